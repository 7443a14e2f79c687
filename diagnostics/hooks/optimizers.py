"""Hooks on an optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.utils.hooks import RemovableHandle

from diagnostics.hooks.callback import Listener

Call: TypeAlias = Callable[[torch.optim.Optimizer, bool], None]


def watch_steps(
    optimizer: torch.optim.Optimizer, listener: Listener, before: Call, after: Call
) -> list[RemovableHandle]:
    """Calls two methods back at the beginning and the end of ``optimizer.step()``, as long as their object lives.

    They are told whether the step was given a closure. A nested ``super().step()`` is one step.
    """
    depth = 0
    weakly_before, weakly_after = weakref.WeakMethod(before), weakref.WeakMethod(after)

    def begins(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        call = weakly_before()
        if depth == 1 and listener.listening and call is not None:
            call(stepping, _has_closure(args, kwargs))

    def ends(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth = max(0, depth - 1)
        call = weakly_after()
        if depth == 0 and listener.listening and call is not None:
            call(stepping, _has_closure(args, kwargs))

    return [optimizer.register_step_pre_hook(begins), optimizer.register_step_post_hook(ends)]


def _has_closure(args: Any, kwargs: Any) -> bool:
    """Whether ``optimizer.step`` was called with a closure; its first argument is the optimizer."""
    return kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None)
