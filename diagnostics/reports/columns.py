"""A run log → History without making a record: the way of reports over hundreds of runs. numpy, no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from diagnostics.records import DepthFit, Diagnosis, Layer
from diagnostics.reports.history import BY_LAYER, BY_STEP, FIT, History, Quantity, standing
from diagnostics.runlog.arrays import Numbers, measured, numbers
from diagnostics.runlog.reading import Contents

_ALWAYS = ("step", "skipped", "clip.applied", "clip.norm_type", "output.numel", *(f"fit.{name}" for name in FIT))
_RMS = ("output.norm", "output.rms")
_NEEDS = {"share": ("clip.shares",), "output.rms": _RMS, "trunk_rms": (*_RMS, "stream_rms")}
"""Columns that a quantity is made from, where it is none itself."""


def from_log(contents: Contents, quantities: Collection[str]) -> dict[str, History]:
    """What ``histories`` makes of the records of a run log.

    Args:
        contents: Of the run log.
        quantities: Those that are wanted.
    """
    names = {*_ALWAYS, *(column for name in quantities for column in _NEEDS.get(name, (name,)))}
    apart: dict[str, list[Numbers]] = {}
    for piece in sorted(numbers(contents, names.__contains__), key=lambda piece: piece.places[0]):
        apart.setdefault(piece.shape.constants["optimizer"], []).append(piece)
    return {
        name: _Log(pieces).history(
            name, quantities, [one for (optimizer, _, _), one in contents.diagnoses.items() if optimizer == name]
        )
        for name, pieces in apart.items()
    }


@dataclass
class _Log:
    """The steps of one optimizer, in pieces of one shape each."""

    pieces: Sequence[Numbers]

    def history(self, optimizer: str, quantities: Collection[str], diagnoses: Sequence[Diagnosis]) -> History:
        steps = self._by_step("step").astype(np.int64)
        last = next(piece for piece, rows in zip(self.pieces, self._rows, strict=True) if len(steps) - 1 in rows)
        layered = ((name, self._by_layer(name)) for name in BY_LAYER if name in quantities)
        return History(
            optimizer,
            self._layers,
            steps,
            {name: self._by_step(name) for name in BY_STEP if name in quantities},
            self._by_step("clip.applied").astype(bool),
            self._by_step("skipped").astype(bool),
            {name: quantity for name, quantity in layered if quantity is not None},
            dict(self._fits()),
            self._numel(),
            last.shape.constants["clip.rule"],
            float(self._by_step("clip.norm_type")[-1]),
            standing(steps, diagnoses),
        )

    @cached_property
    def _rows(self) -> list[NDArray[np.int64]]:
        """The rows of each piece's steps in the order of the steps."""
        places = np.concatenate([piece.places for piece in self.pieces])
        steps = np.concatenate([piece.columns["step"][:, 0] for piece in self.pieces])
        rows = np.empty(len(places), np.int64)
        rows[np.lexsort((places, steps))] = np.arange(len(places))
        return np.split(rows, np.cumsum([len(piece.places) for piece in self.pieces])[:-1])

    @cached_property
    def _layers(self) -> tuple[Layer, ...]:
        tables = [(rows, piece.shape.table) for rows, piece in zip(self._rows, self.pieces, strict=True)]
        known = [(rows, table) for rows, table in tables if table is not None]
        latest: dict[str, Layer] = {}
        for moment in (np.min, np.max):  # in order of appearance, each as last seen
            for _, table in sorted(known, key=lambda one, moment=moment: moment(one[0])):  # type: ignore[misc]
                latest |= {layer.name: layer for layer in table}
        return tuple(sorted(latest.values(), key=attrgetter("depth")))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {layer.name: place for place, layer in enumerate(self._layers)}

    def _by_step(self, name: str) -> NDArray[np.float64]:
        found = np.full(sum(map(len, self._rows)), np.nan)
        for rows, piece in zip(self._rows, self.pieces, strict=True):
            if name in piece.columns:
                found[rows] = piece.columns[name][:, 0]
        return found

    def _fits(self) -> Iterator[tuple[int, DepthFit]]:
        columns = [self._by_step(f"fit.{name}") for name in FIT]
        fitted = [rows for rows, piece in zip(self._rows, self.pieces, strict=True) if f"fit.{FIT[0]}" in piece.columns]
        for row in np.sort(np.concatenate(fitted)) if fitted else ():
            slope, intercept, uncertainty, depths, points = (column[row].item() for column in columns)
            yield int(row), DepthFit(slope, intercept, uncertainty, int(depths), int(points))

    def _numel(self) -> NDArray[np.int64]:
        found = np.zeros(len(self._layers), np.int64)
        quantity = self._by_layer("output.numel")
        if quantity is not None and len(quantity.rows):
            there = quantity.measured.any(axis=0)
            last = len(quantity.rows) - 1 - quantity.measured[::-1].argmax(axis=0)
            found[there] = quantity.values[last, range(len(found))][there]
        return found

    def _by_layer(self, name: str) -> Quantity | None:
        found = []
        for rows, piece in zip(self._rows, self.pieces, strict=True):
            table = piece.shape.table
            cells = _cells(piece, name, len(table)) if table is not None else None
            if cells is not None and cells[1].any() and table is not None:
                found.append((rows, np.array([self._place[layer.name] for layer in table]), *cells))
        if not found:
            return None
        rows = np.sort(np.concatenate([one[0] for one in found]))
        values = np.full((len(rows), len(self._layers)), np.nan)
        there = np.zeros(values.shape, bool)
        for own, places, numbers_, known in found:
            at = np.searchsorted(rows, own)[:, None], places[None, :]
            values[at] = numbers_
            there[at] = known
        return Quantity(rows, values, there)


def _cells(piece: Numbers, name: str, depths: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """One quantity of the steps of a piece, [N, depths], NaN where there is none, and where it was measured."""
    if name == "share":
        shares = piece.columns["clip.shares"]
        return (shares, np.ones(shares.shape, bool)) if shares.shape[1] == depths else None
    if name == "trunk_rms":
        return _first(_cells(piece, "stream_rms", depths), _cells(piece, "output.rms", depths))
    if name == "output.rms" and name not in piece.columns and "output.norm" in piece.columns:
        (norm, there), (numel, _) = _spread(piece, "output.norm", depths), _spread(piece, "output.numel", depths)
        return norm / np.sqrt(np.maximum(numel, 1)), there
    return _spread(piece, name, depths) if name in piece.columns else None


def _spread(piece: Numbers, name: str, depths: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    column = next(one for one in piece.shape.fields if one.name == name)
    there = measured(column, depths)
    values = np.full((len(piece.places), depths), np.nan)
    values[:, there] = piece.columns[name]
    return values, np.broadcast_to(there, values.shape)


def _first(
    one: tuple[NDArray[np.float64], NDArray[np.bool_]] | None,
    other: tuple[NDArray[np.float64], NDArray[np.bool_]] | None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """The one where it was measured, else the other."""
    if one is None or other is None:
        return one or other
    return np.where(one[1], one[0], other[0]), one[1] | other[1]
