"""Weights & Biases: the sink, and how the trainers open a run. The only module that imports wandb, and only when used.

In a run of our own each step is a row of its own. In somebody else's run the rows and W&B's steps belong to them: our
values are logged with ``commit=False``, which lays them beside what their next commit writes, and moves nothing. So a
row of theirs carries the newest value of each of our keys: every step's if they log at every step, the last of ten
steps' if they log at each tenth; if they never log, one row with the last values appears when the run finishes. Where
they log less often than they step, a ``depth/`` value can be as much older than the ``optim_step`` beside it as
recorded steps lie apart.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.records import SOLE_OPTIMIZER, DiagnosticsWarning, RunEnd, RunInfo, StepRecord
from diagnostics.sinks import Event
from diagnostics.sinks.secrets import hide_in_arguments, hide_in_line, hide_secrets

if TYPE_CHECKING:
    import wandb

STEP = "optim_step"
PREFIXES = ("grad", "depth", "loop", "layer_grad_rms", "train", "eval")
CONFIG_KEY = "run_info"
MOST_BINS = 512  # of a wandb.Histogram
PROFILE_FLOOR = 20
INIT_SECONDS, FINISH_SECONDS = 30, 60


class WandbSink:
    """Logs the keys of ``record.flat()``, the caller's metrics, the profile over depth and the verdict to a W&B run.

    Args:
        run: The run; the active one if None.
        every: Steps whose number it divides are logged, and steps where a diagnosis begins or clears.
        profile_every: Each so many recorded steps the profile over depth is logged as ``depth/profile``, a histogram
            with one bin per depth, whose height is ``20 + log10(rms)`` of the output gradient, at least 0; 0 never.
        per_layer: Whether to log ``layer_grad_rms/d007`` for every depth at recorded steps.
        own: Whether the run is ours alone: each step is then a row of its own and the loss is logged as ``train/loss``.

    Raises:
        ValueError: No run is active, or a number is out of range.

    Example:
        >>> import wandb
        >>> from diagnostics.records import ClipRecord
        >>> sink = WandbSink(wandb.init(mode="disabled"))
        >>> sink.write(StepRecord(0, ClipRecord("none", 2.0, None, 0.5, None, applied=False, total_norm_after=0.5)))
        >>> sink.close()
    """

    def __init__(
        self,
        run: wandb.Run | None = None,
        *,
        every: int = 1,
        profile_every: int = 10,
        per_layer: bool = False,
        own: bool = False,
    ) -> None:
        run = active_run() if run is None else run
        if run is None:
            raise ValueError("WandbSink found no active W&B run; call wandb.init() before it, or pass run=.")
        if every < 1 or profile_every < 0:
            raise ValueError(f"every must be at least 1 and profile_every at least 0; got {every} and {profile_every}.")
        self._run = run
        self._every, self._profile_every = every, profile_every
        self._per_layer, self._own = per_layer, own
        self._defined: set[str] = set()
        self._recorded: dict[str, int] = {}
        self._written: set[str] = set()
        for prefix in PREFIXES if own else ():
            run.define_metric(f"{prefix}/*", step_metric=STEP)

    def write(self, event: Event) -> None:
        """Logs a step, describes the run in its config, writes the verdict into its summary."""
        if isinstance(event, StepRecord):
            self._step(event)
        elif isinstance(event, RunInfo):
            self._configure(_origin(event))
        elif isinstance(event, RunEnd):
            self._run.summary.update({f"diagnosis/{key}": value for key, value in event.summary.items()})
            ending = {"ended": event.ended, "status": event.status, "error": event.error}
            self._configure({key: value for key, value in ending.items() if value})

    def close(self) -> None:
        """Nothing to release: whoever opened the run finishes it."""

    def _step(self, record: StepRecord) -> None:
        profile = record.recorded and self._profile_is_due(record)
        if profile:
            self._name_layers(record)
        if record.step % self._every and not record.diagnoses and not profile:
            return
        ours: dict[str, Any] = {**record.flat()}
        if self._per_layer and record.recorded:
            ours |= _per_layer(record)
        if profile:
            ours |= _profile(record)
        if self._own:
            loss = {} if record.loss is None else {"train/loss": record.loss}
            self._run.log({**loss, **record.metrics, **ours, STEP: record.step})
        else:
            self._define(ours.keys())
            self._run.log({**record.metrics, **ours, STEP: record.step}, commit=False)

    def _define(self, keys: AbstractSet[str]) -> None:
        # Key by key: a pattern like grad/* would also take over the axis of a grad/… that the user logs.
        for key in keys - self._defined:
            self._run.define_metric(key, step_metric=STEP)
        self._defined |= keys

    def _profile_is_due(self, record: StepRecord) -> bool:
        count = self._recorded[record.optimizer] = self._recorded.get(record.optimizer, 0) + 1
        return self._profile_every > 0 and (count - 1) % self._profile_every == 0

    def _name_layers(self, record: StepRecord) -> None:
        key = "layers" if record.optimizer == SOLE_OPTIMIZER else f"layers_{record.optimizer}"
        self._configure({key: [one.layer.name for one in record.layers]})

    def _configure(self, values: Mapping[str, Any]) -> None:
        """Adds to the run's config, under one key, and replaces only what was written here."""
        config: Any = self._run.config
        key = CONFIG_KEY if isinstance(config.get(CONFIG_KEY, {}), Mapping) else f"training_{CONFIG_KEY}"
        present = config.get(key, {})
        new = {name: value for name, value in values.items() if name in self._written or name not in present}
        self._written |= new.keys()
        if {**present, **new} != present:
            config.update({key: {**present, **new}}, allow_val_change=True)


