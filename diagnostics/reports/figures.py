"""The figures of a run: what is drawn, as plain numbers. numpy; vl-convert only when a figure is drawn.

A function takes the columns of one optimizer (:class:`~diagnostics.reports.history.History`) and returns a
:class:`~diagnostics.reports.drawing.Figure`. A live Monitor, a run log and the page draw the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from diagnostics.records import SEVERITY_NAMES, DepthFit, Diagnosis, Violation, steps_back
from diagnostics.reports import specifications
from diagnostics.reports.drawing import Figure, figures_extra, grid

with figures_extra():
    import numpy as np
from numpy.typing import NDArray

from diagnostics.reports.history import History, Quantity
from diagnostics.reports.thinning import COLUMNS, IS_ZERO, MEASURED, MISSING, NOT_FINITE, ROWS, cells, extremes, merge, stretches
from diagnostics.reports.whatif import WhatIf

Finding = Diagnosis | Violation

MOST_DECADES = 400  # float64 ends at 324; what lies beyond came from a damaged log
MARKED = 4  # onsets above a heatmap; the time line of findings shows all
SPECIAL = {MISSING: None, IS_ZERO: specifications.IS_ZERO, NOT_FINITE: specifications.NOT_FINITE}
DOTTED = 60  # points of a line that are each worth a dot
OUTER = (0.1, 0.5, 0.9)
"""Quantiles that a spread over steps shows."""


def heatmap(history: History, findings: Iterable[Finding] = (), columns: int = COLUMNS) -> Figure:
    """Depth × step: log10 of the output gradient's rms, one column per recorded step.

    Exact zeros are black, NaN and infinity red; a layer that was not called is grey. In a run too long or too deep for
    one cell each, a cell shows the most extreme of what it stands for, and the figure says so. Marks above show the onset
    of diagnoses and the first break of each rule of the loop.

    Args:
        history: The steps of one optimizer.
        findings: Diagnoses and violations to mark.
        columns: At most so many columns.

    Returns:
        The figure; one that says so where no step was recorded.
    """
    quantity = history.by_layer.get("output.rms")
    name, title = "heatmap", "Output gradient by depth and step"
    if quantity is None:
        return _nothing(name, title, ("columns", "layers", "onsets"))
    steps, depths = history.steps[quantity.rows], len(history.layers)
    logs, kinds = cells(quantity.values, quantity.measured)
    broken = int((kinds == NOT_FINITE).sum())
    groups = stretches(steps, columns)
    logs, kinds = merge(logs, kinds, groups)
    per = math.ceil(depths / ROWS)
    logs, kinds = (part.T for part in merge(logs.T, kinds.T, np.array_split(np.arange(depths), range(per, depths, per))))
    inner = [float(steps[left[-1]] + steps[right[0]]) / 2 for left, right in pairwise(groups)]
    edges = [float(steps[0]) - 0.5, *inner, float(steps[-1]) + 0.5]
    table = [
        {"x": left, "x2": right, "steps": _stretch(steps[group]), "per": per, "log10": _with_kinds(*column)}
        for (left, right), group, *column in zip(pairwise(edges), groups, logs, kinds, strict=True)
    ]
    finite = quantity.values[quantity.measured & np.isfinite(quantity.values)]
    return Figure(
        name,
        title,
        specifications.BY_NAME["heatmap"],
        {"columns": table, "layers": named(history), "onsets": _onsets(findings)},
        _merged(max(map(len, groups)), per),
        f"Heatmap of the output gradient's rms over {depths} depths and {len(steps)} recorded steps: "
        f"{_range(finite)}; {broken} values are NaN or infinite.",
    )


def depth_profile(history: History, steps: Sequence[int] = ()) -> Figure:
    """log10 of the output gradient's rms over depth at some recorded steps, with the fit and its slope.

    The dashed line is the step's fit. Hollow points belong to layers that are recorded but not fitted. Exact zeros
    stand on the lower edge, NaN and infinity on the upper one.

    Args:
        history: The steps of one optimizer.
        steps: Which recorded steps; the first, the middle and the last if empty.

    Returns:
        The figure; one that says so where no step was recorded.

    Raises:
        ValueError: A step that was not recorded.
    """
    quantity = history.by_layer.get("trunk_rms")
    name, title = "depth_profile", "Output gradient over depth"
    if quantity is None:
        return _nothing(name, title, ("profiles", "layers", "edges", "frame"))
    logs, kinds = cells(quantity.values, quantity.measured)
    chosen = _chosen(history.steps[quantity.rows], steps)
    profiles = [_profile(history, int(quantity.rows[row]), logs[row]) for row in chosen]
    edges = [
        {"label": profile["label"], "what": SPECIAL[kind], "depth": np.flatnonzero(kinds[row] == kind).tolist()}
        for profile, row in zip(profiles, chosen, strict=True)
        for kind in (NOT_FINITE, IS_ZERO)
        if (kinds[row] == kind).any()
    ]
    heights = np.concatenate([logs[chosen].ravel(), *(floats(one["line"]) for one in profiles)])
    hollow = any(not layer.trunk for layer in history.layers)
    notes = ["hollow points: recorded, not fitted"] if hollow else []
    return Figure(
        name,
        title,
        specifications.BY_NAME["depth_profile"],
        {"profiles": profiles, "layers": named(history), "edges": edges, "frame": axis_frame("log10", heights)},
        "; ".join([*notes, *_said_of_edges(edges, "depth", "depths")]),
        "Output gradient over depth at " + ", ".join(one["label"] for one in profiles) + ".",
    )


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
    before, after, threshold = (history.by_step[f"clip.{name}"] for name in ("total_norm", "total_norm_after", "threshold"))
    clips = history.rule != "none"
    wanted = {"before clipping" if clips else "norm, not clipped": before}
    if clips:
        wanted["after clipping"] = after
        if history.rule != "value" and (_drawable(threshold) > 0).any():  # by value: one element's bound is no norm
            wanted["threshold"] = threshold
    series, dots, most = [], [], 0
    for label, values in wanted.items():
        drawable = _drawable(values)
        kept = extremes(history.steps, drawable, columns)
        most = max(most, len(kept))
        series.append({"series": label, "step": history.steps[kept].tolist(), "norm": rounded(drawable[kept])})
        lonely = _lonely(drawable[kept])
        dots.append({"series": label, "step": history.steps[kept][lonely].tolist(), "norm": rounded(drawable[kept][lonely])})
    marks = {
        specifications.NOT_FINITE: ~np.isfinite(before),
        specifications.IS_ZERO: before == 0,
        specifications.SKIPPED: history.skipped,
    }
    edges = [{"what": what, "step": _few(history.steps[where], columns)} for what, where in marks.items() if where.any()]
    thinned = [f"{most:,} of {len(before):,} steps drawn, extremes kept"] if most < len(before) else []
    finite = before[np.isfinite(before)]
    heights = np.concatenate([np.log10(_drawable(values)) for values in wanted.values()])
    return Figure(
        "norms",
        f"Total gradient norm, p = {history.norm_type:g}",
        specifications.BY_NAME["norms"],
        {"series": series, "dots": dots, "edges": edges, "frame": axis_frame("norm", heights, base=10)},
        "; ".join([*thinned, *(_said(what, int(where.sum()), "steps") for what, where in marks.items() if where.any())]),
        f"Total gradient norm over {len(before)} steps: {_range(finite)} before clipping; "
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
        specifications.BY_NAME["clipping"],
        {"stretches": [table], "so_far": [{"step": history.steps[ends].tolist(), "share": rounded(so_far[ends])}]},
        words=f"{int(history.applied.sum())} of {len(history.applied)} steps were clipped.",
    )


def gain(history: History) -> Figure:
    """The local gain of each layer: what passing back through it makes of the gradient's norm; 1 keeps it."""
    return _by_depth(history, "gain", "Gain of each layer", level=1.0)


