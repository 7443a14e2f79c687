"""A training loop to copy: plain values in, the final evaluation out, and the Monitor's one line in the middle."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.clipping.rules import ClipByNorm, ClipRule
from diagnostics.diagnosis.recovery import GONE
from diagnostics.first_pass import Preflight, preflight
from diagnostics.monitor import Monitor
from diagnostics.monitor.ledger import is_alarm
from diagnostics.records import SEVERITY_NAMES, RunInfo
from diagnostics.trainers.mistakes import ABOUT_CLIPPING, MISTAKES, WITH_A_SCALER, WITHIN_A_WINDOW, Acts
from diagnostics.trainers.models import MLP
from diagnostics.trainers.progress import Progress
from diagnostics.trainers.schedules import SCHEDULES, make_schedule
from diagnostics.trainers.tasks import Batch, Task

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a sweep may optimise, with the value that stands for a run that broke: the worst there is.
OBJECTIVES: Mapping[str, float] = {"eval/loss": math.inf, "eval/accuracy": -math.inf}
LEAST = {
    "steps": 1,
    "batch_size": 1,
    "micro_batches": 1,
    "evaluate_every": 1,
    "patience": 1,
    "warmup_steps": 0,
    "threads": 1,
    "seed": 0,
}
MOST = {
    "threads": 1024,  # many more end the process without a word
    "seed": 2**64 - 1,  # what torch's generators take
}
OPTIONS: Mapping[str, Collection[str]] = {
    "precision": PRECISIONS,
    "schedule": SCHEDULES,
    "mistake": MISTAKES,
    "objective": OBJECTIVES,
}


@dataclass(frozen=True)
class TrainerSettings:
    """How to train, apart from model, task, optimizer and clipping.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        micro_batches: Backward passes per step; each takes an equal part of the step's examples.
        evaluate_every: Steps between evaluations on the held-out examples; the first is before step 0, and the last
            step has one whatever this says.
        patience: Steps for which a diagnosis at warning or above may stand before a run that stops when sick does.
        precision: ``fp32``; ``bf16`` or ``fp16`` under ``torch.autocast``, weights stay fp32. ``fp16`` needs a
            GradScaler, see :func:`make_scaler`.
        schedule: How the learning rate falls after the warm-up: ``constant`` (it does not), ``linear`` or ``cosine``.
        warmup_steps: Steps over which it rises from 0 before that; a run that is shorter ends on the way.
        compile: Whether the model runs under ``torch.compile``.
        seed: Decides the initial weights and the order of the batches.
        device: ``auto`` (a CUDA GPU where there is one, else the CPU) or what ``torch.device`` takes.
        threads: CPU threads that share one operation.
        preflight: Whether to look at the initial weights before training and say what the gradient does in them, see
            :func:`look`.
        mistake: ``none``, or a mistake to make on purpose, called after the rule of the loop that it breaks: see
            :data:`diagnostics.trainers.mistakes.MISTAKES`.
        objective: What a sweep optimises: ``eval/loss`` or ``eval/accuracy``.

    Raises:
        ValueError: A number out of range or an option that does not exist.

    Example:
        >>> TrainerSettings(steps=0)
        Traceback (most recent call last):
        ValueError: steps must be at least 1; got 0.
    """

    steps: int = 600
    batch_size: int = 64
    micro_batches: int = 1
    evaluate_every: int = 50
    patience: int = 300
    precision: str = "fp32"
    schedule: str = "constant"
    warmup_steps: int = 0
    compile: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    preflight: bool = False
    mistake: str = "none"
    objective: str = "eval/loss"

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}; got {getattr(self, name)}.")
        for name, options in OPTIONS.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}; got {getattr(self, name)!r}.")
        self._refuse_pairs()

    def _refuse_pairs(self) -> None:
        if self.batch_size % self.micro_batches:
            raise ValueError(f"micro_batches must divide batch_size, {self.batch_size}; got {self.micro_batches}.")
        if self.precision == "fp16" and self.mistake in ABOUT_CLIPPING - {WITH_A_SCALER}:
            raise ValueError(f"precision must be fp32 or bf16 with mistake={self.mistake}; got 'fp16'.")
        if self.precision != "fp16" and self.mistake == WITH_A_SCALER:
            raise ValueError(f"precision must be fp16 with mistake={self.mistake}; got {self.precision!r}.")
        if self.micro_batches < 2 and self.mistake in WITHIN_A_WINDOW:
            raise ValueError(f"micro_batches must be at least 2 with mistake={self.mistake}; got 1.")


def choose_device(name: str) -> torch.device:
    """The device of that name, if this machine has it.

    Raises:
        ValueError: It has not, or no device is called so.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # a device that holds no values, such as meta, cannot train
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"device must be auto, cpu or one that this machine has; got {name!r} ({reason}).") from error
    return device


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """The GradScaler that a precision needs, for the Monitor and for :func:`train`; None where gradients fit.

    Example:
        >>> make_scaler("bf16", torch.device("cpu")) is None
        True
    """
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def check_together(model: nn.Module, settings: TrainerSettings, device: torch.device) -> None:
    """Refuses a model that would break in its first step with these settings.

    Args:
        model: The model.
        settings: How it is to be trained.
        device: Where.

    Raises:
        ValueError: One sentence, which begins with the setting to change.

    Example:
        >>> check_together(nn.LSTM(2, 2), TrainerSettings(precision="fp16"), torch.device("cpu"))
        Traceback (most recent call last):
        ValueError: precision must be fp32 or bf16 for a fused LSTM on the CPU; got 'fp16'.
    """
    on_cpu, kinds = device.type == "cpu", {type(module) for module in model.modules()}
    if on_cpu and settings.precision == "fp16" and nn.LSTM in kinds:
        raise ValueError("precision must be fp32 or bf16 for a fused LSTM on the CPU; got 'fp16'.")
    size, parts = settings.batch_size, settings.micro_batches
    # Not a CNN's: there the places of one image are enough.
    if size == parts and isinstance(model, MLP) and nn.BatchNorm1d in kinds:
        raise ValueError(f"batch_size must be at least {2 * parts} for batch normalisation, 2 per pass; got {size}.")
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    if settings.compile and on_cpu and sys.platform == "linux" and shutil.which(compiler) is None:
        raise ValueError(f"compile must be false where there is no C++ compiler, such as {compiler}; got true.")


