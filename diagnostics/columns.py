"""The layers of a step as they are kept: one table of layers that steps share, and columns of numbers beside it.

Standard library only. Whoever needs all layers of many steps (a run log, a report) reads the columns; whoever looks at
a layer gets a LayerRecord, made there and then.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias, overload

from diagnostics.layers import GradientStats, Layer, LayerRecord


class Column(Sequence[float | None]):
    """One number per layer, None where it was not measured, in as many bytes as the numbers take.

    Args:
        numbers: Those of the measured rows in order, as ``array("d")``, or ``array("q")`` for whole numbers.
        rows: Which rows were measured; None for all. Columns may share it.
        size: Number of rows; that of the numbers if None.

    Example:
        >>> list(Column(array("d", [0.5, math.nan]), rows=(0, 2), size=3))
        [0.5, None, nan]
    """

    __slots__ = ("_size", "numbers", "rows")

    def __init__(self, numbers: array[Any], rows: tuple[int, ...] | None = None, size: int | None = None) -> None:
        self.numbers = numbers
        self.rows = rows
        self._size = len(numbers) if size is None else size

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Column | None:
        """The column of some values; None where none of them was measured.

        Example:
            >>> Column.of([1, None]).dense(), Column.of([None])
            ([1, None], None)
        """
        given = list(values)
        rows = tuple(row for row, value in enumerate(given) if value is not None)
        if not rows:
            return None
        numbers = [value for value in given if value is not None]
        code = "q" if all(type(number) is int for number in numbers) else "d"
        return cls(array(code, numbers), None if len(rows) == len(given) else rows, len(given))

    def dense(self) -> list[float | None]:
        """All rows."""
        if self.rows is None:
            return self.numbers.tolist()
        found: list[float | None] = [None] * self._size
        for row, number in zip(self.rows, self.numbers, strict=True):
            found[row] = number
        return found

    @overload
    def __getitem__(self, index: int) -> float | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[float | None]: ...
    def __getitem__(self, index: int | slice) -> float | list[float | None] | None:
        return self.dense()[index]

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[float | None]:
        return iter(self.dense())

    def __eq__(self, other: object) -> bool:
        return self.dense() == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Column.of({self.dense()})"


Columns: TypeAlias = Mapping[str, Column]
"""Columns by name, as :meth:`Layers.columns` names them."""


class Layers(Sequence[LayerRecord]):
    """The layers of one step in order of depth: a sequence of LayerRecord, made when somebody looks.

    What is kept are columns of numbers beside one table of layers, which steps share: :meth:`from_columns`. Objects for
    five hundred layers take a millisecond to make, and nobody looks at most of them.

    What a step did to the weights is only known after it, and reading it back at once would cost a second copy from the
    device. So the update ratios come from a function of their own.

    Args:
        records: The layers as they were measured before the step.
        updates: Returns one update ratio (or None) per layer.

    Example:
        >>> layer = LayerRecord(Layer(0, "0", "Linear"), output=None, weight=None)
        >>> layers = Layers([layer], updates=lambda: [0.001])
        >>> layers.before_step[0].update_ratio, layers[0].update_ratio
        (None, 0.001)
    """

    __slots__ = ("_complete", "_layers", "_measured", "_records", "_updates")

    def __init__(
        self, records: Iterable[LayerRecord] = (), updates: Callable[[], Iterable[float | None]] | None = None
    ) -> None:
        given = tuple(records)
        self._layers = tuple(record.layer for record in given)
        self._measured: Columns | Callable[[], Columns] = lambda: _columns(given)
        self._updates: Callable[[], Iterable[float | None]] | Column | None = updates
        self._records: tuple[LayerRecord, ...] | None = given
        self._complete = given if updates is None else None

    @classmethod
    def from_columns(
        cls,
        layers: tuple[Layer, ...],
        columns: Columns | Callable[[], Columns],
        updates: Callable[[], Iterable[float | None]] | Column | None = None,
    ) -> Layers:
        """The layers of a step from numbers.

        Args:
            layers: In order of depth; the same object at steps that have the same layers.
            columns: One number per layer each, by the names of :meth:`columns`; or a function that makes them.
            updates: The update ratios, or a function that returns one (or None) per layer, where the columns do not
                hold them.

        Example:
            >>> columns = {"output.numel": Column.of([4]), "output.norm": Column.of([2.0])}
            >>> Layers.from_columns((Layer(0, "0", "Linear"),), columns)[0].output.rms
            1.0
        """
        made = cls()
        made._layers, made._measured, made._updates = layers, columns, updates
        made._records = made._complete = None
        return made

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Which layers these are."""
        return self._layers

    def columns(self, *, before_step: bool = False) -> Columns:
        """The numbers, one column per quantity; a quantity that no layer has is left out.

        The names are those of the attributes of LayerRecord: ``"output.numel"``, ``"output.norm"`` and so on, the same
        with ``"weight."``, and ``"weight_norm"``, ``"update_ratio"``, ``"gain"``, ``"dead_fraction"``,
        ``"stream_rms"``. Not there: ``nonfinite`` where it is 0 throughout, and ``rms``, which follows from ``norm``
        and ``numel`` (:meth:`values` has it), unless it does not.

        Args:
            before_step: Without update ratios that come from a function, and may not have come yet.
        """
        if callable(self._measured):
            self._measured = self._measured()
        if before_step or self._updates is None:
            return self._measured
        if callable(self._updates):
            self._updates = Column.of(self._updates())
        return self._measured if self._updates is None else {**self._measured, "update_ratio": self._updates}

    def values(self, name: str) -> list[float | None]:
        """One quantity of every layer.

        Args:
            name: That of a column, or ``"output.rms"``, ``"weight.rms"``, ``"trunk_rms"``, ``"trunk_norm"``.

        Example:
            >>> columns = {"output.numel": Column.of([4, None]), "output.norm": Column.of([2.0, None])}
            >>> layers = Layers.from_columns((Layer(0, "0", "Linear"), Layer(1, "1", "Linear")), columns)
            >>> layers.values("output.rms"), layers.values("gain")
            ([1.0, None], [None, None])
        """
        columns = self.columns(before_step=name != "update_ratio")
        if name in columns:
            return columns[name].dense()
        part, _, quantity = name.partition(".")
        if quantity == "rms" and f"{part}.norm" in columns:
            return _rms(columns[f"{part}.norm"].dense(), columns[f"{part}.numel"].dense())
        if name == "trunk_rms":
            pairs = zip(self.values("stream_rms"), self.values("output.rms"), strict=True)
            return [output if stream is None else stream for stream, output in pairs]
        if name == "trunk_norm":
            sizes = zip(self.values("trunk_rms"), self.values("output.numel"), strict=True)
            return [None if rms is None or numel is None else rms * math.sqrt(numel) for rms, numel in sizes]
        return [None] * len(self)

    def unread(self) -> Layers:
        """The same layers, to be made anew when somebody looks: what is kept should be numbers, not objects."""
        return Layers.from_columns(self._layers, self._measured, self._updates)

    @property
    def before_step(self) -> tuple[LayerRecord, ...]:
        """The layers without their update ratios, which may not have come yet."""
        if self._records is None:
            self._records = _layer_records(self._layers, self.columns(before_step=True))
        return self._records

    def _look(self) -> tuple[LayerRecord, ...]:
        if self._complete is None:
            ratios = self.columns().get("update_ratio") if self._updates is not None else None
            self._complete = self.before_step
            if ratios is not None:
                pairs = zip(self.before_step, ratios, strict=True)
                self._complete = tuple(replace(record, update_ratio=ratio) for record, ratio in pairs)
        return self._complete

    @overload
    def __getitem__(self, index: int) -> LayerRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerRecord | tuple[LayerRecord, ...]:
        return self._look()[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self._look())

    def __eq__(self, other: object) -> bool:
        return self._look() == tuple(other) if isinstance(other, (Layers, tuple, list)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._look())

    def __repr__(self) -> str:
        return f"Layers({list(self._look())!r})"

    def __reduce__(self) -> tuple[Callable[..., Layers], tuple[tuple[Layer, ...], Columns]]:
        return (Layers.from_columns, (self._layers, self.columns()))


