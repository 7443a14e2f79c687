"""The entry points: Hydra composes the configuration, this module makes objects of it and starts the trainer.

Only Hydra and the schema are imported at the top, so that ``--help`` and ``--cfg job`` answer at once. Torch, W&B and
the task's data come in when a job starts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from diagnostics.configs import CONF, ConfigurationError, register_trainers, resolve, sentence
from diagnostics.jobs import Job, describe_job, recompose, refusals
from diagnostics.records import (
    WARNING,
    ContractError,
    DiagnosisError,
    DiagnosticsWarning,
    NonFiniteGradientError,
    RunInfo,
)
from diagnostics.reports.page import PAGE
from diagnostics.trainers.progress import write_line

if TYPE_CHECKING:
    from torch import nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from diagnostics.clipping.rules import ClipRule
    from diagnostics.monitor import Monitor
    from diagnostics.second_opinion import SecondOpinion
    from diagnostics.sinks import Sink
    from diagnostics.trainers.settings import TrainerSettings
    from diagnostics.trainers.tasks import Task

OURS = ("diagnostics", "torch")  # what a `_target_` may name where trusted_packages adds nothing
OF_THE_RUN = ("project", "mode", "wandb_group", "notes")  # of sink.wandb's keys; the others are WandbSink's own
# Errors that say in one sentence what a person has to know: where in the code they arose is of no interest.
SAID = (ConfigurationError, ContractError, DiagnosisError, NonFiniteGradientError, ConnectionError)
WANTS_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # Hydra's own switch, read before we set it

register_trainers()  # at import: the workers of a parallel sweep import this module before they compose their jobs


class Terminated(KeyboardInterrupt):
    """SIGTERM: the machine wants the process to end, as Ctrl-C does a person."""


@dataclass(frozen=True)
class Parts:
    """The objects that a configuration describes."""

    trainer: TrainerSettings
    task: Task
    model: nn.Module
    optimizer: Optimizer
    clip: ClipRule | None
    scaler: GradScaler | None
    monitoring: Mapping[str, Any]
    stop_when_sick: bool = False


def train() -> None:
    """Trains as conf/train.yaml and the command line say.

    A configuration that cannot be ends in one sentence, Ctrl-C in exit code 130, SIGTERM in 143, and a bug in its
    traceback. With ``HYDRA_FULL_ERROR=1`` in the environment every error ends in its traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise what it would print in many lines
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)
    try:
        with _sigterm_interrupts():
            main()
    except KeyboardInterrupt as error:
        sys.exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT))
    except Exception as error:
        if WANTS_TRACEBACKS:
            raise
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            sys.exit(sentence(error))
        if isinstance(error, SAID):
            sys.exit(str(error))
        raise error.with_traceback(_below_hydra(error)) from error.__cause__


