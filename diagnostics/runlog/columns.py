"""Numbers ↔ text: a column of a block as base64 of packed numbers, in the smallest type that loses nothing.

Standard library only: a run that is logged needs no numpy, and a reader that has none still gets its records.
"""

from __future__ import annotations

import sys
from array import array
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT, INTEGER, BOOLEAN = "float", "integer", "boolean"
KINDS: dict[type, str] = {float: FLOAT, int: INTEGER, bool: BOOLEAN}

ZERO = "z"  # all are +0.0, 0 or False: nothing is written
SIZES = {ZERO: 0, "b": 1, "h": 2, "i": 4, "q": 8, "f": 4, "d": 8}
"""Bytes of one number by type code: signed integers and IEEE 754 floats, little endian."""

INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Column:
    """One quantity of a step.

    Attributes:
        name: A path into a StepRecord, as ``"clip.total_norm"``; ``"metrics."`` and a key; or a path into a
            LayerRecord.
        kind: ``"float"``, ``"integer"`` or ``"boolean"``.
        width: Numbers per step.
        absent: Of a quantity of layers the places of those that have none; ``width`` counts the others.
    """

    name: str
    kind: str
    width: int
    absent: tuple[int, ...] = ()


def encode(kind: str, values: Sequence[float]) -> tuple[str, str]:
    """The type code of a column and its numbers as text.

    Args:
        kind: Of the column.
        values: Floats, or integers within int64.

    Example:
        >>> encode(FLOAT, [0.5, 1.0]), encode(FLOAT, [0.1])[0], encode(INTEGER, [0, 0])
        (('f', 'AAAAPwAAgD8A'), 'd', ('z', ''))
    """
    code, packed = _pack_floats(values) if kind == FLOAT else _pack_integers(values)
    if sys.byteorder == "big":
        packed.byteswap()
    raw = packed.tobytes()
    # A multiple of three bytes has no "=" at its end, so that columns of many blocks can be joined and decoded at once.
    return code, b2a_base64(raw + bytes(-len(raw) % 3), newline=False).decode("ascii")


def _pack_floats(values: Sequence[float]) -> tuple[str, array[float]]:
    double = array("d", values)
    raw = double.tobytes()
    if raw.count(0) == len(raw):
        return ZERO, array("d")
    single = array("f", double)
    return ("f", single) if array("d", single).tobytes() == raw else ("d", double)


def _pack_integers(values: Sequence[float]) -> tuple[str, array[int]]:
    low, high = min(values, default=0), max(values, default=0)
    if low == high == 0:
        return ZERO, array("b")
    code = next(code for code in "bhiq" if -(1 << 8 * SIZES[code] - 1) <= low and high < 1 << 8 * SIZES[code] - 1)
    return code, array(code, values)  # type: ignore[arg-type]


def length(code: str, count: int) -> int:
    """Characters of a column with so many numbers."""
    return -(-SIZES[code] * count // 3) * 4


def decode(kind: str, code: str, text: bytes, count: int) -> list[float]:
    """The numbers of a column.

    Raises:
        ValueError: The text is not what :func:`encode` makes.

    Example:
        >>> decode(FLOAT, *encode(FLOAT, [0.5, 1.0]), 2)
        [0.5, 1.0]
    """
    if code == ZERO:
        return [{FLOAT: 0.0, INTEGER: 0, BOOLEAN: False}[kind]] * count
    packed = array(code, a2b_base64(text)[: SIZES[code] * count])
    if len(packed) != count:
        raise ValueError(f"{count} numbers were expected; got {len(packed)}.")
    if sys.byteorder == "big":
        packed.byteswap()
    return list(map(bool, packed)) if kind == BOOLEAN else list(packed)
