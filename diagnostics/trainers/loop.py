"""A training loop to copy: plain values in, the final evaluation out, and the Monitor's one line in the middle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.clipping.rules import ClipByNorm, ClipRule
from diagnostics.diagnosis.recovery import GONE
from diagnostics.first_pass import Preflight, preflight
from diagnostics.monitor import Monitor
from diagnostics.monitor.ledger import is_alarm
from diagnostics.records import SEVERITY_NAMES, RunInfo
from diagnostics.trainers.mistakes import Acts
from diagnostics.trainers.progress import Progress
from diagnostics.trainers.schedules import make_schedule
from diagnostics.trainers.settings import PRECISIONS, TrainerSettings
from diagnostics.trainers.tasks import Batch, Task


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
            # None: the scaler left the step out, or asynchronous=True does not know of the first one yet.
            if scaler is None if record is None else not record.skipped:
                schedule.step()  # torch warns of a schedule ahead of its optimizer
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
    if not monitor.records or not (last := monitor.records[-1]).recorded:
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
