"""A run in columns: what figures, tables and frames are made from, one array per quantity. numpy, no torch.

Records are for a step at a time; a report looks at thousands of steps of sixty layers at once, and at hundreds of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from diagnostics.records import WARNING, DepthFit, Diagnosis, Layer, StepRecord

BY_STEP = ("loss", "clip.total_norm", "clip.total_norm_after", "clip.clip_coef", "clip.threshold", "clip.clip_fraction")
"""Numbers of a step, as paths into a StepRecord; ``loss`` and ``clip.…``."""

BY_LAYER = (
    "output.norm",
    "output.rms",
    "output.abs_max",
    "output.zero_fraction",
    "weight.norm",
    "weight.abs_max",
    "weight_norm",
    "update_ratio",
    "gain",
    "dead_fraction",
    "trunk_rms",
    "share",
)
"""Numbers of a layer at a step, as paths into a LayerRecord; ``share`` is the layer's part of ``total_norm ** p``."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One number for each layer at those steps that have it.

    Attributes:
        rows: The places of those steps in ``History.steps``, shape [R], ascending.
        values: Shape [R, D]; NaN where nothing was measured.
        measured: Shape [R, D]; where False the layer was not called or not measured, which a measured NaN is not.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    measured: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class History:
    """The steps of one optimizer of one run in columns.

    Attributes:
        optimizer: Its name.
        layers: Every layer that was seen, by depth, [D]; where the order changed between steps, as last seen.
        steps: Optimizer steps, ascending, [S].
        by_step: The numbers of :data:`BY_STEP`, float64 [S] each, NaN where not measured.
        applied: Whether the step was clipped, bool [S].
        skipped: Whether the update was left out, bool [S].
        by_layer: The quantities of :data:`BY_LAYER` that were measured at all.
        fits: The fit over depth by place in ``steps``.
        numel: Elements of each layer's output at the last step that has them, [D]; 0 where unknown.
        rule: The clip rule of the last step.
        norm_type: Its p.
        sick: Whether a diagnosis at warning or above stood at the step, bool [S].
    """

    optimizer: str
    layers: tuple[Layer, ...]
    steps: NDArray[np.int64]
    by_step: Mapping[str, NDArray[np.float64]]
    applied: NDArray[np.bool_]
    skipped: NDArray[np.bool_]
    by_layer: Mapping[str, Quantity]
    fits: Mapping[int, DepthFit]
    numel: NDArray[np.int64]
    rule: str
    norm_type: float
    sick: NDArray[np.bool_]


def histories(records: Iterable[StepRecord]) -> dict[str, History]:
    """The columns of each optimizer by its name, in order of appearance.

    Example:
        >>> from diagnostics.records import ClipRecord
        >>> step = StepRecord(step=0, clip=ClipRecord("none", 2.0, None, 0.5, None, False, 0.5))
        >>> histories([step])["optimizer"].by_step["clip.total_norm"].tolist()
        [0.5]
    """
    apart: dict[str, list[StepRecord]] = {}
    for record in records:
        apart.setdefault(record.optimizer, []).append(record)
    return {name: _history(name, sorted(own, key=attrgetter("step"))) for name, own in apart.items()}


def _history(optimizer: str, records: Sequence[StepRecord]) -> History:
    latest = {row.layer.name: row.layer for record in records for row in record.layers}
    layers = sorted(latest.values(), key=attrgetter("depth"))
    places = {layer.name: place for place, layer in enumerate(layers)}
    numel = np.zeros(len(layers), np.int64)
    found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in BY_LAYER}
    for row, record in enumerate(records):
        shares = record.clip.shares if len(record.clip.shares) == len(record.layers) else (None,) * len(record.layers)
        for layer, share in zip(record.layers, shares, strict=True):
            place = places[layer.layer.name]
            if layer.output is not None:
                numel[place] = layer.output.numel
            for name in BY_LAYER:
                value = share if name == "share" else _look(layer, name)
                if value is not None:
                    found[name].append((row, place, value))
    clip = records[-1].clip
    return History(
        optimizer,
        tuple(layers),
        np.array([record.step for record in records], np.int64),
        {name: np.array([_number(_look(record, name)) for record in records]) for name in BY_STEP},
        np.array([record.clip.applied for record in records], bool),
        np.array([record.skipped for record in records], bool),
        {name: _quantity(cells, len(layers)) for name, cells in found.items() if cells},
        {row: record.fit for row, record in enumerate(records) if record.fit is not None},
        numel,
        clip.rule,
        clip.norm_type,
        _sick([record.step for record in records], [one for record in records for one in record.diagnoses]),
    )


def _sick(steps: Sequence[int], diagnoses: Iterable[Diagnosis]) -> NDArray[np.bool_]:
    """At which steps a diagnosis at warning or above stood; each in its last state, from onset until it cleared."""
    numbers = np.array(steps, np.int64)
    found = np.zeros(len(steps), bool)
    for one in {(one.condition, one.step): one for one in diagnoses}.values():
        if one.severity >= WARNING:
            found |= (numbers >= one.step) & (numbers < (math.inf if one.cleared is None else one.cleared))
    return found


def _look(thing: object, path: str) -> float | None:
    for name in path.split("."):
        thing = None if thing is None else getattr(thing, name)
    return thing  # type: ignore[return-value]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _quantity(cells: Sequence[tuple[int, int, float]], depths: int) -> Quantity:
    rows, where = np.unique([row for row, _, _ in cells], return_inverse=True)
    values = np.full((len(rows), depths), np.nan)
    measured = np.zeros(values.shape, bool)
    places = [place for _, place, _ in cells]
    values[where, places] = [value for _, _, value in cells]
    measured[where, places] = True
    return Quantity(rows.astype(np.int64), values, measured)
