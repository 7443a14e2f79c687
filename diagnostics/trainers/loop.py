"""A training loop to copy: plain values in, the final evaluation out, and the Monitor's one line in the middle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from diagnostics.clipping import ClipByNorm
from diagnostics.monitor import Monitor
from diagnostics.trainers.progress import Progress
from diagnostics.trainers.tasks import Task

MISTAKES = ("none", "missing_zero_grad", "clip_after_step")
# What a sweep may optimise, with the value that stands for a run that broke: the worst there is.
OBJECTIVES: Mapping[str, float] = {"eval/loss": math.inf, "eval/accuracy": -math.inf}


@dataclass(frozen=True)
class TrainerSettings:
    """How to train, apart from model, task, optimizer and clipping.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        evaluate_every: Steps between evaluations on the held-out examples; the first is before step 0.
        seed: Decides the initial weights and the order of the batches.
        device: ``auto`` (a CUDA GPU where there is one, else the CPU) or what ``torch.device`` takes.
        threads: CPU threads that share one operation.
        mistake: ``none``, or a mistake to make on purpose: ``missing_zero_grad`` never clears the gradients,
            ``clip_after_step`` clips when it is too late.
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
    evaluate_every: int = 50
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    mistake: str = "none"
    objective: str = "eval/loss"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("evaluate_every", 1), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        for name, options in (("mistake", MISTAKES), ("objective", OBJECTIVES)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}; got {getattr(self, name)!r}.")


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
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device must be auto, cpu or one that this machine has; got {name!r} ({reason}).") from error
    return device


def train(
    model: nn.Module,
    task: Task,
    optimizer: Optimizer,
    monitor: Monitor,
    settings: TrainerSettings,
    *,
    clip: ClipByNorm | None = None,
) -> dict[str, float]:
    """Trains ``model`` on ``task`` for ``settings.steps`` steps.

    Args:
        model: Maps a batch's inputs to outputs; already on its device.
        task: Gives batches, the loss and the held-out examples.
        optimizer: Holds the model's parameters.
        monitor: Watches them; it clips as it was told when it was made.
        settings: Everything else.
        clip: The rule that ``mistake="clip_after_step"`` applies too late.

    Returns:
        ``eval/loss`` and ``eval/accuracy`` of the final weights.
    """
    device = next(model.parameters()).device
    batches = task.batches(settings.batch_size, settings.seed)
    with Progress(settings.steps) as progress:
        for step in range(settings.steps):
            metrics = evaluate(model, task) if step % settings.evaluate_every == 0 else {}
            inputs, targets = (tensor.to(device) for tensor in next(batches))
            if settings.mistake != "missing_zero_grad":
                optimizer.zero_grad()
            loss = task.loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.mistake == "clip_after_step" and clip is not None:
                optimizer.step()
                monitor.clip_grad_norm_(model.parameters(), clip.max_norm, clip.norm_type)
                progress.advance(loss=None)
            else:
                progress.advance(monitor.clip_and_step(loss=loss, metrics=metrics).loss)
    return evaluate(model, task)


def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Mean loss and share of right answers on the held-out examples.

    Example:
        >>> from diagnostics.trainers.models import MLP
        >>> from diagnostics.trainers.tasks import Digits
        >>> sorted(evaluate(MLP(64, 10), Digits()))
        ['eval/accuracy', 'eval/loss']
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss, correct, examples = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in task.held_out():
            inputs, targets = (tensor.to(device) for tensor in batch)
            outputs = model(inputs)
            loss += task.loss(outputs, targets).item() * len(targets)
            correct += task.correct(outputs, targets).item()
            examples += len(targets)
    model.train(training)
    return {"eval/loss": loss / examples, "eval/accuracy": correct / examples}


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
