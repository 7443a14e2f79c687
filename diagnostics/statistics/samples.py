"""Samples of gradients, and of weights before a step with how far the step has moved them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor

from diagnostics.statistics import beside, largest, row_norms, sample
from diagnostics.statistics.stacks import Stacks, from_host, order_of, reordered


class Samples:
    """A sample of each of some tensors, those of one size side by side; of a small tensor that is all of it.

    Args:
        stacks: The tensors; of sparse ones the rows that they hold.

    Example:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> before = Samples(Stacks([weight]))
        >>> before.norms(), before.moved([weight.add_(1.0)]), Samples(Stacks([weight])).peaks()
        (tensor([5.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """

    @torch.no_grad()
    def __init__(self, stacks: Stacks) -> None:
        parts = {place: sample(stacks.tensors[place]) for place in stacks.apart}
        alike: dict[Hashable, list[int]] = {}
        for place, part in parts.items():
            alike.setdefault((part.device, part.dtype, part.shape), []).append(place)
        self._sparse = [place for place in stacks.apart if stacks.tensors[place].is_sparse]
        self._apart = [*alike.values()]
        self._places = [*stacks.places, *self._apart]
        self._order = order_of([*chain.from_iterable(self._places)])
        self._rows = [*stacks.rows, *(_side_by_side([parts[place] for place in places]) for places in self._apart)]

    @torch.no_grad()
    def reduce(self, of_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Some numbers for each sample.

        Args:
            of_rows: Makes them of several samples, shape ``[samples, elements]``, the samples in the last dimension.
        """
        return self._in_order([of_rows(rows) for rows in self._rows])

    def norms(self) -> Tensor:
        """The 2-norm of each sample."""
        return self.reduce(row_norms)

    def projections(self) -> Tensor:
        """The sum of each sample over the root of its number, which is at most its 2-norm.

        Equal norms do not make equal tensors (orthogonal matrices all have the same); this tells them apart.
        """

        def of_rows(rows: Tensor) -> Tensor:
            values = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
            kind = torch.float64 if values.dtype == torch.float64 else torch.float32
            return values.sum(1, dtype=kind) / math.sqrt(max(1, rows.shape[1]))

        return self.reduce(of_rows)

    def peaks(self) -> Tensor:
        """The largest magnitude in each sample; 0 for an empty one, and where no value is known to be in its place."""

        def of_rows(rows: Tensor) -> Tensor:
            return largest(rows, 1) if rows.shape[1] else torch.zeros(len(rows), device=rows.device)

        found = self.reduce(of_rows)
        if self._sparse:
            found = found.index_fill(0, from_host(torch.tensor(self._sparse), found.device), 0.0)
        return found

    @torch.no_grad()
    def moved(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of the difference to what the tensors, in the same order, are by now."""
        whole = len(self._places) - len(self._apart)
        found = []
        for number, (places, before) in enumerate(zip(self._places, self._rows, strict=True)):
            now = [tensors[place] for place in places]
            found.append(row_norms(_side_by_side(now if number < whole else [*map(sample, now)]) - before))
        return self._in_order(found)

    def _in_order(self, found: Sequence[Tensor]) -> Tensor:
        return reordered(beside(found), self._order, -1) if found else torch.zeros(0, dtype=torch.float64)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]).reshape(len(tensors), tensors[0].numel())
