"""The reader of a run log: one pass over the file finds all but the steps' numbers, which are read when needed."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, overload

from diagnostics.columns import Column
from diagnostics.records import Diagnosis, Layers, RunEnd, RunInfo, StepRecord, Violation
from diagnostics.runlog.names import FILE_NAME, SCHEMA, VERSION
from diagnostics.runlog.packing import BOOLEAN, Field, decode, length
from diagnostics.runlog.plain import record
from diagnostics.runlog.shapes import Shape, Table, read_shape, read_table

_STEPS = b'{"steps":'


@dataclass(frozen=True, slots=True)
class Slice:
    """Where one field lies in the data line of a block: its type code, and its first and last character."""

    field: Field
    code: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """The steps of one shape in a block.

    Attributes:
        shape: Theirs.
        places: Of these steps in the block, ascending.
        slices: Their fields, in the order of the shape's.
    """

    shape: Shape
    places: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the first line of a block says; blocks of equal first lines share it.

    Attributes:
        count: Steps.
        parts: By shape.
        length: Characters of the data.
    """

    count: int
    parts: tuple[Part, ...]
    length: int


@dataclass(frozen=True, slots=True)
class Block:
    """Steps that were written together.

    Attributes:
        layout: Of its data.
        start: Where its data begins in the file.
        first: The place of its first step among all steps of the run.
        news: Violations and diagnoses of its last step, plain.
    """

    layout: Layout
    start: int
    first: int
    news: Mapping[str, Any]


@dataclass
class Contents:
    """What a file holds, its steps' numbers still in place.

    Attributes:
        path: The file.
        info: None if the run was killed before it said so.
        end: None if it never ended.
        blocks: The steps.
        violations: By rule and parameters, with the last count.
        diagnoses: By optimizer, condition and onset, in their last state.
    """

    path: Path
    info: RunInfo | None = None
    end: RunEnd | None = None
    blocks: list[Block] = field(default_factory=list)
    violations: dict[tuple[str, tuple[str, ...]], Violation] = field(default_factory=dict)
    diagnoses: dict[tuple[str, str, int], Diagnosis] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of records."""
        return self.blocks[-1].first + self.blocks[-1].layout.count if self.blocks else 0

    def violate(self, violation: Violation) -> None:
        """Counts a violation: one entry per rule and parameters."""
        key = (violation.rule, violation.parameters)
        self.violations[key] = replace(self.violations.get(key, violation), count=violation.count)


def read(file: Path) -> Contents:
    """One pass over a run log.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no run log, is of another version, or is damaged before its end.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no run log at {file}; give a {FILE_NAME} or the folder that holds one.")
    with file.open("rb") as stream:
        _check_header(stream.readline(), file)
        with mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
            return _Reader(file, data).contents


def _check_header(line: bytes, file: Path) -> None:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise ValueError(f"{file} is not a run log: its first line does not name the schema {SCHEMA!r}.")
    version = header.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{file} has schema version {version}, above {VERSION}; update training-diagnostics to read it."
        )
    if version < VERSION:
        raise ValueError(
            f"{file} has schema version {version}, from before the format was settled; only {VERSION} is read. Run it "
            "again to have a log."
        )


