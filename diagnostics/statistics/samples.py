"""Samples of weights before a step, and how far the step has moved them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.statistics import UPDATE_SAMPLE, parameter_norms, projection, row_norms, sample
from diagnostics.statistics.stacks import Layout, Stacks


class Samples:
    """Copies of a sample of each of some weights; of a small one that is all of it.

    Args:
        tensors: The weights.
        layout: Which are stacked, where that is known already.

    Example:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> before = Samples([weight])
        >>> before.norms(), before.moved([weight.add_(1.0)])
        (tensor([5.]), tensor([1.4142]))
    """

    def __init__(self, tensors: Sequence[Tensor], layout: Layout | None = None) -> None:
        self._stacks = Stacks(tensors, layout)
        self._rows = self._stacks.rows
        self._apart = [sample(tensor, UPDATE_SAMPLE).clone() for tensor in self._stacks.rest]

    def norms(self) -> Tensor:
        """The 2-norm of each sample."""
        return self._norms(self._rows, self._apart)

    def projections(self) -> list[Tensor]:
        """The sum of each sample over the root of its number, 0-dim: see :func:`diagnostics.statistics.projection`."""
        sums = [rows.sum(1, dtype=torch.float32) / math.sqrt(rows.shape[1]) for rows in self._rows]
        return list(self._assembled(sums, [projection(one) for one in self._apart]).unbind())

    @torch.no_grad()
    def moved(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of the difference to what the weights, in the same order, are by now."""
        stacks = zip(self._stacks.places, self._rows, strict=True)
        rows = [torch.stack([tensors[i] for i in places]).reshape(old.shape) - old for places, old in stacks]
        apart = zip(self._stacks.apart, self._apart, strict=True)
        return self._norms(rows, [sample(tensors[place], UPDATE_SAMPLE) - old for place, old in apart])

    def _norms(self, rows: Sequence[Tensor], apart: Sequence[Tensor]) -> Tensor:
        return self._assembled([*map(row_norms, rows)], [*parameter_norms(apart).unbind()])

    def _assembled(self, of_rows: Sequence[Tensor], of_rest: Sequence[Tensor]) -> Tensor:
        rest = [torch.stack([*of_rest])] if of_rest else []
        return self._stacks.assemble([*of_rows, *rest]) if of_rows or rest else torch.zeros(0)
