"""A run → what its page shows, as text and drawings; no HTML.

:func:`describe` is the only way from records to a page. What it returns holds plain text that the template escapes, and
SVG of our own making.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from diagnostics.diagnosis import State, advance, verdict
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import (
    NONFINITE,
    SEVERITY_NAMES,
    WARNING,
    Diagnosis,
    GradientStats,
    Remedy,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
)
from diagnostics.reports.drawing import INK, to_svg
from diagnostics.reports.figures import depth_profile, heatmap, norms
from diagnostics.runlog import Run

TONES = ("calm", "notice", "warning", "severe", "severe")
READING = {
    "heatmap": "One row per layer, one column per recorded step. A gradient that keeps its size has one colour from "
    "top to bottom; one that vanishes on its way back grows darker towards depth 0.",
    "profile": "The backward pass runs from right to left. A line that falls towards the left vanishes, one that rises "
    "towards the left explodes. The line is fitted to norms, so that it bends where layers have other widths. Hollow "
    "points are recorded but not fitted.",
    "norms": "The optimizer is given the norm after clipping. A step is clipped where the norm before is above the "
    "threshold.",
}


@dataclass(frozen=True, slots=True)
class Badge:
    """A word and its tone; the tone never says what the word does not."""

    word: str
    tone: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and what it stands for, in words or as code."""

    name: str
    values: tuple[str, ...]
    code: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: the drawing, the same in words for who cannot see it, and how to read it."""

    svg: str
    alternative: str
    caption: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of a table, and whether it is NaN or infinite."""

    text: str
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of the table by depth; the bar is the share in percent."""

    depth: int
    name: str
    kind: str
    cells: tuple[Cell, ...]
    share: str
    bar: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """A diagnosis or a violation."""

    title: str
    when: str
    tone: str
    message: str
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What one optimizer did."""

    name: str
    figures: tuple[Picture, ...]
    clipping: tuple[Fact, ...]
    table_step: int | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that the template shows, as text."""

    name: str
    badges: tuple[Badge, ...]
    headline: str
    ending: str
    troubles: tuple[Trouble, ...]
    parts: tuple[Part, ...]
    facts: tuple[Fact, ...]


def describe(run: Run) -> Page:
    """What the page of a run shows.

    Args:
        run: As ``read_run`` returns it; it may have crashed, be going on, or hold no step.

    Returns:
        The view, figures included.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> from pathlib import Path
        >>> describe(Run(None, (), (), None, Path("mlp/run.jsonl"))).badges
        (Badge(word='unknown', tone='unknown'), Badge(word='no end', tone='unknown'))
    """
    info = run.info or RunInfo(name=run.path.parent.name or "run")
    judgement = judge(run)
    optimizers = list(dict.fromkeys(record.optimizer for record in run.records)) or [""]
    return Page(
        name=info.name,
        badges=tuple(_badges(judgement, run)),
        headline=_sentence(judgement.text),
        ending=_ending(run),
        troubles=tuple(_troubles(run, judgement)),
        parts=tuple(_part(name, [record for record in run.records if record.optimizer == name]) for name in optimizers),
        facts=tuple(_facts(info, run)),
    )


def number(value: float | None) -> str:
    """A number as people read it: three digits, the infinities as a sign, a dash for what was not measured.

    Example:
        >>> number(0.000123456), number(float("inf")), number(None)
        ('0.000123', '∞', '–')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}"


def judge(run: Run) -> Verdict:
    """What the run said at its end; without an end, what it would have said after its last record.

    Example:
        >>> from pathlib import Path
        >>> judge(Run(None, (), (), None, Path("mlp/run.jsonl"))).condition
        'unknown'
    """
    if run.verdict:
        return run.verdict
    state = State()
    for record in run.records:
        state, _ = advance(state, record, Thresholds())
    return verdict(state, run.violations)