def update_ratio(history: History) -> Figure:
    """How far a step moves each layer's weights relative to their size."""
    return _by_depth(history, "update_ratio", "Update / weight")


def share(history: History) -> Figure:
    """Each layer's share of the total norm, raised to the power p so that shares sum to one."""
    return _by_depth(history, "share", "Share of the total norm", positive=False)


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
        specifications.BY_NAME["findings"],
        {"findings": table},
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
            "max_norm": [float(f"{candidate.max_norm:.4g}") for candidate in one.candidates],
            "clipped": [float(f"{candidate.clipped:.4g}") for candidate in one.candidates],
            "coefficient": rounded(floats(candidate.coefficient for candidate in one.candidates)),
        }
        for one in found
    ]
    current = [{"max_norm": tried.max_norm} for one in found for tried in one.candidates if tried.current]
    said = f"The share of steps that would have been clipped, for {sum(len(one.candidates) for one in found)} thresholds."
    return Figure(
        "what_if",
        "What another max_norm would have clipped",
        specifications.BY_NAME["what_if"],
        {"norms": table, "current": current},
        words=said,
    )


def overview(histories: Mapping[str, History], found: Mapping[str, Sequence[Finding]] | None = None) -> Figure:
    """Heatmap, profile and norms in one; with several optimizers, one row of them for each.

    Args:
        histories: The steps of each optimizer by its name.
        found: Diagnoses and violations of each optimizer.

    Returns:
        The figure that ``monitor.plot()`` and ``read_run(path).plot()`` show.
    """
    rows = [
        (name if len(histories) > 1 else "", [heatmap(one, (found or {}).get(name, ())), depth_profile(one), norms(one)])
        for name, one in histories.items()
    ]
    return grid("overview", rows or [("", [_nothing("norms", "Overview", ("series", "dots", "edges", "frame"))])])


