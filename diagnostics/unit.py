"""Optimizers that are stepped as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diagnostics.hooks import BackwardPass


class Unit:
    """Optimizers that are stepped as one.

    Args:
        name: What its records are called.
        optimizers: In the order in which they step.
        home: The model that all their parameters belong to; None if there is no single one.

    Attributes:
        step: Number of the step to come.
        passes: Backward passes into its parameters since its last step; a unit that never steps keeps the newest.
    """

    def __init__(self, name: str, optimizers: Sequence[torch.optim.Optimizer], home: int | None = None) -> None:
        self.name = name
        self.optimizers = tuple(optimizers)
        self.home = home
        self.step = 0
        self.passes: list[BackwardPass] = []
        self._clipped = 0

    def parameters(self) -> list[Tensor]:
        """All parameters that it owns, each once; groups that were added later included."""
        return list({id(parameter): parameter for parameter in self._parameters()}.values())

    def learning_rates(self) -> list[Tensor | float]:
        """One per parameter group, as the optimizer holds them."""
        return [group["lr"] for one in self.optimizers for group in one.param_groups if "lr" in group]

    def rate_places(self, parameters: Sequence[Tensor]) -> list[int]:
        """For each parameter the place of its group's learning rate; one behind the last where it has none."""
        groups = [group for one in self.optimizers for group in one.param_groups if "lr" in group]
        places = {id(parameter): place for place, group in enumerate(groups) for parameter in group["params"]}
        return [places.get(id(parameter), len(groups)) for parameter in parameters]

    def count(self, *, clipped: bool) -> float:
        """Counts a step; returns the share of the steps so far that were clipped."""
        self.step += 1
        self._clipped += clipped
        return self._clipped / self.step

    def _parameters(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]