def _badges(judgement: Verdict, run: Run) -> Iterator[Badge]:
    """The verdict, never calm while a rule of the loop is broken, and how the run ended if not well."""
    if judgement.severity:
        yield Badge(_named(judgement.condition, judgement.severity), TONES[judgement.severity])
    elif run.violations:
        yield Badge(f"unlawful loop · {SEVERITY_NAMES[WARNING]}", TONES[WARNING])
    else:
        yield Badge(judgement.condition, "calm" if judgement.condition == "healthy" else "unknown")
    if run.end is None:
        yield Badge("no end", "unknown")
    elif run.end.status != "finished":
        yield Badge(run.end.status, "severe" if run.end.status == "failed" else "unknown")


def _named(condition: str, severity: int) -> str:
    word = SEVERITY_NAMES[severity]
    return word if severity == NONFINITE else f"{condition} · {word}"


def _ending(run: Run) -> str:
    if run.end is None:
        last = f" after step {run.records[-1].step:,}" if run.records else " before its first step"
        return f"The run log has no end: the run is still going on, or was killed{last}."
    error = f": {run.end.error}" if run.end.error else ""
    when = f" on {_date(run.end.ended)}" if run.end.ended else ""
    return f"{run.end.status.capitalize()}{when} after {run.end.steps:,} steps{error}"


def _troubles(run: Run, judgement: Verdict) -> Iterator[Trouble]:
    """What stands, worst first, then broken rules, then what cleared; what was never confirmed only if it is judged."""
    standing = [diagnosis for diagnosis in run.diagnoses if diagnosis.cleared is None]
    for diagnosis in sorted(standing, key=lambda diagnosis: -diagnosis.severity):
        if diagnosis.confirmed or diagnosis.condition == judgement.condition:
            when = f"since step {diagnosis.step:,}" + ("" if diagnosis.confirmed else ", unconfirmed")
            yield _diagnosis(diagnosis, when, TONES[diagnosis.severity])
    yield from map(_violation, run.violations)
    for diagnosis in run.diagnoses:
        if diagnosis.cleared is not None:
            yield _diagnosis(diagnosis, f"steps {diagnosis.step:,}–{diagnosis.cleared:,}, cleared", "calm")


def _diagnosis(diagnosis: Diagnosis, when: str, tone: str) -> Trouble:
    where = "" if diagnosis.depth is None else f", worst at depth {diagnosis.depth}"
    name = _named(diagnosis.condition, diagnosis.severity)
    return Trouble(name, when + where, tone, _sentence(diagnosis.message), diagnosis.remedies)


def _date(iso: str) -> str:
    return iso.replace("T", " ", 1)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _violation(violation: Violation) -> Trouble:
    times = f", {violation.count:,} times" if violation.count > 1 else ""
    when = f"first at step {violation.step:,}{times}"
    return Trouble(violation.rule, when, TONES[WARNING], violation.message, (Remedy(violation.remedy),))


def _part(name: str, records: Sequence[StepRecord]) -> Part:
    recorded = [record for record in records if record.recorded and len(record.layers)]
    rows = tuple(_rows(recorded[-1])) if recorded else ()
    return Part(name, _figures(name, records), tuple(_clipping(records)), recorded[-1].step if recorded else None, rows)


def _figures(optimizer: str, records: Sequence[StepRecord]) -> tuple[Picture, ...]:
    drawn = (
        ("heatmap", heatmap, _heatmap_in_words),
        ("profile", depth_profile, _profile_in_words),
        ("norms", norms, _norms_in_words),
    )
    return tuple(
        Picture(
            to_svg(draw(records), f"{name} {optimizer}").replace(INK, "currentColor"), words(records), READING[name]
        )
        for name, draw, words in drawn
    )


def _heatmap_in_words(records: Sequence[StepRecord]) -> str:
    outputs = [layer.output for record in records for layer in record.layers if layer.output is not None]
    depths = max((len(record.layers) for record in records), default=0)
    broken = sum(_is_broken(stats) for stats in outputs)
    bounds = _range(stats.rms for stats in outputs)
    return (
        f"Heatmap of the output gradient's rms over {depths} depths and {sum(record.recorded for record in records)} "
        f"recorded steps: {bounds}; {broken} values are NaN or infinite."
    )


