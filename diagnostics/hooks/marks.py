"""A few gradients that no step has spent yet, watched for whether somebody clears or rewrites them.

Looking at every gradient would be a pass over all of them. A loop that clears or clips does so to all parameters of an
optimizer, so it is enough to look at the two that a backward pass begins and ends with, and there at a sample.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TypeAlias

import torch
from torch import Tensor

from diagnostics.statistics.samples import sample_sizes

State: TypeAlias = tuple[weakref.ref[Tensor], int]
"""A tensor and how often it has been written to in place."""

Gradients: TypeAlias = Callable[[Sequence[int]], "list[Tensor | None]"]

FEW = 64
"""So many gradients are known by weak references in any case."""

_MOVED_AWAY: State = (weakref.ref(torch.empty(0)), 0)
"""Of a gradient that is gone when its pass ends: a hook has added it up elsewhere."""


NOTHING = torch.zeros(0)


@dataclass(frozen=True, slots=True)
class Look:
    """The 1-norm of a sample of some gradients, on the device: a norm without squares, so that none is too small."""

    indices: tuple[int, ...] = ()
    sizes: Tensor = NOTHING


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

    def forget(self, indices: Iterable[int]) -> None:
        """A step has spent these gradients."""
        for index in self._seen.keys() & indices:
            del self._seen[index]

    def _present(self, indices: Iterable[int]) -> list[tuple[int, Tensor]]:
        found = [(index, self._gradient(index)) for index in indices]
        return [(index, tensor) for index, tensor in found if tensor is not None and not tensor.is_sparse]


class Spent:
    """Gradients that steps have spent, as they were then.

    Those of the newest step stay in lists. The next pass finds most of them cleared, and then that is all that there is
    to know; only otherwise each gets a state of its own.

    As long as that has never happened, many are known by their ``id`` alone, since a thousand weak references per step
    would double what Python's garbage collector has to do. Another tensor may have the ``id`` of one that is gone, but
    not all of them those of theirs: so they are the same if all are, and else count as replaced.

    Args:
        gradients: Returns parameters' ``.grad`` by index.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._states: dict[int, State] = {}
        self._newest: tuple[Sequence[int], Sequence[weakref.ref[Tensor]] | Sequence[int], list[int]] | None = None
        self._by_id = True

    def __bool__(self) -> bool:
        return self._newest is not None or bool(self._states)

    def add(self, indices: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        """A step has spent these."""
        self.states()
        if any(map(operator.is_, gradients, repeat(None))):
            pairs = zip(indices, gradients, strict=True)
            self._states.update({index: state(gradient) for index, gradient in pairs if gradient is not None})
            return
        present: Sequence[Tensor] = gradients  # type: ignore[assignment] # none is None
        by_id = self._by_id and len(present) > FEW
        identities = [*map(id, present)] if by_id else [*map(weakref.ref, present)]
        self._newest = indices, identities, list(map(_get_version, present))

    def states(self) -> dict[int, State]:
        """What is known by index, to look up and to change."""
        if self._newest is not None:
            (indices, tensors, versions), self._newest = self._newest, None
            references = self._by_weak_references(indices, tensors)
            self._states.update(zip(indices, zip(references, versions, strict=True), strict=True))
        return self._states

    def held(self) -> tuple[dict[int, Tensor], Spent]:
        """Those that are still in ``.grad``, or others in their place; the rest is taken out and returned."""
        out, held = Spent(self._gradients), {}
        newest = self._newest
        if newest is not None and not any(map(operator.is_not, self._gradients(newest[0]), repeat(None))):
            out._newest, self._newest = newest, None
        states = self.states()
        for index, tensor in zip(tuple(states), self._gradients(tuple(states)), strict=True):
            if tensor is None:
                out._states[index] = states.pop(index)
            else:
                held[index] = tensor
        return held, out

    def _by_weak_references(
        self, indices: Sequence[int], tensors: Sequence[weakref.ref[Tensor]] | Sequence[int]
    ) -> Sequence[weakref.ref[Tensor]]:
        if not tensors or not isinstance(tensors[0], int):
            return tensors  # type: ignore[return-value] # all are of one kind
        self._by_id, now = False, self._gradients(indices)
        gone = _MOVED_AWAY[0]
        same = [*map(id, now)] == tensors
        return [weakref.ref(tensor) if same and tensor is not None else gone for tensor in now]

    def take(self, other: Spent) -> None:
        """Takes back what was taken out."""
        self.states().update(other.states())


def state(tensor: Tensor) -> State:
    """Which tensor it is, and its contents."""
    return weakref.ref(tensor), _version(tensor)


def is_other(tensor: Tensor, seen: State) -> bool:
    """Whether it is another tensor than the one that was seen, or has been written to since."""
    return tensor is not seen[0]() or _version(tensor) != seen[1]


_get_version = operator.attrgetter("_version")
"""Documented under "in-place correctness checks"; there is no public name."""


def _version(tensor: Tensor) -> int:
    return int(_get_version(tensor))


def _look(present: Sequence[tuple[int, Tensor]]) -> Look:
    if not present:
        return Look()
    return Look(tuple(index for index, _ in present), sample_sizes([tensor for _, tensor in present]))
