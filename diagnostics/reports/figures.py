"""Figures of one run: the gradient over depth and step, its profile over depth, and the norm that was clipped.

A function takes the records of one optimizer and returns a ``matplotlib.figure.Figure`` that belongs to no window and
to no global state. matplotlib and numpy are imported when a figure is drawn, never before.
"""

# ruff: noqa: PLC0415 -- see above

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from diagnostics.records import DepthFit, GradientStats, Layer, StepRecord, steps_back
from diagnostics.reports.drawing import (
    ALARM,
    BLACK,
    BLUE,
    BOTTOM,
    GREEN,
    INK,
    ORANGE,
    TOP,
    at_least_a_decade,
    extremes,
    legend,
    mark,
    name,
    new_figure,
    say,
    short,
    stretches,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

LEGEND_MARKS = 4
MOST_DECADES = 400  # float64 ends at 324; what lies beyond came from a damaged log
MISSING, MEASURED, IS_ZERO, NOT_FINITE = range(4)


def heatmap(records: Sequence[StepRecord]) -> Figure:
    """Depth × step: log10 of the output gradient's rms, one column per recorded step.

    Exact zeros are black, NaN and infinity red with a cross above their step; a layer that was not called is grey. In a
    run too long for one column per step a column shows the most extreme of its steps, and the figure says so.
    Triangles above mark the onset of diagnoses, diamonds the first break of a rule of the loop.

    Args:
        records: Step records of one optimizer.

    Returns:
        The figure; one that says so where no step was recorded.

    Example:
        >>> heatmap([]).axes[0].get_title(loc="left")
        'Output gradient by depth and step'
    """
    return _alone(_draw_heatmap, records)


def depth_profile(records: Sequence[StepRecord]) -> Figure:
    """log10 of the output gradient's rms over depth, at the first, the middle and the last recorded step.

    The dashed line is ``StepRecord.fit``; its slope stands in the legend. Hollow points belong to layers that are
    recorded but not fitted. Exact zeros stand on the lower edge, NaN and infinity on the upper one.

    Args:
        records: Step records of one optimizer.

    Returns:
        The figure; one that says so where no step was recorded.

    Example:
        >>> depth_profile([]).axes[0].get_title(loc="left")
        'Output gradient over depth'
    """
    return _alone(_draw_profile, records)


def norms(records: Sequence[StepRecord]) -> Figure:
    """Total gradient norm before and after clipping, with the threshold, over all steps.

    Crosses on the upper edge are norms that are NaN or infinite, triangles on the lower edge norms that are zero,
    squares on the lower edge steps that were skipped. A long run keeps the extremes of each stretch, and says so.

    Args:
        records: Step records of one optimizer.

    Returns:
        The figure; one that says so where there is no step.

    Example:
        >>> norms([]).axes[0].get_title(loc="left")
        'Total gradient norm'
    """
    return _alone(_draw_norms, records)


def overview(records: Sequence[StepRecord]) -> Figure:
    """All three figures in one; with several optimizers, one row of them for each.

    Args:
        records: Step records, of one optimizer or of several.

    Returns:
        The figure that ``monitor.plot()`` and ``read_run(path).plot()`` show.

    Example:
        >>> len(overview([]).axes)
        3
    """
    optimizers = list(dict.fromkeys(record.optimizer for record in records)) or [""]
    figure = new_figure(15.0, 4.0 * len(optimizers))
    rows = figure.subfigures(len(optimizers), 1, squeeze=False)[:, 0]
    for optimizer, row in zip(optimizers, rows, strict=True):
        if len(optimizers) > 1:
            row.suptitle(short(optimizer, 80), color=INK, parse_math=False)
        own = [record for record in records if record.optimizer == optimizer]
        for axes, draw in zip(row.subplots(1, 3), (_draw_heatmap, _draw_profile, _draw_norms), strict=True):
            draw(axes, own)
    return figure


def _alone(draw: Callable[[Axes, Sequence[StepRecord]], None], records: Sequence[StepRecord]) -> Figure:
    figure = new_figure(4.8, 3.7)
    draw(figure.add_subplot(), records)
    return figure


def _outputs(record: StepRecord) -> list[tuple[Layer, GradientStats]]:
    rows = record.layers.before_step if record.recorded else ()
    return [(row.layer, row.output) for row in rows if row.output is not None]


def _with_outputs(records: Sequence[StepRecord]) -> list[StepRecord]:
    return sorted((record for record in records if _outputs(record)), key=lambda record: record.step)


def _cell(stats: GradientStats) -> tuple[float, int]:
    """log10 rms and what kind of number the rms is; the first is NaN unless the second is MEASURED."""
    if stats.nonfinite or not math.isfinite(stats.rms):
        return math.nan, NOT_FINITE
    return (math.log10(stats.rms), MEASURED) if stats.rms > 0 else (math.nan, IS_ZERO)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Cells of the heatmap: one row per depth, one column per recorded step or stretch of steps."""

    edges: NDArray[np.float64]
    values: NDArray[np.float64]
    kinds: NDArray[np.int8]
    most: int


def _grid(recorded: Sequence[StepRecord]) -> _Grid:
    import numpy as np

    cells = [[(layer.depth, *_cell(stats)) for layer, stats in _outputs(record)] for record in recorded]
    values = np.full((1 + max(depth for column in cells for depth, _, _ in column), len(cells)), np.nan)
    kinds = np.full(values.shape, MISSING, dtype=np.int8)
    for index, column in enumerate(cells):
        for depth, value, kind in column:
            values[depth, index], kinds[depth, index] = value, kind
    steps = np.array([record.step for record in recorded])
    groups = stretches(steps)
    inner = [(steps[left[-1]] + steps[right[0]]) / 2 for left, right in pairwise(groups)]
    edges = np.array([steps[0] - 0.5, *inner, steps[-1] + 0.5])
    return _Grid(edges, *_extremes(values, kinds, groups), most=max(map(len, groups)))


def _extremes(
    values: NDArray[np.float64], kinds: NDArray[np.int8], groups: Sequence[NDArray[np.intp]]
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """One column per group: not finite wins over zero, zero over the value furthest from the median of its row."""
    import numpy as np

    finite = [row[np.isfinite(row)] for row in values]
    middle = np.array([np.median(row) if len(row) else 0.0 for row in finite])
    distance = np.nan_to_num(abs(values - middle[:, None]))
    rank = kinds * 1e6 + distance
    chosen = np.stack([group[rank[:, group].argmax(axis=1)] for group in groups], axis=1)
    return np.take_along_axis(values, chosen, axis=1), np.take_along_axis(kinds, chosen, axis=1)


def _draw_heatmap(axes: Axes, records: Sequence[StepRecord]) -> None:
    import numpy as np

    recorded = _with_outputs(records)
    name(axes, "Output gradient by depth and step", "optimizer step", "depth (in call order)")
    if not recorded:
        return say(axes, "no recorded step")
    grid = _grid(recorded)
    axes.set_facecolor((INK, 0.25))
    axes.pcolormesh(grid.edges, np.arange(len(grid.values) + 1) - 0.5, _colours(axes, grid), rasterized=True)
    axes.invert_yaxis()
    axes.locator_params(integer=True)
    centres = (grid.edges[:-1] + grid.edges[1:]) / 2
    mark(axes, centres[(grid.kinds == NOT_FINITE).any(axis=0)], TOP, "x", "NaN or infinite (red)")
    if (grid.kinds == IS_ZERO).any():
        axes.plot([], [], "s", color=BLACK, markeredgecolor=INK, label="exactly zero")
    _mark_onsets(axes, records)
    return legend(axes, f"each column: the most extreme of up to {grid.most} recorded steps" if grid.most > 1 else "")


def _colours(axes: Axes, grid: _Grid) -> NDArray[np.float64]:
    """One colour per cell; draws the bar that tells what they mean."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba

    finite = grid.values[grid.kinds == MEASURED]
    scale = Normalize(*at_least_a_decade(finite.min(), finite.max()) if len(finite) else (0.0, 1.0))
    bar = axes.figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, pad=0.02)
    bar.set_label("log10 rms (loss per output)", color=INK, fontsize="small")
    bar.ax.tick_params(colors=INK, labelsize="small")
    bar.outline.set_visible(False)  # type: ignore[operator]
    colours: NDArray[np.float64] = colormaps["viridis"](scale(np.nan_to_num(grid.values)))
    for kind, colour in ((MISSING, "none"), (IS_ZERO, BLACK), (NOT_FINITE, ALARM)):
        colours[grid.kinds == kind] = to_rgba(colour)
    return colours


