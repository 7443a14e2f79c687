"""A step record ↔ its shape and its numbers.

The shape is all of a step but its numbers: which fields have one, how many there are, and what is no number, as a
rule's name. A run has a handful of shapes, thousands of steps, so a shape is written once and a step is what remains.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeAlias

from diagnostics.columns import Column
from diagnostics.records import ClipRecord, DepthFit, Layer, LayerRecord, Layers, StepRecord
from diagnostics.runlog.packing import FLOAT, INT64, INTEGER, KINDS, Field
from diagnostics.runlog.plain import foreign, record

Table: TypeAlias = tuple[Layer, ...]

_APART = ("clip", "layers", "violations", "diagnoses", "metrics", "fit")
_STEP = tuple(one.name for one in fields(StepRecord) if one.name not in _APART)
_CLIP = tuple(one.name for one in fields(ClipRecord) if one.name != "parts")
_FIT = tuple(one.name for one in fields(DepthFit))
_LAYER = tuple(one.name for one in fields(Layer))
_QUANTITIES = frozenset(one.name for one in fields(LayerRecord))
_WEIGHT_NUMEL = "weight.numel"  # the same at every step, unlike the outputs' under batches of different sizes

_step_values, _clip_values, _fit_values = attrgetter(*_STEP), attrgetter(*_CLIP), attrgetter(*_FIT)
_clip_names: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Shape:
    """What steps have in common.

    Attributes:
        constants: What is no number, by the path of its field; the number of elements of the weights, too.
        fields: The numbers, in order.
        table: The layers; None for a step without.
    """

    constants: Mapping[str, Any]
    fields: tuple[Field, ...]
    table: Table | None

    @cached_property
    def of_layers(self) -> tuple[tuple[int, Field], ...]:
        """The fields that hold one number per layer, with their places."""
        return tuple((place, one) for place, one in enumerate(self.fields) if is_of_layer(one.name))

    @cached_property
    def of_steps(self) -> tuple[tuple[int, Field], ...]:
        """The others, with their places."""
        return tuple((place, one) for place, one in enumerate(self.fields) if not is_of_layer(one.name))

    @cached_property
    def depths(self) -> int:
        """Number of layers."""
        return len(self.table or ())

    def record(self, values: Sequence[Any], layers: Layers) -> StepRecord:
        """A step from its numbers, in the order of :attr:`of_steps`, and its layers."""
        leaves = {**self.constants, **dict(zip(self._names, values, strict=True))}
        content = {name: leaves[name] for name in _STEP if name in leaves}
        fit = {name: leaves[f"fit.{name}"] for name in _FIT if f"fit.{name}" in leaves}
        metrics = {name.partition(".")[2]: value for name, value in leaves.items() if name.startswith("metrics.")}
        return StepRecord(
            **content, clip=_clip(leaves, "clip."), layers=layers, fit=DepthFit(**fit) if fit else None, metrics=metrics
        )

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(one.name for _, one in self.of_steps)

    @cached_property
    def constant_columns(self) -> dict[str, Column]:
        """The columns of the layers that are the same at every step."""
        numel = Column.of(self.constants.get(_WEIGHT_NUMEL, ()))
        return {} if numel is None else {_WEIGHT_NUMEL: numel}


def is_of_layer(name: str) -> bool:
    """Whether a field holds one number per layer.

    Example:
        >>> is_of_layer("output.norm"), is_of_layer("clip.total_norm")
        (True, False)
    """
    return name in _QUANTITIES or name.startswith(("output.", "weight."))


def take_apart(step: StepRecord) -> tuple[tuple[Any, ...], list[Any]]:
    """What kind of thing a step has in which field, and the numbers among them.

    Returns:
        The kinds, equal for steps of the same shape over the same layers, for :func:`shape`; and one entry per field:
        a number, or a sequence of them.
    """
    kinds: list[Any] = []
    row: list[Any] = []
    for name, value in _leaves(step).items():
        kind: Any = KINDS.get(type(value))
        if kind is None:
            kind, value = _kind(value)  # noqa: PLW2901 -- in its nearest plain form
        elif kind == INTEGER and value not in INT64:
            kind = (None, value)
        kinds.append((name, kind))
        if kind.__class__ is str or kind[0] is not None:
            row.append(value)
    for name, column in step.layers.columns().items():
        if name == _WEIGHT_NUMEL:
            kinds.append((name, (None, tuple(column))))
        else:
            numbers = column.numbers
            kinds.append((name, (FLOAT if numbers.typecode == "d" else INTEGER, len(numbers), column.rows)))
            row.append(numbers)
    return tuple(kinds), row


def shape(kinds: Sequence[Any], table: Table | None) -> Shape:
    """The shape of a step, from what :func:`take_apart` returned and the step's layers."""
    constants: dict[str, Any] = {}
    known: list[Field] = []
    for name, kind in kinds:
        if isinstance(kind, str):
            known.append(Field(name, kind))
        elif kind[0] is None:
            constants[name] = kind[1]
        else:
            known.append(Field(name, *kind))
    return Shape(constants, tuple(known), table)


