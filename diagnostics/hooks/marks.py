"""A few gradients that no step has spent yet, watched for whether somebody clears or rewrites them.

Looking at every gradient would be a pass over all of them. A loop that clears or clips does so to all parameters of an
optimizer, so it is enough to look at the two that a backward pass begins and ends with, and there at a sample.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from diagnostics import statistics
from diagnostics.statistics import magnitudes

State: TypeAlias = tuple[weakref.ref[Tensor], int]
"""A tensor and how often it has been written to in place."""

_MOVED_AWAY: State = (weakref.ref(torch.empty(0)), 0)
"""Of a gradient that is gone when its pass ends: a hook has added it up elsewhere."""


@dataclass(slots=True)
class Look:
    """Largest magnitudes in a sample of some gradients, on the device; NaN where a gradient holds one."""

    indices: tuple[int, ...] = ()
    peaks: Tensor = field(default_factory=lambda: torch.zeros(0))


class Marks:
    """Gradients to watch.

    Args:
        gradient: Returns a parameter's ``.grad`` by index.
    """

    def __init__(self, gradient: Callable[[int], Tensor | None]) -> None:
        self._gradient = gradient
        self._seen: dict[int, State] = {}
        self._newest: tuple[int, ...] = ()

    def note(self, indices: Sequence[int]) -> Look:
        """The state of these gradients at the end of a pass."""
        present = self._present(dict.fromkeys(indices))
        self._newest = tuple(indices)
        self._seen.update(dict.fromkeys(indices, _MOVED_AWAY))
        self._seen.update({index: state(tensor) for index, tensor in present})
        return _look(present)

    def check(self) -> tuple[Look, bool]:
        """The gradients at the beginning of the next pass, and whether one was written to in between."""
        present = self._present(list(self._seen))
        touched = [index for index, tensor in present if is_other(tensor, self._seen[index])]
        return _look(present), bool(touched)

    def replaced(self) -> frozenset[int]:
        """Those of the newest pass whose gradient is another tensor than at its end."""
        present = self._present(index for index in self._newest if index in self._seen)
        return frozenset(index for index, tensor in present if tensor is not self._seen[index][0]())

    def forget(self, index: int) -> None:
        """A step has spent this gradient."""
        self._seen.pop(index, None)

    def _present(self, indices: Iterable[int]) -> list[tuple[int, Tensor]]:
        found = [(index, self._gradient(index)) for index in indices]
        return [(index, tensor) for index, tensor in found if tensor is not None and not tensor.is_sparse]


def state(tensor: Tensor) -> State:
    """Which tensor it is, and its contents."""
    return weakref.ref(tensor), _version(tensor)


def is_other(tensor: Tensor, seen: State) -> bool:
    """Whether it is another tensor than the one that was seen, or has been written to since."""
    return tensor is not seen[0]() or _version(tensor) != seen[1]


def _version(tensor: Tensor) -> int:
    return int(tensor._version)  # noqa: SLF001 -- documented under "in-place correctness checks"; no public name


def _look(present: Sequence[tuple[int, Tensor]]) -> Look:
    if not present:
        return Look()
    samples = [statistics.sample(tensor, magnitudes.FRACTION_SAMPLE) for _, tensor in present]
    return Look(tuple(index for index, _ in present), statistics.parameter_norms(samples, math.inf))
