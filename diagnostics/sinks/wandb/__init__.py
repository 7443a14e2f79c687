"""Weights & Biases: the sink, and how the trainers open a run. The only package that imports wandb, and only when used.

In a run of our own each step is a row of its own. In somebody else's run the rows and W&B's steps belong to them: our
values are logged with ``commit=False``, which lays them beside what their next commit writes, and moves nothing. So a
row of theirs carries the newest value of each of our keys: every step's if they log at every step, the last of ten
steps' if they log at each tenth; if they never log, one row with the last values appears when the run finishes. Where
they log less often than they step, a ``depth/`` value can be as much older than the ``optim_step`` beside it as
recorded steps lie apart.

Pictures, tables, the page and the run log are made when the sink is closed, from the run log on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.records import SEVERE, SEVERITY_NAMES, SOLE_OPTIMIZER, Diagnosis, RunEnd, RunInfo, StepRecord
from diagnostics.sinks import Event
from diagnostics.sinks.secrets import hide_in_info
from diagnostics.sinks.wandb.closing import leave, warn
from diagnostics.sinks.wandb.history import History
from diagnostics.sinks.wandb.opening import active_run, describe, open_run
from diagnostics.sinks.wandb.values import per_layer, profile

if TYPE_CHECKING:
    import wandb

__all__ = ["WandbSink", "active_run", "describe", "open_run"]

STEP = "optim_step"
PREFIXES = ("grad", "depth", "loop", "layer_grad_rms", "train", "eval")
CONFIG_KEY = "run_info"
ALERT_SECONDS = 600.0


class WandbSink:
    """Logs the keys of ``record.flat()``, the caller's metrics, the profile over depth and the verdict to a W&B run.

    At its close it leaves there, under ``report/``: the heatmap of depth and step, the profile over depth as lines, the
    diagnoses and violations as tables, the page of the run; and the run log as an artifact of the type ``run-log``,
    from which ``diagnostics-report wandb:entity/project/group`` makes reports on any machine. What cannot be made is
    said in one warning and left out.

    Args:
        run: The run; the active one if None.
        every: Steps whose number it divides are logged, and steps where a diagnosis begins or clears.
        profile_every: Each so many recorded steps the profile over depth is logged as ``depth/profile``, a histogram
            with one bin per depth, whose height is ``20 + log10(rms)`` of the output gradient, at least 0; 0 never.
        per_layer: Whether to log ``layer_grad_rms/d007`` for every depth at recorded steps.
        own: Whether the run is ours alone: each step is then a row of its own and the loss is logged as ``train/loss``.
        media: Whether to leave pictures, tables and the page at close.
        upload_run_log: Whether to leave the run log at close.
        alerts: Whether to send an alert, by ``run.alert``, when a condition is first found to be severe; one for each
            condition, and W&B passes on at most one of a condition in ten minutes.

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
        media: bool = True,
        upload_run_log: bool = True,
        alerts: bool = True,
    ) -> None:
        run = active_run() if run is None else run
        if run is None:
            raise ValueError("WandbSink found no active W&B run; call wandb.init() before it, or pass run=.")
        if every < 1 or profile_every < 0:
            raise ValueError(f"every must be at least 1 and profile_every at least 0; got {every} and {profile_every}.")
        self._run = run
        self._every, self._profile_every = every, profile_every
        self._per_layer, self._own, self._alerts = per_layer, own, alerts
        self._media, self._upload = media, upload_run_log
        kept = not getattr(run, "disabled", False)
        self._history = History(run, keep=media or upload_run_log) if kept else None
        self._defined: set[str] = set()
        self._recorded: dict[str, int] = {}
        self._written: set[str] = set()
        self._alerted: set[tuple[str, str]] = set()
        self._step = 0
        for prefix in PREFIXES if own else ():
            run.define_metric(f"{prefix}/*", step_metric=STEP)

    def share_run_log(self, path: Path) -> None:
        """Tells the sink, before its first event, of a run log that another sink of the same Monitor writes.

        A Monitor does so by itself. A sink that is not told writes one of its own, beside the files of the W&B run.
        """
        if self._history is not None:
            self._history.share(path)

    def write(self, event: Event) -> None:
        """Logs a step, describes the run in its config, writes the verdict into its summary."""
        if self._history is not None:
            self._history.write(event)
        try:
            self._write(event)
        except BaseException:
            if self._history is not None:  # a sink that fails is switched off and never closed
                self._history.close()
            raise

    def close(self) -> None:
        """Leaves pictures, tables, the page and the run log in the run; whoever opened the run finishes it."""
        history, self._history = self._history, None
        if history is None:
            return
        troubles = history.close()
        if history.log is not None and (self._media or self._upload):
            troubles |= leave(self._run, history.log, self._leave, media=self._media, upload=self._upload)
            if self._own:
                self._run.log({STEP: self._step})  # the row ends here, before a value of the caller's joins it
        warn(troubles)

    def _leave(self, key: str, value: Any) -> None:
        self._run.log({key: value}, commit=False)

    def _write(self, event: Event) -> None:
        if isinstance(event, StepRecord):
            self._log(event)
            for diagnosis in event.diagnoses if self._alerts else ():
                self._alert(event.optimizer, diagnosis)
        elif isinstance(event, RunInfo):
            self._configure(_origin(hide_in_info(event)))
        elif isinstance(event, RunEnd):
            self._run.summary.update({f"diagnosis/{key}": value for key, value in event.summary.items()})
            ending = {"ended": event.ended, "status": event.status, "error": event.error}
            self._configure({key: value for key, value in ending.items() if value})

    def _log(self, record: StepRecord) -> None:
        self._step = record.step
        profile_is_due = record.recorded and self._profile_is_due(record)
        if profile_is_due:
            self._name_layers(record)
        if record.step % self._every and not record.diagnoses and not profile_is_due:
            return
        ours: dict[str, Any] = {**record.flat()}
        if self._per_layer and record.recorded:
            ours |= per_layer(record)
        if profile_is_due:
            ours |= profile(record)
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

    def _alert(self, optimizer: str, diagnosis: Diagnosis) -> None:
        key = (optimizer, diagnosis.condition)
        severe = diagnosis.severity >= SEVERE and diagnosis.confirmed and diagnosis.cleared is None
        if not severe or key in self._alerted:
            return
        self._alerted.add(key)
        remedies = "".join(f"\nTry: {remedy}." for remedy in diagnosis.remedies[:1])
        self._run.alert(
            title=f"{diagnosis.condition} ({SEVERITY_NAMES[diagnosis.severity]})",
            text=f"{self._run.name}: {diagnosis}{remedies}\nMore: diagnostics-explain {diagnosis.condition}",
            level="ERROR",
            wait_duration=ALERT_SECONDS,
        )

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


def _origin(info: RunInfo) -> dict[str, Any]:
    origin = {
        "started": info.started,
        "command": info.command,
        "overrides": list(info.overrides),
        "seed": info.seed,
        "device": info.device,
        "versions": dict(info.versions),
        "git": dict(info.git),
    }
    return {key: value for key, value in origin.items() if value not in (None, "", [], {})}
