"""How the learning rate goes over a run: a warm-up, then constant, down a line, or down half a cosine.

Example:
    >>> [round(factor("linear", step, steps=6, warmup_steps=2), 2) for step in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# What is left of the learning rate after a share (0 to 1) of the steps that follow the warm-up.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: (1.0 + math.cos(math.pi * share)) / 2,
}


def factor(name: str, step: int, *, steps: int, warmup_steps: int) -> float:
    """What a step's learning rate is multiplied by.

    Args:
        name: ``constant``, ``linear`` or ``cosine`` (Loshchilov and Hutter 2017, equation 5, with one period).
        step: Which step, from 0.
        steps: How many there are; a decay would reach 0 at the step that follows the last.
        warmup_steps: The first of them, over which the factor rises along a line from 0 at step 0 to 1; a run that is
            shorter, as a trial of a long one is, ends on the way.

    Example:
        >>> factor("cosine", 50, steps=100, warmup_steps=0)
        0.5
    """
    if step < warmup_steps:
        return step / warmup_steps
    return SCHEDULES[name]((step - warmup_steps) / max(steps - warmup_steps, 1))


def make_schedule(optimizer: Optimizer, name: str, *, steps: int, warmup_steps: int) -> LambdaLR:
    """PyTorch's scheduler with :func:`factor`; it sets the learning rate of step 0 at once.

    Args:
        optimizer: Whose learning rates are multiplied, each by the same factor.
        name: As for :func:`factor`; likewise the rest.
        steps: Of the run.
        warmup_steps: As for :func:`factor`.
    """

    def at(step: int) -> float:
        # The scheduler sets the rate of the step that comes next, after the last step too.
        return factor(name, min(step, steps), steps=steps, warmup_steps=warmup_steps)

    return LambdaLR(optimizer, at)
