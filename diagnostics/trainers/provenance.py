"""Where a run comes from: enough to start it again."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diagnostics.records import RunInfo

PACKAGES = ("training-diagnostics", "torch", "numpy", "scikit-learn", "hydra-core", "omegaconf", "wandb")


def describe_run(
    *,
    name: str,
    directory: Path,
    command: str,
    overrides: tuple[str, ...],
    config: Mapping[str, Any],
    seed: int,
    device: str,
    code: Sequence[Path] = (Path(__file__).parent,),
) -> RunInfo:
    """The run's RunInfo: what the caller says, and the time, the versions and the commit.

    Args:
        name: As :class:`RunInfo` has it; likewise the others but the last.
        directory: Folder of the run.
        command: The command line.
        overrides: Hydra's.
        config: The resolved configuration.
        seed: The random seed.
        device: Of the parameters.
        code: Folders of which the first that git tracks says the commit.

    Example:
        >>> info = describe_run(name="mlp", directory=Path("outputs"), command="python scripts/train.py", overrides=(),
        ...                     config={}, seed=0, device="cpu")
        >>> info.name, "python" in info.versions
        ('mlp', True)
    """
    return RunInfo(
        name=name,
        started=datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        command=command,
        overrides=overrides,
        config=config,
        seed=seed,
        device=device,
        versions=_versions(),
        git=next(filter(None, map(git_state, code)), {}),
        directory=str(directory),
    )


def git_state(folder: Path) -> dict[str, Any]:
    """Commit that ``folder`` is at and whether tracked files have changed since.

    Empty without git or a commit, and where git tracks no file of the folder: an environment inside a checkout holds
    packages of which the checkout's commit says nothing.

    Example:
        >>> git_state(Path("/"))
        {}
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD") if _git(folder, "ls-files") else ""
        changed = commit and _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": bool(changed)} if commit else {}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 - fixed words
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {package: number for package, number in found.items() if number}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
