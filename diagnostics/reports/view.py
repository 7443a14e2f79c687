"""A run → what its page shows, as plain numbers and text; no HTML.

:func:`describe` is the only way from a run log to a page. What it returns is ready for JSON: numbers have four digits,
long series are thinned, and every text is somebody else's and is only ever shown as text.
"""

# ruff: noqa: PLC0415 -- the words of a verdict are wanted where there is no numpy

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from diagnostics.records import (
    NONFINITE,
    SEVERITY_NAMES,
    WARNING,
    Diagnosis,
    Remedy,
    RunInfo,
    Verdict,
    Violation,
)
from diagnostics.runlog import Run
from diagnostics.second_opinion import read_second_opinion

if TYPE_CHECKING:
    from diagnostics.reports.drawing import Figure
    from diagnostics.reports.figures import Finding
    from diagnostics.reports.history import History
    from diagnostics.reports.whatif import WhatIf

TONES = ("calm", "notice", "warning", "severe", "severe")
WIDEST, NARROWEST, ROOM = 160, 40, 20_000
"""Columns of a heatmap: the most, the fewest, and how many all heatmaps of a page may have together."""

MOST_PROFILES = 7
"""Steps to choose from where there is room."""

View = dict[str, Any]


def columns_for(runs: int) -> int:
    """How many columns each heatmap may have where a page holds so many runs.

    Example:
        >>> columns_for(1), columns_for(500)
        (160, 40)
    """
    return max(NARROWEST, min(WIDEST, ROOM // max(runs, 1)))


def describe(run: Run, columns: int = WIDEST) -> View:
    """What the page of a run shows.

    Args:
        run: As ``read_run`` returns it; it may have crashed, be going on, or hold no step.
        columns: At most so many columns and stretches in each figure over steps.

    Returns:
        Text, numbers, lists and dictionaries.

    Raises:
        ModuleNotFoundError: numpy is not installed.

    Example:
        >>> from pathlib import Path
        >>> describe(Run(None, (), (), None, Path("mlp/run.jsonl")))["badges"]
        [['unknown', 'unknown'], ['no end', 'unknown']]
    """
    from diagnostics.reports.drawing import figures_extra

    with figures_extra():
        from diagnostics.reports.history import histories
        from diagnostics.reports.overlays import last_profile

    info = run.info or RunInfo(name=run.path.parent.name or "run")
    judgement = run.judge()
    apart = histories(run.records)
    found = {name: findings_of(run, name) for name in apart}
    return {
        "name": info.name,
        "badges": list(_badges(judgement, run)),
        "headline": _sentence(judgement.text),
        "ending": _ending(run, max((int(one.steps[-1]) for one in apart.values()), default=None)),
        "troubles": list(_troubles(run, judgement)),
        "parts": [_part(one, found[name], columns) for name, one in apart.items()],
        "facts": list(_facts(info, run)),
        "profile": next((last_profile(one) for one in apart.values()), []),
    }


def figures_of(run: Run) -> list[Figure]:
    """Every figure of a run, as its page shows them and for a paper."""
    from diagnostics.reports.drawing import figures_extra

    with figures_extra():
        from diagnostics.reports.figures import of_history
        from diagnostics.reports.history import histories
        from diagnostics.reports.whatif import what_if

    apart = histories(run.records).items()
    return [figure for name, one in apart for figure in of_history(one, findings_of(run, name), what_if(one))]


def findings_of(run: Run, optimizer: str) -> list[Finding]:
    """What a figure of one optimizer marks: its confirmed diagnoses; and broken rules, which are of the whole loop."""
    return [*(one for one in run.diagnoses_of(optimizer) if one.confirmed), *run.violations]


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


def badge(condition: str, severity: int, *, unlawful: bool) -> tuple[str, str]:
    """A verdict as a word and its tone, never calm while a rule of the loop is broken.

    Example:
        >>> badge("vanishing", 3, unlawful=False), badge("healthy", 0, unlawful=True)
        (('vanishing · severe', 'severe'), ('unlawful loop · warning', 'warning'))
    """
    if severity:
        return _named(condition, severity), TONES[severity]
    if unlawful:
        return f"unlawful loop · {SEVERITY_NAMES[WARNING]}", TONES[WARNING]
    return condition, "calm" if condition == "healthy" else "unknown"


def _badges(judgement: Verdict, run: Run) -> Iterator[list[str]]:
    """The verdict, and how the run ended if not well."""
    yield list(badge(judgement.condition, judgement.severity, unlawful=bool(run.violations)))
    if run.end is None:
        yield ["no end", "unknown"]
    elif run.end.status != "finished":
        yield [run.end.status, "severe" if run.end.status == "failed" else "unknown"]


def _named(condition: str, severity: int) -> str:
    word = SEVERITY_NAMES[severity]
    return word if severity == NONFINITE else f"{condition} · {word}"


def _ending(run: Run, last: int | None) -> str:
    if run.end is None:
        where = " before its first step" if last is None else f" after step {last:,}"
        return f"The run log has no end: the run is still going on, or was killed{where}."
    error = f": {run.end.error}" if run.end.error else ""
    when = f" on {_date(run.end.ended)}" if run.end.ended else ""
    return f"{run.end.status.capitalize()}{when} after {run.end.steps:,} steps{error}"


def _troubles(run: Run, judgement: Verdict) -> Iterator[View]:
    """What stands, worst first, then broken rules, then what cleared; what was never confirmed only if it is judged."""
    standing = [diagnosis for diagnosis in run.diagnoses if diagnosis.cleared is None]
    opinion = read_second_opinion(run.path) if run.end and run.path.is_file() else None
    trials = {trial.override: f"{trial} after {opinion.steps:,} steps" for trial in opinion.trials} if opinion else {}
    for diagnosis in sorted(standing, key=lambda diagnosis: -diagnosis.severity):
        if diagnosis.confirmed or diagnosis.condition == judgement.condition:
            when = f"since step {diagnosis.step:,}" + ("" if diagnosis.confirmed else ", unconfirmed")
            tried = trials if opinion and diagnosis.condition == opinion.condition else {}
            yield _diagnosis(diagnosis, when, TONES[diagnosis.severity], tried)
    yield from map(_violation, run.violations)
    for diagnosis in run.diagnoses:
        if diagnosis.cleared is not None:
            yield _diagnosis(diagnosis, f"steps {diagnosis.step:,}–{diagnosis.cleared:,}, cleared", "calm", {})


def _diagnosis(diagnosis: Diagnosis, when: str, tone: str, tried: Mapping[str, str]) -> View:
    where = "" if diagnosis.depth is None else f", worst at depth {diagnosis.depth}"
    name = _named(diagnosis.condition, diagnosis.severity)
    return _trouble(name, when + where, tone, _sentence(diagnosis.message), _tries(diagnosis.remedies, tried))


def _violation(violation: Violation) -> View:
    times = f", {violation.count:,} times" if violation.count > 1 else ""
    when = f"first at step {violation.step:,}{times}"
    return _trouble(violation.rule, when, TONES[WARNING], violation.message, _tries([Remedy(violation.remedy)], {}))


def _trouble(title: str, when: str, tone: str, message: str, remedies: list[View]) -> View:
    return {"title": title, "when": when, "tone": tone, "message": message, "remedies": remedies}


def _tries(remedies: Iterable[Remedy], tried: Mapping[str, str]) -> list[View]:
    """What to try, and what became of it where a second opinion was asked."""
    return [{"text": one.text, "override": one.override, "tried": tried.get(one.override or "")} for one in remedies]


def _date(iso: str) -> str:
    return iso.replace("T", " ", 1)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _part(history: History, found: Sequence[Finding], columns: int) -> View:
    """What one optimizer did."""
    from diagnostics.reports.figures import of_history
    from diagnostics.reports.figures.numbers import named
    from diagnostics.reports.whatif import what_if

    answers = what_if(history)
    profiles = MOST_PROFILES if columns == WIDEST else 3
    return {
        "name": history.optimizer,
        "figures": [drawn(one) for one in of_history(history, found, answers, columns, profiles)],
        "layers": named(history),
        "clipping": list(_clipping(history)),
        "table": _table(history),
        "what_if": [_answer(one) for one in answers],
    }


def drawn(figure: Figure) -> View:
    """A figure without its specification, which the page has once for all runs, and without the names of layers."""
    data = {name: table for name, table in figure.data.items() if name != "layers"}
    return {
        "kind": figure.name,
        "title": figure.title,
        "data": data,
        "note": figure.note,
        "words": figure.words,
        "height": figure.height,
    }


def _answer(one: WhatIf) -> View:
    return {
        "norm": f"p = {one.norm_type:g}" + ("" if one.recorded else ", put together from the layers' norms"),
        "steps": f"{one.steps:,} steps with a finite norm, {one.healthy:,} of them healthy",
        "candidates": [
            [number(tried.max_norm), f"{tried.clipped:.1%}", number(tried.coefficient), tried.current]
            for tried in one.candidates
        ],
        "suggestions": [[f"{wanted.share:.0%}", number(wanted.max_norm)] for wanted in one.suggestions],
        "caveat": one.caveat,
    }


def _clipping(history: History) -> Iterator[View]:
    import numpy as np

    total, coef = history.by_step["clip.total_norm"], history.by_step["clip.clip_coef"]
    if history.rule == "none":
        yield _fact("rule", "none: gradients were measured, not clipped")
    else:
        threshold = history.by_step["clip.threshold"][-1]
        terms = "" if math.isnan(threshold) else f", threshold {number(float(threshold))}"
        yield _fact("rule", f"by {history.rule}{terms}, norm_type {history.norm_type:g}")
        clipped = int(history.applied.sum())
        yield _fact("clipped", f"{clipped:,} of {len(total):,} steps ({clipped / len(total):.1%})")
        applied = coef[history.applied & ~np.isnan(coef)].tolist()
        if applied:
            yield _fact("coefficient", f"median {number(median(applied))}, smallest {number(min(applied))}")
    finite = total[np.isfinite(total)].tolist()
    if finite:
        yield _fact("total norm", f"median {number(median(finite))}, largest {number(max(finite))}")
    broken = history.steps[~np.isfinite(total)]
    if len(broken):
        yield _fact("not finite", f"{len(broken):,} steps, the first is step {broken[0]:,}")
    if history.skipped.any():
        yield _fact("skipped", f"{int(history.skipped.sum()):,} steps left the weights as they were")


TABLE = (
    ("output.rms", "output gradient rms"),
    ("gain", "gain"),
    ("weight.norm", "weight gradient norm"),
    ("update_ratio", "update / weight"),
    ("dead_fraction", "dead units"),
    ("share", "share of total norm"),
)
"""Columns of the table by depth."""


def _table(history: History) -> View | None:
    """The numbers of each layer at the last step that has them; columns that nobody measured are left out."""
    rows = {name: history.by_layer[name] for name, _ in TABLE if name in history.by_layer}
    if "output.rms" not in rows:
        return None
    row = int(rows["output.rms"].rows[-1])
    columns = {}
    for name, quantity in rows.items():
        at = quantity.rows.searchsorted(row)
        if at < len(quantity.rows) and quantity.rows[at] == row:
            shown = zip(quantity.values[at].tolist(), quantity.measured[at].tolist(), strict=True)
            columns[name] = [_cell(value, name) if known else None for value, known in shown]
    kinds = [layer.kind if layer.trunk else f"{layer.kind} (not fitted)" for layer in history.layers]
    return {
        "step": int(history.steps[row]),
        "headings": [heading for name, heading in TABLE if name in columns],
        "kinds": kinds,
        "columns": [columns[name] for name, _ in TABLE if name in columns],
    }


def _cell(value: float, name: str) -> str:
    """With the power of ten always there, so that a column can be compared at a glance; fractions in percent."""
    if not math.isfinite(value):
        return number(value)
    if name in ("share", "dead_fraction"):
        return f"{value:.1%}"
    return f"{value:.2e}" if value else "0"


def _fact(name: str, *values: str, code: bool = False) -> View:
    return {"name": name, "values": list(values), "code": code}


def _facts(info: RunInfo, run: Run) -> Iterator[View]:
    if info.command:
        yield _fact("command", info.command, code=True)
    if info.overrides:
        yield _fact("overrides", *info.overrides, code=True)
    if info.started:
        yield _fact("started", _date(info.started))
    if info.device:
        yield _fact("device", info.device)
    if info.seed is not None:
        yield _fact("seed", str(info.seed))
    if info.versions:
        yield _fact("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items()))
    if info.git:
        changed = ", with uncommitted changes" if info.git.get("dirty") else ""
        yield _fact("git", f"{info.git.get('commit', '')}{changed}")
    yield _fact("run log", str(run.path), code=True)
