"""Automatic mixed precision: what a GradScaler has to be asked, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def unscale(scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Divides gradients by the loss scale, once per step: what the loop has unscaled already is left alone."""
    for optimizer in optimizers:
        _unscale_once(scaler, optimizer)


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """The scale as a tensor (``get_scale()`` would wait for it); None before the first loss was scaled."""
    scale: Tensor | None = scaler._scale  # noqa: SLF001
    return scale


def inside_step(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler hands to a fused step that is running: the scale still to be divided by, and the overflow.

    None where there is nothing: such a step is the only one that starts although gradients are scaled or not finite.
    """
    found = [[getattr(one, name, None) for name in ("grad_scale", "found_inf")] for one in optimizers]
    scale, overflow = zip(*found, strict=True)
    return (_first(scale), _first(overflow))


def _first(values: Iterable[Tensor | None]) -> Tensor | None:
    return next((value for value in values if value is not None), None)


def _unscale_once(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:  # torch says that it has been done by an error only
        if "already been called" not in str(error):
            raise
