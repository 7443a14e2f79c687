"""What a fused optimizer can be handed: a divisor for all gradients, and word that they are not to be spent.

Both are meant for a GradScaler: a fused step divides by ``optimizer.grad_scale`` as it reads the gradients, and leaves
everything as it is where ``optimizer.found_inf`` is 1, without the host knowing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnostics.monitor.observation import Observation


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes both.

    Example:
        >>> is_fused(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], fused=True))
        True
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it can be told to leave a step out; a fused SGD with momentum reads memory that nobody wrote, if first.

    Example:
        >>> skips(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.9, fused=True))
        False
    """
    return is_fused(optimizer) and not any(group.get("momentum") for group in optimizer.param_groups)


def can_divide(observation: Observation, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether all of them can divide the gradients of a step as they read them.

    Their kernels step wrongly, silently, where a gradient does not lie in memory as its parameter does.
    """
    return all(map(is_fused, optimizers)) and lie_alike(observation.parameters, observation.gradients)


def to_divide_by(observation: Observation, optimizers: Iterable[torch.optim.Optimizer]) -> Tensor | None:
    """What fused optimizers are to divide all gradients by, 0-dim; None where gradients have to be written to."""
    factor = observation.clipping.leave_to_optimizer() if can_divide(observation, optimizers) else None
    return None if factor is None else 1 / factor


def lie_alike(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """Whether gradients lie in memory in the order in which their parameters do.

    Example:
        >>> lie_alike([torch.zeros(2, 2)], [torch.zeros(2, 2).T])
        False
    """
    if any(gradient.is_sparse for gradient in gradients):
        return False
    if all(map(Tensor.is_contiguous, (*parameters, *gradients))):  # takes a fifth of the time
        return True
    return all(one.stride() == other.stride() for one, other in zip(parameters, gradients, strict=True))


@contextmanager
def handed(optimizer: torch.optim.Optimizer, divisor: Tensor | None, overflow: Tensor | None) -> Iterator[None]:
    """Steps inside divide gradients by this, and are left out where the overflow is 1.

    Args:
        optimizer: A fused one, or any if there is nothing to hand over.
        divisor: 0-dim, or None for 1.
        overflow: 0-dim, 1.0 or 0.0; None for 0.
    """
    holder: Any = optimizer
    given = {"grad_scale": divisor, "found_inf": overflow}
    values = {name: value.float() for name, value in given.items() if value is not None}
    vars(holder).update(values)
    try:
        yield
    finally:
        for name in values:
            delattr(holder, name)
