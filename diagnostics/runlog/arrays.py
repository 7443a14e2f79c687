"""The numbers of a run log as arrays, for reports: no record is made, and what is not asked for is not decoded. numpy.

A run may hold millions of blocks of one step each, or a few of thousands. Blocks of the same layout are taken
together: their columns are joined as text and decoded at once.
"""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap

import numpy as np
from numpy.typing import NDArray

from diagnostics.runlog.packing import SIZES, ZERO, Field
from diagnostics.runlog.reading import Block, Contents, Layout, Part, Slice
from diagnostics.runlog.shapes import Shape


@dataclass(frozen=True, slots=True)
class Numbers:
    """Steps of one shape.

    Attributes:
        shape: Theirs.
        places: Their places among all steps of the run, int64 [N].
        columns: By name, float64 [N, W] with W numbers per step.
    """

    shape: Shape
    places: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.float64]]


def numbers(contents: Contents, wanted: Callable[[str], bool]) -> Iterator[Numbers]:
    """The numbers of all steps, in pieces of one shape each.

    Args:
        contents: Of the run log; the file must still be there.
        wanted: Whether a column of this name is to be decoded.

    Raises:
        ValueError: The numbers are damaged.
    """
    groups: dict[int, tuple[Layout, list[Block]]] = {}
    for block in contents.blocks:
        groups.setdefault(id(block.layout), (block.layout, []))[1].append(block)
    with contents.path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
        for layout, blocks in groups.values():
            firsts = np.array([block.first for block in blocks], np.int64)
            for part in layout.parts:
                places = (firsts[:, None] + np.array(part.places)).reshape(-1)
                columns = {
                    piece.field.name: _decode(data, blocks, part, piece)
                    for piece in part.slices
                    if wanted(piece.field.name)
                }
                yield Numbers(part.shape, places, columns)


def _decode(data: mmap, blocks: list[Block], part: Part, piece: Slice) -> NDArray[np.float64]:
    steps, width = len(blocks) * len(part.places), piece.field.width
    if piece.code == ZERO:
        return np.zeros((steps, width))
    text = b"".join([data[block.start + piece.start : block.start + piece.stop] for block in blocks])
    size = len(part.places) * width * SIZES[piece.code]
    raw = np.frombuffer(a2b_base64(text), np.uint8).reshape(len(blocks), -1)[:, :size]
    kind = f"<{'f' if piece.code in 'fd' else 'i'}{SIZES[piece.code]}"
    return np.ascontiguousarray(raw).view(kind).reshape(steps, width).astype(np.float64)


def measured(field: Field, depths: int) -> NDArray[np.bool_]:
    """Which of the layers have a number of a field, [depths]."""
    there = np.full(depths, field.rows is None)
    there[list(field.rows or ())] = True
    return there
