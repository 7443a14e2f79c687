"""The job that Hydra runs now: its name, its folder, the command that repeats it, and a Monitor that knows all that.

Our own trainers and other people's apps ask here; without Hydra's job around it, nothing here is needed.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diagnostics.configs import CONF, ConfigurationError
from diagnostics.records import RunInfo
from diagnostics.runlog import log_file
from diagnostics.sinks import Sink
from diagnostics.sinks.runlog import RunLogSink
from diagnostics.sinks.secrets import hide_secrets
from diagnostics.trainers.provenance import describe_run

if TYPE_CHECKING:
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
        started_in: The current folder when the program was started; Hydra may have changed it since.
        flags: What else the command line needs so that it repeats the job.
    """

    name: str
    overrides: tuple[str, ...]
    directory: Path
    group: str | None
    shared: Path
    started_in: Path = field(default_factory=Path.cwd)
    flags: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        """The file that was started."""
        return self.started_in / sys.argv[0]

    @property
    def command(self) -> str:
        """The command line that repeats this job alone."""
        return shlex.join([*_program(self.script, self.started_in), *self.flags, *self.overrides])


def _program(path: Path, started_in: Path) -> list[str]:
    """The words that start a program: its name if it was installed, else its script as seen from where it started."""
    if path.suffix != ".py":
        return [path.name]
    script = path.resolve()
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and module.origin and Path(module.origin).resolve() == script:
        return ["python", "-m", module.name.removesuffix(".__main__")]
    roots = [root for root in (started_in, _CHECKOUT) if script.is_relative_to(root)]
    return ["python", str(script.relative_to(roots[0]) if roots else script)]


def describe_job() -> Job:
    """What Hydra knows about the job that runs now."""
    config = HydraConfig.get()
    overrides = tuple(config.overrides.task)
    directory, started_in = Path(config.runtime.output_dir), Path(config.runtime.cwd)
    flags = _chosen_files(sys.argv[1:])
    if config.mode != RunMode.MULTIRUN:
        choices = config.runtime.choices
        chosen = "-".join(str(choices[group]) for group in ("model", "task") if group in choices)
        name = " ".join(overrides) or chosen or config.job.name
        return Job(name, overrides, directory, None, directory, started_in, flags)
    sweep = started_in / config.sweep.dir
    common = _common_overrides(sweep)
    name = " ".join([override for override in overrides if override not in common] or overrides)
    if config.sweeper.get("params"):  # the configuration asks for a sweep, and would again
        flags = (*flags, "hydra.mode=RUN")
    return Job(name, overrides, directory, sweep.name, sweep, started_in, flags)


def _chosen_files(arguments: Sequence[str]) -> tuple[str, ...]:
    """Those of Hydra's options that choose which configuration is composed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for short, long in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, long, dest=long)
    found = vars(parser.parse_known_args(arguments)[0])
    return tuple(f"{option}={value}" for option, value in found.items() if value)


def _common_overrides(sweep: Path) -> list[str]:
    """What was asked of all jobs: the sweep's own overrides, of which those with several values match no job's."""
    written = sweep / "multirun.yaml"  # Hydra's sweepers write it before the first job
    return list(OmegaConf.load(written).hydra.overrides.task) if written.exists() else []


@contextmanager
def refusals(key: str, section: Mapping[str, Any]) -> Iterator[None]:
    """Turns what a constructor says about a value into one sentence with the value's full key."""
    try:
        yield
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        joint = "." if said.split(" ")[0] in section else ": "
        raise ConfigurationError(f"{key}{joint}{said}.") from error


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


