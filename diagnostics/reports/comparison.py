"""Did my fix work: the same numbers of two folders of runs or more, side by side, by depth, with differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagnostics.reports.fleet import Fleet, Spread, Summary
from diagnostics.reports.history import History

GRID = tuple(place / 10 for place in range(11))
"""Relative depths: 0 is the first layer of the forward pass, 1 the last."""


@dataclass(frozen=True, slots=True)
class Side:
    """The runs of one folder.

    Attributes:
        label: The folder, as given.
        runs: How many.
        sick: How many of them are sick.
        conditions: Verdicts with counts, the most frequent first.
        slope: Of the last backward slopes, in decades per layer.
        loss: Of the last losses.
        profile: log10 of the output gradient's rms at :data:`GRID`: each run's median over its recorded steps, then
            the median over runs; NaN where no run has a finite value.
        low: The smallest run's, where ``profile`` is the median's.
        high: The largest run's.
    """

    label: str
    runs: int
    sick: int
    conditions: Mapping[str, int]
    slope: Spread | None
    loss: Spread | None
    profile: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several folders of runs; the first is what the others are held against.

    Attributes:
        depths: The relative depths of the profiles, :data:`GRID`.
        sides: In the order given.
        sentence: What became better or worse, from the first to the last.
    """

    depths: tuple[float, ...]
    sides: tuple[Side, ...]
    sentence: str

    def differences(self, side: int) -> tuple[float, ...]:
        """Decades by which that side's profile lies above the first one's, by depth."""
        return tuple(
            after - before for before, after in zip(self.sides[0].profile, self.sides[side].profile, strict=True)
        )


def relative_profile(history: History) -> NDArray[np.float64]:
    """A run's median log10 rms of output gradients over its recorded steps, by relative depth.

    Trunk layers count, with the residual stream's gradient where they end a branch of it. Exact zeros and non-finite
    values are left out of the median.

    Args:
        history: The steps of one optimizer.

    Returns:
        Shape [len(GRID)]; NaN everywhere where nothing was recorded.
    """
    quantity = history.by_layer.get("trunk_rms")
    places = [place for place, layer in enumerate(history.layers) if layer.trunk]
    if quantity is None or not places:
        return np.full(len(GRID), np.nan)
    values = quantity.values[:, places]
    usable = np.isfinite(values) & (values > 0)
    known = usable.any(axis=0)
    if not known.any():
        return np.full(len(GRID), np.nan)
    medians = np.nanmedian(np.log10(values, where=usable, out=np.full(values.shape, np.nan))[:, known], axis=0)
    return np.interp(GRID, np.linspace(0, 1, len(places))[known], medians)


def compare(fleets: Mapping[str, Fleet], profiles: Mapping[str, Sequence[NDArray[np.float64]]]) -> Comparison:
    """Puts folders side by side.

    Args:
        fleets: Each folder's runs.
        profiles: Each folder's profiles, as :func:`relative_profile` gives them, one per run.

    Example:
        >>> compare({"a": Fleet(()), "b": Fleet(())}, {"a": [], "b": []}).sides[1].label
        'b'
    """
    sides = tuple(_side(label, fleet.runs, profiles[label]) for label, fleet in fleets.items())
    return Comparison(GRID, sides, _sentence(sides[0], sides[-1]))


def _side(label: str, runs: Sequence[Summary], profiles: Sequence[NDArray[np.float64]]) -> Side:
    known = [profile for profile in profiles if np.isfinite(profile).any()]
    table = np.array(known) if known else np.full((1, len(GRID)), np.nan)
    conditions = [run.condition for run in runs]
    counts = {one: conditions.count(one) for one in sorted(set(conditions), key=lambda one: -conditions.count(one))}
    return Side(
        label=label,
        runs=len(runs),
        sick=sum(run.sick is True for run in runs),
        conditions=counts,
        slope=Spread.of(run.slope for run in runs),
        loss=Spread.of(run.loss for run in runs),
        profile=_numbers(np.median(table, axis=0)),
        low=_numbers(table.min(axis=0)),
        high=_numbers(table.max(axis=0)),
    )


def _numbers(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _sentence(before: Side, after: Side) -> str:
    said = (
        f"{before.label} → {after.label}: {before.sick} of {before.runs} runs sick, then {after.sick} of {after.runs}"
    )
    if before.slope and after.slope:
        said += f"; backward slope {before.slope.median:+.2f}, then {after.slope.median:+.2f} decades per layer"
    return f"{said}."
