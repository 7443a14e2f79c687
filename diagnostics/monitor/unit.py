"""Optimizers that are stepped as one."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from diagnostics.clipping.state import ClipState, Member, NormWindow
from diagnostics.hooks.passes import BackwardPass
from diagnostics.records import NORM_QUANTILES, ClipRecord, StepRecord

NORM_WINDOW = 1000
"""Over how many steps the quantiles of the norm are taken."""


class Unit:
    """Optimizers that are stepped as one.

    Args:
        name: What its records are called.
        optimizers: In the order in which they step.
        home: The model that all their parameters belong to; None if there is no single one.

    Attributes:
        names: What each optimizer is called where there are several.
        clipping: How they clip.
        step: Number of the step to come.
        passes: Backward passes into its parameters since its last step; a unit that never steps keeps the newest.
    """

    def __init__(self, name: str, optimizers: Sequence[torch.optim.Optimizer], home: int | None = None) -> None:
        self.name = name
        self.optimizers = tuple(optimizers)
        self.home = home
        self.names: Sequence[str] = [name]
        self.clipping = ClipState("none", 2.0)
        self.step = 0
        self.passes: list[BackwardPass] = []
        self._given: list[Tensor] = []
        self._unique: list[Tensor] = []
        self._clipped = self._counted = 0
        self._norms = NormWindow(NORM_WINDOW)

    def parameters(self) -> list[Tensor]:
        """All parameters that it owns, each once; groups that were added later included. The same list if no news."""
        given = list(self._parameters())
        if len(given) != len(self._given) or not all(map(operator.is_, given, self._given)):
            self._given = given
            self._unique = list({id(parameter): parameter for parameter in given}.values())
        return self._unique

    def learning_rates(self) -> list[Tensor | float]:
        """One per parameter group, as the optimizer holds them."""
        return [group["lr"] for one in self.optimizers for group in one.param_groups if "lr" in group]

    def rate_places(self, parameters: Sequence[Tensor]) -> list[int]:
        """For each parameter the place of its group's learning rate; one behind the last where it has none."""
        groups = [group for one in self.optimizers for group in one.param_groups if "lr" in group]
        places = {id(parameter): place for place, group in enumerate(groups) for parameter in group["params"]}
        return [places.get(id(parameter), len(groups)) for parameter in parameters]

    def members(self, parameters: Sequence[Tensor], name: Callable[[Tensor], str]) -> list[Member]:
        """Where parameters belong: their name, their optimizer and its parameter group."""
        found = {}
        for optimizer, called in zip(self.optimizers, self.names, strict=True):
            prefix = f"{called}/" if len(self.optimizers) > 1 else ""
            for place, group in enumerate(optimizer.param_groups):
                found.update({id(one): (called, f"{prefix}{place}") for one in group["params"]})
        return [Member(name(one), *found[id(one)]) for one in parameters]

    def begin(self) -> int:
        """Counts a step; returns its number."""
        self.step += 1
        return self.step - 1

    def count(self, total_norm: float, *, clipped: bool) -> tuple[float, tuple[float, ...]]:
        """Counts what a step did; returns the share of clipped ones so far, and the quantiles of their norm."""
        self._counted += 1
        self._clipped += clipped
        self._norms.add(total_norm)
        quantiles = tuple(self._norms.quantile(q) for q in NORM_QUANTILES) if len(self._norms) else ()
        return self._clipped / self._counted, quantiles

    def skip(self, passes: Sequence[BackwardPass], loss_scale: float) -> StepRecord:
        """Counts a step of which only the GradScaler knew, and what is known of it: its gradients are gone."""
        step = self.begin()
        fraction, quantiles = self.count(math.nan, clipped=False)
        limit = self.clipping.limit(math.nan)
        clip = ClipRecord(
            rule=self.clipping.kind,
            norm_type=self.clipping.norm_type,
            max_norm=None if limit is None else limit.max_norm,
            total_norm=math.nan,
            clip_coef=None,
            applied=False,
            total_norm_after=math.nan,
            threshold=self.clipping.clip_value if limit is None else limit.threshold,
            clip_fraction=fraction,
            norm_quantiles=quantiles,
        )
        rates = tuple(rate for rate in self.learning_rates() if isinstance(rate, float))
        return StepRecord(
            step=step,
            clip=clip,
            optimizer=self.name,
            lr=rates,
            backward_passes=len(passes),
            loss_scale=loss_scale,
            skipped=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on later has to know, in plain containers."""
        rule = {"rule": self.clipping.kind, "clipping": self.clipping.state_dict()}
        return {"step": self.step, "clipped": self._clipped, **rule, **self._norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was."""
        self.step = self._counted = int(state["step"])
        self._clipped = int(state["clipped"])
        self._norms.load_state_dict(state)
        self.clipping.load_state_dict(state["clipping"])

    def _parameters(self) -> Iterator[Tensor]:
        groups = (group["params"] for optimizer in self.optimizers for group in optimizer.param_groups)
        return chain.from_iterable(groups)
