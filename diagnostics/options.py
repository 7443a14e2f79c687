"""What a Monitor may be told, checked in one place: one clear sentence per mistake."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from diagnostics.clipping import ClipByNorm

NONFINITE_POLICIES = ("skip", "raise", "step")
REACTIONS = ("warn", "raise", "record")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a Monitor that are plain values; ``Monitor`` says what each means.

    Raises:
        ValueError: If one has a value that it cannot have.
        TypeError: If clip is no rule.

    Example:
        >>> Options(every=-1)
        Traceback (most recent call last):
        ValueError: every must be 0 (never) or a number of steps; got -1.
    """

    clip: ClipByNorm | None = None
    accumulate: int = 1
    nonfinite: str = "skip"
    on_violation: str = "warn"
    on_diagnosis: str = "warn"
    every: int = 10
    layers: str | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not isinstance(self.clip, ClipByNorm):
            raise TypeError(f"clip must be a rule such as ClipByNorm(max_norm=1.0), or None; got {self.clip!r}.")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate must be a number of backward passes, at least 1; got {self.accumulate!r}.")
        if not isinstance(self.every, int) or self.every < 0:
            raise ValueError(f"every must be 0 (never) or a number of steps; got {self.every!r}.")
        for name, choices in (
            ("nonfinite", NONFINITE_POLICIES),
            ("on_violation", REACTIONS),
            ("on_diagnosis", REACTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        if self.layers is not None:
            try:
                re.compile(self.layers)
            except re.error as error:
                raise ValueError(f"layers must be a regular expression; got {self.layers!r} ({error}).") from None


def models_of(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name to model; one model has the name ``""``."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for found in models.values():
        if not isinstance(found, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or a mapping of names to modules; got {found!r}.")
    if not models:
        raise ValueError("model must hold at least one module; got an empty mapping.")
    return models


def optimizers_of(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
) -> list[torch.optim.Optimizer]:
    """The optimizers as a list."""
    found = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    for optimizer in found:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizers must be torch.optim.Optimizer objects; got {optimizer!r}.")
    if not found:
        raise ValueError("optimizers must hold at least one optimizer; got none.")
    return found
