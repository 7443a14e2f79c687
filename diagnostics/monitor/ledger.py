"""The host side of a Monitor: records go in, and the contract, the diagnosis, the sinks and the user hear of them.

No tensors. A record whose update ratios are still on their way is handed to the sinks one step late.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from diagnostics import diagnosis
from diagnostics.contract import Contract
from diagnostics.contract.acts import Backward, Clip, Closing, Moved, Step
from diagnostics.diagnosis.remedies import prescribe
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.monitor.options import Options
from diagnostics.records import (
    WARNING,
    ContractError,
    Diagnosis,
    DiagnosisError,
    DiagnosticsWarning,
    RunEnd,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
    condition_in_short,
)
from diagnostics.sinks import Event
from diagnostics.sinks.fanout import Fanout

WINDOW = 1000
"""How many records are kept."""

BLIND = (
    "No output gradient was seen, so depth is not judged; weight gradients are. A compiled model is seen where the "
    "Monitor is created before its first call and the whole forward is one graph (fullgraph=True); others take some "
    "steps under torch.compiler.set_stance('force_eager') to be judged. No hook runs inside a scripted or exported "
    "one. Otherwise the model's layers are not called as modules."
)
"""What is said once when the first recorded step has no output gradients."""

_NOT_THE_USER = ("diagnostics", "torch", "contextlib")


class Ledger:
    """Everything that is known about a run so far.

    Args:
        run: Where it comes from.
        contract: The rules of its loop.
        sinks: Where records go.
        options: What to do with violations and diagnoses.
        thresholds: When a number becomes a diagnosis.

    Attributes:
        records: The newest records, oldest first.
    """

    def __init__(
        self, run: RunInfo, contract: Contract, sinks: Fanout, options: Options, thresholds: Thresholds
    ) -> None:
        self.run = run
        self.records: deque[StepRecord] = deque(maxlen=WINDOW)
        self._contract = contract
        self._sinks = sinks
        self._options = options
        self._thresholds = thresholds
        self._state = diagnosis.State()
        self._found: list[Violation] = []  # broken since the last record
        self._waiting: StepRecord | None = None
        self._told_blind = False
        self._steps = 0
        self._clipped = 0
        self._decades: float | None = None
        self._first_nonfinite: int | None = None
        self._tell(run)

    @property
    def violations(self) -> tuple[Violation, ...]:
        """All violations, oldest first."""
        return self._contract.violations

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """All diagnoses in order of onset, those that cleared and those that stand."""
        return tuple(prescribe(one, self.run) for one in self._state.diagnoses)

    def verdict(self) -> Verdict:
        """The run in one sentence."""
        return diagnosis.verdict(self._state, self.violations, self._thresholds)

    def note(self, fact: Backward | Clip | Moved) -> None:
        """Takes what the loop did between two steps, and what is only now known of an earlier one."""
        if isinstance(fact, Backward):
            self._contract.backward(fact)
        elif isinstance(fact, Clip):
            self._found += self._contract.clip(fact)
        else:
            self._found += self._contract.moved(fact)

    def enter(self, record: StepRecord, fact: Step | None) -> StepRecord:
        """Takes a step; returns its record with violations and diagnoses. Without a fact the rules do not see it."""
        found, self._found = [*self._found, *(self._contract.step(fact) if fact else ())], []
        if found:
            record = replace(record, violations=tuple(found))
        self._state, changed = diagnosis.advance(self._state, record, self._thresholds)
        if changed:
            record = replace(record, diagnoses=tuple(prescribe(one, self.run) for one in changed))
        self._count(record)
        self.records.append(replace(record, layers=record.layers.unread()))
        self._hand_on()
        if record.recorded:
            self._waiting = record
        else:
            self._tell(record)
        return record

    def announce(self, record: StepRecord, *, listening: bool = True) -> None:
        """Tells the user what is new at a step, by a warning or an error as he asked for.

        Args:
            record: The step.
            listening: Whether the hooks are at work; if not, the reason was told.
        """
        if listening and record.recorded and record.backward_passes and not self._told_blind:
            columns = record.layers.columns(before_step=True)
            weights = zip(record.layers.layers, record.layers.values("weight.norm"), strict=True)
            self._told_blind = any(layer.trunk and norm is not None for layer, norm in weights)
            if self._told_blind and "output.norm" not in columns:
                self.warn(BLIND)
        self._announce_violations(record.violations)
        serious = [one for one in record.diagnoses if is_alarm(one)]
        if serious and self._options.on_diagnosis == "raise":
            raise DiagnosisError(_with_remedies(serious[0]))
        if self._options.on_diagnosis == "warn":
            for one in serious:
                self.warn(_with_remedies(one))

    def warn(self, text: str) -> None:
        """Warns at the user's line."""
        warnings.warn(text, DiagnosticsWarning, stacklevel=_frames_to_the_user())

    def close(self, status: str, error: str | None, fact: Closing | None = None) -> None:
        """Hands on what is left and says how the run ended."""
        late = (*self._found, *self._contract.close(fact or Closing(finished=status == "finished")))
        self._hand_on()
        for violation in late:
            self._tell(violation)
        ended = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
        self._tell(RunEnd(status, ended, self._steps, self.verdict(), self._summary(), error))
        for failure in self._sinks.close():
            self.warn(failure)
        if status in ("finished", "stopped"):
            self._announce_violations(late)

    def state_dict(self) -> dict[str, Any]:
        """What the summary at the end counts, in plain containers."""
        return {"steps": self._steps, "clipped": self._clipped, "first_nonfinite": self._first_nonfinite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts on from where another one was."""
        self._steps, self._clipped = int(state["steps"]), int(state["clipped"])
        self._first_nonfinite = state["first_nonfinite"]

    def _announce_violations(self, violations: tuple[Violation, ...]) -> None:
        new = [violation for violation in violations if violation.count == 1]
        if new and self._options.on_violation == "raise":
            raise ContractError(str(new[0]))
        if self._options.on_violation == "warn":
            for violation in new:
                self.warn(str(violation))

    def _hand_on(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._tell(waiting)

    def _tell(self, event: Event) -> None:
        for failure in self._sinks.write(event):
            self.warn(failure)

    def _count(self, record: StepRecord) -> None:
        self._steps += 1
        self._clipped += record.clip.applied
        if record.fit is not None:
            self._decades = record.fit.decades
        broken = record.nonfinite > 0 or not math.isfinite(record.clip.total_norm)
        if broken and self._first_nonfinite is None:
            self._first_nonfinite = record.step

    def _summary(self) -> dict[str, str | float]:
        verdict, violations = self.verdict(), self.violations
        values: dict[str, str | float | None] = {
            "verdict": condition_in_short(verdict.condition, unlawful=bool(violations)),
            "severity": verdict.severity,
            "decades": self._decades,
            "violations": sum(violation.count for violation in violations),
            "clip_fraction": self._clipped / self._steps if self._steps else None,
            "first_nonfinite_step": self._first_nonfinite,
            "first_violation_step": min((violation.step for violation in violations), default=None),
        }
        return {key: value for key, value in values.items() if value is not None}


class LedgerView:
    """What anybody may see of a ledger."""

    _ledger: Ledger

    @property
    def run(self) -> RunInfo:
        """Where the run comes from."""
        return self._ledger.run

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The newest thousand records, oldest first."""
        return tuple(self._ledger.records)

    @property
    def violations(self) -> tuple[Violation, ...]:
        """All violations, oldest first."""
        return self._ledger.violations

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """All diagnoses in order of onset, those that cleared and those that stand."""
        return self._ledger.diagnoses

    def verdict(self) -> Verdict:
        """The run in one word, one number and one sentence."""
        return self._ledger.verdict()


def is_alarm(found: Diagnosis) -> bool:
    """Whether a diagnosis that has changed is news that calls for a look: confirmed, standing, at warning or above."""
    return found.confirmed and found.cleared is None and found.severity >= WARNING


def ending(error: BaseException | None) -> tuple[str, str | None]:
    """Status and one line for the exception that ended a run."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "finished", None
    line = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    return ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed"), line


def _frames_to_the_user() -> int:
    """How far up the first frame is that is neither ours nor torch's, which calls our step hooks."""
    frame, level = sys._getframe(1), 1  # noqa: SLF001 -- what the warnings module itself goes by
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    return level


def _with_remedies(found: Diagnosis) -> str:
    tries = "; ".join(str(remedy) for remedy in found.remedies)
    advice = f" Try: {tries}." if tries else ""
    return f"{found}{advice} More: diagnostics-explain {found.condition}."
