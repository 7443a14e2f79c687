"""One run on disk: written and read here and nowhere else.

A run log is a text file that only grows, one JSON value per line. The first line names the schema; every other one is
an object with a key that says what it is, but for the numbers, which are a string::

    {"schema": "training-diagnostics/run", "version": 2}
    {"info": {"name": "mlp", …}}
    {"layers": {"id": 0, "name": ["0", "2"], "kind": ["Linear", "Linear"], …}}
    {"shape": {"id": 0, "layers": 0, "constants": {"clip.rule": "norm", …}, "fields": [["loss", "float", null], …]}}
    {"steps": [0, 0, 1, 0], "types": ["fdz…", "fd…"]}
    "mpmZPgAA…"
    {"news": {"violations": [{…}], "diagnoses": [{…}]}}
    {"violation": {…}}
    {"end": {"status": "finished", …}}

What is said once is plain JSON, to be read by people and found by grep. Numbers are packed: the steps since the last
flush are one block, two lines. The first names each step's shape, which says what kind of number stands in which field
(a table of layers and a shape are written when they are first seen), and a type per field; the second holds the
fields of each shape in turn, as base64 of little-endian numbers: ``f`` and ``d`` are floats of four bytes, where that
loses nothing, or eight; ``b h i q`` integers; ``z`` is nothing but zeros and takes no character. A field ends at a
multiple of four characters, so that a reader decodes the fields it wants and skips the others. ``rms`` that follows
from ``norm`` is left out. News belongs to the last step of the block that follows it.

NaN and the infinities come back as themselves. A reader ignores what it does not know; a change of meaning is a new
version. Of a block that was not written to its end nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from diagnostics.diagnosis import State, verdict
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import Diagnosis, RunEnd, RunInfo, StepRecord, Verdict, Violation
from diagnostics.runlog.names import FILE_NAME, FLUSH_SECONDS, SCHEMA, VERSION, log_file
from diagnostics.runlog.reading import Records, read
from diagnostics.runlog.writing import Event, RunLogWriter

__all__ = [
    "FILE_NAME",
    "FLUSH_SECONDS",
    "SCHEMA",
    "VERSION",
    "Event",
    "Run",
    "RunLogWriter",
    "log_file",
    "read_run",
]


@dataclass(frozen=True)
class Run:
    """One run, read back.

    Attributes:
        info: Where it comes from; None if the process was killed before it said so.
        records: The steps, equal to what was written; read from the file when somebody looks.
        violations: One entry per rule and parameters, oldest first, with the last count.
        end: How it ended; None for a run that is still going or was killed.
        path: The file.

    Example:
        >>> Run(None, (), (), None, Path("run.jsonl")).verdict is None
        True
    """

    info: RunInfo | None
    records: Sequence[StepRecord]
    violations: tuple[Violation, ...]
    end: RunEnd | None
    path: Path

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Every diagnosis in order of appearance, in its last state: what cleared has ``cleared`` set."""
        return tuple(self._diagnoses.values())

    def diagnoses_of(self, optimizer: str) -> tuple[Diagnosis, ...]:
        """Those that the records of one optimizer carry."""
        return tuple(one for (name, _, _), one in self._diagnoses.items() if name == optimizer)

    @property
    def _diagnoses(self) -> dict[tuple[str, str, int], Diagnosis]:
        if isinstance(self.records, Records):
            return self.records.contents.diagnoses
        last: dict[tuple[str, str, int], Diagnosis] = {}
        for record in self.records:
            last |= {(record.optimizer, one.condition, one.step): one for one in record.diagnoses}
        return last

    @property
    def verdict(self) -> Verdict | None:
        """What the run said at its end; None if it never ended."""
        return self.end.verdict if self.end else None

    def judge(self) -> Verdict:
        """What the run said at its end; without an end, what its diagnoses so far amount to.

        Example:
            >>> Run(None, (), (), None, Path("run.jsonl")).judge().condition
            'unknown'
        """
        if self.end:
            return self.end.verdict
        recorded = islice((record for record in self.records if record.recorded), Thresholds().confirm)
        return verdict(State.told(self.diagnoses, len(list(recorded))), self.violations)

    def plot(self) -> Any:
        """A :class:`~diagnostics.reports.drawing.Figure`: heatmap over depth and steps, profile with its fit, norms."""
        # Figures know run logs, not the other way round; and a reader of logs must not need the library that draws.
        draw = import_module("diagnostics.reports.figures").overview
        return draw(self.records, lambda optimizer: [*self.diagnoses_of(optimizer), *self.violations])

    def to_frame(self, library: str | None = None, *, layers: bool = True) -> Any:
        """The run as a data frame of polars or pandas, in long form: one row per step and layer.

        What a step says of itself (``step``, ``loss``, ``clip.total_norm``, ``lr.0``, ``fit.slope``, ``metrics.x`` …)
        stands in each of its rows, beside ``depth``, ``layer``, ``kind``, ``trunk`` and what was measured of the layer
        (``output.rms``, ``weight.norm``, ``update_ratio``, ``share`` …). A step without layers is one row. What was not
        measured is null; a NaN was measured.

        Args:
            library: ``"polars"`` or ``"pandas"``; the first of them that is installed if None.
            layers: False for one row per step, without the layers.

        Raises:
            ModuleNotFoundError: Neither is installed.
            ValueError: There is no such library.
            TypeError: The run does not come from ``read_run``.
        """
        if not isinstance(self.records, Records):
            raise TypeError("to_frame needs the records of a run log; use read_run(path).to_frame().")
        make = import_module("diagnostics.runlog.frame").frame  # numpy
        return make(self.records.contents, library, layers=layers)


def read_run(path: str | Path) -> Run:
    """Reads a run log, also one that is still being written or that ends in the middle of a line.

    Args:
        path: The file or the run's folder.

    Returns:
        The run. Its records are made when somebody looks at them, so the file must stay where it is.

    Raises:
        FileNotFoundError: There is no run log.
        ValueError: The file is no run log, is of another version, or is damaged before its last line.

    Example:
        >>> read_run("nowhere.jsonl")
        Traceback (most recent call last):
        FileNotFoundError: There is no run log at nowhere.jsonl; give a run.jsonl or the folder that holds one.
    """
    file = log_file(path)
    found = read(file)
    return Run(found.info, Records(found), tuple(found.violations.values()), found.end, file)
