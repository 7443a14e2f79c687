"""Mistakes to make on purpose: each breaks the rule of the loop that it is called after, to see it reported.

``none`` is the lawful loop: clear, one or more backward passes, clip, step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.clipping import ClipByNorm
from diagnostics.monitor import Monitor
from diagnostics.records import StepRecord

MISTAKES = (
    "none",
    "missing_zero_grad",
    "zero_grad_before_step",
    "step_without_grads",
    "clip_before_backward",
    "clip_after_step",
    "clip_mid_accumulation",
    "clip_scaled_grads",
    "clip_subset",
    "clip_ineffective",
    "param_not_in_optimizer",
    "optimizer_param_not_in_model",
    "no_update",
    "window_size",
    "dropped_window",
)
ABOUT_CLIPPING = frozenset(name for name in MISTAKES if name.startswith("clip_"))
WITHIN_A_WINDOW = frozenset({"clip_mid_accumulation", "window_size", "dropped_window"})
"""Mistakes that need several backward passes per step."""
WITH_A_SCALER = "clip_scaled_grads"
TINY_RATE = 1e-12


@dataclass(frozen=True)
class Acts:
    """What the loop does around the backward passes of a step, lawfully or not.

    Args:
        mistake: One of :data:`MISTAKES`.
        model: The model.
        optimizer: Its optimizer.
        monitor: Clips and steps, or watches the loop do so.
        clip: What mistakes about clipping clip by, at another moment.
        scaler: The loop's GradScaler.
    """

    mistake: str
    model: nn.Module
    optimizer: Optimizer
    monitor: Monitor
    clip: ClipByNorm | None = None
    scaler: torch.amp.GradScaler | None = None

    def prepare(self) -> None:
        """Before the first step: what is wrong with the optimizer."""
        group = self.optimizer.param_groups[-1]
        if self.mistake == "param_not_in_optimizer":
            group["params"].pop()
        elif self.mistake == "optimizer_param_not_in_model":
            self.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        elif self.mistake == "no_update":
            for one in self.optimizer.param_groups:
                one["lr"] = TINY_RATE

    def begin(self) -> None:
        """Before the first backward pass of a step."""
        if self.mistake != "missing_zero_grad":
            self.optimizer.zero_grad()
        if self.mistake == "clip_before_backward":
            self._clip()

    def between(self) -> None:
        """Between two backward passes of a step."""
        if self.mistake == "clip_mid_accumulation":
            self._clip()

    def step(self, loss: Tensor, metrics: Mapping[str, float]) -> StepRecord | None:
        """After the last backward pass: clips and steps; None where a scaler left the step out unseen."""
        if self.mistake == "zero_grad_before_step":
            self.optimizer.zero_grad()
        if self.mistake not in ABOUT_CLIPPING or self.clip is None:
            return self.monitor.clip_and_step(loss=loss, metrics=metrics)
        before = self.monitor.records[-1:]
        if self.mistake == WITH_A_SCALER:
            self._clip()
        elif self.mistake == "clip_subset":
            self._clip(without=1)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.mistake == "clip_after_step":
            self._clip()
        after = self.monitor.records[-1:]
        return after[0] if after != before else None

    def _clip(self, without: int = 0) -> None:
        if self.clip is not None:
            parameters = list(self.model.parameters())
            kept = parameters[: len(parameters) - without]
            self.monitor.clip_grad_norm_(kept, self.clip.max_norm, self.clip.norm_type)