def _mark_onsets(axes: Axes, records: Sequence[StepRecord]) -> None:
    found = {(d.step, d.condition, "v") for record in records for d in record.diagnoses if d.confirmed}
    broken = {(v.step, v.rule, "D") for record in records for v in record.violations}
    marks = sorted(found | broken)
    for index, (step, what, marker) in enumerate(marks):
        label = f"{short(what)} from step {step:,}" if index < LEGEND_MARKS else ""
        lane, colour = (TOP + 0.03, ORANGE) if marker == "v" else (TOP + 0.06, BLUE)
        mark(axes, [step], lane, marker, label, color=colour, markersize=5)
    if len(marks) > LEGEND_MARKS:
        axes.plot([], [], " ", label=f"and {len(marks) - LEGEND_MARKS} more")


def _draw_profile(axes: Axes, records: Sequence[StepRecord]) -> None:
    from matplotlib.ticker import MaxNLocator

    recorded = _with_outputs(records)
    x, y = "depth (in call order)", "log10 rms (loss per output)"
    name(axes, "Output gradient over depth", x, y)
    if not recorded:
        return say(axes, "no recorded step")
    last = len(recorded) - 1
    chosen = sorted({0, last // 2, last})
    for index, look in zip(chosen, ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^")), strict=False):
        _draw_profile_of(axes, recorded[index], *look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(*at_least_a_decade(*axes.get_ylim()))
    axes.grid(axis="y", color=INK, alpha=0.25)
    return legend(axes)


def _draw_profile_of(axes: Axes, record: StepRecord, colour: str, marker: str) -> None:
    rows = [(row.layer, row.output, row.trunk_rms) for row in record.layers.before_step]
    cells = [
        (layer, *_cell(replace(stats, rms=rms))) for layer, stats, rms in rows if stats is not None and rms is not None
    ]
    look: dict[str, Any] = {
        "color": colour,
        "markersize": 5.5 if len(cells) < 60 else 2.5,
        "rasterized": len(cells) > 400,
    }
    for trunk, fill in ((True, "full"), (False, "none")):
        points = [(layer.depth, value) for layer, value, kind in cells if kind == MEASURED and layer.trunk is trunk]
        if points:
            axes.plot(*zip(*points, strict=True), marker, fillstyle=fill, **look)
    for kind, edge, sign in ((NOT_FINITE, TOP, "x"), (IS_ZERO, BOTTOM, "v")):
        mark(axes, [layer.depth for layer, _, found in cells if found == kind], edge, sign, "", color=colour)
    line = _fitted_line([layer for layer, _, _ in cells if layer.trunk], record.fit)
    label = f"step {record.step:,}: "
    label += f"{record.fit.slope:+.3g} decades per layer back" if record.fit else "no fit"
    axes.plot(*zip(*line, strict=True), "--", color=colour)
    axes.plot([], [], "--", marker=marker, color=colour, label=label)


def _fitted_line(trunk: Sequence[Layer], fit: DepthFit | None) -> list[tuple[int, float]]:
    """Where the fit puts the layers of the trunk; its unit is one layer of the trunk."""
    if fit is None:
        return [(0, math.nan)]
    places = zip(trunk, steps_back(trunk), strict=True)
    line = [(layer.depth, fit.intercept + fit.slope * place) for layer, place in places]
    return [(depth, height) for depth, height in line if abs(height) < MOST_DECADES] or [(0, math.nan)]


def _draw_norms(axes: Axes, records: Sequence[StepRecord]) -> None:
    import numpy as np

    order = sorted(records, key=lambda record: record.step)
    p = f"{order[-1].clip.norm_type:g}" if order else "2"
    name(axes, "Total gradient norm", "optimizer step", f"norm, p = {p} (loss per parameter)")
    if not order:
        return say(axes, "no step")
    steps = np.array([record.step for record in order])
    before = np.array([record.clip.total_norm for record in order])
    kept = extremes(steps, before, np.array([record.clip.total_norm_after for record in order]))
    _draw_lines(axes, [order[index] for index in kept])
    mark(axes, steps[~np.isfinite(before)], TOP, "x", "NaN or infinite")
    mark(axes, steps[before == 0], BOTTOM, "v", "exactly zero", color=BLUE)
    mark(axes, steps[[record.skipped for record in order]], BOTTOM, "s", "step skipped", markersize=4)
    drawn = f"{len(kept):,} of {len(order):,} steps drawn, extremes kept"
    return legend(axes, drawn if len(kept) < len(order) else "")


def _draw_lines(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Norm before, norm after and threshold; one line where nothing is clipped."""
    clips = [record.clip for record in records]
    steps = [record.step for record in records]
    dots: dict[str, Any] = {"marker": ".", "markersize": 4} if len(records) < 60 else {}
    clipping = any(clip.rule != "none" for clip in clips)
    label = "before clipping" if clipping else "norm, not clipped"
    axes.set_yscale("log")
    axes.plot(steps, [_drawable(clip.total_norm) for clip in clips], color=BLUE, label=label, **dots)
    if clipping:
        after = [_drawable(clip.total_norm_after) for clip in clips]
        axes.plot(steps, after, color=ORANGE, linewidth=1, label="after clipping", **dots)
        thresholds = [None if clip.rule == "value" else clip.threshold for clip in clips]  # one element's is no norm
        if any(_drawable(threshold) > 0 for threshold in thresholds):
            axes.plot(steps, [_drawable(threshold) for threshold in thresholds], "--", color=INK, label="threshold")
    _ticks(axes)
    axes.grid(axis="y", color=INK, alpha=0.25)


def _drawable(value: float | None) -> float:
    """A gap for zero, NaN and infinity; further out an axis has no room for its ticks."""
    return min(max(value, 1e-150), 1e150) if value is not None and 0 < value < math.inf else math.nan


def _ticks(axes: Axes) -> None:
    """Plain numbers on a logarithmic axis, enough of them on one that spans little."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = at_least_a_decade(*(math.log10(limit) for limit in axes.get_ylim()))
    axes.set_ylim(10**low, 10**high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2.5 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
