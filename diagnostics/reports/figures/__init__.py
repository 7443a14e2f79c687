"""The figures of a run: what is drawn, as plain numbers. numpy; vl-convert only when a figure is drawn.

A function takes the columns of one optimizer (:class:`~diagnostics.reports.history.History`) and returns a
:class:`~diagnostics.reports.drawing.Figure`. A live Monitor, a run log and the page draw the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from diagnostics.records import StepRecord
from diagnostics.reports.drawing import Figure, figures_extra, grid

with figures_extra():  # before the modules that are made of it
    import numpy as np  # noqa: F401

from diagnostics.reports.figures.by_depth import depth_profile, evenly, gain, heatmap, share, update_ratio
from diagnostics.reports.figures.by_step import clipping, findings, norms, what_if
from diagnostics.reports.figures.numbers import Finding, nothing
from diagnostics.reports.history import History, histories
from diagnostics.reports.thinning import COLUMNS
from diagnostics.reports.whatif import WhatIf

__all__ = [
    "Finding",
    "clipping",
    "depth_profile",
    "findings",
    "gain",
    "heatmap",
    "norms",
    "of_history",
    "overview",
    "share",
    "update_ratio",
    "what_if",
]


def overview(records: Iterable[StepRecord], found: Callable[[str], Iterable[Finding]] = lambda _: ()) -> Figure:
    """Heatmap, profile and norms in one; with several optimizers, one row of them for each.

    Args:
        records: Of a Monitor or a run log.
        found: Diagnoses and violations of an optimizer, by its name.

    Returns:
        The figure that ``monitor.plot()`` and ``read_run(path).plot()`` show.

    Example:
        >>> overview([]).svg().startswith("<svg")
        True
    """
    apart = histories(records)
    several = len(apart) > 1
    rows = [
        (name if several else "", [heatmap(one, found(name)), depth_profile(one), norms(one)])
        for name, one in apart.items()
    ]
    return grid("overview", rows or [("", [nothing("norms", "No step", ("series", "dots", "edges", "frame"))])])


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
        depth_profile(history, evenly(history, profiles)),
        norms(history, columns),
        *([findings(history, found)] if found else []),
        *([clipping(history, min(columns, 40))] if history.rule != "none" else []),
        *layers,
        *([what_if(answers)] if any(one.candidates for one in answers) else []),
    ]
