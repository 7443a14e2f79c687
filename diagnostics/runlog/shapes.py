"""A step record ↔ its shape and its numbers.

The shape is all of a step but its numbers: which fields have one, how many there are, and what is no number, as a
rule's name. A run has a handful of shapes, thousands of steps, so a shape is written once and a step is what remains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import sqrt
from operator import attrgetter
from typing import Any, TypeAlias

from diagnostics.records import ClipRecord, DepthFit, GradientStats, Layer, LayerRecord, Layers, StepRecord
from diagnostics.runlog.columns import FLOAT, INT64, INTEGER, KINDS, Column
from diagnostics.runlog.plain import foreign, record

Table: TypeAlias = tuple[Layer, ...]
Numbers: TypeAlias = Mapping[str, Sequence[Any]]  # one entry per layer, by the quantity's name

_STEP = ("step", "optimizer", "loss", "backward_passes", "loss_scale", "skipped", "recorded")
_CLIP = tuple(one.name for one in fields(ClipRecord) if one.name not in ("shares", "parts", "norm_quantiles"))
_FIT = tuple(one.name for one in fields(DepthFit))
_STATISTICS = tuple(one.name for one in fields(GradientStats))
_GRADIENTS = ("output", "weight")
_MEASURED = tuple(one.name for one in fields(LayerRecord) if one.name not in ("layer", *_GRADIENTS))
_LAYER = tuple(one.name for one in fields(Layer))
_VECTORS = ("lr", "shares", "norm_quantiles")
_WEIGHT_NUMEL = "weight.numel"

_step_values, _clip_values, _fit_values = attrgetter(*_STEP), attrgetter(*_CLIP), attrgetter(*_FIT)
_clip_names: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Shape:
    """What steps have in common.

    Attributes:
        constants: What is no number, by the path of its field; the number of elements of the weights, too.
        columns: The numbers, in order.
        table: The layers; None for a step without.
    """

    constants: Mapping[str, Any]
    columns: tuple[Column, ...]
    table: Table | None

    @cached_property
    def _of_layers(self) -> tuple[bool, ...]:
        return tuple(is_of_layer(column.name) for column in self.columns)

    def columns_of_layers(self) -> Iterator[tuple[int, Column]]:
        """The columns that hold one number per layer, with their places."""
        return ((place, one) for place, one in enumerate(self.columns) if self._of_layers[place])

    def columns_of_steps(self) -> Iterator[tuple[int, Column]]:
        """The others, with their places."""
        return ((place, one) for place, one in enumerate(self.columns) if not self._of_layers[place])

    def record(self, values: Sequence[Any], layers: Layers) -> StepRecord:
        """A step from its numbers, in the order of :meth:`columns_of_steps`, and its layers."""
        leaves = {**self.constants, **dict(zip(self._names, values, strict=True))}
        content = {name: leaves[name] for name in (*_STEP, "lr") if name in leaves}
        fit = {name: leaves[f"fit.{name}"] for name in _FIT if f"fit.{name}" in leaves}
        metrics = {name.partition(".")[2]: value for name, value in leaves.items() if name.startswith("metrics.")}
        return StepRecord(
            **content, clip=_clip(leaves, "clip."), layers=layers, fit=DepthFit(**fit) if fit else None, metrics=metrics
        )

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(one.name for _, one in self.columns_of_steps())

    def layer_records(self, numbers: Numbers) -> list[LayerRecord]:
        """The layers of a step from their numbers."""
        assert self.table is not None
        empty = [None] * len(self.table)
        columns = (
            self.table,
            *(_gradients(_below(f"{gradient}.", {**self._numel, **numbers}), empty) for gradient in _GRADIENTS),
            *(numbers.get(name, empty) for name in _MEASURED),
        )
        return [LayerRecord(*row) for row in zip(*columns, strict=True)]

    @cached_property
    def _numel(self) -> Numbers:
        return {_WEIGHT_NUMEL: self.constants[_WEIGHT_NUMEL]} if _WEIGHT_NUMEL in self.constants else {}


def is_of_layer(name: str) -> bool:
    """Whether a column holds one number per layer.

    Example:
        >>> is_of_layer("output.norm"), is_of_layer("clip.total_norm")
        (True, False)
    """
    return name in _MEASURED or name.startswith(("output.", "weight."))


def is_vector(name: str) -> bool:
    """Whether a column of steps holds a tuple and not one number.

    Example:
        >>> is_vector("clip.shares"), is_vector("metrics.lr")
        (True, False)
    """
    return not name.startswith("metrics.") and name.rsplit(".", maxsplit=1)[-1] in _VECTORS


def take_apart(step: StepRecord) -> tuple[tuple[Any, ...], list[Any]]:
    """What kind of thing a step has in which field, and the numbers among them.

    Returns:
        The kinds, equal for steps of the same shape over the same layers, for :func:`shape`; and one entry per column:
        a number, or a sequence of them.
    """
    kinds: list[Any] = []
    row: list[Any] = []
    for name, value in _leaves(step).items():
        kind: Any = KINDS.get(type(value))
        if kind is None:
            kind, value = _kind(name, value)  # noqa: PLW2901 -- in its nearest plain form
        elif kind == INTEGER and value not in INT64:
            kind = (None, value)
        kinds.append((name, kind))
        if kind.__class__ is str or kind[0] is not None:
            row.append(value)
    return tuple(kinds), row


def shape(kinds: Sequence[Any], table: Table | None) -> Shape:
    """The shape of a step, from what :func:`take_apart` returned and the step's layers."""
    constants: dict[str, Any] = {}
    columns: list[Column] = []
    for name, kind in kinds:
        if isinstance(kind, str):
            columns.append(Column(name, kind, 1))
        elif kind[0] is None:
            constants[name] = kind[1]
        else:
            columns.append(Column(name, *kind))
    return Shape(constants, tuple(columns), table)


