"""The writer of a run log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from diagnostics.records import RunEnd, RunInfo, StepRecord, Violation
from diagnostics.runlog.names import BLOCK_STEPS, FLUSH_SECONDS, SCHEMA, VERSION, log_file
from diagnostics.runlog.packing import Field, encode
from diagnostics.runlog.plain import foreign, plain
from diagnostics.runlog.shapes import Table, pack, plain_shape, plain_table, shape, take_apart

Event: TypeAlias = RunInfo | StepRecord | Violation | RunEnd

_KINDS: dict[type, str] = {RunInfo: "info", Violation: "violation", RunEnd: "end"}


class RunLogWriter:
    """Writes a run log; a killed process loses at most about the last second of it.

    Args:
        path: The file, or the folder that gets a ``run.jsonl``; folders are created.

    Raises:
        FileExistsError: The file exists; a run log is never overwritten.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diagnostics import read_run
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
            self._file = self.path.open("x", encoding="ascii", newline="\n")
        except FileExistsError as error:
            raise FileExistsError(
                f"{self.path} already holds a run log and is not overwritten; choose another folder or remove it."
            ) from error
        self._lines: list[str] = []
        self._steps: list[tuple[int, list[Any]]] = []
        self._flushed = -math.inf
        self._shapes: dict[tuple[int | None, tuple[Any, ...]], int] = {}
        self._fields: list[tuple[Field, ...]] = []
        self._tables: dict[Table, int] = {}
        self._newest: tuple[Table, int] = ((), -1)
        self._line({"schema": SCHEMA, "version": VERSION})
        self._flush()

    def write(self, event: Event) -> None:
        """Appends one event; all but a step without news reaches the disk at once."""
        urgent = True
        if isinstance(event, StepRecord):
            self._step(event)
            urgent = bool(event.violations or event.diagnoses) or len(self._steps) >= BLOCK_STEPS
        else:
            self._block()
            self._line({_KINDS[type(event)]: plain(event)})
        if urgent or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        """Writes what waits and closes the file."""
        if not self._file.closed:
            self._flush()
            self._file.close()

    def _line(self, content: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(content, separators=(",", ":"), default=foreign))

    def _flush(self) -> None:
        # Lines wait in a list, not in the file's buffer: a forked process would write its copy of that a second time.
        self._block()
        if self._lines:
            text = "\n".join(self._lines) + "\n"
            self._lines = []  # joined before and written at once after: an interrupt neither loses nor doubles a line
            self._file.write(text)
            self._file.flush()
        self._flushed = time.monotonic()

    def _step(self, record: StepRecord) -> None:
        kinds, row = take_apart(record)
        number = self._shape(kinds, record.layers.layers)
        if record.violations or record.diagnoses:
            # Before the steps and not behind them: a log that is cut between the two has no step without its news.
            news = {"violations": plain(record.violations), "diagnoses": plain(record.diagnoses)}
            self._line({"news": {name: items for name, items in news.items() if items}})
        self._steps.append((number, row))

    def _shape(self, kinds: tuple[Any, ...], layers: Table) -> int:
        table = self._table(layers) if layers else None
        number = self._shapes.get((table, kinds))
        if number is None:
            number = self._shapes[table, kinds] = len(self._shapes)
            new = shape(kinds, layers or None)
            self._fields.append(new.fields)
            self._line({"shape": plain_shape(number, new, table)})
        return number

    def _table(self, layers: Table) -> int:
        if layers is not self._newest[0]:  # steps share their table, which is slow to hash
            if layers not in self._tables:
                self._tables[layers] = len(self._tables)
                self._line({"layers": plain_table(self._tables[layers], layers)})
            self._newest = (layers, self._tables[layers])
        return self._newest[1]

    def _block(self) -> None:
        """Makes the two lines of the steps that wait."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        rows: dict[int, list[list[Any]]] = {}
        for number, row in steps:
            rows.setdefault(number, []).append(row)
        types, data = [], []
        for number, own in rows.items():
            columns = zip(self._fields[number], zip(*own, strict=True), strict=True)
            coded = [encode(field.kind, pack(field, values)) for field, values in columns]
            types.append("".join(code for code, _ in coded))
            data += [text for _, text in coded]
        self._line({"steps": [number for number, _ in steps], "types": types})
        self._lines.append(f'"{"".join(data)}"')
