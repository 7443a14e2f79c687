"""One run on disk: written and read here and nowhere else.

A run log is a text file of JSON lines that only grows. The first line names the schema; every other line is an object
with one key that says what it is::

    {"schema": "training-diagnostics/run", "version": 1}
    {"info": {"name": "mlp", …}}
    {"layers": {"id": 0, "name": ["0", "2"], "kind": ["Linear", "Linear"], …}}
    {"step": {"step": 0, "loss": 2.3, "clip": {…}, "layers": 0, "weight": {"norm": [0.1, 0.2]}, …}}
    {"violation": {…}}
    {"end": {"status": "finished", …}}

A table of layers is written when it is first seen and then named by its id; a step holds one column per quantity, in
the order of the table. A field at its default, a column without a value and one that follows from others (``rms`` from
``norm``) are left out. NaN and the infinities are written as Python's json does (``NaN``, ``Infinity``), so they come
back as themselves. A reader ignores what it does not know; a change of meaning is a new version.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar

from diagnostics.records import (
    ClipRecord,
    DepthFit,
    Diagnosis,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    Remedy,
    RunEnd,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
)

SCHEMA, VERSION = "training-diagnostics/run", 1
FILE_NAME = "run.jsonl"
FLUSH_SECONDS = 1.0

Event: TypeAlias = RunInfo | StepRecord | Violation | RunEnd
Columns: TypeAlias = dict[str, list[Any]]
Table: TypeAlias = tuple[tuple[Layer, ...], tuple[int | None, ...]]  # the layers, and how many weights each has
RecordType = TypeVar("RecordType")

_KINDS: dict[type, str] = {RunInfo: "info", StepRecord: "step", Violation: "violation", RunEnd: "end"}
_NESTED: dict[str, type] = {
    "clip": ClipRecord,
    "parts": ClipRecord,
    "violations": Violation,
    "diagnoses": Diagnosis,
    "remedies": Remedy,
    "fit": DepthFit,
    "verdict": Verdict,
}
_STATISTICS = tuple(field.name for field in fields(GradientStats))
_ABSENT: Any = SimpleNamespace(**dict.fromkeys(_STATISTICS))
_LAYER = tuple(field.name for field in fields(Layer))
_MEASURED = ("weight_norm", "update_ratio", "gain", "dead_fraction", "stream_rms")


def log_file(path: str | Path) -> Path:
    """The file that a path means: itself if it is a file or ends in ``.jsonl``, else ``run.jsonl`` in that folder.

    Example:
        >>> log_file("outputs/first").name
        'run.jsonl'
    """
    path = Path(path)
    return path if path.suffix == ".jsonl" or path.is_file() else path / FILE_NAME


class RunLogWriter:
    """Writes a run log; a killed process loses at most about the last second of it.

    Args:
        path: The file, or the folder that gets a ``run.jsonl``; folders are created.

    Raises:
        FileExistsError: The file exists; a run log is never overwritten.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     writer = RunLogWriter(folder)
        ...     writer.write(RunInfo(name="mlp"))
        ...     writer.close()
        ...     read_run(folder).info.name
        'mlp'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = log_file(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self.path.open("x", encoding="ascii")
        except FileExistsError as error:
            raise FileExistsError(
                f"{self.path} already holds a run log and is not overwritten; choose another folder or remove it."
            ) from error
        self._waiting: list[str] = []
        self._flushed = -math.inf
        self._tables: dict[Table, int] = {}
        self._newest: tuple[Table | None, int] = (None, -1)
        self._line({"schema": SCHEMA, "version": VERSION})
        self._flush()

    def write(self, event: Event) -> None:
        """Appends one event; all but a step without news reaches the disk at once."""
        if isinstance(event, StepRecord):
            self._line({"step": self._step(event)})
            urgent = bool(event.violations or event.diagnoses)
        else:
            self._line({_KINDS[type(event)]: _plain(event)})
            urgent = True
        if urgent or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        """Writes what waits and closes the file."""
        if not self._file.closed:
            self._flush()
            self._file.close()

    def _line(self, content: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(content, separators=(",", ":"), default=_foreign))

    def _flush(self) -> None:
        # Lines wait in a list, not in the file's buffer: a forked process would write its copy of that a second time.
        if self._waiting:
            text = "\n".join(self._waiting) + "\n"
            self._waiting = []  # joined before and written at once after: an interrupt neither loses nor doubles a line
            self._file.write(text)
            self._file.flush()
        self._flushed = time.monotonic()

    def _step(self, record: StepRecord) -> dict[str, Any]:
        content: dict[str, Any] = _plain(record)
        if record.layers:
            output = _statistics([layer.output for layer in record.layers])
            weight = _statistics([layer.weight for layer in record.layers])
            numel = tuple(weight.pop("numel", ()))
            content["layers"] = self._table((tuple(layer.layer for layer in record.layers), numel))
            columns: dict[str, Columns | list[Any]] = {"output": output, "weight": weight}
            columns |= {name: _column(record.layers, name) for name in _MEASURED}
            content |= {name: column for name, column in columns.items() if column}
        return content

    def _table(self, table: Table) -> int:
        if table != self._newest[0]:  # equal tables mostly hold the same objects, which compare faster than they hash
            if table not in self._tables:
                self._tables[table] = len(self._tables)
                self._line({"layers": _plain_table(self._tables[table], *table)})
            self._newest = (table, self._tables[table])
        return self._newest[1]


def _plain_table(number: int, layers: tuple[Layer, ...], numel: tuple[int | None, ...]) -> dict[str, Any]:
    columns = {name: [getattr(layer, name) for layer in layers] for name in _LAYER}
    return {"id": number, **columns, "weight_numel": numel}


def _foreign(value: Any) -> Any:
    """What json does not know in its nearest plain form: a configuration holds paths, a metric another's number."""
    if isinstance(value, Mapping):
        return dict(value)
    return float(value) if hasattr(value, "__float__") else str(value)


_DEFAULTS: dict[type, tuple[tuple[str, Any], ...]] = {
    cls: tuple(
        (field.name, field.default if field.default_factory is MISSING else field.default_factory())
        for field in fields(cls)
        if field.name != "layers"
    )
    for cls in (StepRecord, RunInfo, RunEnd, *_NESTED.values())
}


def _plain(value: Any) -> Any:
    """A record as a dict without the fields that are at their default; anything else as it is."""
    if type(value) is tuple:
        return [_plain(item) for item in value]
    if type(value) not in _DEFAULTS:
        return value
    content = ((name, getattr(value, name), default) for name, default in _DEFAULTS[type(value)])
    return {name: _plain(item) for name, item, default in content if item is not default and item != default}


def _column(rows: Sequence[Any], name: str) -> list[Any]:
    """One attribute of all rows; empty if none of them has a value."""
    column = list(map(attrgetter(name), rows))
    return [] if column.count(None) == len(column) else column


def _statistics(gradients: Sequence[GradientStats | None]) -> Columns:
    if all(stats is None for stats in gradients):
        return {}
    rows = [_ABSENT if stats is None else stats for stats in gradients]
    columns = {name: column for name in _STATISTICS if (column := _column(rows, name))}
    if columns["rms"] == _rms(columns["norm"], columns["numel"]):
        del columns["rms"]
    if not any(columns.get("nonfinite", ())):
        columns.pop("nonfinite", None)
    return columns


def _rms(norms: Sequence[float | None], numels: Sequence[int | None]) -> list[float | None]:
    return [
        None if norm is None or numel is None else norm / math.sqrt(numel or 1)
        for norm, numel in zip(norms, numels, strict=True)
    ]


@dataclass(frozen=True)
class Run:
    """One run, read back.

    Attributes:
        info: Where it comes from; None if the process was killed before it said so.
        records: The steps, equal to what was written.
        violations: One entry per rule and parameters, oldest first, with the last count.
        end: How it ended; None for a run that is still going or was killed.
        path: The file.

    Example:
        >>> Run(None, (), (), None, Path("run.jsonl")).verdict is None
        True
    """

    info: RunInfo | None
    records: tuple[StepRecord, ...]
    violations: tuple[Violation, ...]
    end: RunEnd | None
    path: Path

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Every diagnosis in order of appearance, in its last state: what cleared has ``cleared`` set."""
        last: dict[tuple[str, str, int], Diagnosis] = {}
        for record in self.records:
            last |= {(record.optimizer, one.condition, one.step): one for one in record.diagnoses}
        return tuple(last.values())

    @property
    def verdict(self) -> Verdict | None:
        """What the run said at its end; None if it never ended."""
        return self.end.verdict if self.end else None

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: heatmap over depth and steps, depth profile with its fit, norms."""
        # Figures know run logs, not the other way round; and a reader of logs must not need matplotlib.
        return import_module("diagnostics.reports.figures").overview(self.records)


def read_run(path: str | Path) -> Run:
    """Reads a run log, also one that is still being written or that ends in the middle of a line.

    Args:
        path: The file or the run's folder.

    Raises:
        FileNotFoundError: There is no run log.
        ValueError: The file is no run log, is of a newer version, or is damaged before its last line.

    Example:
        >>> read_run("nowhere.jsonl")
        Traceback (most recent call last):
        FileNotFoundError: There is no run log at nowhere.jsonl; give a run.jsonl or the folder that holds one.
    """
    file = log_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no run log at {file}; give a {FILE_NAME} or the folder that holds one.")
    reader = _Reader()
    for number, content in _lines(file):
        reader.take(content, f"Line {number} of {file}")
    return Run(reader.info, tuple(reader.records), tuple(reader.violations.values()), reader.end, file)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered objects after the header; the last line may be incomplete and is then left out."""
    with file.open("rb") as stream:
        _check_header(stream.readline(), file)
        damaged = 0
        for number, line in enumerate(stream, start=2):
            if damaged:
                raise ValueError(f"Line {damaged} of {file} is damaged; remove that line to read the others.")
            try:
                content = json.loads(line)
            except ValueError:
                damaged = number
            else:
                yield number, content


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


class _Reader:
    """What the lines so far add up to."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.end: RunEnd | None = None
        self.records: list[StepRecord] = []
        self.violations: dict[tuple[str, tuple[str, ...]], Violation] = {}
        self._tables: dict[int, tuple[list[Layer], Sequence[int | None]]] = {}

    def take(self, content: Mapping[str, Any], place: str) -> None:
        try:
            self._take(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{place} does not fit the schema {SCHEMA!r}; the run log is damaged.") from error

    def _take(self, content: Mapping[str, Any]) -> None:
        if "step" in content:
            record = self._step(content["step"])
            self.records.append(record)
            for violation in record.violations:
                self._violate(violation)
        elif "layers" in content:
            table = content["layers"]
            self._tables[table["id"]] = (_layers(table), table["weight_numel"])
        elif "violation" in content:
            self._violate(_record(Violation, content["violation"]))
        elif "info" in content:
            self.info = _record(RunInfo, content["info"])
        elif "end" in content:
            self.end = _record(RunEnd, content["end"])

    def _violate(self, violation: Violation) -> None:
        key = (violation.rule, violation.parameters)
        self.violations[key] = replace(self.violations.get(key, violation), count=violation.count)

    def _step(self, content: dict[str, Any]) -> StepRecord:
        table = content.pop("layers", None)
        record = _record(StepRecord, content)
        if table is None:
            return record
        layers, numel = self._tables[table]
        empty = [None] * len(layers)
        weight = {"numel": numel, **content["weight"]} if "weight" in content else {}
        columns = (
            layers,
            _gradients(content.get("output", {}), empty),
            _gradients(weight, empty),
            *(content.get(name, empty) for name in _MEASURED),
        )
        return replace(record, layers=Layers([LayerRecord(*row) for row in zip(*columns, strict=True)]))


def _layers(table: Mapping[str, Any]) -> list[Layer]:
    names = [name for name in _LAYER if name in table]  # older logs know fewer
    rows = zip(*(table[name] for name in names), strict=True)
    return [_record(Layer, dict(zip(names, row, strict=True))) for row in rows]


def _gradients(columns: Columns, empty: list[None]) -> Sequence[GradientStats | None]:
    if not columns:
        return empty
    columns = {"rms": _rms(columns["norm"], columns["numel"]), "nonfinite": [0] * len(empty), **columns}
    known = [name for name in _STATISTICS if name in columns]
    rows = zip(*(columns[name] for name in known), strict=True)
    return [None if row[0] is None else GradientStats(**dict(zip(known, row, strict=True))) for row in rows]


def _record(cls: type[RecordType], content: Mapping[str, Any]) -> RecordType:
    """A record from its plain form; keys that this version does not know are ignored."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: _value(name, value) for name, value in content.items() if name in known})


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(name, item) for item in value)
    return _record(_NESTED[name], value) if name in _NESTED and value is not None else value
