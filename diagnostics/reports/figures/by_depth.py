"""Figures over depth: the heatmap, the profile with its fit, and one number of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.records import DepthFit, Violation, steps_back
from diagnostics.reports.drawing import Figure
from diagnostics.reports.figures.numbers import (
    Finding,
    axis_frame,
    called,
    floats,
    named,
    nothing,
    rounded,
    said_of_edges,
    span,
)
from diagnostics.reports.history import History, Quantity
from diagnostics.reports.specifications import BY_NAME, parts
from diagnostics.reports.thinning import (
    COLUMNS,
    IS_ZERO,
    MEASURED,
    MISSING,
    NOT_FINITE,
    ROWS,
    cells,
    merge,
    stretches,
)

MOST_DECADES = 400  # float64 ends at 324; what lies beyond came from a damaged log
MARKED = 4  # onsets above a heatmap; the time line of findings shows all
OUTER = (0.1, 0.5, 0.9)
"""Quantiles that a spread over steps shows."""
SPECIAL = {MISSING: None, IS_ZERO: parts.IS_ZERO, NOT_FINITE: parts.NOT_FINITE}


def heatmap(history: History, findings: Iterable[Finding] = (), columns: int = COLUMNS) -> Figure:
    """Depth × step: log10 of the output gradient's rms, one column per recorded step.

    Exact zeros are black, NaN and infinity red; a layer that was not called is grey. In a run too long or too deep for
    one cell each, a cell shows the most extreme of what it stands for, and the figure says so. Marks above show the
    onset of diagnoses and the first break of each rule of the loop.

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
        return nothing(name, title, ("columns", "layers", "onsets"))
    steps, depths = history.steps[quantity.rows], len(history.layers)
    logs, kinds = cells(quantity.values, quantity.measured)
    broken = int((kinds == NOT_FINITE).sum())
    groups = stretches(steps, columns)
    logs, kinds = merge(logs, kinds, groups)
    per = math.ceil(depths / ROWS)
    rows = np.array_split(np.arange(depths), range(per, depths, per))
    logs, kinds = merge(logs.T, kinds.T, rows)
    logs, kinds = logs.T, kinds.T
    inner = [float(steps[left[-1]] + steps[right[0]]) / 2 for left, right in pairwise(groups)]
    edges = [float(steps[0]) - 0.5, *inner, float(steps[-1]) + 0.5]
    table = [
        {"x": left, "x2": right, "steps": _stretch(steps[group]), "per": per, "log10": with_kinds(*column)}
        for (left, right), group, *column in zip(pairwise(edges), groups, logs, kinds, strict=True)
    ]
    finite = quantity.values[quantity.measured & np.isfinite(quantity.values)]
    return Figure(
        name,
        title,
        BY_NAME["heatmap"],
        {"columns": table, "layers": named(history), "onsets": _onsets(findings)},
        _merged(max(map(len, groups)), per),
        f"Heatmap of the output gradient's rms over {depths} depths and {len(steps)} recorded steps: "
        f"{span(finite)}; {broken} values are NaN or infinite.",
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
        return nothing(name, title, ("profiles", "layers", "edges", "frame"))
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
        BY_NAME["depth_profile"],
        {"profiles": profiles, "layers": named(history), "edges": edges, "frame": axis_frame("log10", heights)},
        "; ".join([*notes, *said_of_edges(edges, "depth", "depths")]),
        "Output gradient over depth at " + ", ".join(one["label"] for one in profiles) + ".",
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


def evenly(history: History, most: int) -> list[int]:
    """Recorded steps from the first to the last, at even distances."""
    if "trunk_rms" not in history.by_layer:
        return []
    recorded = history.steps[history.by_layer["trunk_rms"].rows]
    return [int(recorded[place]) for place in np.unique(np.linspace(0, len(recorded) - 1, most).astype(int))]


def _by_depth(history: History, name: str, title: str, *, positive: bool = True, level: float | None = None) -> Figure:
    quantity = history.by_layer.get(name)
    if quantity is None:
        return nothing(name, title, ("spread", "layers", "level"))
    usable = np.isfinite(quantity.values) & quantity.measured & ((quantity.values > 0) | (not positive))
    known = np.flatnonzero(usable.any(axis=0))
    low, median, high = _quantiles(quantity, usable)[:, known]
    last = np.where(usable[-1], quantity.values[-1], np.nan)[known]
    spread = {
        "depth": known.tolist(),
        "low": rounded(low),
        "median": rounded(median),
        "high": rounded(high),
        "last": rounded(last),
    }
    left_out = int((quantity.measured & ~usable).sum())
    return Figure(
        name,
        title,
        BY_NAME[name],
        {"spread": [spread], "layers": named(history), "level": [] if level is None else [{"level": level}]},
        f"{left_out:,} values that are not finite{' or zero' if positive else ''} are left out" if left_out else "",
        f"{title}: the medians over {len(quantity.rows)} steps lie {span(median)}.",
    )


def _quantiles(quantity: Quantity, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Quantiles over steps of what is usable, [3, D]; NaN for a depth that has nothing."""
    if usable.all():
        whole: NDArray[np.float64] = np.quantile(quantity.values, OUTER, axis=0)
        return whole
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


def _profile(history: History, place: int, logs: NDArray[np.float64]) -> dict[str, Any]:
    """A row of the table ``profiles``: the depths, their log10 rms, and where the fit puts them."""
    fit = history.fits.get(place)
    slope = f"{fit.slope:+.3g} decades per layer" if fit else "no fit"
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
    line = {depth: fit.intercept + fit.slope * place - math.log10(history.numel[depth]) / 2 for depth, place in places}
    return {depth: float(f"{height:.4g}") for depth, height in line.items() if abs(height) < MOST_DECADES}


def with_kinds(logs: NDArray[np.float64], kinds: NDArray[np.int8]) -> list[float | str | None]:
    """A column of the table ``columns``; a hundredth of a decade is less than a colour can tell."""
    return [
        round(value, 2) if kind == MEASURED else SPECIAL[kind]
        for value, kind in zip(logs.tolist(), kinds.tolist(), strict=True)
    ]


def _onsets(found: Iterable[Finding]) -> list[dict[str, Any]]:
    ordered = sorted({(one.step, called(one)) for one in found if isinstance(one, Violation) or one.confirmed})
    return [{"step": step, "what": f"{what} from step {step:,}"} for step, what in ordered[:MARKED]]


def _stretch(steps: NDArray[np.int64]) -> str:
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}"


def _merged(steps: int, depths: int) -> str:
    """What a cell of a thinned heatmap stands for; nothing to say of one that is not thinned."""
    parts = [f"{steps} recorded steps"] * (steps > 1) + [f"{depths} layers"] * (depths > 1)
    return f"each cell: the most extreme of up to {' and '.join(parts)}" if parts else ""
