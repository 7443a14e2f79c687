"""Records in, diagnoses and remedies out. Pure functions, no torch.

The backward slope is a robust line through log10 rms of the output gradients over depth. It is the same number however
deep the network is, which no threshold on a norm is: a four-layer sigmoid chain and one of twelve layers have the same
total norm (0.12) and the same slope (-0.91 decades per layer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from diagnostics.records import (
    NONFINITE,
    WARNING,
    DepthFit,
    Diagnosis,
    LayerRecord,
    Remedy,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
    steps_back,
)

MAX_FITTED = 64
_MAD_TO_SIGMA = 1.4826
_SKIPS_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a number becomes a diagnosis.

    Attributes:
        notice_decades: Decades between the first and the last layer from which a slope is worth a notice.
        warning_decades: From which it is a warning; the lesson's four-layer sigmoid chain has 2.73.
        severe_decades: From which it is severe.
        confirm: Recorded steps in a row that confirm a condition.
        clear: Recorded steps in a row without it that clear it.

    Raises:
        ValueError: If the decades do not increase from a positive number, or a count is below 1.

    Example:
        >>> Thresholds().warning_decades
        2.5
    """

    notice_decades: float = 1.5
    warning_decades: float = 2.5
    severe_decades: float = 5.0
    confirm: int = 3
    clear: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.notice_decades <= self.warning_decades <= self.severe_decades:
            raise ValueError(
                "notice_decades, warning_decades and severe_decades must be positive and in this order; got "
                f"{self.notice_decades}, {self.warning_decades}, {self.severe_decades}."
            )
        for name in ("confirm", "clear"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 recorded step; got {getattr(self, name)}.")

    def severity(self, decades: float) -> int:
        """0 to 3 for so many decades."""
        limits = (self.notice_decades, self.warning_decades, self.severe_decades)
        return sum(decades >= limit for limit in limits)


@dataclass(frozen=True, slots=True)
class _Track:
    """One condition over time: its diagnosis, and how severe the last records found it (0 where they did not)."""

    diagnosis: Diagnosis
    recent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What :func:`advance` carries from record to record.

    Attributes:
        tracks: Conditions that stand or are about to.
        past: Diagnoses that cleared, oldest first.
        records: Number of steps so far whose output gradients were seen.
        skips: Skipped steps in a row, by optimizer.
        slope: The last fitted backward slope.
    """

    tracks: Mapping[str, _Track] = field(default_factory=dict)
    past: tuple[Diagnosis, ...] = ()
    records: int = 0
    skips: Mapping[str, int] = field(default_factory=dict)
    slope: float | None = None

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """All diagnoses, in order of onset."""
        standing = [track.diagnosis for track in self.tracks.values()]
        return tuple(sorted([*self.past, *standing], key=lambda diagnosis: diagnosis.step))


def fit_depth(layers: Iterable[LayerRecord]) -> DepthFit | None:
    """Fits a line through log10 rms of the output gradients over depth (Theil-Sen).

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
    trunk = [(record.layer, record.trunk_rms) for record in layers if record.layer.trunk]
    sizes = [(layer, rms) for layer, rms in trunk if rms is not None]
    places = steps_back([layer for layer, _ in sizes])
    points = [
        (float(place), math.log10(rms)) for place, (_, rms) in zip(places, sizes, strict=True) if 0 < rms < math.inf
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
    skips = {**state.skips, record.optimizer: state.skips.get(record.optimizer, 0) + 1 if record.skipped else 0}
    found = {diagnosis.condition: diagnosis for diagnosis in _nonfinite(record, skips[record.optimizer])}
    judged = ["nonfinite"]
    slope = state.slope
    if record.recorded:
        fit = record.fit or fit_depth(record.layers.before_step)
        if fit is not None:
            slope = fit.slope
            judged += ["vanishing", "exploding"]
            found |= {diagnosis.condition: diagnosis for diagnosis in _slope(record, fit, thresholds)}
    tracks, past, changed = dict(state.tracks), list(state.past), []
    for condition in judged:
        before = tracks.pop(condition, None)
        after = _follow(before, found.get(condition), record.step, thresholds)
        if after is None:
            continue
        if before is None or _differs(before.diagnosis, after.diagnosis):
            changed.append(after.diagnosis)
        if after.diagnosis.cleared is None:
            tracks[condition] = after
        else:
            past.append(after.diagnosis)
    seen = record.recorded and any(layer.output is not None for layer in record.layers.before_step)
    return State(tracks, tuple(past), state.records + seen, skips, slope), tuple(changed)


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


def prescribe(diagnosis: Diagnosis, run: RunInfo | None) -> Diagnosis:
    """The diagnosis with remedies that fit the run.

    An override is named only where the run's configuration has its key, and a remedy that the run already follows is
    left out.
    """
    remedies = []
    for remedy in diagnosis.remedies:
        if remedy.override is None:
            remedies.append(remedy)
            continue
        key, _, value = remedy.override.partition("=")
        current = _look_up({} if run is None else run.config, key)
        if current is _ABSENT:
            remedies.append(replace(remedy, override=None))
        elif not _same_choice(current, value):
            remedies.append(remedy)
    return replace(diagnosis, remedies=tuple(remedies))


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
    past = [
        f"{old.condition} at steps {old.step}–{old.cleared}, cleared" for old in state.past if old.severity >= WARNING
    ]
    doubt = [f"unconfirmed ({state.records} record{'s' * (state.records != 1)})"] if short else []
    condition, severity = (worst.condition, worst.severity) if worst else ("healthy", 0)
    return Verdict(condition, severity, "; ".join([text, *past, *doubt]))


def _follow(track: _Track | None, found: Diagnosis | None, step: int, thresholds: Thresholds) -> _Track | None:
    """Confirmation, hysteresis and all-clear of one condition; None where there is nothing to follow.

    The severity rises to what the last ``confirm`` records all reached and falls to what the last ``clear`` records did
    not exceed.
    """
    level = found.severity if found else 0
    if track is None:
        certain = level == NONFINITE or thresholds.confirm == 1
        return _Track(replace(found, confirmed=certain), (level,)) if found else None
    if found is None and not track.diagnosis.confirmed:
        return None
    recent = (*track.recent, level)[-max(thresholds.confirm, thresholds.clear) :]
    reached = min(recent[-thresholds.confirm :]) if len(recent) >= thresholds.confirm else 0
    ceiling = max(recent[-thresholds.clear :]) if len(recent) >= thresholds.clear else NONFINITE
    before = track.diagnosis
    if not before.confirmed:
        confirmed, severity = reached > 0 or level == NONFINITE, reached or level
    else:
        confirmed, severity = True, min(max(before.severity, reached), ceiling)
    if severity == 0:
        return _Track(replace(before, cleared=step), recent)
    latest = found or before
    return _Track(replace(latest, step=before.step, confirmed=confirmed, severity=severity), recent)


def _differs(before: Diagnosis, after: Diagnosis) -> bool:
    return (before.confirmed, before.severity, before.cleared) != (after.confirmed, after.severity, after.cleared)


def _slope(record: StepRecord, fit: DepthFit, thresholds: Thresholds) -> Iterable[Diagnosis]:
    """Vanishing or exploding: decades beyond their own uncertainty."""
    certain = max(0.0, abs(fit.slope) - fit.uncertainty) * (fit.depths - 1)
    severity = thresholds.severity(certain)
    if severity == 0:
        return
    condition = "vanishing" if fit.slope < 0 else "exploding"
    rate = f"{abs(fit.slope):.2f} decades per layer on the way back, {fit.decades:.1f} over {fit.depths} layers"
    evidence = {
        "slope": fit.slope,
        "uncertainty": fit.uncertainty,
        "decades": fit.decades,
        "threshold": (thresholds.notice_decades, thresholds.warning_decades, thresholds.severe_decades)[severity - 1],
        "depths": fit.depths,
    }
    first = next((layer.layer.depth for layer in record.layers.before_step if layer.output is not None), None)
    if condition == "vanishing":
        message = (
            f"the gradient fades by {rate}. The first layers hardly learn, and clipping cannot cure it: it multiplies "
            "all layers by one number and leaves the slope as it is."
        )
        yield Diagnosis(condition, severity, record.step, first, evidence, message, VANISHING_REMEDIES)
    else:
        message = (
            f"the gradient grows by {rate}. The first layers are thrown about; clipping bounds the step and leaves "
            "the slope as it is."
        )
        yield Diagnosis(condition, severity, record.step, first, evidence, message, EXPLODING_REMEDIES)


def _nonfinite(record: StepRecord, skips: int) -> Iterable[Diagnosis]:
    """NaN or infinity in a gradient: an overflow that the loss scaler corrects is no illness, ten in a row are."""
    scaler_at_work = record.loss_scale != 1.0 and record.skipped and skips < _SKIPS_IN_A_ROW
    broken = record.nonfinite > 0 or not math.isfinite(record.clip.total_norm)
    broken |= record.loss is not None and not math.isfinite(record.loss)
    if not broken or scaler_at_work:
        return
    deepest = next((layer for layer in reversed(record.layers.before_step) if _is_broken(layer)), None)
    where = (
        f"; the backward pass met them first at depth {deepest.layer.depth} ({deepest.layer.name})" if deepest else ""
    )
    lost = f", {skips} steps in a row were skipped" if skips > 1 else ""
    message = f"{record.nonfinite} gradient elements are NaN or infinite{where}{lost}."
    evidence = {"nonfinite": float(record.nonfinite), "total_norm": record.clip.total_norm, "skipped": float(skips)}
    depth = deepest.layer.depth if deepest else None
    yield Diagnosis("nonfinite", NONFINITE, record.step, depth, evidence, message, NONFINITE_REMEDIES)


def _is_broken(layer: LayerRecord) -> bool:
    return any(stats is not None and stats.nonfinite > 0 for stats in (layer.output, layer.weight))


def _evenly(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    if len(points) <= limit:
        return points
    return [points[round(place * (len(points) - 1) / (limit - 1))] for place in range(limit)]


def _uncertainty(points: Sequence[tuple[float, float]], slope: float, intercept: float) -> float:
    if len(points) < 3:
        return 0.0
    sigma = _MAD_TO_SIGMA * median(abs(y - intercept - slope * x) for x, y in points)
    centre = sum(x for x, _ in points) / len(points)
    return sigma / math.sqrt(sum((x - centre) ** 2 for x, _ in points))


def _unlawful(violations: Sequence[Violation]) -> str:
    rules = dict.fromkeys(violation.rule for violation in violations)
    return f"unlawful loop ({', '.join(rules)})"


_ABSENT = object()


def _look_up(config: Mapping[str, object], key: str) -> object:
    """What a configuration holds under a dotted key, or _ABSENT."""
    node: object = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _same_choice(current: object, value: str) -> bool:
    """Whether a configuration already holds what an override would set: a value, or a group chosen by its class."""
    if isinstance(current, Mapping):
        current = str(current.get("_target_", "")).rsplit(".", maxsplit=1)[-1]
    return str(current).lower() == value.lower()


VANISHING_REMEDIES = (
    Remedy("use an activation whose slope does not saturate", "model.activation=relu"),
    Remedy("initialise so that the variance of the gradient is kept", "model.init=kaiming"),
    Remedy("normalise between the layers", "model.norm=layer"),
    Remedy("add residual connections", "model.residual=true"),
    Remedy("use an optimizer that divides by the gradient's own size", "optimizer=adamw"),
)
EXPLODING_REMEDIES = (
    Remedy("initialise so that the variance of the gradient is kept", "model.init=kaiming"),
    Remedy("clip the gradient norm, which bounds the step", "clip=norm"),
    Remedy("normalise between the layers", "model.norm=layer"),
    Remedy("add residual connections", "model.residual=true"),
)
NONFINITE_REMEDIES = (
    Remedy("lower the learning rate"),
    Remedy("look at the input and the loss for division by zero, log of zero and overflow"),
)
