"""How what is too long or too deep for a picture is thinned: extremes stay, and the picture says so. numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

COLUMNS, ROWS = 160, 100
"""Most columns and rows of a heatmap: about what its pixels can tell apart."""

MISSING, MEASURED, IS_ZERO, NOT_FINITE = range(4)
"""Kinds of cells, by what wins when cells are merged."""

Number = TypeVar("Number", np.int64, np.float64)


def stretches(steps: NDArray[np.int64], most: int = COLUMNS) -> list[NDArray[np.intp]]:
    """Places in ``steps`` (ascending) grouped by equal stretches of the time line.

    Args:
        steps: Shape [S].
        most: At most so many groups.

    Example:
        >>> [group.tolist() for group in stretches(np.array([0, 1, 2, 10]), 2)]
        [[0, 1, 2], [3]]
    """
    if not len(steps):
        return []
    stretch = (steps - steps[0]) * most // (steps[-1] - steps[0] + 1)
    return np.split(np.arange(len(steps)), np.flatnonzero(np.diff(stretch)) + 1)


def extremes(steps: NDArray[np.int64], values: NDArray[np.float64], most: int = COLUMNS) -> NDArray[np.intp]:
    """Places to draw of a series: in every stretch the first, the last, the smallest, the largest and one gap.

    Args:
        steps: Ascending, shape [S].
        values: Shape [S]; what is not finite is a gap.
        most: At most so many stretches.

    Returns:
        Places, ascending; all of them where no more than ``2 * most`` steps are given.

    Example:
        >>> extremes(np.arange(7), np.array([1.0, 1, 9, 1, 1, 0, 1]), 1).tolist()
        [0, 2, 5, 6]
    """
    if len(steps) <= 2 * most:
        return np.arange(len(steps))
    kept: set[int] = set()
    for group in stretches(steps, most):
        inside = values[group]
        finite = np.flatnonzero(np.isfinite(inside))
        places = [0, len(group) - 1]
        if len(finite) < len(group):
            places.append(int(np.flatnonzero(~np.isfinite(inside))[0]))
        if len(finite):
            places += [int(finite[inside[finite].argmin()]), int(finite[inside[finite].argmax()])]
        kept.update(int(group[place]) for place in places)
    return np.array(sorted(kept))


def cells(values: NDArray[np.float64], measured: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """log10 of magnitudes, and what kind of number each is; the first is NaN unless the second is MEASURED.

    Example:
        >>> logs, kinds = cells(np.array([0.01, 0.0, np.inf, np.nan]), np.array([True, True, True, False]))
        >>> logs[0].item(), kinds.tolist() == [MEASURED, IS_ZERO, NOT_FINITE, MISSING]
        (-2.0, True)
    """
    kinds = np.where(np.isfinite(values), np.where(values > 0, MEASURED, IS_ZERO), NOT_FINITE)
    kinds = np.where(measured, kinds, MISSING).astype(np.int8)
    logs = np.full(values.shape, np.nan)
    np.log10(values, where=kinds == MEASURED, out=logs)
    return logs, kinds


def merge(
    logs: NDArray[np.float64], kinds: NDArray[np.int8], groups: Sequence[NDArray[np.intp]]
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """One row for each group of rows: not finite wins over zero, zero over the value furthest from its column's median.

    Args:
        logs: Shape [R, D].
        kinds: Likewise.
        groups: Places of rows, G of them.

    Returns:
        Both with shape [G, D].
    """
    if len(groups) == len(logs):
        return logs, kinds
    finite = np.where(np.isfinite(logs), logs, np.nan)
    empty = np.isnan(finite).all(axis=0)
    middle = np.zeros(logs.shape[1])
    middle[~empty] = np.nanmedian(finite[:, ~empty], axis=0)
    rank = kinds * 1e6 + np.nan_to_num(abs(logs - middle))
    chosen = np.stack([group[rank[group].argmax(axis=0)] for group in groups])
    return np.take_along_axis(logs, chosen, axis=0), np.take_along_axis(kinds, chosen, axis=0)
