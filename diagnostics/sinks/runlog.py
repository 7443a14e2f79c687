"""Writes the run log: everything about the run, in a file of its folder, for reading while it runs and later."""

from __future__ import annotations

from pathlib import Path

from diagnostics.runlog import RunLogWriter
from diagnostics.sinks import Event


class RunLogSink:
    """Writes every event to a run log, which `read_run` reads.

    Args:
        path: The file, or the folder that gets a ``run.jsonl``; folders are created.

    Raises:
        FileExistsError: There is a run log already; it is never overwritten.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     sink = RunLogSink(folder)
        ...     sink.close()
        ...     sink.path.name
        'run.jsonl'
    """

    def __init__(self, path: str | Path) -> None:
        self._writer = RunLogWriter(path)
        self.path = self._writer.path

    def write(self, event: Event) -> None:
        """Appends the event."""
        self._writer.write(event)

    def close(self) -> None:
        """Writes what waits and closes the file."""
        self._writer.close()
