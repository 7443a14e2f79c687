"""A run log as a data frame of polars or pandas, whichever there is. numpy besides."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.runlog.arrays import Numbers, measured, numbers
from diagnostics.runlog.packing import BOOLEAN, FLOAT, INTEGER
from diagnostics.runlog.reading import Contents
from diagnostics.runlog.shapes import is_of_layer

LIBRARIES = ("polars", "pandas")
WORDS = ("optimizer", "clip.rule")
OF_LAYER = ("depth", "layer", "kind", "trunk", "share")
SHARES = "clip.shares"
WORD = "word"
_DTYPES = {FLOAT: np.float64, INTEGER: np.int64, BOOLEAN: np.bool_, WORD: np.object_}


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a column: values and where there are any, of a shape that broadcasts to steps × layers."""

    name: str
    kind: str
    values: Any
    there: Any = True


@dataclass
class _Column:
    """A column of the frame in the making."""

    kind: str
    values: NDArray[Any]
    missing: NDArray[np.bool_]

    @classmethod
    def of(cls, kind: str, rows: int) -> _Column:
        return cls(kind, np.zeros(rows, _DTYPES[kind]), np.ones(rows, bool))

    def put(self, rows: NDArray[np.int64], part: _Part) -> None:
        if part.kind != self.kind:  # a metric that is sometimes a whole number
            self.kind, self.values = FLOAT, self.values.astype(np.float64)
        there = np.broadcast_to(part.there, rows.shape)
        self.values[rows[there]] = np.broadcast_to(part.values, rows.shape)[there]
        self.missing[rows[there]] = False

    def words(self) -> list[str | None]:
        return [None if hole else word for word, hole in zip(self.values, self.missing, strict=True)]


def frame(contents: Contents, library: str | None, *, layers: bool) -> Any:
    """The data frame that ``Run.to_frame`` describes.

    Raises:
        ModuleNotFoundError: The library is not installed; neither, if None is named.
        ValueError: There is no such library.
    """
    if library not in (None, *LIBRARIES):
        raise ValueError(f"library must be polars, pandas or None; got {library!r}.")
    chosen = next((name for name in LIBRARIES if library in (None, name) and _installed(name)), None)
    if chosen is None:
        raise ModuleNotFoundError(f"to_frame needs {library or 'polars or pandas'}; pip install {library or 'polars'}.")
    columns = _columns(list(numbers(contents, lambda name: layers or not is_of_layer(name))), layers=layers)
    return _to_polars(columns) if chosen == "polars" else _to_pandas(columns)


def _installed(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None


def _columns(pieces: Sequence[Numbers], *, layers: bool) -> dict[str, _Column]:
    depths = [len(piece.shape.table or ()) if layers else 0 for piece in pieces]
    count = sum(len(piece.places) for piece in pieces)
    height = np.ones(count, np.int64)  # rows of each step
    for piece, depth in zip(pieces, depths, strict=True):
        height[piece.places] = max(depth, 1)
    first = np.concatenate([[0], np.cumsum(height)])
    found: dict[str, _Column] = {}
    for piece, depth in zip(pieces, depths, strict=True):
        rows = first[piece.places][:, None] + np.arange(max(depth, 1))
        for part in (*_of_steps(piece), *(_of_layers(piece) if depth else ())):
            column = found.get(part.name) or found.setdefault(part.name, _Column.of(part.kind, int(first[-1])))
            column.put(rows, part)
    # What tells of the step stands before what tells of the layer.
    return dict(sorted(found.items(), key=lambda item: item[0] in OF_LAYER or is_of_layer(item[0])))


def _of_steps(piece: Numbers) -> Iterator[_Part]:
    for name in WORDS:
        yield _Part(name, WORD, piece.shape.constants[name])
    for _, field in piece.shape.of_steps:
        values = piece.columns[field.name]
        if field.length is None:
            yield _Part(field.name, field.kind, values)
        elif field.name != SHARES:
            yield from (_Part(f"{field.name}.{place}", field.kind, values[:, [place]]) for place in range(field.width))


def _of_layers(piece: Numbers) -> Iterator[_Part]:
    table = piece.shape.table or ()
    yield _Part("depth", INTEGER, [layer.depth for layer in table])
    yield _Part("layer", WORD, np.array([layer.name for layer in table], object))
    yield _Part("kind", WORD, np.array([layer.kind for layer in table], object))
    yield _Part("trunk", BOOLEAN, [layer.trunk for layer in table])
    parts = {part.name: part for part in _measured(piece, len(table))}
    yield from parts.values()
    for gradient in ("output", "weight"):
        norm, numel = parts.get(f"{gradient}.norm"), parts.get(f"{gradient}.numel")
        if norm and numel and f"{gradient}.rms" not in parts:
            yield _Part(f"{gradient}.rms", FLOAT, norm.values / np.sqrt(np.maximum(numel.values, 1)), norm.there)
    shares = piece.columns.get(SHARES)
    if shares is not None and shares.shape[1] == len(table):
        yield _Part("share", FLOAT, shares)


def _measured(piece: Numbers, depths: int) -> Iterator[_Part]:
    numel = piece.shape.constant_columns.get("weight.numel")
    if numel is not None:
        given = numel.dense()
        yield _Part(
            "weight.numel", INTEGER, np.array([one or 0 for one in given]), np.array([one is not None for one in given])
        )
    for _, field in piece.shape.of_layers:
        there = measured(field, depths)
        values = np.zeros((len(piece.places), depths))
        values[:, there] = piece.columns[field.name]
        yield _Part(field.name, field.kind, values, there)


def _to_polars(columns: dict[str, _Column]) -> Any:
    polars = import_module("polars")
    made = []
    for name, one in columns.items():
        if one.kind == WORD:
            made.append(polars.Series(name, one.words(), dtype=polars.String))
        else:
            values, hole = polars.Series(name, one.values), polars.Series(one.missing)
            made.append(
                polars.select(polars.when(~hole).then(values).alias(name))[name] if one.missing.any() else values
            )
    return polars.DataFrame(made)


def _to_pandas(columns: dict[str, _Column]) -> Any:
    pandas = import_module("pandas")
    types = {
        FLOAT: pandas.arrays.FloatingArray,
        INTEGER: pandas.arrays.IntegerArray,
        BOOLEAN: pandas.arrays.BooleanArray,
    }
    return pandas.DataFrame(
        {
            name: types[one.kind](one.values, one.missing)
            if one.kind in types
            else pandas.array(one.words(), dtype="string")
            for name, one in columns.items()
        }
    )
