"""What the loop did, gathered for the contract: from the hooks' notes, one step's numbers, and the optimizers.

Nothing here waits for the device: numbers are asked for before the step's one copy and looked at after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.contract.acts import NOBODY, Backward, Clip, Closing, Moved, Step
from diagnostics.hooks import Watcher
from diagnostics.hooks.graph import where
from diagnostics.hooks.marks import Look
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor.catalogue import Catalogue
from diagnostics.monitor.observation import Observation
from diagnostics.monitor.unit import Unit
from diagnostics.records import ClipRecord, StepRecord
from diagnostics.statistics.reading import Reader, Reading
from diagnostics.statistics.samples import sample

Fact: TypeAlias = Backward | Clip | Moved


class Facts:
    """Gathers what the contract is told.

    Args:
        models: Name to model.
        catalogue: Names and indices of parameters.
        watcher: The hooks' notes.
        reader: Who brings numbers from the device.
        units: All optimizers, each by itself and all together.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        catalogue: Catalogue,
        watcher: Watcher,
        reader: Reader,
        units: Sequence[Unit],
    ) -> None:
        self._catalogue = catalogue
        self._watcher = watcher
        self._reader = reader
        self._units = units
        self._sizes: dict[int, float] = {}
        self._owned: set[int] = set()
        self._stranded: dict[int, Tensor] = {}  # a sample of each value as it was first seen
        self._changes: dict[int, Reading] = {}
        self._ran: dict[str, set[int]] = {unit.name: set() for unit in units}
        self._unregistered: tuple[str, ...] | None = None
        self._models = {name: weakref.ref(model) for name, model in models.items()}
        self._moved: list[Callable[[], Moved]] = []
        self._idle: dict[str, frozenset[int]] = {}  # which parameters of a unit have been without a gradient
        self._exchanged: set[int] = set()  # parameters that models have no more, and tensors that they have by now
        self._weights: dict[int, float] = {}  # norms of some that have no gradient, when last looked at
        self._by_hand: set[int] = set()  # those that move all the same

    # backward passes and clips

    def ask(self, events: Sequence[Any]) -> Callable[[], list[Fact]]:
        """Asks for the numbers of what happened since the last step; returns what tells of it once they have come.

        What the step before has done to the weights comes first: it is known by then.
        """
        passes = [event for event in events if isinstance(event, BackwardPass)]
        asked = [
            [self._reader.ask(tensor) for tensor in (one.leftover, one.before.sizes, one.after.sizes)] for one in passes
        ]
        self._changes = self._ask_stranded(passes)
        for ran in self._ran.values():
            ran.update(self._watcher.forward.ran)
        self._watcher.forward.ran = set()

        earlier, self._moved = self._moved, []

        def told() -> list[Fact]:
            numbers = iter(asked)
            since = [
                self._backward(one, *next(numbers)) if isinstance(one, BackwardPass) else one
                for one in events
                if isinstance(one, (BackwardPass, Clip))  # steps that a scaler skipped are no acts of the loop's
            ]
            return [*(moved() for moved in earlier), *since]

        return told

    def clip(self, given: Iterable[Tensor], owners: Sequence[Tensor], norms: Sequence[float], did: ClipRecord) -> Clip:
        """A clip of the loop's own."""
        coefficient = did.clip_coef if did.applied and did.clip_coef is not None else 1.0
        return Clip(
            dict(zip(map(self._catalogue.index, owners), norms, strict=True)),
            frozenset(self._catalogue.known(given)),
            did.max_norm or float("inf"),
            did.norm_type,
            coefficient,
        )

    def _backward(self, one: BackwardPass, leftover: Reading, before: Reading, after: Reading) -> Backward:
        found = _by_index(one.before, before)
        zeroed = frozenset(index for index, size in found.items() if size == 0 != self._sizes.get(index, 0.0))
        sizes = _by_index(one.after, after)
        self._sizes |= found | sizes  # what is zero at one pass and still at the next was not zeroed again
        return Backward(
            frozenset(one.accumulated),
            dict(zip(one.held, leftover.values, strict=True)),
            one.replaced,
            one.cleared,
            zeroed,
            one.touched,
            sizes,
            one.continued,
            one.training,
        )

    # the step

    def step(self, observation: Observation, unit: Unit, *, closure: bool = False) -> Callable[[StepRecord], Step]:
        """Gathers what the contract is told of a step; returns what tells it, once the numbers have come."""
        held = unit.parameters() if len(observation.indices) < len(observation.held) else ()
        empty = frozenset(
            self._catalogue.index(tensor) for tensor in held if tensor.requires_grad and tensor.grad is None
        )
        ran, self._ran[unit.name] = self._ran[unit.name], set()
        changes, foreign = self._changes, self._catalogue.foreign(observation.held)
        rewritten, replaced = self._watcher.rewritten(observation.indices), self._watcher.replaced()

        def told(record: StepRecord) -> Step:
            norms = dict(zip(observation.indices, observation.by_gradient, strict=True))
            stranded = _read(changes)
            idle, before = empty & foreign, self._idle.get(unit.name, NOBODY)
            if observation.recorded:
                idle = empty | {index for index, norm in norms.items() if norm == 0}
                self._look_for_moved_by_hand(empty, observation)
            if not idle <= before:
                stranded |= self._look_for_replaced()
            self._idle[unit.name] = idle | before  # each is looked for once: it is a walk through the models
            return Step(
                optimizer=record.optimizer,
                step=record.step,
                norms=norms,
                rewritten=rewritten,
                replaced=replaced,
                total_norm=record.clip.total_norm_after,
                max_norm=observation.clipping.state.max_norm,
                norm_type=record.clip.norm_type,
                resolution=observation.resolution,
                skipped=record.skipped,
                closure=closure,
                loss_scale=record.loss_scale,
                empty=empty,
                by_hand=empty & (self._exchanged | self._by_hand),
                ran=self._catalogue.parameters_of(ran) if empty else frozenset(),
                foreign=foreign,
                stranded=stranded,
                unregistered=self._look_for_unregistered(),
                compared=observation.compared,
            )

        return told

    def moved(self, observation: Observation, record: StepRecord) -> None:
        """Remembers to tell what a recorded step did to the weights, when that is known."""
        standing = observation.standing()
        self._moved.append(lambda: Moved(record.optimizer, record.step, *standing()))

    def closing(self, events: Sequence[Any], status: str) -> tuple[list[Fact], Closing]:
        """What is left to tell at the end; after a failure nothing that would have to be read from the device."""
        if status != "finished":
            return [event for event in events if isinstance(event, Clip)], Closing(finished=False)
        told = self.ask(events)()
        return told, Closing(finished=True, cleared=self._watcher.cleared(), stranded=_read(self._changes))

    # parameters that no optimizer has

    def _ask_stranded(self, passes: Sequence[BackwardPass]) -> dict[int, Reading]:
        fresh = set().union(*(one.accumulated for one in passes)) - self._owned - self._stranded.keys()
        if fresh or self._stranded:
            owned = self._catalogue.known(tensor for unit in self._units for tensor in unit.parameters())
            self._owned.update(owned)
            for index in fresh - self._owned:
                tensor = self._catalogue.tensor(index)
                if tensor is not None and self._catalogue.is_inside(index):
                    self._stranded[index] = self._sample(tensor)
        return self._ask_changes()

    @torch.no_grad()
    def _ask_changes(self) -> dict[int, Reading]:
        asked = {}
        for index, first in list(self._stranded.items()):
            tensor = self._catalogue.tensor(index)
            if tensor is None or tensor.grad is None or index in self._owned or tensor.numel() == 0:
                del self._stranded[index]
            else:
                now = sample(tensor)
                asked[index] = self._reader.ask((now != first.to(now.device)).any())
        return asked

    def _look_for_replaced(self) -> dict[int, bool]:
        """Where parameters begin to have no gradient: whether their model has others in their place by now."""
        new, self._exchanged = self._catalogue.admit(self._living())
        self._watcher.adopt(new)
        found = {self._catalogue.index(tensor): tensor for tensor in new}
        self._stranded |= {index: self._sample(tensor) for index, tensor in found.items()}
        return dict.fromkeys(found, False)

    def _look_for_moved_by_hand(self, empty: AbstractSet[int], observation: Observation) -> None:
        """Whether parameters without a gradient move all the same, as an exponential average does."""
        norms = observation.sampled_norms() if empty else {}
        now = {index: norms[index] for index in empty if self._catalogue.is_inside(index)}
        self._by_hand |= {index for index, norm in now.items() if self._weights.get(index, norm) != norm}
        self._weights.update(now)

    @staticmethod
    def _sample(tensor: Tensor) -> Tensor:
        return sample(tensor).clone()

    def _look_for_unregistered(self) -> tuple[str, ...]:
        if self._unregistered is not None or not any(leaves.done for leaves in self._watcher.leaves):
            return ()
        used = {
            id(leaf): leaf for leaves in self._watcher.leaves for one in leaves.found if (leaf := one()) is not None
        }
        unknown = [leaf for leaf in used.values() if not list(self._catalogue.known([leaf]))]
        models = self._living()
        self._unregistered = tuple(where(leaf, models) for leaf in unknown)
        return self._unregistered

    def _living(self) -> dict[str, nn.Module]:
        return {name: model for name, reference in self._models.items() if (model := reference()) is not None}


def _read(changes: Mapping[int, Reading]) -> dict[int, bool]:
    return {index: reading.values[0] != 0 for index, reading in changes.items()}


def _by_index(look: Look, reading: Reading) -> dict[int, float]:
    return dict(zip(look.indices, reading.values, strict=True))