def train(
    model: nn.Module,
    task: Task,
    optimizer: Optimizer,
    monitor: Monitor,
    settings: TrainerSettings,
    *,
    clip: ClipRule | None = None,
    scaler: torch.amp.GradScaler | None = None,
    stop_when_sick: bool = False,
) -> dict[str, float]:
    """Trains ``model`` on ``task`` for ``settings.steps`` steps.

    A step that the Monitor skips, as fp16 does until the loss scale fits, does not advance the schedule. A run that is
    stopped early closes its Monitor as ``stopped``, with the reason.

    Args:
        model: Maps a batch's inputs to outputs; already on its device.
        task: Gives batches, the loss and the held-out examples.
        optimizer: Holds the model's parameters.
        monitor: Watches them; it clips as it was told when it was made, with the same micro-batches and scaler.
        settings: Everything else.
        clip: The rule that a mistake about clipping applies too late, too early or in part, if it clips by norm.
        scaler: What :func:`make_scaler` gave.
        stop_when_sick: Whether to end the run early once a diagnosis has stood for ``settings.patience`` steps.

    Returns:
        ``eval/loss`` and ``eval/accuracy`` of the final weights.
    """
    device = next(model.parameters()).device
    batches = task.batches(settings.batch_size, settings.seed)
    acts = Acts(settings.mistake, model, optimizer, monitor, clip if isinstance(clip, ClipByNorm) else None, scaler)
    acts.prepare()
    schedule = make_schedule(optimizer, settings.schedule, steps=settings.steps, warmup_steps=settings.warmup_steps)
    # Only now: hooks that the Monitor registers after the first compiled call would never fire.
    forward = torch.compile(model) if settings.compile else model
    with Progress(settings.steps) as progress:
        for step in range(settings.steps):
            evaluates = step % settings.evaluate_every == 0 or step == settings.steps - 1
            metrics = evaluate(model, task, settings.precision) if evaluates else {}
            acts.begin()
            loss = _backward(forward, task, next(batches), settings, acts, device=device)
            record = acts.step(loss, metrics)
            if record is not None and not record.skipped:  # torch warns of a schedule ahead of its optimizer
                schedule.step()
            progress.advance(None if record is None else record.loss)
            if stop_when_sick and (reason := incurable(monitor, settings.patience)):
                monitor.close("stopped", reason)
                break
    if settings.mistake == "dropped_window":
        acts.begin()
        _backward(forward, task, next(batches), replace(settings, mistake="none", micro_batches=1), acts, device=device)
    return evaluate(model, task, settings.precision)


