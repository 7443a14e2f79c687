"""How to train, as plain values: checked one by one, and together with the model and the device."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from diagnostics.trainers.mistakes import ABOUT_CLIPPING, MISTAKES, WITH_A_SCALER, WITHIN_A_WINDOW
from diagnostics.trainers.models import MLP
from diagnostics.trainers.schedules import SCHEDULES

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
