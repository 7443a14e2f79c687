"""What a run log is called, in its first line and on disk."""

from __future__ import annotations

from pathlib import Path

SCHEMA, VERSION = "training-diagnostics/run", 2
FILE_NAME = "run.jsonl"
FLUSH_SECONDS = 1.0
BLOCK_STEPS = 100
"""No more steps are packed together: who reads one of them decodes them all."""


def log_file(path: str | Path) -> Path:
    """The file that a path means: itself if it is a file or ends in ``.jsonl``, else ``run.jsonl`` in that folder.

    Example:
        >>> log_file("outputs/first").name
        'run.jsonl'
    """
    path = Path(path)
    return path if path.suffix == ".jsonl" or path.is_file() else path / FILE_NAME
