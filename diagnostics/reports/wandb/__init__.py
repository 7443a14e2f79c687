"""W&B and reports: run logs that lie there as artifacts, and a fleet as a W&B Report."""

from __future__ import annotations

import json
import os
import re
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.records import DiagnosticsWarning
from diagnostics.reports.fleet import Fleet
from diagnostics.reports.request import place_in_wandb
from diagnostics.reports.wandb.building import build
from diagnostics.runlog import FILE_NAME
from diagnostics.sinks.wandb.closing import ARTIFACT
from diagnostics.sinks.wandb.place import Place, read_place

if TYPE_CHECKING:
    import wandb

SPECIFICATION = "wandb_report.json"
SECONDS = 20
MOST_NAMES = 5


def fetch(place: str, folder: str | Path) -> list[Path]:
    """Downloads the run logs of a group of runs from W&B.

    Args:
        place: ``wandb:entity/project/group``.
        folder: Gets a folder for each run, named after its id, with its run log; what is there is replaced.

    Returns:
        The run logs.

    Raises:
        ValueError: The place is not named in full.
        ConnectionError: W&B did not answer or knows no account.
        FileNotFoundError: There is no such project or group, or no run of it left its log.

    Example:
        >>> fetch("wandb:me/digits", "logs")
        Traceback (most recent call last):
        ValueError: A place in W&B is wandb:entity/project/group; got 'wandb:me/digits'.
    """
    entity, project, group = place_in_wandb(place)
    api = _api()
    try:
        runs = list(api.runs(f"{entity}/{project}", filters={"group": group}))
    except ValueError as error:
        raise FileNotFoundError(f"There is no {entity}/{project} in W&B, or not for this account.") from error
    places = [Place(project, run.id, run.name or run.id, entity, group) for run in runs]
    found = [_download(run, place, Path(folder)) for run, place in zip(runs, places, strict=True)]
    logs = [log for own in found for log in own]
    without = [place.name for place, own in zip(places, found, strict=True) if not own]
    if not logs:
        raise FileNotFoundError(
            f"No run of group {group!r} in {entity}/{project} has left its run log in W&B; a run does so when it ends, "
            "unless upload_run_log is false."
        )
    if without:
        some = ", ".join(without[:MOST_NAMES]) + (", …" if len(without) > MOST_NAMES else "")
        said = f"{len(without)} of {len(runs)} runs have left no run log in W&B: {some}."
        warnings.warn(said, DiagnosticsWarning, stacklevel=2)
    return logs


def _download(run: Any, place: Place, folder: Path) -> list[Path]:
    """The run logs of one run: one for each Monitor that it had."""
    artifacts = [one for one in run.logged_artifacts() if one.type == ARTIFACT]
    logs = []
    for number, artifact in enumerate(artifacts, start=1):
        own = folder / re.sub(r"[^\w.-]", "_", run.id)
        own = own if number == 1 else own / f"run_{number}"
        logs.append(Path(artifact.download(root=str(own), path_prefix=FILE_NAME)) / FILE_NAME)
        place.write(logs[-1])
    return logs


def _api() -> wandb.Api:
    """W&B's public API, for an account that is logged in; never asks for a password."""
    import wandb  # noqa: PLC0415 -- costs half a second

    hint = "run `wandb login` if you have not"
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "shared"):
        raise ConnectionError(f"WANDB_MODE={mode} forbids to ask W&B; unset it.")
    with suppress(TypeError):  # versions that ask at a terminal whoever is not logged in
        if not wandb.login(prompt=False, verify=False):
            raise ConnectionError(f"W&B knows no account here; {hint}.")
    try:
        return wandb.Api(timeout=SECONDS)
    except wandb.errors.Error as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ConnectionError(f"W&B did not answer ({said}); {hint}.") from error


def publish(fleet: Fleet, folder: str | Path) -> Iterator[str]:
    """Makes a W&B Report of a fleet: saves it in W&B, or writes it down where that cannot be done now.

    Args:
        fleet: Runs that were logged to W&B, here or fetched from there.
        folder: Gets ``wandb_report.json``, the Report as W&B would be sent it, where it cannot be saved.

    Yields:
        Where the Report is, how to publish it later, and the command that sends the runs that W&B does not have yet.

    Raises:
        ModuleNotFoundError: The extra ``wandb-report`` is not installed.

    Example:
        >>> list(publish(Fleet(()), "."))
        ['None of these runs was logged to W&B, so there is no Report; sink=[runlog,wandb] logs them there.']
    """
    places = {run.path: place for run in fleet.runs if (place := read_place(run.path))}
    if not places:
        yield "None of these runs was logged to W&B, so there is no Report; sink=[runlog,wandb] logs them there."
        return
    try:
        report = _save(fleet, places)
        yield f"W&B Report: {report.url}"
    except (ConnectionError, _NotSavedError) as error:
        path = Path(folder) / SPECIFICATION
        path.write_text(specification(fleet, places), encoding="utf-8")
        yield f"W&B Report, not published: {path}. {error} The same command publishes it later."
    waiting = {files for log, place in places.items() if (files := place.waits(log))}
    if waiting:
        yield f"{len(waiting)} of these runs are not in W&B yet. This sends them:"
        yield f"  {sync_command(waiting)}"


class _NotSavedError(Exception):
    """W&B answered and did not take the Report."""


def _save(fleet: Fleet, places: Mapping[Path, Place]) -> Any:
    api = _api()
    report = build(fleet, places, api.default_entity or "", asks=True)
    try:
        return report.save()
    except Exception as error:  # the library has no error of its own: ValueError, CommError, validation
        said = str(error).splitlines()[0].rstrip(".")
        raise _NotSavedError(f"W&B did not take it ({said}).") from error


def specification(fleet: Fleet, places: Mapping[Path, Place]) -> str:
    """The Report as JSON, made without asking W&B.

    Args:
        fleet: The runs.
        places: By the path of the run log, where they are in W&B.
    """
    model = build(fleet, places, "", asks=False)._to_model()  # noqa: SLF001 -- there is no public way without a network
    whole = model.model_dump(by_alias=True, exclude_none=True, mode="json")
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def sync_command(folders: Iterable[Path]) -> str:
    """The command that sends offline runs, ready to copy; a pattern where it means just these.

    Example:
        >>> sync_command({Path("a b/offline-run-1"), Path("a b/offline-run-2")})
        "wandb sync 'a b/offline-run-1' 'a b/offline-run-2'"
    """
    wanted = sorted(folders)
    (parent, *others) = {folder.parent for folder in wanted}
    if not others and len(wanted) > 1 and sorted(parent.glob("offline-run-*")) == wanted:
        return f"wandb sync {shlex.quote(str(parent))}/offline-run-*"
    return shlex.join(["wandb", "sync", *map(str, wanted)])
