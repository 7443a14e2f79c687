"""How a W&B run of our own is opened and finished, and which run is active."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.records import DiagnosticsWarning
from diagnostics.sinks.secrets import hide_in_arguments, hide_in_line, hide_secrets

if TYPE_CHECKING:
    import wandb

INIT_SECONDS, FINISH_SECONDS = 30, 60


def active_run() -> wandb.Run | None:
    """The run that W&B says is active; never imports wandb.

    Example:
        >>> active_run() is None or active_run().id != ""
        True
    """
    return getattr(sys.modules.get("wandb"), "run", None)


def describe(run: wandb.Run) -> str:
    """One sentence about a run: its name, group and project, and where it can be seen or how it gets there.

    Example:
        >>> with open_run(project="example", name="mlp", group="sweep", mode="disabled") as run:
        ...     describe(run)
        'W&B run mlp of group sweep in project example: disabled, nothing is kept.'
    """
    group = f" of group {run.group}" if run.group else ""
    if getattr(run, "disabled", False):
        where = "disabled, nothing is kept."
    elif run.offline:
        where = f"offline, {shlex.join(['wandb', 'sync', str(Path(run.dir).parent)])} sends it."
    else:
        where = str(run.url)
    return f"W&B run {run.name}{group} in project {run.project}: {where}"


@contextmanager
def open_run(
    *,
    project: str,
    name: str | None = None,
    group: str | None = None,
    notes: str | None = None,
    multirun: str | None = None,
    config: Mapping[str, Any] | None = None,
    directory: str | Path = ".",
    mode: Literal["offline", "online", "disabled"] = "offline",
) -> Iterator[wandb.Run]:
    """Opens a W&B run of our own and finishes it: as failed if the block raises, is interrupted or exits with an error.

    A run that an earlier job left open is finished first, so that it never receives this one's values. Values under
    keys that look like secrets are replaced in the config and the name; a command line that holds one is not stored.

    Args:
        project: W&B project.
        name: What people see in the table of runs.
        group: Runs of one group are shown together; a sweep is one.
        notes: Free text.
        multirun: Name of the sweep that the run belongs to; stands in the config as ``run_info.multirun``, because
            W&B gives keys like ``sweep`` and ``group`` a meaning of its own.
        config: The resolved configuration in plain containers.
        directory: The files go to the folder ``wandb`` in it.
        mode: ``"offline"`` writes files that ``wandb sync`` sends later; ``"online"`` needs an account; ``"disabled"``.

    Yields:
        The run.

    Raises:
        ConnectionError: W&B did not answer or knows no account; nothing has started.

    Example:
        >>> with open_run(project="example", mode="disabled") as run:
        ...     run.log({"train/loss": 1.0})
    """
    if mode != "online":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means that nothing is sent; read at import
    sweep = {"run_info": {"multirun": multirun}} if multirun else {}
    run = _init(
        project=project,
        name=None if name is None else hide_in_line(name),
        group=group,
        notes=notes,
        config=hide_secrets({**(config or {}), **sweep}),
        dir=str(Path(directory).absolute()),  # W&B's own process, which jobs share, may have started elsewhere
        mode=mode,
    )
    failed = True
    try:
        yield run
        failed = False
    except SystemExit as error:
        failed = error.code not in (None, 0)
        raise
    finally:
        _finish(run, exit_code=int(failed))


def _init(**options: Any) -> wandb.Run:
    import wandb  # noqa: PLC0415 - costs half a second

    Path(options["dir"]).mkdir(parents=True, exist_ok=True)
    wanted = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1.0,  # what a killed process may lose
        # W&B stores the command line, and there is no way to hide a word of it.
        "x_disable_meta": hide_in_arguments(sys.argv) != sys.argv,
    }
    known = wandb.Settings()  # older versions know fewer settings
    values: dict[str, Any] = {key: value for key, value in wanted.items() if hasattr(known, key)}
    try:
        settings = wandb.Settings(reinit="finish_previous", **values)
    except ValueError:  # the oldest versions say True for the same
        settings = wandb.Settings(reinit=True, **values)
    try:
        return wandb.init(**options, settings=settings)
    except wandb.errors.Error as error:
        said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConnectionError(
            f"W&B could not start an {options['mode']} run ({said}); run `wandb login` if you have not, or choose mode "
            "offline and send the run later with `wandb sync`."
        ) from error


def _finish(run: wandb.Run, exit_code: int) -> None:
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:  # noqa: BLE001 - neither the run's result nor the user's own exception may be lost to it
        with suppress(DiagnosticsWarning):
            warnings.warn(
                f"W&B could not finish the run ({type(error).__name__}: {error}); what it has is in {run.dir}, and "
                "`wandb sync` can send it.",
                DiagnosticsWarning,
                stacklevel=3,
            )