def active_run() -> wandb.Run | None:
    """The run that W&B says is active; never imports wandb.

    Example:
        >>> active_run() is None or active_run().id != ""
        True
    """
    return getattr(sys.modules.get("wandb"), "run", None)


def _origin(info: RunInfo) -> dict[str, Any]:
    origin = {
        "started": info.started,
        "command": hide_in_line(info.command),
        "overrides": hide_in_arguments(info.overrides),
        "seed": info.seed,
        "device": info.device,
        "versions": dict(info.versions),
        "git": hide_secrets(info.git),
    }
    return {key: value for key, value in origin.items() if value not in (None, "", [], {})}


def _within(record: StepRecord) -> str:
    return "" if record.optimizer == SOLE_OPTIMIZER else f"{record.optimizer}/"


def _per_layer(record: StepRecord) -> dict[str, float]:
    prefix = f"layer_grad_rms/{_within(record)}d"
    outputs = [(one.layer.depth, one.output) for one in record.layers]
    return {f"{prefix}{depth:03d}": output.rms for depth, output in outputs if output is not None}


def _profile(record: StepRecord) -> dict[str, Any]:
    import wandb  # noqa: PLC0415 - loaded already, since there is a run

    layers = [one for one in record.layers if one.output is not None]
    count = min(len(layers), MOST_BINS)
    if count == 0:
        return {}
    chosen = [layers[i * (len(layers) - 1) // max(count - 1, 1)] for i in range(count)]
    depths = [one.layer.depth for one in chosen]
    heights = [_height(one.output.rms) for one in chosen if one.output is not None]
    histogram = wandb.Histogram(np_histogram=(heights, [*depths, depths[-1] + 1]))  # type: ignore[arg-type] # lists do
    return {f"depth/{_within(record)}profile": histogram}


def _height(rms: float) -> float:
    """Zero, NaN and infinity have height 0: a histogram takes finite ones only, and ``grad/nonfinite`` tells."""
    return max(0.0, PROFILE_FLOOR + math.log10(rms)) if 0 < rms < math.inf else 0.0


@contextmanager
def open_run(
    *,
    project: str,
    name: str | None = None,
    group: str | None = None,
    notes: str | None = None,
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
    run = _init(
        project=project,
        name=None if name is None else hide_in_line(name),
        group=group,
        notes=notes,
        config=hide_secrets(config or {}),
        dir=str(directory),
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
