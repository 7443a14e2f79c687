"""The run log that the objects at close are made from: another sink's, or one of our own beside the W&B run's files."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.records import RunInfo
from diagnostics.runlog import FILE_NAME, RunLogWriter
from diagnostics.sinks import Event
from diagnostics.sinks.secrets import hide_in_info
from diagnostics.sinks.wandb.place import place_of

if TYPE_CHECKING:
    import wandb

RUN_LOG = "run log"


class History:
    """Keeps what happened on disk, so that memory does not grow with the steps.

    Args:
        run: The W&B run.
        keep: Whether a log is wanted for the close: if no other sink writes one, it is written beside the run's files.
    """

    def __init__(self, run: wandb.Run, *, keep: bool) -> None:
        self._run = run
        self._ours = keep
        self._placed = False
        self._writer: RunLogWriter | None = None
        self._troubles: dict[str, str] = {}
        self.log: Path | None = None
        """The file; None before the first event, and where there is none."""

    def share(self, log: Path) -> None:
        """Takes the log that another sink writes."""
        if self._writer is None:
            self._ours, self.log = False, log

    def write(self, event: Event) -> None:
        """Keeps an event; a disk that is full or read-only costs the objects at close, not the logging."""
        try:
            if self._ours:
                self._keep(event)
            if self.log is not None and not self._placed:
                self._placed = True
                place_of(self._run, self.log).write(self.log)
        except OSError as error:
            self.close()
            self._ours, self.log = False, None
            self._troubles[RUN_LOG] = f"{type(error).__name__}: {error}"

    def _keep(self, event: Event) -> None:
        if self._writer is None:
            self._writer = self._open()
            self.log = self._writer.path
        self._writer.write(hide_in_info(event) if isinstance(event, RunInfo) else event)

    def close(self) -> dict[str, str]:
        """Closes a log of our own; what went wrong with it."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
        return dict(self._troubles)

    def _open(self) -> RunLogWriter:
        """A second Monitor in the same run writes into ``run_2``, and so on."""
        files = Path(self._run.dir).absolute().parent  # not run.dir itself, of which W&B uploads every file
        places = (files / f"run_{number}" for number in itertools.count(2))
        for folder in itertools.chain([files], places):
            with suppress(FileExistsError):
                return RunLogWriter(folder / FILE_NAME)
        raise AssertionError  # for type checkers: there are places without end