def incurable(monitor: Monitor, patience: int) -> str | None:
    """Why a run need not go on: the diagnosis at warning or above that has stood for so many steps; None if it may.

    One that only stands for what it has cost is no reason: its slope is gone, and the run may make up for it.
    """
    last = monitor.records[-1]
    if not last.recorded:
        return None
    for one in monitor.diagnoses:
        if is_alarm(one) and GONE not in one.evidence and last.step - one.step >= patience:
            return f"{one.condition} ({SEVERITY_NAMES[one.severity]}) has stood since step {one.step}"
    return None


def _backward(
    forward: Callable[[Tensor], Tensor],
    task: Task,
    batch: Batch,
    settings: TrainerSettings,
    acts: Acts,
    *,
    device: torch.device,
) -> Tensor:
    """Adds the gradients of the mean loss over the batch, a part of it at a time; that loss."""
    losses: list[Tensor] = []
    scaler, passes = acts.scaler, settings.micro_batches + (settings.mistake == "window_size")
    parts = (tensor.to(device).chunk(passes) for tensor in batch)
    for inputs, targets in zip(*parts, strict=True):
        if losses:
            acts.between()
        with autocast(settings.precision, device):
            loss = task.loss(forward(inputs), targets) / settings.micro_batches
        if settings.mistake != "step_without_grads":
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def look(model: nn.Module, task: Task, settings: TrainerSettings, run: RunInfo | None = None) -> Preflight:
    """What :func:`diagnostics.preflight` says of the model on the first batch; training goes on as without it.

    It looks in fp32 whatever the precision, since fp16 without its loss scale would add zeros of its own.

    Example:
        >>> from diagnostics.trainers.models import MLP
        >>> from diagnostics.trainers.tasks import Digits
        >>> task = Digits()
        >>> look(MLP(task.inputs, task.outputs, depth=2), task, TrainerSettings()).verdict.condition
        'healthy'
    """
    device = next(model.parameters()).device

    def loss() -> Tensor:
        inputs, targets = (tensor.to(device) for tensor in next(task.batches(settings.batch_size, settings.seed)))
        return task.loss(model(inputs), targets)

    return preflight(model, loss, run=run)


def evaluate(model: nn.Module, task: Task, precision: str = "fp32") -> dict[str, float]:
    """Mean loss and share of right answers on the held-out examples.

    Args:
        model: Put into evaluation mode meanwhile.
        task: Holds the examples.
        precision: As in :class:`TrainerSettings`.

    Example:
        >>> from diagnostics.trainers.models import MLP
        >>> from diagnostics.trainers.tasks import Digits
        >>> task = Digits()
        >>> sorted(evaluate(MLP(task.inputs, task.outputs), task))
        ['eval/accuracy', 'eval/loss']
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss, correct, examples = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in task.held_out():
            inputs, targets = (tensor.to(device) for tensor in batch)
            with autocast(precision, device):
                outputs = model(inputs)
                loss += task.loss(outputs, targets).item() * len(targets)
            correct += task.correct(outputs, targets).item()
            examples += len(targets)
    model.train(training)
    return {"eval/loss": loss / examples, "eval/accuracy": correct / examples}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass in a precision.

    Example:
        >>> with autocast("bf16", torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def objective(name: str, evaluation: Mapping[str, float], condition: str) -> float:
    """What a sweep gets to see of a run.

    Args:
        name: A key of ``evaluation``.
        evaluation: What ``train`` returned.
        condition: The verdict's; a run that is ``nonfinite`` has no meaningful value.

    Returns:
        The value, or the worst there is (infinity for a loss) if the run turned non-finite.

    Example:
        >>> objective("eval/loss", {"eval/loss": 0.5, "eval/accuracy": 0.9}, "nonfinite")
        inf
    """
    value = evaluation[name]
    return OBJECTIVES[name] if condition == "nonfinite" or not math.isfinite(value) else value
