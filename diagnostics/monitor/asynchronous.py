"""Steps that never wait for the device: what they did is written down when the numbers have come, a step later.

The norm and the coefficient stay on the device, so gradients are always multiplied, by 1 where nothing is to be
clipped. Everything that a step wants to know leaves by one copy behind the step's own work.

A CUDA graph that was captured around a step replays kernels and runs none of this: take the forward and the backward
pass into the graph, and leave ``clip_and_step`` outside.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from diagnostics.clipping.groups import GroupState
from diagnostics.monitor import amp, fused
from diagnostics.monitor.observation import Seen
from diagnostics.monitor.options import Options
from diagnostics.monitor.schedule import Units
from diagnostics.monitor.steps import Asked, Steps
from diagnostics.monitor.unit import Unit
from diagnostics.records import StepRecord
from diagnostics.statistics.reading import Parcel, Reading

LONGEST_QUEUE = 8
"""So many steps the host may be ahead before it waits for the oldest: memory for more is not worth anything."""


class Pending(NamedTuple):
    """A step whose numbers are on their way, and what writes it down."""

    parcel: Parcel
    finish: Callable[[], StepRecord]


def refuse_what_waits(options: Options, units: Units) -> None:
    """What ``asynchronous=True`` cannot do, in one sentence.

    Raises:
        ValueError: If the options ask for it.
    """
    for name in ("nonfinite", "on_violation", "on_diagnosis"):
        if getattr(options, name) == "raise":
            raise ValueError(
                f"{name} must not be 'raise' with asynchronous=True, which learns of a step when it is over; got "
                f"'raise': use {'skip or step' if name == 'nonfinite' else 'warn or record'}."
            )
    for unit in units.all:
        if isinstance(unit.clipping, GroupState) or unit.clipping.kind not in ("none", "norm"):
            raise ValueError(
                "clip must be a ClipByNorm or None with asynchronous=True, which knows a threshold before the norm; "
                f"got a rule of the kind {unit.clipping.kind!r}."
            )
    if options.nonfinite == "skip" and not all(map(fused.skips, units.together.optimizers)):
        raise ValueError(
            "nonfinite='skip' needs fused optimizers with asynchronous=True (AdamW(fused=True); SGD without momentum), "
            "which can be told on the device; got another: use nonfinite='step'."
        )


class Asynchronous(Steps):
    """The part of a Monitor that is at work with ``asynchronous=True``."""

    _pending: deque[Pending]
    _newest: StepRecord | None = None
    _begun: Asked | None = None

    def state_dict(self) -> dict[str, Any]:  # noqa: D102 -- as the base class, once all steps are written down
        self._finish_pending(wait=True)
        return super().state_dict()

    def _step_without_waiting(
        self, unit: Unit, closure: Any, numbers: Sequence[Reading], metrics: Sequence[str], *, update: bool
    ) -> StepRecord:
        if closure is not None:
            raise ValueError("closure must be None with asynchronous=True, which does not wait for it; got a closure.")
        self._finish_pending()
        if self._scaler is not None:
            amp.unscale(self._scaler, unit.optimizers)
        asked = self._ask(unit, again=False)
        observation, scaler = asked.observation, self._scaler
        fold = self._options.fold and scaler is None and fused.can_divide(observation, unit.optimizers)
        factor, overflow = observation.clipping.clip_unread(write=not fold)
        skipping = self._options.nonfinite == "skip" or scaler is not None
        own = skipping and scaler is None  # a scaler tells its optimizers itself
        self._step_all(unit, 1 / factor if fold and factor is not None else None, overflow if own else None)
        if update and scaler is not None:
            scaler.update()
        self._send(unit, asked, numbers, metrics, skipping=skipping)
        newest: Any = self._newest  # None in this mode only, and only at the beginning
        return newest  # type: ignore[no-any-return]

    def _begin_without_waiting(self, unit: Unit) -> None:
        """A step of the loop's own begins."""
        self._finish_pending()
        self._begun = self._ask(unit, again=False)

    def _end_without_waiting(self, unit: Unit) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            self._send(unit, begun, skipping=None)

    def _send(
        self,
        unit: Unit,
        asked: Asked,
        numbers: Sequence[Reading] = (),
        metrics: Sequence[str] = (),
        *,
        skipping: bool | None,
    ) -> None:
        """After the step: everything that was asked for leaves together, and the next step may come."""
        observation = asked.observation
        observation.moved()
        conclude = self._after_step(unit, observation, numbers=numbers, metrics=metrics)
        self._watcher.spend(observation.indices, observation.parameters, observation.gradients)
        observation.release()
        self._watcher.recording = self._due()

        def finish() -> StepRecord:
            asked.told()
            clip = observation.clipping.clip(write=skipping is not None)
            skipped = observation.skipped if skipping is None else skipping and not math.isfinite(clip.total_norm)
            return conclude(Seen(observation, clip), skipped)

        self._pending.append(Pending(self._reader.depart(), finish))

    def _finish_pending(self, *, wait: bool = False) -> None:
        """Writes down the steps whose numbers have come. Ranks that reduce together do so at the same step."""
        together = self._replicas.active
        while self._pending:
            pending = self._pending[0]
            if not (wait or together or len(self._pending) > LONGEST_QUEUE or pending.parcel.arrived):
                return
            self._pending.popleft()
            pending.parcel.read()
            self._newest = pending.finish()
            self._learn()
            self._say(self._newest)
