"""Records in, diagnoses and remedies out. Pure functions, no torch.

The backward slope is a robust line through log10 of the output gradients' norm over depth. It is the same number
however deep the network is, which no threshold on a norm is: a four-layer sigmoid chain and one of twelve layers have
the same total norm (0.12) and the same slope (-0.91 decades per layer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from diagnostics.diagnosis.conditions import examine
from diagnostics.diagnosis.conditions.case import MAD_TO_SIGMA, Case, Memory
from diagnostics.diagnosis.recovery import Cost
from diagnostics.diagnosis.remedies import prescribe
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import (
    NONFINITE,
    NOTICE,
    SOLE_OPTIMIZER,
    WARNING,
    DepthFit,
    Diagnosis,
    LayerRecord,
    Layers,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
    steps_back,
)

MAX_FITTED = 64
AT_ONCE = ("nonfinite", "spike", "clipped_always")
"""What one step shows for sure, and what a history of fifty steps already confirms."""

LASTING = ("vanishing", "exploding")
"""What costs the first layers a part of the training that its end does not give back."""

MOST_PAST = 1000
"""How many diagnoses that cleared are kept."""

Followed = tuple[str, str]
"""An optimizer's name and a condition's."""


@dataclass(frozen=True, slots=True)
class _Track:
    """One condition over time.

    Attributes:
        diagnosis: As it stands.
        recent: How severe the last records found it; 0 if they did not.
        peak: How severe it was at its worst.
        cost: What it has cost.
        weighs: Whether it is a notice that is a warning for having stood so long.
    """

    diagnosis: Diagnosis
    recent: tuple[int, ...]
    peak: int = 0
    cost: Cost = field(default_factory=Cost)
    weighs: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What :func:`advance` carries from record to record.

    Attributes:
        tracks: Conditions that stand or are about to, by optimizer.
        past: The newest thousand diagnoses that cleared, oldest first.
        records: Number of steps so far whose output gradients were seen.
        memories: What the conditions keep, by optimizer.
    """

    tracks: Mapping[Followed, _Track] = field(default_factory=dict)
    past: tuple[Diagnosis, ...] = ()
    records: int = 0
    memories: Mapping[str, Memory] = field(default_factory=dict)

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """All diagnoses, in order of onset."""
        standing = [track.diagnosis for track in self.tracks.values()]
        return tuple(sorted([*self.past, *standing], key=lambda diagnosis: diagnosis.step))

    @classmethod
    def told(cls, diagnoses: Iterable[Diagnosis], records: int) -> State:
        """The state of a run that told its diagnoses, as its log has them: enough for a verdict, not to go on from.

        Args:
            diagnoses: In their last state.
            records: Number of steps whose output gradients were seen.
        """
        known = list(diagnoses)
        tracks = {
            (str(place), one.condition): _Track(one, ()) for place, one in enumerate(known) if one.cleared is None
        }
        return cls(tracks, tuple(one for one in known if one.cleared is not None), records)