def report() -> None:
    """Prints a row for each run at or below the given places, the sickest first, and writes one page for all."""
    import shutil

    from diagnostics.reports.report import make

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal knows fewer characters than a name has
    status = make(sys.argv[1:], shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    if status:
        sys.exit(status)


def job(config: DictConfig) -> float:
    """Hydra's task function: one run, from its configuration to the objective that a sweeper gets to see."""
    alone = HydraConfig.get().mode != RunMode.MULTIRUN
    try:
        with _sigterm_interrupts(), _short_warnings():
            return run(resolve(config), describe_job())
    except Exception as error:
        if alone and isinstance(error, SAID) and not WANTS_TRACEBACKS:
            sys.exit(str(error))  # Hydra would put a line of its own before the sentence
        if not alone:
            _report_failure(error)
        raise


def run(settings: Mapping[str, Any], place: Job) -> float:
    """One run of the training job.

    Args:
        settings: The resolved configuration.
        place: Which job it is and where its files go.

    Returns:
        The value of ``trainer.objective``.

    Raises:
        ConfigurationError: A value that only the objects themselves can refuse; before a step and before a W&B run.
    """
    from diagnostics.monitor import Monitor
    from diagnostics.second_opinion import append
    from diagnostics.sinks.console import say
    from diagnostics.trainers import loop
    from diagnostics.trainers.provenance import describe_run
    from diagnostics.trainers.settings import objective

    parts = assemble(settings)
    info = describe_run(
        name=place.name,
        directory=place.directory,
        command=place.command,
        overrides=place.overrides,
        config=settings,
        seed=parts.trainer.seed,
        device=str(next(parts.model.parameters()).device),
    )
    if parts.trainer.preflight:
        say(print, str(loop.look(parts.model, parts.task, parts.trainer, info)))
    try:
        with open_sinks(settings["sink"], info, place) as (sinks, log):
            with Monitor(parts.model, parts.optimizer, sinks=sinks, run=info, **parts.monitoring) as monitor:
                evaluation = loop.train(
                    parts.model,
                    parts.task,
                    parts.optimizer,
                    monitor,
                    parts.trainer,
                    clip=parts.clip,
                    scaler=parts.scaler,
                    stop_when_sick=parts.stop_when_sick,
                )
            steps = monitor.records[-1].step + 1
            log({**evaluation, "optim_step": steps})
        shown = ", ".join(f"{key} {value:.4g}" for key, value in evaluation.items())
        print(f"{info.name}: {shown} after {steps} steps")
        if settings["diagnostics"]["second_opinion"] and monitor.verdict().severity >= WARNING:
            opinion = _ask_again(place, monitor, steps)
            if settings["sink"]["runlog"]:
                append(place.directory / settings["sink"]["runlog"]["path"], opinion)
        return objective(parts.trainer.objective, evaluation, monitor.verdict().condition)
    finally:
        if settings["sink"]["runlog"] and not place.group:  # a sweep has one page for all of its jobs
            _print_page(place.directory / settings["sink"]["runlog"]["path"], place.directory / PAGE)


def _ask_again(place: Job, monitor: Monitor, steps: int) -> SecondOpinion:
    """Tries each remedy of a sick run, and prints what it makes of it."""
    from diagnostics.monitor import Monitor
    from diagnostics.second_opinion import Outcome, accuracy_at, brief, second_opinion
    from diagnostics.trainers import loop

    steps = brief(steps)
    quiet = (f"trainer.steps={steps}", "diagnostics.on_violation=record", "diagnostics.on_diagnosis=record")

    def rerun(override: str) -> Outcome:
        parts = assemble(resolve(recompose(place.overrides, [*override.split(), *quiet])))
        with Monitor(parts.model, parts.optimizer, sinks=[], **parts.monitoring) as again:
            evaluation = loop.train(
                parts.model, parts.task, parts.optimizer, again, parts.trainer, clip=parts.clip, scaler=parts.scaler
            )
        return Outcome(evaluation["eval/accuracy"], again.verdict())

    condition = monitor.verdict().condition
    remedies = next(one.remedies for one in monitor.diagnoses if one.condition == condition and one.cleared is None)
    accuracy = accuracy_at(monitor.records, steps)
    return second_opinion(condition, remedies, rerun, accuracy=accuracy, steps=steps, say=partial(print, flush=True))


def assemble(settings: Mapping[str, Any]) -> Parts:
    """Makes the objects that the configuration describes, and lets each refuse what it cannot work with.

    Raises:
        ConfigurationError: In one sentence, under the key's full name.
    """
    import torch

    from diagnostics.clipping.rules import ClipByNorm
    from diagnostics.monitor.options import Options
    from diagnostics.trainers.settings import check_together, choose_device, make_scaler

    trainer = build(settings["trainer"], "trainer")
    trusted = (*OURS, *settings["trusted_packages"])
    task = build(settings["task"], "task", trusted=trusted)
    clip = build(settings["clip"], "clip") if settings["clip"] else None
    monitoring = {
        key: value for key, value in settings["diagnostics"].items() if key not in ("thresholds", "second_opinion")
    }
    stop_when_sick = monitoring["on_diagnosis"] == "stop"
    if stop_when_sick:
        monitoring["on_diagnosis"] = "warn"  # the Monitor says it, the loop acts on it
    with refusals("diagnostics", monitoring):
        Options(**monitoring)
    monitoring["thresholds"] = build(settings["diagnostics"]["thresholds"], "diagnostics.diagnosis.thresholds")
    if trainer.mistake.startswith("clip_") and not isinstance(clip, ClipByNorm):
        raise ConfigurationError(f"trainer.mistake={trainer.mistake} needs a norm to clip with; add clip=norm.")
    with refusals("trainer", settings["trainer"]):
        device = choose_device(trainer.device)
        task.batches(trainer.batch_size, trainer.seed)
    torch.set_num_threads(trainer.threads)
    torch.manual_seed(trainer.seed)
    model = build(settings["model"], "model", task.inputs, task.outputs, trusted=trusted).to(device)
    with refusals("trainer", settings["trainer"]):
        check_together(model, trainer, device)
    optimizer = build(settings["optimizer"], "optimizer", model.parameters(), trusted=trusted)
    scaler = make_scaler(trainer.precision, device)
    monitoring |= {"clip": clip, "accumulate": trainer.micro_batches, "scaler": scaler}
    return Parts(trainer, task, model, optimizer, clip, scaler, monitoring, stop_when_sick)


def build(section: Mapping[str, Any], key: str, *arguments: Any, trusted: Sequence[str] = OURS, **keywords: Any) -> Any:
    """The object that a section of the configuration describes.

    Args:
        section: ``_target_``, a class of a trusted package, and its keywords, which may be sections themselves.
        key: Where the section stands, for messages.
        arguments: What the class needs besides.
        trusted: The packages.
        keywords: The same, by name.

    Raises:
        ConfigurationError: Another target, or values that the class refuses.

    Example:
        >>> build({"_target_": "diagnostics.ClipByNorm", "max_norm": 1.0}, "clip").max_norm
        1.0
    """
    target = str(section.get("_target_"))
    wrong = ConfigurationError(f"{key}._target_ must be a class of {' or '.join(trusted)}; got {target!r}.")
    if target.split(".", maxsplit=1)[0] not in trusted:
        raise wrong
    try:
        make = instantiate(dict(section), _partial_=True, _recursive_=False, _convert_="all")
    except HydraException as error:
        raise wrong from error
    if not isinstance(make.func, type) or make.func.__module__.split(".")[0] not in trusted:
        raise wrong
    parts = {name: _build_parts(value, f"{key}.{name}", trusted) for name, value in make.keywords.items()}
    with refusals(key, section):
        return make(*arguments, **parts, **keywords)


def _build_parts(value: Any, key: str, trusted: Sequence[str]) -> Any:
    """A keyword's value, with every section in it built."""
    if not isinstance(value, Mapping):
        return value
    if "_target_" in value:
        return build(value, key, trusted=trusted)
    return {name: _build_parts(item, f"{key}.{name}", trusted) for name, item in value.items()}


@contextmanager
def open_sinks(
    sinks: Mapping[str, Any], info: RunInfo, place: Job
) -> Iterator[tuple[list[Sink], Callable[[Mapping[str, float]], object]]]:
    """Opens what ``sink=[...]`` chose.

    Yields:
        The sinks, and a function that logs what no step record carries; it does nothing without W&B.
    """
    opened: list[Sink] = []
    with ExitStack() as stack:
        run = stack.enter_context(_wandb_run(sinks["wandb"], info, place)) if sinks["wandb"] else None
        if sinks["console"]:
            opened.append(build(sinks["console"], "sink.console", write=partial(write_line, stream=sys.stdout)))
        if sinks["runlog"]:
            path = place.directory / sinks["runlog"]["path"]
            opened.append(build({**sinks["runlog"], "path": str(path)}, "sink.runlog"))
        if run is None:
            yield opened, lambda _values: None
            return
        from diagnostics.sinks.wandb import WandbSink, describe

        print(describe(run))
        options = {key: value for key, value in sinks["wandb"].items() if key not in OF_THE_RUN}
        yield [*opened, WandbSink(run, own=True, **options)], run.log


def _wandb_run(options: Mapping[str, Any], info: RunInfo, place: Job) -> AbstractContextManager[Any]:
    from diagnostics.sinks.wandb import open_run

    return open_run(
        project=options["project"],
        name=info.name,
        group=options["wandb_group"] or place.group,
        notes=options["notes"],
        multirun=place.group,
        config=info.config,
        directory=place.shared,
        mode=options["mode"],
    )


def _print_page(run_log: Path, page: Path) -> None:
    """Makes the page of a run, however the run ended; a page that fails must not hide the run's own result."""
    if not run_log.exists():
        return
    from diagnostics.reports.page import write_page

    try:
        print(f"Page of this run: {write_page(run_log, page)}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is more important
        write_line(f"The page of this run could not be written ({type(error).__name__}: {error}).")


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows our own warnings as the sentence they are, above the progress bar, and each one in each job."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DiagnosticsWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, DiagnosticsWarning):
                write_line(str(message))
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        yield


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM end a run as Ctrl-C does, so that its sinks are closed."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated("SIGTERM")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _report_failure(error: Exception) -> None:
    """Says at once what failed: Hydra shows only a sweep's first failure, and that one at the end."""
    trace = "" if isinstance(error, SAID) else "".join(traceback.format_exception(error))
    write_line(f"{trace}Job {HydraConfig.get().job.num} ({describe_job().name}) failed: {error}")


def _below_hydra(error: Exception) -> TracebackType | None:
    """The part of a traceback that is the job's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not run.__code__:
        trace = trace.tb_next
    return trace or error.__traceback__