_STATISTICS = tuple(field.name for field in fields(GradientStats))
_PARTS = ("output", "weight")
_QUANTITIES = tuple(field.name for field in fields(LayerRecord) if field.name not in ("layer", *_PARTS))


def _columns(records: Sequence[LayerRecord]) -> Columns:
    """The numbers of some records."""
    found: dict[str, Column | None] = {}
    for part in _PARTS:
        gradients: list[GradientStats | None] = [getattr(record, part) for record in records]
        for name in _STATISTICS:
            found[f"{part}.{name}"] = Column.of(None if one is None else getattr(one, name) for one in gradients)
        if all(one is None or _follows(one) for one in gradients):
            found.pop(f"{part}.rms")
        if not any(one.nonfinite for one in gradients if one is not None):
            found.pop(f"{part}.nonfinite")
    for name in _QUANTITIES:
        found[name] = Column.of(getattr(record, name) for record in records)
    return {name: column for name, column in found.items() if column is not None}


def _layer_records(layers: Sequence[Layer], columns: Columns) -> tuple[LayerRecord, ...]:
    """The records of some numbers."""
    missing: list[None] = [None] * len(layers)
    parts = [_gradients(part, columns, missing) for part in _PARTS]
    rest = [columns[name].dense() if name in columns else missing for name in _QUANTITIES]
    return tuple(map(LayerRecord, layers, *parts, *rest))


def _gradients(part: str, columns: Columns, missing: list[None]) -> Sequence[GradientStats | None]:
    own = {name: columns[f"{part}.{name}"].dense() for name in _STATISTICS if f"{part}.{name}" in columns}
    if not own:
        return missing
    rms = _rms(own["norm"], own["numel"])
    own = {"rms": rms, "nonfinite": [0] * len(missing), **own}
    rows: Iterator[Any] = zip(*(own.get(name, missing) for name in _STATISTICS), strict=True)
    return [None if row[0] is None else GradientStats(*row) for row in rows]


def _follows(stats: GradientStats) -> bool:
    """Whether the rms is what norm and number of elements say."""
    rms = stats.norm / math.sqrt(stats.numel or 1)
    return rms == stats.rms or (math.isnan(rms) and math.isnan(stats.rms))


def _rms(norms: Sequence[float | None], numels: Sequence[float | None]) -> list[float | None]:
    return [
        None if norm is None or numel is None else norm / math.sqrt(numel or 1)
        for norm, numel in zip(norms, numels, strict=True)
    ]