def of_history(
    history: History, found: Sequence[Finding], answers: Sequence[WhatIf], columns: int = COLUMNS, profiles: int = 3
) -> list[Figure]:
    """Every figure of one optimizer that has something to show.

    Args:
        history: The steps of one optimizer.
        found: Diagnoses and violations.
        answers: What other thresholds would have done.
        columns: At most so many columns in figures over steps.
        profiles: At most so many steps whose profile is shown.
    """
    layers = [
        draw(history)
        for name, draw in (("gain", gain), ("share", share), ("update_ratio", update_ratio))
        if name in history.by_layer
    ]
    return [
        heatmap(history, found, columns),
        depth_profile(history, _evenly(history, profiles)),
        norms(history, columns),
        *([findings(history, found)] if found else []),
        *([clipping(history, min(columns, 40))] if history.rule != "none" else []),
        *layers,
        *([what_if(answers)] if any(one.candidates for one in answers) else []),
    ]


def named(history: History) -> list[dict[str, Any]]:
    """The table ``layers`` of a figure: what each depth is called."""
    return [{"depth": depth, "layer": layer.name} for depth, layer in enumerate(history.layers)]


def rounded(values: NDArray[Any]) -> list[float | None]:
    """Four significant digits, which no eye tells from all of them; None for what is not finite.

    Example:
        >>> rounded(np.array([1 / 3, np.nan]))
        [0.3333, None]
    """
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _by_depth(
    history: History, name: str, title: str, *, positive: bool = True, level: float | None = None
) -> Figure:
    quantity = history.by_layer.get(name)
    if quantity is None:
        return _nothing(name, title, ("spread", "layers", "level"))
    usable = np.isfinite(quantity.values) & quantity.measured & ((quantity.values > 0) | (not positive))
    known = np.flatnonzero(usable.any(axis=0))
    low, median, high = _quantiles(quantity, usable)[:, known]
    last = np.where(usable[-1], quantity.values[-1], np.nan)[known]
    spread = {"depth": known.tolist(), "low": rounded(low), "median": rounded(median), "high": rounded(high), "last": rounded(last)}
    left_out = int((quantity.measured & ~usable).sum())
    return Figure(
        name,
        title,
        specifications.BY_NAME[name],
        {"spread": [spread], "layers": named(history), "level": [] if level is None else [{"level": level}]},
        f"{left_out:,} values that are not finite{' or zero' if positive else ''} are left out" if left_out else "",
        f"{title}: the medians over {len(quantity.rows)} steps lie {_range(median)}.",
    )