def _kind(name: str, value: Any) -> tuple[Any, Any]:
    """The kind of what is not one plain number, and its value: a constant, or what a Column is made of."""
    if value is None or isinstance(value, str):
        return (None, value), value
    if name == _WEIGHT_NUMEL:  # the same at every step, unlike the outputs' under batches of different sizes
        return (None, tuple(value)), value
    if not isinstance(value, (list, tuple)):
        value = foreign(value)
        return KINDS.get(type(value), (None, value)), value
    absent: tuple[int, ...] = ()
    if None in value:
        absent = tuple(place for place, one in enumerate(value) if one is None)
        value = [one for one in value if one is not None]
    types = set(map(type, value))
    if types == {int} and all(one in INT64 for one in value):
        return (INTEGER, len(value), absent), value
    return (FLOAT, len(value), absent), value if types == {float} else list(map(float, value))


def _leaves(step: StepRecord) -> dict[str, Any]:
    """All that a step says, by path; what is news, as violations, is not among it."""
    found = dict(zip(_STEP, _step_values(step), strict=True))
    found["lr"] = step.lr
    _add_clip(found, "clip.", step.clip)
    if step.fit is not None:
        found |= zip([f"fit.{name}" for name in _FIT], _fit_values(step.fit), strict=True)
    for name, value in step.metrics.items():
        found[f"metrics.{name}"] = value
    if step.layers:
        for gradient in _GRADIENTS:
            found |= _statistics(f"{gradient}.", list(map(attrgetter(gradient), step.layers)))
        for name in _MEASURED:
            column = list(map(attrgetter(name), step.layers))
            if column.count(None) < len(column):
                found[name] = column
    return found


def _add_clip(found: dict[str, Any], prefix: str, clip: ClipRecord) -> None:
    names = _clip_names.get(prefix) or _clip_names.setdefault(prefix, [f"{prefix}{name}" for name in _CLIP])
    found |= zip(names, _clip_values(clip), strict=True)
    found[f"{prefix}shares"] = clip.shares
    found[f"{prefix}norm_quantiles"] = clip.norm_quantiles
    for place, part in enumerate(clip.parts):
        _add_clip(found, f"{prefix}parts.{place}.", part)


def _clip(leaves: Mapping[str, Any], prefix: str) -> ClipRecord:
    own = {name: leaves[prefix + name] for name in (*_CLIP, *_VECTORS) if prefix + name in leaves}
    parts: list[ClipRecord] = []
    while f"{prefix}parts.{len(parts)}.rule" in leaves:
        parts.append(_clip(leaves, f"{prefix}parts.{len(parts)}."))
    return ClipRecord(**own, parts=tuple(parts))


def _statistics(prefix: str, gradients: Sequence[GradientStats | None]) -> dict[str, Any]:
    """One column per statistic; without ``rms`` where it follows from the norm."""
    if all(stats is None for stats in gradients):
        return {}
    found: dict[str, Any] = {}
    for name in _STATISTICS:
        column = [None if stats is None else getattr(stats, name) for stats in gradients]
        if column.count(None) < len(column):
            found[prefix + name] = column
    if found[f"{prefix}rms"] == rms(found[f"{prefix}norm"], found[f"{prefix}numel"]):
        del found[f"{prefix}rms"]
    return found


def rms(norms: Sequence[float | None], numels: Sequence[int | None]) -> list[float | None]:
    """Root mean squares from norms, None where there is none.

    Example:
        >>> rms([2.0, None], [4, None])
        [1.0, None]
    """
    return [
        None if norm is None or numel is None else norm / sqrt(numel or 1)
        for norm, numel in zip(norms, numels, strict=True)
    ]


def _below(prefix: str, numbers: Numbers) -> Numbers:
    return {name[len(prefix) :]: column for name, column in numbers.items() if name.startswith(prefix)}


def _gradients(columns: Numbers, empty: list[None]) -> Sequence[GradientStats | None]:
    if "norm" not in columns:
        return empty
    columns = {"rms": rms(columns["norm"], columns["numel"]), **columns}
    known = [name for name in _STATISTICS if name in columns]
    rows = zip(*(columns[name] for name in known), strict=True)
    place = known.index("norm")
    return [None if row[place] is None else GradientStats(**dict(zip(known, row, strict=True))) for row in rows]


def plain_table(number: int, layers: Table) -> dict[str, Any]:
    """A table of layers for JSON, one column per field."""
    return {"id": number, **{name: [getattr(layer, name) for layer in layers] for name in _LAYER}}


def read_table(content: Mapping[str, Any]) -> Table:
    """The layers of a table from JSON; what an older log does not know is at its default."""
    names = [name for name in _LAYER if name in content]
    rows = zip(*(content[name] for name in names), strict=True)
    return tuple(record(Layer, dict(zip(names, row, strict=True))) for row in rows)


def plain_shape(number: int, new: Shape, table: int | None) -> dict[str, Any]:
    """A shape for JSON."""
    columns = [[one.name, one.kind, one.width, *([one.absent] if one.absent else [])] for one in new.columns]
    return {"id": number, "layers": table, "constants": new.constants, "columns": columns}


def read_shape(content: Mapping[str, Any], tables: Mapping[int, Table]) -> Shape:
    """A shape from JSON."""
    columns = (
        Column(name, kind, width, tuple(absent[0]) if absent else ())
        for name, kind, width, *absent in content["columns"]
    )
    table = content["layers"]
    return Shape(content["constants"], tuple(columns), None if table is None else tables[table])
