"""Samples of gradients, and of weights before a step with how far the step has moved them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from diagnostics.statistics import accumulation_dtype, beside, dense, detached, largest, pack, row_norms
from diagnostics.statistics.stacks import Stacks, from_host, order_of, reordered

LARGEST_SAMPLE = 4096
SMALLEST_SAMPLE = 1024
RUN = 16
"""So many numbers of fp32 are a line of the cache."""
_CANDIDATES = 4
"""With the nearest prime one sample in ten sees some columns twenty times too rarely, with the best of four none."""


def sample(tensor: Tensor) -> Tensor:
    """A fixed, evenly spread part of a tensor: all of a small one, else runs of neighbours.

    Where every seventeenth element is looked at one by one, all of the memory is read; runs as long as a line of the
    cache read a part of it. How far they lie apart is chosen so that they fall on all columns alike: a layer with dead
    columns would else be judged by all of them or by none.

    Returns:
        All of at most ``LARGEST_SAMPLE`` elements, one-dimensional. Of more about a 64th, but no fewer than
        ``SMALLEST_SAMPLE`` and no more than ``LARGEST_SAMPLE``, in shape ``[runs, RUN]``. A view where the tensor is
        contiguous.

    Example:
        >>> sample(torch.zeros(3, 2)).shape, sample(torch.zeros(100, 100)).shape
        (torch.Size([6]), torch.Size([64, 16]))
    """
    values = detached(dense(tensor))
    flat = values.reshape(-1)
    return flat if flat.numel() <= LARGEST_SAMPLE else flat.unfold(0, RUN, _distance(values.shape))


def sample_size(shape: torch.Size) -> int:
    """How many elements :func:`sample` takes of a dense tensor of a shape.

    Example:
        >>> sample_size(torch.Size([6])), sample_size(torch.Size([100, 100]))
        (6, 1024)
    """
    numel = shape.numel()
    return numel if numel <= LARGEST_SAMPLE else ((numel - RUN) // _distance(shape) + 1) * RUN


@lru_cache(maxsize=4096)
def _distance(shape: torch.Size) -> int:
    """How far the runs of a sample lie apart: that of a few primes with which they are spread best over the columns."""
    numel = shape.numel()
    columns = shape[-1] if shape[-1] > RUN else numel // shape[0]
    steps = [stride(numel, min(max(SMALLEST_SAMPLE, numel // 64), LARGEST_SAMPLE) // RUN)]
    while len(steps) < _CANDIDATES:
        steps.append(_next_prime(steps[-1] + 1, numel))
    return min(steps, key=lambda step: _largest_gap(numel, step, columns))


def _largest_gap(numel: int, step: int, columns: int) -> int:
    """How many columns, at most, lie between two neighbours of those where runs begin; at least a run's."""
    starts = sorted(place % columns for place in range(0, numel - RUN + 1, step))
    gaps = (later - earlier for earlier, later in zip(starts, [*starts[1:], starts[0] + columns], strict=True))
    return max(RUN, *gaps)


@torch.no_grad()
def sample_sizes(tensors: Sequence[Tensor]) -> Tensor:
    """The 1-norm of a sample of each of a few tensors: without squares, so that none is too small for it.

    At the end of every backward pass, so in as few steps as can be: ``parameter_norms`` takes twice as long for two.

    Example:
        >>> sample_sizes([torch.tensor([1e-30, -1e-30]), torch.ones(4)])
        tensor([2.0000e-30, 4.0000e+00])
    """
    sizes = [
        torch.linalg.vector_norm(sample(tensor), 1.0, dtype=accumulation_dtype(tensor.dtype)) for tensor in tensors
    ]
    one_kind = len({(size.device, size.dtype) for size in sizes}) == 1
    return torch.stack(sizes) if one_kind else pack(sizes)


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


@lru_cache(maxsize=4096)
def stride(numel: int, limit: int) -> int:
    """By how many elements those of a sample lie apart, of more than so many."""
    return _next_prime(max(2, math.ceil(numel / limit)), numel)


def _next_prime(step: int, numel: int) -> int:
    """The first prime from a number on that does not divide another."""
    while numel % step == 0 or not _is_prime(step):
        step += 1
    return step


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
