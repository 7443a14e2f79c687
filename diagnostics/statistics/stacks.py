"""Many small tensors measured by few kernels: those of one size are copied side by side and reduced row by row.

A kernel on 256 numbers costs its launch. A reduction over the rows of a stack gives bit for bit what one reduction per
tensor gives on a CPU; other devices have kernels for lists of tensors, which need no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

STACKED = 2048
"""A larger tensor is worth a kernel of its own."""
LEAST = 4
"""So many of one size make a stack."""


class Layout:
    """Which tensors are stacked.

    Args:
        sizes: Their numbers of elements.
        kinds: What those of a stack have in common, as their shape; the size where that says the same.

    Attributes:
        stacks: Places of those that are stacked together.
        rest: Places of the others.
        whole: Whether one stack holds all of them.

    Example:
        >>> layout = Layout([6, 6, 6, 6, 4096])
        >>> layout.stacks, layout.rest
        ([[0, 1, 2, 3]], [4])
    """

    def __init__(self, sizes: Sequence[int], kinds: Sequence[Hashable] | None = None) -> None:
        places: dict[Hashable, list[int]] = {}
        own = sizes if kinds is None else kinds
        if own and own.count(own[0]) == len(own):
            places[own[0]] = list(range(len(own)))
        else:
            for place, kind in enumerate(own):
                places.setdefault(kind, []).append(place)
        self.stacks = [one for one in places.values() if 0 < sizes[one[0]] <= STACKED and len(one) >= LEAST]
        self.whole = [len(one) for one in self.stacks] == [len(sizes)]
        self.rest = [] if self.whole else sorted(set(range(len(sizes))).difference(*self.stacks))

    @cached_property
    def order(self) -> Tensor | None:
        """Where each tensor's result is among those of the stacks, one after the other, and of the rest behind them."""
        return None if self.whole else order_of([*chain.from_iterable(self.stacks), *self.rest])


class Stacks:
    """Some tensors, the small ones among them as rows of few. They are stacked when that is first asked for.

    Args:
        tensors: Of any shape, dtype and device.
        layout: Theirs, where it is known already.

    Attributes:
        tensors: The tensors.

    Example:
        >>> stacks = Stacks([torch.ones(2), torch.zeros(2), torch.ones(2), torch.ones(2), torch.ones(3)])
        >>> stacks.reduce(lambda rows: rows.sum(1), lambda rest: torch.stack([one.sum() for one in rest]))
        tensor([2., 0., 2., 2., 3.])
    """

    def __init__(self, tensors: Sequence[Tensor], layout: Layout | None = None) -> None:
        self.tensors = tensors
        self._layout = layout

    @property
    def rows(self) -> list[Tensor]:
        """The stacks, shape ``[tensors, elements]``: of plain tensors, contiguous in memory."""
        return self._stacked[0]

    @property
    def places(self) -> list[list[int]]:
        """The places of the tensors in each stack."""
        return self._stacked[1]

    @property
    def rest(self) -> list[Tensor]:
        """The tensors that are in no stack."""
        return [self.tensors[place] for place in self.apart]

    @property
    def apart(self) -> list[int]:
        """Their places."""
        return self._stacked[2]

    @cached_property
    def _stacked(self) -> tuple[list[Tensor], list[list[int]], list[int], Tensor | None]:
        layout = self._layout
        if layout is not None:
            return self._stack(layout)
        sizes = list(map(Tensor.numel, self.tensors))  # a shape takes six times as long to ask for
        layout = Layout(sizes)
        found = self._stack(layout)
        if len(found[0]) == len(layout.stacks):
            return found
        return self._stack(Layout(sizes, [tensor.shape for tensor in self.tensors]))

    def _stack(self, layout: Layout) -> tuple[list[Tensor], list[list[int]], list[int], Tensor | None]:
        stacks = (
            _rows(self.tensors if layout.whole else [self.tensors[i] for i in places]) for places in layout.stacks
        )
        found = [(rows, places) for rows, places in zip(stacks, layout.stacks, strict=True) if rows is not None]
        rows, places = [one for one, _ in found], [one for _, one in found]
        if len(found) == len(layout.stacks):
            return rows, places, layout.rest, layout.order
        apart = sorted(set(range(len(self.tensors))).difference(*places))
        return rows, places, apart, order_of([*chain.from_iterable(places), *apart])

    def reduce(
        self, of_rows: Callable[[Tensor], Tensor], of_rest: Callable[[Sequence[Tensor]], Tensor], dim: int = 0
    ) -> Tensor:
        """One number for every tensor, in order.

        Args:
            of_rows: Makes the numbers of a stack.
            of_rest: Makes those of other tensors.
            dim: The dimension of both results that counts tensors.
        """
        rows, _, apart, _ = self._stacked
        return self.assemble([*map(of_rows, rows), *([of_rest(self.rest)] if apart or not rows else [])], dim)

    def assemble(self, found: Sequence[Tensor], dim: int = 0) -> Tensor:
        """What was found about each stack, and about the rest behind them, as one tensor in order."""
        together = torch.cat([*found], dim) if len(found) > 1 else found[0]
        return reordered(together, self._stacked[3], dim)


def order_of(places: Sequence[int]) -> Tensor | None:
    """Where to find what stands at each place, of 0, 1, 2 and so on; None where everything stands at its own.

    Example:
        >>> order_of([2, 0, 1]), order_of([0, 1])
        (tensor([1, 2, 0]), None)
    """
    if list(places) == list(range(len(places))):
        return None
    order = torch.empty(len(places), dtype=torch.long)
    order[torch.tensor(places)] = torch.arange(len(places))
    return order


def reordered(together: Tensor, order: Tensor | None, dim: int = 0) -> Tensor:
    """What stands together in an order of its own, put in that of the places.

    Example:
        >>> reordered(torch.tensor([1.0, 2.0, 3.0]), order_of([2, 0, 1]))
        tensor([2., 3., 1.])
    """
    return together if order is None else together.index_select(dim, from_host(order, together.device))


def from_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which need not be waited for as it would be without ``non_blocking``.

    Example:
        >>> from_host(torch.ones(1), torch.device("cpu"))
        tensor([1.])
    """
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def _rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape as rows; None where they are not plain, or lie in memory in an order of their own."""
    try:
        if not all(map(Tensor.is_contiguous, tensors)):
            return None
        stack = torch.stack(tensors)  # type: ignore[arg-type] # any sequence
    except (RuntimeError, NotImplementedError):  # sparse ones, several devices or shapes
        return None
    mixed = stack.dtype == torch.float64 and any(tensor.dtype != torch.float64 for tensor in tensors)
    if type(stack) is not Tensor or stack.is_sparse or stack.is_complex() or mixed:
        return None
    return stack.reshape(len(tensors), -1)