def pack(field: Field, values: Sequence[Any]) -> array[Any]:
    """The numbers of a field of some steps, one behind the other.

    Args:
        field: Which.
        values: An entry per step, as :func:`take_apart` gives it.
    """
    code = "d" if field.kind == FLOAT else "q"
    if field.length is None:
        return array(code, values)
    found = array(code)
    for numbers in values:
        found.extend(numbers)
    return found


def _kind(value: Any) -> tuple[Any, Any]:
    """The kind of what is not one plain number, and its value: a constant, or what a Field is made of."""
    if value is None or isinstance(value, str):
        return (None, value), value
    if not isinstance(value, (list, tuple)):
        value = foreign(value)
        return KINDS.get(type(value), (None, value)), value
    return (FLOAT, len(value)), value


def _leaves(step: StepRecord) -> dict[str, Any]:
    """What a step says of itself, by path; neither its layers nor its news, as violations, are among it."""
    found = dict(zip(_STEP, _step_values(step), strict=True))
    _add_clip(found, "clip.", step.clip)
    if step.fit is not None:
        found |= zip([f"fit.{name}" for name in _FIT], _fit_values(step.fit), strict=True)
    for name, value in step.metrics.items():
        found[f"metrics.{name}"] = value
    return found


def _add_clip(found: dict[str, Any], prefix: str, clip: ClipRecord) -> None:
    names = _clip_names.get(prefix) or _clip_names.setdefault(prefix, [f"{prefix}{name}" for name in _CLIP])
    found |= zip(names, _clip_values(clip), strict=True)
    for place, part in enumerate(clip.parts):
        _add_clip(found, f"{prefix}parts.{place}.", part)


def _clip(leaves: Mapping[str, Any], prefix: str) -> ClipRecord:
    own = {name: leaves[prefix + name] for name in _CLIP if prefix + name in leaves}
    parts: list[ClipRecord] = []
    while f"{prefix}parts.{len(parts)}.rule" in leaves:
        parts.append(_clip(leaves, f"{prefix}parts.{len(parts)}."))
    return ClipRecord(**own, parts=tuple(parts))


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
    known = [[one.name, one.kind, one.length, *([] if one.rows is None else [one.rows])] for one in new.fields]
    return {"id": number, "layers": table, "constants": new.constants, "fields": known}


def read_shape(content: Mapping[str, Any], tables: Mapping[int, Table]) -> Shape:
    """A shape from JSON."""
    known = (
        Field(name, kind, length, tuple(*rows) if rows else None) for name, kind, length, *rows in content["fields"]
    )
    table = content["layers"]
    return Shape(content["constants"], tuple(known), None if table is None else tables[table])
