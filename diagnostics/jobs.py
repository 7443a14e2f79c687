"""The job that Hydra runs now: its name, its folder, the command that repeats it, and a Monitor that knows all that.

Our own trainers and other people's apps ask here; without Hydra's job around it, nothing here is needed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diagnostics.configs import CONF
from diagnostics.records import RunInfo
from diagnostics.sinks import Sink
from diagnostics.sinks.runlog import RunLogSink
from diagnostics.trainers.provenance import describe_run, git_state

if TYPE_CHECKING:
    from diagnostics.clipping import ClipByNorm
    from diagnostics.monitor import Monitor

_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """What Hydra knows about a job.

    Attributes:
        name: For people: the overrides, in a multirun those that differ between its jobs.
        overrides: All of them.
        directory: The job's own folder.
        group: In a multirun the sweep's folder name, else None.
        shared: Where the W&B files go: the sweep's folder or the job's own.
    """

    name: str
    overrides: tuple[str, ...]
    directory: Path
    group: str | None
    shared: Path

    @property
    def command(self) -> str:
        """The command line that repeats this job alone."""
        return shlex.join([*_program(Path(sys.argv[0])), *self.overrides])


def _program(path: Path) -> list[str]:
    """The words that start a program: its name if it was installed, else its script as seen from where it started."""
    if path.suffix != ".py":
        return [path.name]
    script = path.resolve()
    roots = [root for root in (Path.cwd(), _CHECKOUT) if script.is_relative_to(root)]
    return ["python", str(script.relative_to(roots[0]) if roots else script)]


def describe_job() -> Job:
    """What Hydra knows about the job that runs now."""
    config = HydraConfig.get()
    overrides = tuple(config.overrides.task)
    directory = Path(config.runtime.output_dir)
    if config.mode != RunMode.MULTIRUN:
        choices = config.runtime.choices
        chosen = "-".join(str(choices[group]) for group in ("model", "task") if group in choices)
        name = " ".join(overrides) or chosen or config.job.name
        return Job(name, overrides, directory, group=None, shared=directory)
    sweep = Path(config.sweep.dir).absolute()
    differing = [override for override in overrides if override not in _common_overrides(sweep)]
    return Job(" ".join(differing or overrides), overrides, directory, group=sweep.name, shared=sweep)


def _common_overrides(sweep: Path) -> list[str]:
    """What was asked of all jobs: the sweep's own overrides, of which those with several values match no job's."""
    written = sweep / "multirun.yaml"  # Hydra's sweepers write it before the first job
    return list(OmegaConf.load(written).hydra.overrides.task) if written.exists() else []


def recompose(overrides: Sequence[str], changes: Sequence[str]) -> DictConfig:
    """The configuration of a run with some overrides changed.

    Args:
        overrides: The run's own.
        changes: Take the place of those of the same key. One that chooses another option of a group also takes the
            place of overrides of keys inside of it, which the new option may not have.
    """
    keys = [change.partition("=")[0] for change in changes]
    kept = [one for one in overrides if not any(_is_inside(one.lstrip("+~").partition("=")[0], key) for key in keys)]
    known = GlobalHydra.instance().is_initialized()
    running: AbstractContextManager[Any] = (
        nullcontext() if known else initialize_config_dir(str(CONF), version_base="1.3")
    )
    with running:
        return compose("train", overrides=[*kept, *changes])


def _is_inside(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


class TellStopping(Callback):
    """Says at the end of a sweep what stopping saved; ``hydra.callbacks`` names it.

    Hydra does not call it where a job failed: ``diagnostics-report`` on the sweep's folder says the same.

    Example:
        >>> TellStopping().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": "nowhere"}}}))
    """

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Reads the sweep's run logs and prints what they say together."""
        from diagnostics.reports.stopping import tell_stopping  # noqa: PLC0415 -- once, at the very end
        from diagnostics.runlog import FILE_NAME, read_run  # noqa: PLC0415 -- likewise

        logs = sorted(Path(config.hydra.sweep.dir).rglob(FILE_NAME))
        for line in tell_stopping([read_run(log) for log in logs]):
            sys.stdout.write(f"{line}\n")


def make_monitor(
    model: Any, optimizers: Any, *, clip: ClipByNorm | None, sink: Mapping[str, Sink | None], **options: Any
) -> Monitor:
    """What the section ``diagnostics`` of somebody else's Hydra app makes: a Monitor that knows which run it is in.

    Args:
        model: As ``Monitor`` takes it.
        optimizers: Likewise.
        clip: The rule; empty for ``diagnostics/clip=none``.
        sink: Name to sink; those that are None were not chosen.
        options: The Monitor's others; ``run`` takes the place of what Hydra knows about the run.

    Returns:
        The Monitor.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Linear(2, 1)
        >>> make_monitor(model, optim.SGD(model.parameters()), clip=None, sink={}, every=1).close()
    """
    from diagnostics.monitor import Monitor  # noqa: PLC0415 -- loads torch, which composing does not need

    plain: dict[str, Any] = {name: one.name if isinstance(one, Enum) else one for name, one in options.items()}
    if HydraConfig.initialized():
        plain.setdefault("run", _describe_run(model))
    return Monitor(model, optimizers, clip=clip or None, sinks=[one for one in sink.values() if one], **plain)


def open_run_log(path: str) -> RunLogSink:
    """A run log in the folder of Hydra's job, or in the current one where there is no job.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     sink = open_run_log(f"{folder}/run.jsonl")
        ...     sink.close()
    """
    return RunLogSink(Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else ".") / path)


def _describe_run(model: Any) -> RunInfo:
    import torch  # noqa: PLC0415 -- as above

    job = describe_job()
    models = model.values() if isinstance(model, Mapping) else [model]
    written = job.directory / str(HydraConfig.get().output_subdir) / "config.yaml"  # before the job began, by Hydra
    info = describe_run(
        name=job.name,
        directory=job.directory,
        command=job.command,
        overrides=job.overrides,
        config=OmegaConf.to_container(OmegaConf.load(written)) if written.exists() else {},  # type: ignore[arg-type]
        seed=torch.initial_seed(),
        device=next((str(one.device) for model in models for one in model.parameters()), ""),
    )
    return replace(info, git=git_state(Path(HydraConfig.get().runtime.cwd)))