def _profile_in_words(records: Sequence[StepRecord]) -> str:
    fits = [(record.step, record.fit.slope) for record in records if record.fit is not None]
    if not fits:
        return "Output gradient over depth; no step had a fit."
    (first, start), (last, end) = fits[0], fits[-1]
    return (
        f"Output gradient over depth: it changes by {start:+.2g} decades per layer on the way back at step {first}, by "
        f"{end:+.2g} at step {last}."
    )


def _norms_in_words(records: Sequence[StepRecord]) -> str:
    bounds = _range(record.clip.total_norm for record in records)
    clipped = sum(record.clip.applied for record in records)
    return f"Total gradient norm over {len(records)} steps: {bounds} before clipping; {clipped} steps were clipped."


def _range(values: Iterable[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"between {number(min(finite))} and {number(max(finite))}" if finite else "no finite value"


def _is_broken(stats: GradientStats) -> bool:
    return stats.nonfinite > 0 or not math.isfinite(stats.rms)


def _clipping(records: Sequence[StepRecord]) -> Iterator[Fact]:
    if not records:
        return
    clips = [record.clip for record in records]
    rule = clips[-1]
    if rule.rule == "none":
        yield Fact("rule", ("none: gradients were measured, not clipped",))
    else:
        yield Fact("rule", (f"by {rule.rule}, {rule.terms}",))
        applied = [clip.clip_coef for clip in clips if clip.applied and clip.clip_coef is not None]
        yield Fact("clipped", (f"{len(applied):,} of {len(clips):,} steps ({len(applied) / len(clips):.1%})",))
        if applied:
            yield Fact("coefficient", (f"median {number(median(applied))}, smallest {number(min(applied))}",))
    finite = [clip.total_norm for clip in clips if math.isfinite(clip.total_norm)]
    if finite:
        yield Fact("total norm", (f"median {number(median(finite))}, largest {number(max(finite))}",))
    broken = [record.step for record in records if not math.isfinite(record.clip.total_norm)]
    if broken:
        yield Fact("not finite", (f"{len(broken):,} steps, the first is step {broken[0]:,}",))
    skipped = sum(record.skipped for record in records)
    if skipped:
        yield Fact("skipped", (f"{skipped:,} steps left the weights as they were",))


def _rows(record: StepRecord) -> Iterator[Row]:
    known = len(record.clip.shares) == len(record.layers)
    shares: Sequence[float | None] = record.clip.shares if known else [None] * len(record.layers)
    for layer, share in zip(record.layers, shares, strict=True):
        measured = (
            layer.output.rms if layer.output else None,
            layer.weight.norm if layer.weight else None,
            layer.update_ratio,
        )
        certain = share if share is not None and math.isfinite(share) else None
        yield Row(
            depth=layer.layer.depth,
            name=layer.layer.name,
            kind=layer.layer.kind if layer.layer.trunk else f"{layer.layer.kind} (not fitted)",
            cells=tuple(map(_cell, measured)),
            share=number(share) if certain is None else f"{certain:.1%}",
            bar=round(100 * (certain or 0.0), 1),
        )


def _cell(value: float | None) -> Cell:
    """With the power of ten always there, so that a column can be compared at a glance."""
    if value is None or not math.isfinite(value):
        return Cell(number(value), broken=value is not None)
    return Cell(f"{value:.2e}" if value else "0")


def _facts(info: RunInfo, run: Run) -> Iterator[Fact]:
    if info.command:
        yield Fact("command", (info.command,), code=True)
    if info.overrides:
        yield Fact("overrides", info.overrides, code=True)
    if info.started:
        yield Fact("started", (_date(info.started),))
    if info.device:
        yield Fact("device", (info.device,))
    if info.seed is not None:
        yield Fact("seed", (str(info.seed),))
    if info.versions:
        yield Fact("versions", (", ".join(f"{name} {number}" for name, number in info.versions.items()),))
    if info.git:
        changed = ", with uncommitted changes" if info.git.get("dirty") else ""
        yield Fact("git", (f"{info.git.get('commit', '')}{changed}",))
    yield Fact("run log", (str(run.path),), code=True)