class _Reader:
    """Goes from line to line; an incomplete last one, as a killed process leaves it, is left out."""

    def __init__(self, file: Path, data: mmap) -> None:
        self.contents = Contents(file)
        self._tables: dict[int, Table] = {}
        self._shapes: dict[int, Shape] = {}
        self._layouts: dict[bytes, Layout] = {}
        self._news: Mapping[str, Any] = {}
        self._data = data
        start, number = data.find(b"\n") + 1, 2
        while start > 0 and (stop := data.find(b"\n", start)) >= 0:
            line = data[start:stop]
            start = stop + 1
            try:
                if line.startswith(_STEPS):
                    start = self._block(line, start)
                    number += 1
                else:
                    self._take(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {file} is damaged; remove it to read the others.") from error
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ValueError(
                    f"Line {number} of {file} does not fit the schema {SCHEMA!r}; the run log is damaged."
                ) from error
            number += 1

    def _block(self, line: bytes, start: int) -> int:
        """Notes the steps whose second line begins here; returns where the next line begins, 0 at the end."""
        layout = self._layouts.get(line)
        if layout is None:
            layout = self._layouts[line] = _layout(json.loads(line), self._shapes)
        stop = start + layout.length + 3  # in quotes, and with the end of the line
        if self._data[start : start + 1] != b'"' or self._data[stop - 2 : stop] != b'"\n':
            if stop > len(self._data) and self._data.find(b"\n", start) < 0:
                return 0
            raise ValueError("The numbers are not as long as their description says.")
        news, self._news = self._news, {}
        self.contents.blocks.append(Block(layout, start + 1, self.contents.steps, news))
        if news:
            self._tell(news, layout)
        return stop

    def _tell(self, news: Mapping[str, Any], layout: Layout) -> None:
        last = next(part.shape for part in layout.parts if layout.count - 1 in part.places)
        optimizer = last.constants["optimizer"]
        for content in news.get("violations", ()):
            self.contents.violate(record(Violation, content))
        for content in news.get("diagnoses", ()):
            one = record(Diagnosis, content)
            self.contents.diagnoses[optimizer, one.condition, one.step] = one

    def _take(self, content: Any) -> None:
        if not isinstance(content, dict):
            raise TypeError("A line that is no object.")
        if "shape" in content:
            self._shapes[content["shape"]["id"]] = read_shape(content["shape"], self._tables)
        elif "layers" in content:
            self._tables[content["layers"]["id"]] = read_table(content["layers"])
        elif "news" in content:
            self._news = content["news"]
        elif "violation" in content:
            self.contents.violate(record(Violation, content["violation"]))
        elif "info" in content:
            self.contents.info = record(RunInfo, content["info"])
        elif "end" in content:
            self.contents.end = record(RunEnd, content["end"])


def _layout(content: Mapping[str, Any], shapes: Mapping[int, Shape]) -> Layout:
    numbers = content["steps"]
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    parts, start = [], 0
    for (number, own), codes in zip(places.items(), content["types"], strict=True):
        fields = shapes[number].fields
        lengths = [length(code, one.width * len(own)) for one, code in zip(fields, codes, strict=True)]
        starts = list(accumulate(lengths, initial=start))
        slices = tuple(map(Slice, fields, codes, starts, starts[1:]))
        parts.append(Part(shapes[number], tuple(own), slices))
        start = starts[-1]
    return Layout(len(numbers), tuple(parts), start)


class Records(Sequence[StepRecord]):
    """The steps of a run log in order: records are made when somebody looks, block by block.

    Args:
        contents: What :func:`read` found; the file must stay where it is.
    """

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self._made: dict[int, tuple[StepRecord, ...]] = {}
        self._firsts = [block.first for block in contents.blocks]

    def __len__(self) -> int:
        return self.contents.steps

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StepRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | tuple[StepRecord, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        number = bisect_right(self._firsts, place) - 1
        return self._block(number)[place - self._firsts[number]]

    def __iter__(self) -> Iterator[StepRecord]:
        for number in range(len(self._firsts)):
            yield from self._block(number)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (Records, tuple)) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _block(self, number: int) -> tuple[StepRecord, ...]:
        if number not in self._made:
            self._made[number] = _records(self.contents.path, self.contents.blocks[number])
        return self._made[number]


def _records(path: Path, block: Block) -> tuple[StepRecord, ...]:
    with path.open("rb") as stream:
        stream.seek(block.start)
        data = stream.read(block.layout.length)
    try:
        found: dict[int, StepRecord] = {}
        for part in block.layout.parts:
            found |= zip(part.places, _part(part, data), strict=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: the numbers of {block.layout.count} steps cannot be read.") from error
    made = [found[place] for place in range(block.layout.count)]
    if block.news:
        made[-1] = replace(
            made[-1],
            violations=tuple(record(Violation, one) for one in block.news.get("violations", ())),
            diagnoses=tuple(record(Diagnosis, one) for one in block.news.get("diagnoses", ())),
        )
    return tuple(made)


def _part(part: Part, data: bytes) -> Iterator[StepRecord]:
    fields = [_values(part.slices[place], part, data) for place, _ in part.shape.of_steps]
    table, columns = part.shape.table, _Columns(part, data)
    for place, row in enumerate(zip(*fields, strict=True)):
        layers = Layers() if table is None else Layers.from_columns(table, columns.at(place))
        yield part.shape.record(row, layers)


def _numbers(piece: Slice, part: Part, data: bytes) -> array[Any]:
    count = piece.field.width * len(part.places)
    return decode(piece.field.kind, piece.code, data[piece.start : piece.stop], count)


def _values(piece: Slice, part: Part, data: bytes) -> Sequence[Any]:
    """One entry per step: a number, or a tuple of them."""
    numbers, width = _numbers(piece, part, data), piece.field.width
    if piece.field.length is not None:
        return [tuple(numbers[place * width : (place + 1) * width]) for place in range(len(part.places))]
    return list(map(bool, numbers)) if piece.field.kind == BOOLEAN else numbers


class _Columns:
    """Makes the columns of the layers when those of one of a block's steps are looked at."""

    def __init__(self, part: Part, data: bytes) -> None:
        self._part, self._data = part, data
        self._found: list[tuple[Field, array[Any]]] | None = None

    def at(self, place: int) -> Callable[[], dict[str, Column]]:
        return lambda: self._make(place)

    def _make(self, place: int) -> dict[str, Column]:
        part, shape = self._part, self._part.shape
        if self._found is None:
            self._found = [(one, _numbers(part.slices[at], part, self._data)) for at, one in shape.of_layers]
        made = dict(shape.constant_columns)
        for one, numbers in self._found:
            own = numbers[place * one.width : (place + 1) * one.width]
            made[one.name] = Column(own, one.rows, shape.depths)
        return made
