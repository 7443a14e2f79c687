"""Several runs in one figure: laid over each other by depth, and one folder of runs held against another. numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.reports.comparison import Comparison
from diagnostics.reports.drawing import Figure
from diagnostics.reports.figures.numbers import axis_frame, floats, rounded
from diagnostics.reports.fleet import Fleet, Row
from diagnostics.reports.history import History
from diagnostics.reports.specifications import BY_NAME
from diagnostics.reports.thinning import cells

MOST_OF_A_KIND = 4  # sick rows and sound ones: there are eight colours and shapes that can be told apart
SEPARATOR = " · "


def overlay(profiles: Mapping[str, Sequence[Sequence[float | None]]], note: str = "") -> Figure:
    """Profiles of several runs in one figure; runs under one name, as those that differ in their seed, have a band.

    Args:
        profiles: By name, the profiles of its runs (:func:`last_profile`). By relative depth where depths differ.
        note: What the names say.

    Returns:
        The figure.
    """
    table = [{"run": name, **row} for name, own in profiles.items() if (row := band(own))]
    same = len({len(next(filter(None, own))) for own in profiles.values() if any(own)}) <= 1
    heights = np.concatenate([floats(row[end]) for row in table for end in ("low", "high")] or [np.zeros(0)])
    name = "overlay" if same else "overlay_relative"
    return Figure(
        name,
        "Output gradient over depth, run by run",
        BY_NAME[name],
        {"runs": table, "frame": axis_frame("log10", heights)},
        note,
        f"Output gradient over depth of {len(table)} runs or groups of runs at their last recorded step.",
    )


def band(profiles: Sequence[Sequence[float | None]]) -> dict[str, list[Any]]:
    """Median and range over some runs' profiles at each depth; empty without one. Runs of another depth are left out.

    Example:
        >>> band([[-1.0, -2.0], [-3.0, None]])["median"]
        [-2.0, -2.0]
    """
    like = [own for own in profiles if own and len(own) == len(next(filter(None, profiles)))]
    if not like:
        return {}
    values = np.array([floats(own) for own in like])
    known = np.isfinite(values).any(axis=0)
    depths = np.flatnonzero(known)
    last = max(values.shape[1] - 1, 1)
    of = np.nanquantile if np.isnan(values[:, known]).any() else np.quantile  # the latter is fifty times as fast
    low, median, high = of(values[:, known], (0, 0.5, 1), axis=0)
    return {
        "depth": depths.tolist(),
        "relative": rounded(depths / last),
        "low": rounded(low),
        "median": rounded(median),
        "high": rounded(high),
    }


def last_profile(history: History) -> list[float | None]:
    """log10 of the trunk's output gradient at each depth at the last recorded step; empty where there is none."""
    quantity = history.by_layer.get("trunk_rms")
    if quantity is None:
        return []
    trunk = [place for place, layer in enumerate(history.layers) if layer.trunk]
    logs, _ = cells(quantity.values[-1:, trunk], quantity.measured[-1:, trunk])
    return rounded(logs[0])


def compared(comparison: Comparison) -> tuple[Figure, Figure]:
    """Folders of runs by relative depth, and by how many decades they differ from the first.

    Args:
        comparison: As :func:`diagnostics.reports.comparison.compare` returns it.

    Returns:
        Profiles with their range over runs; differences.
    """
    depths = list(comparison.depths)
    sides = [
        {"run": one.label, "depth": depths, "relative": depths}
        | {"low": _numbers(one.low), "median": _numbers(one.profile), "high": _numbers(one.high)}
        for one in comparison.sides
    ]
    heights = np.array([[one.low, one.high] for one in comparison.sides])
    apart = [
        {"side": one.label, "relative": depths, "decades": _numbers(comparison.differences(index))}
        for index, one in enumerate(comparison.sides)
        if index
    ]
    return (
        Figure(
            "overlay_relative",
            "Output gradient over depth",
            BY_NAME["overlay_relative"],
            {"runs": sides, "frame": axis_frame("log10", heights)},
            "each run's median over its recorded steps; the band spans the runs",
            comparison.sentence,
        ),
        Figure(
            "differences",
            f"Difference to {comparison.sides[0].label}",
            BY_NAME["differences"],
            {"differences": apart},
            words=comparison.sentence,
        ),
    )


def of_fleet(
    fleet: Fleet, described: Mapping[Any, Mapping[str, Any]], comparison: Comparison | None = None
) -> list[Figure]:
    """The figures of many runs: the sickest rows beside sound ones, and the comparison where there is one.

    Args:
        fleet: The rows.
        described: Each run as :func:`diagnostics.reports.view.describe` gives it, by the path of its log.
        comparison: Of the folders.
    """
    known = [row for row in fleet.rows if any(path in described for path in row.logs)]
    sick = [row for row in known if row.sick][:MOST_OF_A_KIND]
    rows = [*sick, *[row for row in known if not row.sick][:MOST_OF_A_KIND]]
    names, note = _names(rows)
    profiles = {
        name: [described[path]["profile"] for path in row.logs if path in described]
        for name, row in zip(names, rows, strict=True)
    }
    return [overlay(profiles, note), *(compared(comparison) if comparison else ())]


def _names(rows: Sequence[Row]) -> tuple[list[str], str]:
    """Short names that tell the rows apart, and what stands in them: values alone where all rows have the same keys."""
    common = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    own = [[one.partition("=") for one in row.overrides if one not in common] for row in rows]
    keys = {tuple(key.rpartition(".")[2] for key, _, _ in pairs) for pairs in own}
    names = [SEPARATOR.join(value for _, _, value in pairs) for pairs in own]
    if len(keys) == 1 and all(names) and len(set(names)) == len(names):
        return names, SEPARATOR.join(*keys)
    return [f"{place}: {row.label}" for place, row in enumerate(rows, 1)], ""


def _numbers(values: Sequence[float]) -> list[float | None]:
    return rounded(np.array(values))
