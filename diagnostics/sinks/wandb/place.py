"""Where in W&B a run is, in a small file beside its run log, so that reports find the one from the other."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True, slots=True)
class Place:
    """A run in W&B.

    Attributes:
        project: Its project.
        id: Its id.
        name: What people see in the table of runs.
        entity: Whose it is; empty where that is known only when it is sent.
        group: Its group; empty without one.
        folder: For an offline run the folder of its files; relative to the run log, so that both can be moved.

    Example:
        >>> Place("digits", "1a2b", "depth=3").group
        ''
    """

    project: str
    id: str
    name: str
    entity: str = ""
    group: str = ""
    folder: str | None = None

    def write(self, log: Path) -> None:
        """Writes the file beside a run log; replaces an older one."""
        _beside(log).write_text(json.dumps(asdict(self)) + "\n", encoding="ascii")

    def waits(self, log: Path) -> Path | None:
        """The folder that `wandb sync` has yet to send; None if the run is online, was sent, or its files are gone."""
        if self.folder is None:
            return None
        folder = Path(os.path.normpath(log.parent / self.folder))
        files = list(folder.glob("*.wandb"))
        return folder if files and not any(Path(f"{file}.synced").exists() for file in files) else None


def place_of(run: wandb.Run, log: Path) -> Place:
    """The place of a run that has begun."""
    folder = os.path.relpath(Path(run.dir).absolute().parent, log.absolute().parent) if run.offline else None
    return Place(run.project or "", run.id, run.name or run.id, run.entity or "", run.group or "", folder)


def read_place(log: Path) -> Place | None:
    """The place of the run that wrote a log; None if it was not logged to W&B.

    Example:
        >>> read_place(Path("nowhere/run.jsonl")) is None
        True
    """
    try:
        content = json.loads(_beside(log).read_text(encoding="ascii"))
        return Place(**{field.name: content[field.name] for field in fields(Place) if field.name in content})
    except (OSError, ValueError, TypeError):
        return None


def _beside(log: Path) -> Path:
    return log.with_name(f"{log.stem}.wandb.json")
