"""What figures share: numbers rounded for a page, limits of axes, marks on the edges in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.records import Diagnosis, Violation
from diagnostics.reports.drawing import Figure
from diagnostics.reports.history import History
from diagnostics.reports.specifications import BY_NAME, parts
from diagnostics.reports.thinning import stretches

Finding = Diagnosis | Violation


def called(one: Finding) -> str:
    """The name of what was found."""
    return one.rule if isinstance(one, Violation) else one.condition


def named(history: History) -> list[dict[str, Any]]:
    """The table ``layers`` of a figure: what each depth is called."""
    return [{"depth": depth, "layer": layer.name} for depth, layer in enumerate(history.layers)]


def rounded(values: NDArray[Any]) -> list[float | None]:
    """Four significant digits, which no eye tells from all of them; None for what is not finite.

    Example:
        >>> rounded(np.array([1 / 3, np.nan]))
        [0.3333, None]
    """
    return [_short(value) if math.isfinite(value) else None for value in values.tolist()]


def _short(value: float) -> float:
    rounded = float(f"{value:.4g}")
    return rounded if math.isfinite(rounded) else value  # the largest numbers would round up to infinity


def drawable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A gap for zero, NaN and infinity; further out an axis has no room for its ticks."""
    usable = np.isfinite(values) & (values > 0)
    return np.where(usable, np.clip(np.where(usable, values, 1.0), 1e-150, 1e150), np.nan)


def axis_frame(field: str, heights: NDArray[np.float64], base: float | None = None) -> list[dict[str, float]]:
    """The limits of an axis of log10 values: the data and a little air, a decade at least."""
    finite = heights[np.isfinite(heights)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (-0.5, 0.5)
    wider = max(0.04 * (high - low), (1.0 - (high - low)) / 2)
    limits = (low - wider, high + wider)
    return [{field: float(f"{limit if base is None else base**limit:.4g}")} for limit in limits]


def few(steps: NDArray[np.int64], columns: int) -> list[int]:
    """One step of each stretch: marks of more would cover each other."""
    return [int(steps[group[0]]) for group in stretches(steps, columns)]


def said_of_edges(edges: Sequence[Mapping[str, Any]], field: str, unit: str) -> list[str]:
    """How many marks stand on the edges, in words."""
    counts: dict[str, int] = {}
    for edge in edges:
        counts[edge["what"]] = counts.get(edge["what"], 0) + len(edge[field])
    return [said(what, count, unit) for what, count in counts.items()]


def said(what: str, count: int, unit: str) -> str:
    """What a mark on an edge stands for, and how many there are."""
    where = {
        parts.NOT_FINITE: "crosses on the upper edge",
        parts.IS_ZERO: "triangles on the lower edge",
        parts.SKIPPED: "squares on the lower edge",
    }[what]
    return f"{where}: {what} ({count:,} {unit if count > 1 else unit[:-1]})"


def span(values: NDArray[np.float64]) -> str:
    """Where finite values lie, in words."""
    finite = values[np.isfinite(values)]
    return f"between {finite.min():.3g} and {finite.max():.3g}" if len(finite) else "nowhere finite"


def floats(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Numbers in which NaN stands for what is missing."""
    return np.array([math.nan if value is None else value for value in values])


def nothing(name: str, title: str, tables: Iterable[str]) -> Figure:
    """A figure without a mark that says that no step was recorded."""
    empty: dict[str, list[Any]] = {table: [] for table in tables}
    return Figure(name, title, BY_NAME[name], empty, "no recorded step", f"{title}: no recorded step.")
