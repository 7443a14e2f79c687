"""Figures over steps: norms, what was clipped, what was found; and what another threshold would clip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.records import SEVERITY_NAMES, Violation
from diagnostics.reports.drawing import Figure
from diagnostics.reports.figures.numbers import (
    Finding,
    axis_frame,
    called,
    drawable,
    few,
    floats,
    rounded,
    said,
    span,
)
from diagnostics.reports.history import History
from diagnostics.reports.specifications import BY_NAME, parts
from diagnostics.reports.specifications.by_step import SEVERITIES
from diagnostics.reports.thinning import COLUMNS, extremes, stretches
from diagnostics.reports.whatif import WhatIf

DOTTED = 60  # points of a line that are each worth a dot


def norms(history: History, columns: int = COLUMNS) -> Figure:
    """Total gradient norm before and after clipping, with the threshold, over all steps.

    Crosses on the upper edge are norms that are NaN or infinite, triangles on the lower edge norms that are zero,
    squares on the lower edge steps that were skipped. A long run keeps the extremes of each stretch, and says so.

    Args:
        history: The steps of one optimizer.
        columns: Stretches of steps into which a long run is cut.

    Returns:
        The figure.
    """
    before, after, threshold = (
        history.by_step[f"clip.{name}"] for name in ("total_norm", "total_norm_after", "threshold")
    )
    clips = history.rule != "none"
    wanted = {"before clipping" if clips else "norm, not clipped": before}
    if clips:
        wanted["after clipping"] = after
        if history.rule != "value" and (drawable(threshold) > 0).any():  # by value: one element's bound is no norm
            wanted["threshold"] = threshold
    series, dots, most = [], [], 0
    for label, values in wanted.items():
        shown = drawable(values)
        kept = extremes(history.steps, shown, columns)
        most = max(most, len(kept))
        series.append({"series": label, "step": history.steps[kept].tolist(), "norm": rounded(shown[kept])})
        lonely = _lonely(shown[kept])
        dots.append(
            {"series": label, "step": history.steps[kept][lonely].tolist(), "norm": rounded(shown[kept][lonely])}
        )
    marks = {
        parts.NOT_FINITE: ~np.isfinite(before),
        parts.IS_ZERO: before == 0,
        parts.SKIPPED: history.skipped,
    }
    edges = [{"what": what, "step": few(history.steps[where], columns)} for what, where in marks.items() if where.any()]
    thinned = [f"{most:,} of {len(before):,} steps drawn, extremes kept"] if most < len(before) else []
    finite = before[np.isfinite(before)]
    heights = np.concatenate([np.log10(drawable(values)) for values in wanted.values()])
    return Figure(
        "norms",
        f"Total gradient norm, p = {history.norm_type:g}",
        BY_NAME["norms"],
        {"series": series, "dots": dots, "edges": edges, "frame": axis_frame("norm", heights, base=10)},
        "; ".join([*thinned, *(said(what, int(where.sum()), "steps") for what, where in marks.items() if where.any())]),
        f"Total gradient norm over {len(before)} steps: {span(finite)} before clipping; "
        f"{int(history.applied.sum())} steps were clipped.",
    )


def clipping(history: History, columns: int = 40) -> Figure:
    """The share of steps that were clipped, in each stretch of the run and so far.

    Args:
        history: The steps of one optimizer.
        columns: At most so many stretches.

    Returns:
        The figure.
    """
    groups = stretches(history.steps, columns)
    starts = [int(history.steps[group[0]]) for group in groups]
    table = {
        "x": [start - 0.5 for start in starts],
        "x2": [start - 0.5 for start in [*starts[1:], int(history.steps[-1]) + 1]],
        "share": rounded(np.array([history.applied[group].mean() for group in groups])),
    }
    so_far = np.cumsum(history.applied) / np.arange(1, len(history.applied) + 1)
    ends = np.array([group[-1] for group in groups])
    return Figure(
        "clipping",
        "Steps that were clipped",
        BY_NAME["clipping"],
        {"stretches": [table], "so_far": [{"step": history.steps[ends].tolist(), "share": rounded(so_far[ends])}]},
        words=f"{int(history.applied.sum())} of {len(history.applied)} steps were clipped.",
    )


def findings(history: History, found: Iterable[Finding]) -> Figure:
    """Diagnoses from their onset until they cleared, and the first break of each rule of the loop, on the time line.

    Args:
        history: The steps of one optimizer; the time line's end.
        found: Diagnoses and violations.

    Returns:
        The figure.
    """
    last = int(history.steps[-1]) if len(history.steps) else 0
    table: list[dict[str, Any]] = [_finding(one, last) for one in found]
    table.sort(key=lambda row: row["start"])
    said = ", ".join(f"{row['what']} ({row['when']})" for row in table) or "nothing"
    return Figure(
        "findings",
        "What was found, and when",
        BY_NAME["findings"],
        {"findings": table, "ends": [{"start": int(history.steps[0])}, {"start": last}] if len(history.steps) else []},
        words=f"Found: {said}.",
        height=24 * len({row["what"] for row in table}) or 24,
    )


def what_if(found: Sequence[WhatIf]) -> Figure:
    """The share of steps that each max_norm would have clipped.

    Args:
        found: As :func:`diagnostics.reports.whatif.what_if` returns them.

    Returns:
        The figure.
    """
    table = [
        {
            "norm": f"p = {one.norm_type:g}",
            "max_norm": rounded(floats(candidate.max_norm for candidate in one.candidates)),
            "clipped": rounded(floats(candidate.clipped for candidate in one.candidates)),
            "coefficient": rounded(floats(candidate.coefficient for candidate in one.candidates)),
        }
        for one in found
        if one.candidates
    ]
    current = [{"max_norm": tried.max_norm} for one in found for tried in one.candidates if tried.current]
    said = (
        f"The share of steps that would have been clipped, for {sum(len(one.candidates) for one in found)} thresholds."
    )
    return Figure(
        "what_if",
        "What another max_norm would have clipped",
        BY_NAME["what_if"],
        {"norms": table, "current": current},
        "dashed: the threshold of this run" if current else "",
        said,
    )


def _lonely(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points a line would not show, between two gaps; all of a short series."""
    gap = ~np.isfinite(values)
    if len(values) <= DOTTED:
        return ~gap
    lonely: NDArray[np.bool_] = ~gap & np.append(True, gap[:-1]) & np.append(gap[1:], True)
    return lonely


def _finding(one: Finding, last: int) -> dict[str, Any]:
    if isinstance(one, Violation):
        times = f", {one.count:,} times" if one.count > 1 else ""
        severity, end, when = SEVERITIES[-1], None, f"first at step {one.step:,}{times}"
    else:
        severity = SEVERITY_NAMES[one.severity]
        end = (last if one.cleared is None else one.cleared) + 0.5
        when = f"since step {one.step:,}" if one.cleared is None else f"steps {one.step:,}–{one.cleared:,}"
    start = float(one.step) if end is None else one.step - 0.5
    return {"what": called(one), "severity": severity, "start": start, "end": end, "when": when}
