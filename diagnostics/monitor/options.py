"""What a Monitor may be told, checked in one place: one clear sentence per mistake."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.clipping.rules import ClipRule, checked
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.distributed import is_choice, is_sharded
from diagnostics.records import RunInfo

NONFINITE_POLICIES = ("skip", "raise", "step")
REACTIONS = ("warn", "raise", "record")

Clip: TypeAlias = ClipRule | Mapping[Any, ClipRule | None] | None  # a mapping is from optimizers, or their names


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

    clip: Clip = None
    accumulate: int = 1
    nonfinite: str = "skip"
    on_violation: str = "warn"
    on_diagnosis: str = "warn"
    every: int = 10
    layers: str | None = None
    scaler: torch.amp.GradScaler | None = None
    thresholds: Thresholds | None = None
    run: RunInfo | None = None
    process_group: Any = None
    asynchronous: bool = False
    fold: bool = False

    def __post_init__(self) -> None:
        for name, rule in self.clip.items() if isinstance(self.clip, Mapping) else [(None, self.clip)]:
            checked("clip" if name is None else f"clip[{name!r}]", rule)
        for name, kind in (("scaler", torch.amp.GradScaler), ("thresholds", Thresholds), ("run", RunInfo)):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None; got {getattr(self, name)!r}.")
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise ValueError(f"accumulate must be a number of backward passes, at least 1; got {self.accumulate!r}.")
        if type(self.every) is not int or self.every < 0:
            raise ValueError(f"every must be 0 (never) or a number of steps; got {self.every!r}.")
        _check_bool("asynchronous", self.asynchronous)
        _check_bool("fold", self.fold)
        _check_group(self.process_group)
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
            except (re.error, TypeError) as error:
                raise ValueError(f"layers must be a regular expression; got {self.layers!r} ({error}).") from None


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False; got {value!r}.")


def _check_group(choice: Any) -> None:
    if not is_choice(choice):
        raise TypeError(
            "process_group must be None (find it), False (never communicate) or a torch.distributed.ProcessGroup; "
            f"got {choice!r}."
        )


def one_number(name: str, value: Tensor | float | None) -> Tensor:
    """The value as a tensor of one element, or of none for None.

    Example:
        >>> one_number("loss", 0.5), one_number("loss", None)
        (tensor(0.5000, dtype=torch.float64), tensor([]))
    """
    if value is None:
        return torch.zeros(0)
    number = torch.tensor(value, dtype=torch.float64) if isinstance(value, Real) else value
    if not isinstance(number, Tensor) or number.numel() != 1:
        got = f"a tensor of shape {tuple(number.shape)}" if isinstance(number, Tensor) else repr(value)
        raise ValueError(f"{name} must be a number or a tensor of one element; got {got}.")
    return number


def models_of(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name to model; one model has the name ``""``."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for found in models.values():
        if not isinstance(found, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or a mapping of names to modules; got {found!r}.")
        if is_sharded(found):
            raise TypeError(
                "model must hold whole parameters on every rank; got one that is sharded (FSDP or DTensor), which no "
                "rank could measure alone."
            )
    if not models:
        raise ValueError("model must hold at least one module; got an empty mapping.")
    return models


def optimizers_of(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
) -> list[torch.optim.Optimizer]:
    """The optimizers as a list."""
    given: Any = optimizers
    several = isinstance(given, Iterable) and not isinstance(given, (torch.optim.Optimizer, str))
    found = list(given) if several else [given]
    for optimizer in found:
        if not isinstance(optimizer, torch.optim.Optimizer):
            got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
            raise TypeError(f"optimizers must be torch.optim.Optimizer objects; got {got}.")
    if not found:
        raise ValueError("optimizers must hold at least one optimizer; got none.")
    if len({id(optimizer) for optimizer in found}) < len(found):
        raise ValueError("optimizers must be different objects; got the same one twice.")
    return found
