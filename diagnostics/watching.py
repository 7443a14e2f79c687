"""One line for a loop that nobody wants to change."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diagnostics.monitor import Monitor
from diagnostics.monitor.ledger import ending

_watched: weakref.WeakKeyDictionary[nn.Module, Monitor] = weakref.WeakKeyDictionary()


def watch(
    model: nn.Module, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer], **options: Any
) -> Monitor:
    """One line for an unchanged loop: a Monitor that sees the loop's own steps and closes itself at exit.

    Args:
        model: The model.
        optimizer: Its optimizer, or several.
        options: As for :class:`Monitor`.

    Returns:
        The Monitor, which need not be kept. Called again on the same model it replaces the old one.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = watch(model, optimizer, sinks=[])
        >>> model(torch.ones(4, 2)).square().mean().backward()
        >>> optimizer.step()
        >>> len(monitor.records)
        1
        >>> monitor.close()
    """
    previous = _watched.pop(model, None)
    if previous is not None:
        previous.close()
    monitor = Monitor(model, optimizer, **options)
    _watched[model] = monitor
    weakref.finalize(model, monitor.close).atexit = False
    return monitor


@atexit.register
def _close_watched() -> None:
    error = getattr(sys, "last_value", None)
    for monitor in list(_watched.values()):
        monitor.close(*ending(error))