class ReportSweep(Callback):
    """Reports on a sweep at its end, as ``diagnostics-report`` does; ``hydra.callbacks`` names it.

    Hydra does not call it where a job failed; the command on the sweep's folder says the same.

    Example:
        >>> ReportSweep().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": "nowhere"}}}))
    """

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table of the jobs, the sickest first, and writes one page for all; nothing without a run log."""
        from diagnostics.reports.report import Report  # noqa: PLC0415 -- once, at the very end
        from diagnostics.reports.request import Request  # noqa: PLC0415 -- likewise

        report = Report(Request((config.hydra.sweep.dir,)))
        try:
            lines = ["", *report.printed(), "", *report.written()]
        except FileNotFoundError:
            return
        sys.stdout.writelines(f"{line}\n" for line in lines)


def make_monitor(
    model: Any,
    optimizers: Any,
    *,
    clip: Mapping[str, Any] | None,
    sink: Mapping[str, Any],
    thresholds: Mapping[str, Any] | None = None,
    sinks: Iterable[Sink] = (),
    **options: Any,
) -> Monitor:
    """What the section ``diagnostics`` of somebody else's Hydra app makes: a Monitor that knows which run it is in.

    Args:
        model: As ``Monitor`` takes it.
        optimizers: Likewise.
        clip: The section of the rule; empty for ``diagnostics/clip=none``.
        sink: Name to section of a sink; None for those that were not chosen.
        thresholds: Their section; None for the Monitor's own.
        sinks: Sinks besides those of the configuration.
        options: The Monitor's others; ``run`` takes the place of what is known about the run.

    Returns:
        The Monitor; each has sinks of its own.

    Raises:
        ConfigurationError: A value that only the objects themselves can refuse.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Linear(2, 1)
        >>> make_monitor(model, optim.SGD(model.parameters()), clip=None, sink={}, every=1).close()
    """
    from diagnostics.monitor import Monitor  # noqa: PLC0415 -- loads torch, which composing does not need
    from diagnostics.monitor.options import Options  # noqa: PLC0415 -- likewise

    plain: dict[str, Any] = {name: one.name if isinstance(one, Enum) else one for name, one in options.items()}
    plain["clip"] = _build(clip, "diagnostics.clip") if clip else None
    plain["thresholds"] = _build(thresholds, "diagnostics.diagnosis.thresholds") if thresholds else None
    with refusals("diagnostics", plain):
        Options(**{one.name: plain[one.name] for one in fields(Options) if one.name in plain})
    if "run" not in plain:
        plain["run"] = _describe_run(model)
    with ExitStack() as unless_all_open:
        opened = []
        for name, section in sink.items():
            if section:
                opened.append(_build(section, f"diagnostics.sink.{name}"))
                unless_all_open.callback(opened[-1].close)
        monitor = Monitor(model, optimizers, sinks=[*opened, *sinks], **plain)
        unless_all_open.pop_all()
    return monitor


def _build(section: Mapping[str, Any], key: str) -> Any:
    make = instantiate(section, _partial_=True, _convert_="all")
    with refusals(key, section):
        return make()


def open_run_log(path: str) -> RunLogSink:
    """A run log in the folder of Hydra's job, or in the current one where there is no job.

    A second one of the same job, as cross-validation and a notebook make them, goes into a folder ``run_2`` beside the
    first, and so on.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     sink = open_run_log(f"{folder}/run.jsonl")
        ...     sink.close()
    """
    job = _running_job()
    file = log_file((job.directory if job else Path.cwd()) / path)
    places = (file.parent / f"run_{number}" / file.name for number in itertools.count(2))
    for place in itertools.chain([file], places):  # another process may take a place between a look and an opening
        with suppress(FileExistsError):
            return RunLogSink(place)
    raise AssertionError  # for type checkers: there are places without end


def _running_job() -> Job | None:
    """What Hydra knows, if it runs this; a configuration that was composed alone knows no folder."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return None
    return describe_job()


def _describe_run(model: Any) -> RunInfo:
    import torch  # noqa: PLC0415 -- as above

    models = list(model.values()) if isinstance(model, Mapping) else [model]
    running = _running_job()
    job = running or Job(type(models[0]).__name__, (), Path.cwd(), None, Path.cwd())
    return describe_run(
        name=job.name,
        directory=job.directory,
        command=job.command if running else "",
        overrides=job.overrides,
        config=_config_of(job) if running else {},
        seed=torch.initial_seed(),
        device=next((str(one.device) for model in models for one in model.parameters()), ""),
        code=(job.script.parent, job.started_in),
    )


def _config_of(job: Job) -> dict[str, Any]:
    """The configuration as Hydra wrote it down before the job began; unresolved where it cannot be resolved alone."""
    written = job.directory / str(HydraConfig.get().output_subdir) / "config.yaml"
    if not written.exists():
        return {}
    config = OmegaConf.load(written)
    plain: Any
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(config)
    hidden: dict[str, Any] = hide_secrets(plain)  # Hydra's file names a secret of the environment, resolved it is one
    return hidden
