"""Numbers ↔ text: a field of all steps of a block as base64 of packed numbers, in the smallest type without loss.

Standard library only: a run that is logged needs no numpy, and a reader that has none still gets its records.
"""

from __future__ import annotations

import sys
from array import array
from binascii import a2b_base64, b2a_base64
from dataclasses import dataclass
from typing import Any

FLOAT, INTEGER, BOOLEAN = "float", "integer", "boolean"
KINDS: dict[type, str] = {float: FLOAT, int: INTEGER, bool: BOOLEAN}

ZERO = "z"  # all are +0.0, 0 or False: nothing is written
SIZES = {ZERO: 0, "b": 1, "h": 2, "i": 4, "q": 8, "f": 4, "d": 8}
"""Bytes of one number by type code: signed integers and IEEE 754 floats, little endian."""

INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Field:
    """One quantity of a step.

    Attributes:
        name: A path into a StepRecord, as ``"clip.total_norm"``; ``"metrics."`` and a key; or the name of a column of
            ``Layers``.
        kind: ``"float"``, ``"integer"`` or ``"boolean"``.
        length: Numbers per step, in a sequence; None for one number that stands alone.
        rows: Of a quantity of layers, which of them have it; None for all.
    """

    name: str
    kind: str
    length: int | None = None
    rows: tuple[int, ...] | None = None

    @property
    def width(self) -> int:
        """Numbers per step."""
        return 1 if self.length is None else self.length


def encode(kind: str, numbers: array[Any]) -> tuple[str, str]:
    """The type code of a field and its numbers as text.

    Args:
        kind: Of the field.
        numbers: ``array("d")`` of floats, or ``array("q")``.

    Example:
        >>> encode(FLOAT, array("d", [0.5, 1.0])), encode(FLOAT, array("d", [0.1]))[0], encode(INTEGER, array("q", [0]))
        (('f', 'AAAAPwAAgD8A'), 'd', ('z', ''))
    """
    code, packed = _smallest_float(numbers) if kind == FLOAT else _smallest_integer(numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    raw = packed.tobytes()
    # A multiple of three bytes has no "=" at its end, so that fields of many blocks can be joined and decoded at once.
    return code, b2a_base64(raw + bytes(-len(raw) % 3), newline=False).decode("ascii")


def _smallest_float(double: array[float]) -> tuple[str, array[float]]:
    raw = double.tobytes()
    if raw.count(0) == len(raw):
        return ZERO, array("d")
    single = array("f", double)
    return ("f", single) if array("d", single).tobytes() == raw else ("d", double)


def _smallest_integer(numbers: array[int]) -> tuple[str, array[int]]:
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low == high == 0:
        return ZERO, array("b")
    code = next(code for code in "bhiq" if -(1 << 8 * SIZES[code] - 1) <= low and high < 1 << 8 * SIZES[code] - 1)
    return code, array(code, numbers)


def length(code: str, count: int) -> int:
    """Characters of a field with so many numbers."""
    return -(-SIZES[code] * count // 3) * 4


def decode(kind: str, code: str, text: bytes, count: int) -> array[Any]:
    """The numbers of a field, as ``array("d")`` of floats or ``array("q")``.

    Raises:
        ValueError: The text is not what :func:`encode` makes.

    Example:
        >>> decode(FLOAT, *encode(FLOAT, array("d", [0.5, 1.0])), 2)
        array('d', [0.5, 1.0])
    """
    wide = "d" if kind == FLOAT else "q"
    if code == ZERO:
        return array(wide, bytes(8 * count))
    packed = array(code, a2b_base64(text)[: SIZES[code] * count])
    if len(packed) != count:
        raise ValueError(f"{count} numbers were expected; got {len(packed)}.")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed if code == wide else array(wide, packed)
