"""Which optimizers step together, how often they have, and which steps are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diagnostics.clipping.groups import ClipByGroup
from diagnostics.clipping.rules import ClipRule, Measure
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor.amp import SkippedStep
from diagnostics.monitor.catalogue import Catalogue
from diagnostics.monitor.options import Clip
from diagnostics.monitor.unit import Unit
from diagnostics.records import SOLE_OPTIMIZER

FIRST_RECORDED = 50
DENSE_AFTER_ALARM = 20
_PENDING_PASSES = 256


class LostStep(NamedTuple):
    """A step that a GradScaler left out: of whom, the passes that it would have spent, and the scale at fault."""

    unit: Unit
    passes: list[BackwardPass]
    scale: Tensor


class Units:
    """All units of a Monitor: every optimizer by itself, and all together.

    Args:
        optimizers: The optimizers.
        catalogue: Knows which model a parameter belongs to.
        clip: A rule for all, each unit with a history of its own; or one per optimizer, by itself or its unit's name.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], catalogue: Catalogue, clip: Clip = None) -> None:
        self.together = Unit(SOLE_OPTIMIZER, optimizers)
        self.all = [self.together]
        self._catalogue = catalogue
        for place, optimizer in enumerate(optimizers if len(optimizers) > 1 else ()):
            home = catalogue.home(Unit("", [optimizer]).parameters())
            shared = home is not None and any(unit.home == home for unit in self.all)
            named = home is not None and not shared and catalogue.models[home]
            name = named or f"{type(optimizer).__name__.lower()}_{place}"
            self.all.append(Unit(name, [optimizer], home))
        self.together.names = [unit.name for unit in self.all[1:]] or [SOLE_OPTIMIZER]
        rules = clip if isinstance(clip, Mapping) else {unit.name: clip for unit in self.all}
        self._start_clipping(rules, several=isinstance(clip, Mapping) and len(self.all) > 1)

    def _start_clipping(self, given: Mapping[Any, ClipRule | None], *, several: bool) -> None:
        names = {unit.optimizers[0]: unit.name for unit in self.all if len(unit.optimizers) == 1}
        rules = {names.get(key, key): rule for key, rule in given.items()}
        if unknown := [key for key in rules if key not in {SOLE_OPTIMIZER, *names.values()}]:
            raise ValueError(
                f"clip must name optimizers that the Monitor was given, or give them: {', '.join(names.values())}; "
                f"got {unknown[0]!r}."
            )
        if several:
            rules[SOLE_OPTIMIZER] = ClipByGroup(None, by="optimizer", rules=rules)
        for unit in self.all:
            unit.clipping = (rules.get(unit.name) or Measure()).start()

    @property
    def active(self) -> list[Unit]:
        """The units that have stepped; all together as long as none has."""
        return [unit for unit in self.all if unit.step] or [self.together]

    def collect(self, events: Sequence[Any]) -> list[LostStep]:
        """Gives each unit the backward passes into its parameters; returns the steps that a GradScaler left out."""
        passes: list[BackwardPass] = []
        lost = []
        for event in events:
            if isinstance(event, BackwardPass):
                passes.append(event)
            elif isinstance(event, SkippedStep):
                self._collect(passes)
                passes = []
                unit = self.of(self.together.optimizers[event.place])
                lost.append(LostStep(unit, self.take(unit), event.scale))
        self._collect(passes)
        return lost

    def _collect(self, passes: Sequence[BackwardPass]) -> None:
        """Likewise, less those whose gradients were cleared unspent."""
        for unit in self.all if passes else ():
            own = self._own(unit)
            for one in passes:
                if one.cleared:
                    unit.passes = [old for old in unit.passes if not own(old) <= one.cleared]
                if own(one):
                    unit.passes = [*unit.passes, one][-_PENDING_PASSES:]

    def take(self, unit: Unit) -> list[BackwardPass]:
        """The passes that a step of this unit spends; no other step of the same optimizers will."""
        passes = unit.passes
        for other in self.all:
            if not set(other.optimizers).isdisjoint(unit.optimizers):
                other.passes = []
        return passes

    def _own(self, unit: Unit) -> Callable[[BackwardPass], AbstractSet[int]]:
        """What a pass has added to the unit's own parameters."""
        if len(self.all) == 1:
            return lambda one: one.accumulated
        own = {self._catalogue.index(parameter) for parameter in unit.parameters()}
        return lambda one: one.accumulated & own

    def of(self, optimizer: torch.optim.Optimizer | None) -> Unit:
        """The unit of one optimizer, or of all for None.

        Raises:
            ValueError: If the Monitor does not know the optimizer.
        """
        if optimizer is None:
            return self.together
        for unit in reversed(self.all):
            if len(unit.optimizers) == 1 and unit.optimizers[0] is optimizer:
                return unit
        raise ValueError(
            f"optimizer must be one that the Monitor was given; got another {type(optimizer).__name__}: "
            "pass it to Monitor(model, [...]) as well."
        )


class Schedule:
    """Which steps are recorded: the first 50, every ``every``-th, and twenty after an alarm.

    Args:
        every: 0 records none, 1 all.

    Attributes:
        dense_until: The step at which the last alarm is over.

    Example:
        >>> schedule = Schedule(10)
        >>> [step for step in range(45, 75) if schedule.due(step)]
        [45, 46, 47, 48, 49, 50, 60, 70]
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.dense_until = 0

    def due(self, step: int) -> bool:
        """Whether to record a step."""
        if self.every == 0:
            return False
        return step < max(FIRST_RECORDED, self.dense_until) or step % self.every == 0

    def alarm(self, step: int) -> None:
        """Records the steps after this one."""
        self.dense_until = step + 1 + DENSE_AFTER_ALARM