def _quantiles(quantity: Quantity, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Quantiles over steps of what is usable, [3, D]; NaN for a depth that has nothing."""
    found = np.full((len(OUTER), quantity.values.shape[1]), np.nan)
    for depth in np.flatnonzero(usable.any(axis=0)):
        found[:, depth] = np.quantile(quantity.values[usable[:, depth], depth], OUTER)
    return found


def _chosen(recorded: NDArray[np.int64], steps: Sequence[int]) -> list[int]:
    if not steps:
        last = len(recorded) - 1
        return sorted({0, last // 2, last})
    unknown = [step for step in steps if step not in recorded]
    if unknown:
        raise ValueError(f"steps must be recorded ones; got {unknown[0]}, which was not recorded.")
    return [int(np.flatnonzero(recorded == step)[0]) for step in steps]


def _evenly(history: History, most: int) -> list[int]:
    """Recorded steps from the first to the last, at even distances."""
    if "trunk_rms" not in history.by_layer:
        return []
    recorded = history.steps[history.by_layer["trunk_rms"].rows]
    return [int(recorded[place]) for place in np.unique(np.linspace(0, len(recorded) - 1, most).astype(int))]


def _profile(history: History, place: int, logs: NDArray[np.float64]) -> dict[str, Any]:
    """A row of the table ``profiles``: the depths, their log10 rms, and where the fit puts them."""
    fit = history.fits.get(place)
    slope = f"{fit.slope:+.3g} decades per layer back" if fit else "no fit"
    line = _fitted_line(history, fit) if fit else {}
    step = int(history.steps[place])
    return {
        "step": step,
        "label": f"step {step:,}: {slope}",
        "depth": list(range(len(logs))),
        "log10": rounded(logs),
        "fitted": [layer.trunk for layer in history.layers],
        "line": [line.get(depth) for depth in range(len(logs))],
    }


def _fitted_line(history: History, fit: DepthFit) -> dict[int, float]:
    """Where the fit, a line through norms, puts the rms of the trunk's layers; straight where they are equally wide."""
    trunk = [depth for depth, layer in enumerate(history.layers) if layer.trunk and history.numel[depth]]
    places = zip(trunk, steps_back([history.layers[depth] for depth in trunk]), strict=True)
    line = {
        depth: fit.intercept + fit.slope * place - math.log10(history.numel[depth]) / 2 for depth, place in places
    }
    return {depth: float(f"{height:.4g}") for depth, height in line.items() if abs(height) < MOST_DECADES}


def _with_kinds(logs: NDArray[np.float64], kinds: NDArray[np.int8]) -> list[float | str | None]:
    return [
        value if kind == MEASURED else SPECIAL[kind] for value, kind in zip(rounded(logs), kinds.tolist(), strict=True)
    ]


def _onsets(found: Iterable[Finding]) -> list[dict[str, Any]]:
    ordered = sorted({(one.step, _called(one)) for one in found if isinstance(one, Violation) or one.confirmed})
    return [{"step": step, "what": f"{what} from step {step:,}"} for step, what in ordered[:MARKED]]


def _finding(one: Finding, last: int) -> dict[str, Any]:
    if isinstance(one, Violation):
        times = f", {one.count:,} times" if one.count > 1 else ""
        severity, end, when = specifications.SEVERITIES[-1], None, f"first at step {one.step:,}{times}"
    else:
        severity = SEVERITY_NAMES[one.severity]
        end = (last if one.cleared is None else one.cleared) + 0.5
        when = f"since step {one.step:,}" if one.cleared is None else f"steps {one.step:,}–{one.cleared:,}"
    start = float(one.step) if end is None else one.step - 0.5
    return {"what": _called(one), "severity": severity, "start": start, "end": end, "when": when}


def _called(one: Finding) -> str:
    return one.rule if isinstance(one, Violation) else one.condition


def _stretch(steps: NDArray[np.int64]) -> str:
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}"


def _merged(steps: int, depths: int) -> str:
    """What a cell of a thinned heatmap stands for; nothing to say of one that is not thinned."""
    parts = [f"{steps} recorded steps"] * (steps > 1) + [f"{depths} layers"] * (depths > 1)
    return f"each cell: the most extreme of up to {' and '.join(parts)}" if parts else ""


def _drawable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A gap for zero, NaN and infinity; further out an axis has no room for its ticks."""
    usable = np.isfinite(values) & (values > 0)
    return np.where(usable, np.clip(np.where(usable, values, 1.0), 1e-150, 1e150), np.nan)


def _lonely(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points a line would not show, between two gaps; all of a short series."""
    gap = ~np.isfinite(values)
    if len(values) <= DOTTED:
        return ~gap
    return ~gap & np.append(True, gap[:-1]) & np.append(gap[1:], True)


def axis_frame(field: str, heights: NDArray[np.float64], base: float | None = None) -> list[dict[str, float]]:
    """The limits of an axis of log10 values: the data and a little air, a decade at least."""
    finite = heights[np.isfinite(heights)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (-0.5, 0.5)
    wider = max(0.04 * (high - low), (1.0 - (high - low)) / 2)
    limits = (low - wider, high + wider)
    return [{field: float(f"{limit if base is None else base**limit:.4g}")} for limit in limits]


def _few(steps: NDArray[np.int64], columns: int) -> list[int]:
    """One step of each stretch: marks of more would cover each other."""
    return [int(steps[group[0]]) for group in stretches(steps, columns)]


def _said_of_edges(edges: Sequence[Mapping[str, Any]], field: str, unit: str) -> list[str]:
    counts: dict[str, int] = {}
    for edge in edges:
        counts[edge["what"]] = counts.get(edge["what"], 0) + len(edge[field])
    return [_said(what, count, unit) for what, count in counts.items()]


def _said(what: str, count: int, unit: str) -> str:
    where = {
        specifications.NOT_FINITE: "crosses on the upper edge",
        specifications.IS_ZERO: "triangles on the lower edge",
        specifications.SKIPPED: "squares on the lower edge",
    }[what]
    return f"{where}: {what} ({count:,} {unit if count > 1 else unit[:-1]})"


def _range(values: NDArray[np.float64]) -> str:
    finite = values[np.isfinite(values)]
    return f"between {finite.min():.3g} and {finite.max():.3g}" if len(finite) else "nowhere finite"


def floats(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values])


def _nothing(name: str, title: str, tables: Iterable[str]) -> Figure:
    empty: dict[str, list[Any]] = {table: [] for table in tables}
    return Figure(name, title, specifications.BY_NAME[name], empty, "no recorded step", f"{title}: no recorded step.")
