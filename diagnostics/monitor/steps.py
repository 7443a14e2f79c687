"""What a step is made of: asked of the device before it, written down after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diagnostics import diagnosis
from diagnostics.depth.forward import Role
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor import amp, fused
from diagnostics.monitor.catalogue import Catalogue
from diagnostics.monitor.facts import Facts
from diagnostics.monitor.guarding import Guarded
from diagnostics.monitor.ledger import is_alarm
from diagnostics.monitor.observation import Observation, Seen
from diagnostics.monitor.options import Options
from diagnostics.monitor.resuming import Resumable
from diagnostics.monitor.schedule import LostStep
from diagnostics.monitor.unit import Unit
from diagnostics.records import ClipRecord, StepRecord
from diagnostics.statistics.reading import Reader, Reading


class Asked(NamedTuple):
    """A step whose numbers were asked for.

    Attributes:
        observation: Its measurements.
        told: To be called when they have come: takes note of what went before.
    """

    observation: Observation
    told: Callable[[], None]


class Steps(Guarded, Resumable):
    """The part of a Monitor that measures a step and writes it down."""

    _options: Options
    _catalogue: Catalogue
    _reader: Reader
    _facts: Facts
    _scaler: torch.amp.GradScaler | None
    _own_clip: ClipRecord | None
    _zeros: AbstractSet[int]
    _in_range: list[dict[Role, bool]]

    def _observe(self, unit: Unit, *, recorded: bool | None = None) -> Observation:
        """Asks for everything that the step needs, reads it by one copy, and notes what went before."""
        asked = self._ask(unit, recorded=recorded)
        asked.told()
        return asked.observation

    def _ask(self, unit: Unit, *, recorded: bool | None = None, again: bool = True) -> Asked:
        """Asks for everything that the step needs.

        Args:
            unit: Whose step.
            recorded: Whether to record it; None as the schedule says.
            again: Whether there may be a second look at gradients that fp32 has not held.
        """
        self._learn()
        events = self._watcher.drain()
        self._watcher.adopt(self._catalogue.adopt(unit.parameters()))
        passes = [event for event in events if isinstance(event, BackwardPass)]
        facts = self._facts.ask(events)
        lost = self._collect_lost(events)
        if passes and events[-1] is passes[-1]:
            self._own_clip = None  # more came in after it, so it does not tell what the step spends
        observation = Observation(
            self._catalogue,
            self._reader,
            unit,
            self._units.take(unit),
            recorded=self._watcher.recording if recorded is None else recorded,
            loss_scale=None if self._scaler is None else amp.loss_scale(self._scaler),
            zeros=self._zeros,
        )
        step = unit.step
        self._replicas.ask(observation, step, self._units.all.index(unit))

        def told() -> None:
            observation.settle(again=again)
            self._replicas.settle(observation, step)
            self._zeros = observation.zeros
            for fact in facts():
                self._ledger.note(fact)
            self._enter_lost(lost)

        return Asked(observation, told)

    def _learn(self) -> None:
        """Tells the hooks which norms fp32 has held: one step late, which is when a mode that never waits knows it."""
        for found in self._in_range:
            self._watcher.in_range.difference_update(found)
            self._watcher.in_range.update(role for role, known in found.items() if known)
        self._in_range.clear()

    def _collect_lost(self, events: Sequence[Any]) -> list[tuple[LostStep, Reading]]:
        return [(one, self._reader.ask(one.scale)) for one in self._units.collect(events)]

    def _enter_lost(self, lost: Sequence[tuple[LostStep, Reading]]) -> None:
        for one, scale in lost:
            self._say(self._ledger.enter(one.unit.skip(one.passes, scale.values[0]), None))

    def _step_all(self, unit: Unit, divisor: Tensor | None = None, overflow: Tensor | None = None) -> None:
        with self._stepping():
            for optimizer in unit.optimizers:
                with fused.handed(optimizer, divisor, overflow):
                    if self._scaler is None:
                        optimizer.step()
                    else:
                        self._scaler.step(optimizer)

    def _conclude(
        self,
        unit: Unit,
        seen: Seen,
        *,
        skipped: bool,
        closure: bool = False,
        numbers: Sequence[Reading] = (),
        metrics: Sequence[str] = (),
    ) -> StepRecord:
        """After the step: asks what it did to the weights, makes the record, and sees to the next step."""
        observation = seen.observation
        if not seen.late:
            observation.moved()
        record = self._after_step(unit, observation, closure=closure, numbers=numbers, metrics=metrics)(seen, skipped)
        if not skipped:
            self._watcher.spend(observation.indices, observation.parameters, observation.gradients)
        self._watcher.recording = self._due()
        return record

    def _after_step(
        self,
        unit: Unit,
        observation: Observation,
        *,
        closure: bool = False,
        numbers: Sequence[Reading] = (),
        metrics: Sequence[str] = (),
    ) -> Callable[[Seen, bool], StepRecord]:
        """Gathers what is known when a step is over; returns what makes the record, once the numbers have come."""
        table = self._catalogue.layers(self._watcher, unit.home)
        fact = self._facts.step(observation, unit, closure=closure)
        step = unit.begin()

        def conclude(seen: Seen, skipped: bool) -> StepRecord:
            layers = observation.layers(table, seen.clip_factor)
            clipped, quantiles = unit.count(seen.clip.total_norm, clipped=seen.clip.applied)
            shares = observation.shares(table)
            record = StepRecord(
                step=step,
                clip=replace(seen.clip, shares=shares, clip_fraction=clipped, norm_quantiles=quantiles),
                optimizer=unit.name,
                loss=numbers[0].values[0] if numbers and numbers[0].values else None,
                lr=observation.learning_rates,
                backward_passes=len(observation.passes),
                loss_scale=observation.loss_scale,
                layers=layers,
                skipped=skipped,
                metrics={name: reading.values[0] for name, reading in zip(metrics, numbers[1:], strict=True)},
                fit=diagnosis.fit_depth(layers) if observation.recorded else None,
                recorded=observation.recorded,
            )
            record = self._ledger.enter(record, fact(record))
            self._in_range.append(observation.in_range())
            if not skipped:
                observation.clipping.enter(seen.clip.total_norm)
            if record.recorded and not (skipped or closure):
                self._facts.moved(observation, record)
            if any(violation.count == 1 for violation in record.violations) or any(map(is_alarm, record.diagnoses)):
                self._replicas.alarm(record.step)
            return record

        return conclude