def fit_depth(layers: Iterable[LayerRecord]) -> DepthFit | None:
    """Fits a line through log10 of the output gradients' norm over depth (Theil-Sen).

    Trunk layers count, with the residual stream's gradient where they end a branch of it. Layers that stand side by
    side, as those of two towers, stand at one place. Exact zeros and non-finite values are left out; of more than 64
    points evenly chosen ones enter.

    Args:
        layers: The layers of one recorded step, in order of depth.

    Returns:
        The fit, None with fewer than two points. The uncertainty is the standard error of a least-squares slope with
        the same points and the residuals' spread taken from their median absolute deviation; 0 for two points.

    Source: Theil 1950; Sen, Estimates of the regression coefficient based on Kendall's tau, 1968.

    Example:
        >>> from diagnostics.records import GradientStats, Layer
        >>> rms = [1e-4, 1e-3, 1e-2]
        >>> layers = [LayerRecord(Layer(d, str(d), "Linear"), GradientStats(1, x, x), None) for d, x in enumerate(rms)]
        >>> round(fit_depth(layers).slope, 6)
        -1.0
    """
    known = layers if isinstance(layers, Layers) else Layers(layers)
    trunk = zip(known.layers, known.values("trunk_norm"), strict=True)
    sizes = [(layer, norm) for layer, norm in trunk if layer.trunk and norm is not None]
    places = steps_back([layer for layer, _ in sizes])
    points = [
        (float(place), math.log10(norm)) for place, (_, norm) in zip(places, sizes, strict=True) if 0 < norm < math.inf
    ]
    fitted = _evenly(points, MAX_FITTED)
    slopes = [(y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(fitted) for x2, y2 in fitted[:i] if x1 != x2]
    if not slopes:
        return None
    slope = median(slopes)
    intercept = median(y - slope * x for x, y in fitted)
    return DepthFit(slope, intercept, _uncertainty(fitted, slope, intercept), max(places) + 1, len(points))


def advance(state: State, record: StepRecord, thresholds: Thresholds) -> tuple[State, tuple[Diagnosis, ...]]:
    """Takes one record.

    Args:
        state: What the records before it left; ``State()`` at the beginning.
        record: The next one.
        thresholds: When a number becomes a diagnosis.

    Returns:
        The new state, and the diagnoses that began, were confirmed, changed severity or cleared at this record.
    """
    memory = state.memories.get(record.optimizer, Memory())
    memory = replace(memory, skips=memory.skips + 1 if record.skipped else 0)
    fit = (record.fit or fit_depth(record.layers)) if record.recorded else None
    standing = {
        condition: NOTICE if track.weighs else track.diagnosis.severity
        for (optimizer, condition), track in state.tracks.items()
        if optimizer == record.optimizer and track.diagnosis.confirmed
    }
    found, judged = examine(Case(record, fit, memory, thresholds, standing))
    memory = memory.after(record, thresholds.history)
    tracks, past, changed = dict(state.tracks), state.past, []
    for condition in judged:
        before = tracks.pop((record.optimizer, condition), None)
        finding = _named(found.get(condition), record.optimizer)
        after = _follow(before, finding, record.step, memory.usual_loss, thresholds)
        if after is None:
            continue
        if before is None or _differs(before.diagnosis, after.diagnosis):
            changed.append(after.diagnosis)
        if after.diagnosis.cleared is None:
            tracks[record.optimizer, condition] = after
        else:
            past = (*past, after.diagnosis)[-MOST_PAST:]
    seen = record.recorded and "output.norm" in record.layers.columns(before_step=True)
    memories = {**state.memories, record.optimizer: memory}
    return State(tracks, past, state.records + seen, memories), tuple(changed)


def diagnose(
    records: Iterable[StepRecord], thresholds: Thresholds | None = None, run: RunInfo | None = None
) -> tuple[Diagnosis, ...]:
    """What the records of a run show.

    Args:
        records: In order of time.
        thresholds: When a number becomes a diagnosis; the defaults if None.
        run: Where they come from; with a configuration of this project's trainers remedies name its overrides.

    Returns:
        All diagnoses in order of onset, those that cleared and those that stand.

    Example:
        >>> diagnose([])
        ()
    """
    state = State()
    for record in records:
        state, _ = advance(state, record, thresholds or Thresholds())
    return tuple(prescribe(diagnosis, run) for diagnosis in state.diagnoses)


def verdict(state: State, violations: Sequence[Violation] = (), thresholds: Thresholds | None = None) -> Verdict:
    """One word, one number and one sentence: the last confirmed state, what cleared and when, what the loop broke."""
    if state.records == 0 and not state.tracks:
        unlawful = f"; {_unlawful(violations)}" if violations else ""
        return Verdict("unknown", 0, f"unknown: no output gradient was seen{unlawful}")
    short = state.records < (thresholds or Thresholds()).confirm
    standing = [diagnosis for diagnosis in state.diagnoses if diagnosis.cleared is None]
    serious = [item for item in standing if item.severity >= WARNING and (item.confirmed or short)]
    worst = max(serious, key=lambda diagnosis: diagnosis.severity, default=None)
    if worst is None:
        text = f"healthy gradients, {_unlawful(violations)}" if violations else "healthy"
    else:
        seen = worst.message.split(". ", maxsplit=1)[0].rstrip(".")
        text = f"{worst.condition} since step {worst.step}: {seen}"
        text += f"; {_unlawful(violations)}" if violations else ""
    past = _cleared([old for old in state.past if old.severity >= WARNING])
    doubt = [f"unconfirmed ({state.records} record{'s' * (state.records != 1)})"] if short else []
    condition, severity = (worst.condition, worst.severity) if worst else ("healthy", 0)
    return Verdict(condition, severity, "; ".join([text, *past, *doubt]))


def _follow(
    track: _Track | None, found: Diagnosis | None, step: int, loss: float | None, thresholds: Thresholds
) -> _Track | None:
    """Confirmation, hysteresis and all-clear of one condition; None where there is nothing to follow.

    The severity rises to what the last ``confirm`` records all reached and falls to what the last ``clear`` records did
    not exceed; while a slope's cost remains, or weighs, it is at least a warning. What has cleared is told by the worst
    that it was.
    """
    level = found.severity if found else 0
    if track is None:
        if found is None:
            return None
        certain = found.condition in AT_ONCE or thresholds.confirm == 1
        new = prescribe(replace(found, confirmed=certain), None)
        return _Track(new, (level,), level if certain else 0, Cost(judged=step - 1).after(level, step, loss))
    if found is None and not track.diagnosis.confirmed:
        return None
    recent = (*track.recent, level)[-max(thresholds.confirm, thresholds.clear) :]
    before, cost = track.diagnosis, track.cost.after(level, step, loss)
    confirmed, severity = _settled(before, recent, thresholds)
    latest = before if found is None else prescribe(found, None)
    if severity < WARNING <= before.severity and before.condition in LASTING and cost.remains(loss, thresholds):
        severity, latest = WARNING, cost.told(latest, loss)
    weighs = severity == NOTICE and latest.condition in LASTING and cost.weighs(loss, thresholds)
    if weighs:
        severity, latest = WARNING, before if found is None else cost.weighed(latest, loss)
    peak = max(track.peak, severity if confirmed else 0)
    if severity == 0:
        return _Track(replace(cost.made_up(before), severity=peak, cleared=step), recent)
    return _Track(replace(latest, step=before.step, confirmed=confirmed, severity=severity), recent, peak, cost, weighs)


def _settled(before: Diagnosis, recent: Sequence[int], thresholds: Thresholds) -> tuple[bool, int]:
    """Whether a diagnosis is confirmed and how severe it is, by how severe the last records found it."""
    reached = min(recent[-thresholds.confirm :]) if len(recent) >= thresholds.confirm else 0
    ceiling = max(recent[-thresholds.clear :]) if len(recent) >= thresholds.clear else NONFINITE
    if not before.confirmed:
        return reached > 0 or recent[-1] == NONFINITE, reached or recent[-1]
    return True, min(max(before.severity, reached), ceiling)


def _differs(before: Diagnosis, after: Diagnosis) -> bool:
    return (before.confirmed, before.severity, before.cleared) != (after.confirmed, after.severity, after.cleared)


def _named(found: Diagnosis | None, optimizer: str) -> Diagnosis | None:
    """The finding with the optimizer's name, where a run has several."""
    if found is None or optimizer == SOLE_OPTIMIZER:
        return found
    return replace(found, message=f"{optimizer}: {found.message}")


def _evenly(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    if len(points) <= limit:
        return points
    return [points[round(place * (len(points) - 1) / (limit - 1))] for place in range(limit)]


def _uncertainty(points: Sequence[tuple[float, float]], slope: float, intercept: float) -> float:
    if len(points) < 3:
        return 0.0
    sigma = MAD_TO_SIGMA * median(abs(y - intercept - slope * x) for x, y in points)
    centre = sum(x for x, _ in points) / len(points)
    return sigma / math.sqrt(sum((x - centre) ** 2 for x, _ in points))


def _cleared(past: Sequence[Diagnosis]) -> list[str]:
    """What was and is no more, one phrase per condition."""
    told = []
    for condition in dict.fromkeys(old.condition for old in past):
        same = [old for old in past if old.condition == condition]
        often = f" {len(same)} times, the last" if len(same) > 1 else ""
        told.append(f"{condition}{often} at steps {same[-1].step}–{same[-1].cleared}, cleared")
    return told


def _unlawful(violations: Sequence[Violation]) -> str:
    rules = dict.fromkeys(violation.rule for violation in violations)
    return f"unlawful loop ({', '.join(rules)})"
