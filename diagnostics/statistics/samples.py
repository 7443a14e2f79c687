"""Samples of weights before a step, and how far the step has moved them; samples of gradients, for their peaks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor

from diagnostics.statistics import largest, pack, row_norms, spread
from diagnostics.statistics.stacks import Stacks, order_of, reordered


class Samples:
    """A sample of each of some tensors, those of one size side by side; of a small tensor that is all of it.

    Args:
        stacks: The tensors; of sparse ones nothing is looked at.

    Example:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> before = Samples(Stacks([weight]))
        >>> before.norms(), before.moved([weight.add_(1.0)]), Samples(Stacks([weight])).peaks()
        (tensor([5.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """

    @torch.no_grad()
    def __init__(self, stacks: Stacks) -> None:
        parts = {place: _part(stacks.tensors[place]) for place in stacks.apart}
        alike: dict[Hashable, list[int]] = {}
        for place, part in parts.items():
            alike.setdefault((part.device, part.dtype, part.shape), []).append(place)
        self._apart = [*alike.values()]
        self._places = [*stacks.places, *self._apart]
        self._order = order_of([*chain.from_iterable(self._places)])
        self._rows = [*stacks.rows, *(_side_by_side([parts[place] for place in places]) for places in self._apart)]

    def norms(self) -> Tensor:
        """The 2-norm of each sample."""
        return self._in_order([row_norms(rows) for rows in self._rows])

    def projections(self) -> Tensor:
        """The sum of each sample over the root of its number, which is at most its 2-norm.

        Equal norms do not make equal tensors (orthogonal matrices all have the same); this tells them apart.
        """
        values = [torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows for rows in self._rows]
        kinds = [torch.float64 if rows.dtype == torch.float64 else torch.float32 for rows in values]
        sums = [rows.sum(1, dtype=kind) for rows, kind in zip(values, kinds, strict=True)]
        return self._in_order(
            [one / math.sqrt(max(1, rows[0].numel())) for one, rows in zip(sums, self._rows, strict=True)]
        )

    def peaks(self) -> Tensor:
        """The largest magnitude in each sample; 0 for an empty one."""
        sizes = [largest(rows, 1) if rows.shape[1] else rows.new_zeros(len(rows)) for rows in self._rows]
        return self._in_order(sizes)

    @torch.no_grad()
    def moved(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of the difference to what the tensors, in the same order, are by now."""
        whole = len(self._places) - len(self._apart)
        found = []
        for number, (places, before) in enumerate(zip(self._places, self._rows, strict=True)):
            now = [tensors[place] for place in places]
            found.append(row_norms(_side_by_side(now if number < whole else [*map(_part, now)]) - before))
        return self._in_order(found)

    def _in_order(self, found: Sequence[Tensor]) -> Tensor:
        return reordered(pack(found), self._order)


def _part(tensor: Tensor) -> Tensor:
    return torch.zeros(0) if tensor.is_sparse else spread(tensor)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]).reshape(len(tensors), tensors[0].numel())
