"""What one step measures: asked of the device in one go, read by one copy, turned into records."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import Tensor, nn

from diagnostics import statistics
from diagnostics.clipping.groups import GroupState
from diagnostics.clipping.writing import Clipping
from diagnostics.contract.acts import NOBODY, Compared
from diagnostics.contract.rules.clips import EXCESS
from diagnostics.depth import Call, find_owners, layer_table, unit_weights
from diagnostics.depth.forward import Forward
from diagnostics.hooks import Watcher
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor import amp
from diagnostics.monitor.assembly import OUTSIDE, Around, Piece, Sampled, Update, layer_records, update_ratios
from diagnostics.monitor.recording import Recording
from diagnostics.monitor.unit import Unit
from diagnostics.records import ClipRecord, Layer, LayerRecord, Layers
from diagnostics.statistics.dead import DeadUnits

NEGLIGIBLE = 1e-4
"""A gradient so much smaller than the optimizer's largest is not expected to move its parameter."""


class Catalogue:
    """Parameters by index and name, and the table of layers.

    Args:
        models: Name to model.
        pattern: Regular expression on the names of the layers to tell of; None for all.
    """

    def __init__(self, models: Mapping[str, nn.Module], pattern: str | None = None) -> None:
        self.models = list(models)
        self.owners, named = find_owners(models)
        self.dead = DeadUnits(unit_weights(self.owners, named))
        self.names = list(named)
        self._tensors = [weakref.ref(tensor) for tensor in named.values()]
        self._index = {id(tensor): index for index, tensor in enumerate(named.values())}
        self._homes = {name: owner.root for owner in self.owners for name in owner.parameters}
        self._inside = len(self.names)
        self._admitted: set[int] = set()
        places = {name: place for place, name in enumerate(self.names)}
        self._of_owners = [[places[name] for name in owner.parameters] for owner in self.owners]
        self._pattern = None if pattern is None else re.compile(pattern)
        self._table: list[tuple[Layer, Call]] = []
        self._version = (-1, -1)

    def tensors(self) -> list[Tensor]:
        """The parameters by index."""
        return [tensor for tensor in (reference() for reference in self._tensors) if tensor is not None]

    def adopt(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Takes in tensors that are not known yet, as parameters that no model has; returns those."""
        known, index = self._tensors, self._index  # which every step asks, so without a call of _knows for each
        new = [one for one in tensors if (place := index.get(id(one))) is None or known[place]() is not one]
        for tensor in new:
            self._index[id(tensor)] = len(self.names)
            self.names.append(f"parameter_{len(self.names) - self._inside}")
            self._tensors.append(weakref.ref(tensor))
        return new

    def admit(self, models: Mapping[str, nn.Module]) -> tuple[list[Tensor], set[int]]:
        """Takes in parameters that models have got since, where they have a gradient.

        Returns:
            Those parameters, and the indices of others that were put in or taken out: of parameters that models have no
            more, and of tensors that they have by now.
        """
        named = find_owners(models)[1]
        held = {id(tensor) for tensor in named.values()}
        moved = {i for i, one in enumerate(self._tensors) if (i < self._inside) != (id(one()) in held)}
        new = {name: one for name, one in named.items() if not self._knows(one) and one.grad is not None}
        self.adopt(list(new.values()))
        for name, tensor in new.items():
            self.names[self.index(tensor)] = name
            self._admitted.add(self.index(tensor))
        return list(new.values()), moved

    def _knows(self, tensor: Tensor) -> bool:
        index = self._index.get(id(tensor))  # which may have been that of a tensor that is gone
        return index is not None and self._tensors[index]() is tensor

    def index(self, tensor: Tensor) -> int:
        """The index of a known parameter."""
        return self._index[id(tensor)]

    def name(self, tensor: Tensor) -> str:
        """The name of a known parameter."""
        return self.names[self.index(tensor)]

    def known(self, tensors: Iterable[Tensor]) -> Iterator[int]:
        """The indices of those that are known."""
        return (self.index(tensor) for tensor in tensors if self._knows(tensor))

    def tensor(self, index: int) -> Tensor | None:
        """The parameter of an index, if it still lives."""
        return self._tensors[index]()

    def is_inside(self, index: int) -> bool:
        """Whether a model has the parameter."""
        return index < self._inside or index in self._admitted

    def foreign(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """Those that no model has."""
        if len(self.names) == self._inside:
            return NOBODY
        return frozenset(index for index in self.known(tensors) if not self.is_inside(index))

    def parameters_of(self, owners: Iterable[int]) -> frozenset[int]:
        """The parameters of some owners."""
        return frozenset(index for owner in owners for index in self._of_owners[owner])

    def home(self, tensors: Sequence[Tensor]) -> int | None:
        """Which model all these parameters belong to; None if there is no single one."""
        names = [self.names[self._index[id(tensor)]] for tensor in tensors if id(tensor) in self._index]
        homes = {self._homes.get(name) for name in names} if len(names) == len(tensors) else set()
        return homes.pop() if len(homes) == 1 else None

    def layers(self, watcher: Watcher, home: int | None = None) -> list[tuple[Layer, Call]]:
        """The layers in the order of their calls, and one for parameters that no model has.

        Args:
            watcher: Has seen the calls.
            home: Tell only of this model.
        """
        version = (watcher.forward.version, len(self.names))
        if version != self._version:
            self._version = version
            self._table = self._make_table(watcher.forward)
        if home is None:
            return self._table
        return [(layer, call) for layer, call in self._table if self.owners[call[0]].root == home]

    def _make_table(self, forward: Forward) -> list[tuple[Layer, Call]]:
        every = [call for root, order in enumerate(forward.orders) for call in order.calls or self._registered(root)]
        table = layer_table(self.owners, every) if every else []
        table = [(forward.place(layer, call), call) for layer, call in table]
        outside = tuple(self.names[self._inside :])
        if outside:
            table.append((Layer(len(table), OUTSIDE, "Parameter", outside, trunk=False), (-1, 0)))
        return [entry for entry in table if self._pattern is None or self._pattern.search(entry[0].name)]

    def _registered(self, root: int) -> list[Call]:
        return [(index, 0) for index, owner in enumerate(self.owners) if owner.root == root]


@dataclass(frozen=True, slots=True)
class Seen:
    """A step before its record.

    Attributes:
        observation: What was measured.
        clip: What clipping did.
        clip_factor: What the gradients had been multiplied by before they were measured.
        late: Whether that was after the step, whose closure made the gradients inside it.
    """

    observation: Observation
    clip: ClipRecord
    clip_factor: float = 1.0
    late: bool = False


def see(observation: Observation, own: ClipRecord | None, *, late: bool = False) -> Seen:
    """A step that the loop takes itself, with the clip of its own that came before it."""
    found = observation.clipping.clip(write=False)
    if own is None or not own.applied:
        return Seen(observation, found, late=late)
    merged = replace(own, total_norm_after=found.total_norm, shares=found.shares)
    return Seen(observation, merged, own.total_norm_after / own.total_norm, late)


def as_spent(seen: Seen) -> Seen:
    """The same step, by what it has left in ``.grad`` where it began with more than was declared.

    Some optimizers clip inside ``step()``, before they hand on to the class that they were made from.
    """
    limit = seen.observation.clipping.state.max_norm
    if seen.late or limit is None or not limit * (1 + EXCESS) < seen.clip.total_norm_after < math.inf:
        return seen
    left = seen.observation.norm_now()
    if not 0 < left <= limit * (1 + EXCESS):
        return seen
    return replace(seen, clip=replace(seen.clip, applied=True, total_norm_after=left))


class Observation:
    """The measurements of one step.

    Asks the reader for everything the step needs before it happens; :meth:`settle` brings the numbers.

    Args:
        catalogue: The model.
        reader: Who brings the numbers.
        unit: The step's optimizers, and how they clip.
        passes: Backward passes whose gradients it spends.
        recorded: Whether to take more than norms.
        zeros: Gradients that were exactly zero when last looked at closely; their norm of 0 is then believed.
        loss_scale: The AMP loss scale, which output gradients are divided by; None without a scaler.

    Attributes:
        compared: What differs between ranks; None where nothing was compared.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        reader: statistics.Reader,
        unit: Unit,
        passes: Sequence[BackwardPass],
        *,
        recorded: bool,
        loss_scale: Tensor | None = None,
        zeros: AbstractSet[int] = frozenset(),
    ) -> None:
        self.catalogue = catalogue
        self.reader = reader
        self.recorded = recorded
        self._zeros = zeros
        self.passes = list(passes)
        self.held = held = unit.parameters()
        self._rates = [reader.ask(lr) if isinstance(lr, Tensor) else float(lr) for lr in unit.learning_rates()]
        parameters, self.gradients = statistics.gradients_of(held)
        self.indices = [catalogue.index(parameter) for parameter in parameters]
        still_scaled, overflow = amp.inside_step(unit.optimizers)
        self._overflow = None if overflow is None else reader.ask(overflow)
        members = unit.members(parameters, catalogue.name) if isinstance(unit.clipping, GroupState) else ()
        self.clipping = Clipping(
            self.gradients, unit.clipping, reader, members=members, euclidean=True, scale=still_scaled
        )
        self._scale = None if loss_scale is None else reader.ask(loss_scale)
        names = [catalogue.names[index] for index in self.indices]
        self._recording = Recording(reader, self.passes, names, self.gradients, catalogue.dead) if recorded else None
        self._held = [tensor for tensor in held if tensor.requires_grad] if recorded else []
        self._before = [statistics.sample(tensor, statistics.UPDATE_SAMPLE).clone() for tensor in self._held]
        self._weight_norms = statistics.parameter_norms(self._before)
        self._weights = reader.ask(self._weight_norms)
        self._sampled_peaks = reader.ask(statistics.sampled_peaks(self._held)) if recorded else None
        self._places = unit.rate_places(self._held)
        self._moved: statistics.Reading | None = None
        self.compared: Compared | None = None

    @property
    def loss_scale(self) -> float:
        """The loss scale; 1.0 without a scaler."""
        return 1.0 if self._scale is None else self._scale.values[0]

    @property
    def skipped(self) -> bool:
        """Whether a fused step finds an overflow, which makes it leave everything as it is."""
        return self._overflow is not None and self._overflow.values[0] != 0

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """One per parameter group, as they were before the step."""
        return tuple(rate if isinstance(rate, float) else rate.values[0] for rate in self._rates)

    def settle(self) -> None:
        """Reads everything that was asked for; a second time for what fp32 may not have held."""
        self.clipping.settle(lambda place: self.indices[place] in self._zeros)
        self.by_gradient = self.clipping.by_gradient

    @property
    def zeros(self) -> AbstractSet[int]:
        """Gradients that are exactly zero."""
        return {index for index, norm in zip(self.indices, self.by_gradient, strict=True) if norm == 0}

    def fingerprint(self) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """What tells a replica from another, by parameter, 0-dim and not read yet; of a recorded step, before it.

        Returns:
            The norms of the gradients, the norms of samples of the weights, and the sums of those samples.
        """
        gradients = {self.indices[place]: norm for place, norm in self.clipping.measured.items()}
        held = [self.catalogue.index(tensor) for tensor in self._held]
        norms = dict(zip(held, self._weight_norms.unbind(), strict=True))
        sums = [statistics.projection(sample) for sample in self._before]
        return gradients, norms, dict(zip(held, sums, strict=True))

    def sampled_norms(self) -> dict[int, float]:
        """The norm of each trainable parameter's sample before a recorded step, by index."""
        return dict(zip(map(self.catalogue.index, self._held), self._weights.values, strict=True))

    def norm_now(self) -> float:
        """The norm of the gradients as they are by now, by a copy from the device of its own."""
        _, gradients = statistics.gradients_of(self.held)
        now = Clipping(gradients, self.clipping.state, self.reader)
        now.settle()
        return now.total / self.clipping.scale

    def moved(self) -> None:
        """Asks how far the weights have moved, after a recorded step."""
        if not self.recorded:
            return
        after = [statistics.sample(tensor, statistics.UPDATE_SAMPLE) for tensor in self._held]
        distances = [new.detach() - old for new, old in zip(after, self._before, strict=True)]
        self._moved = self.reader.ask(statistics.parameter_norms(distances))
        self._before = []

    def layers(self, chosen: Sequence[tuple[Layer, Call]], clip_factor: float = 1.0) -> Layers:
        """The layers' records; the update ratios come when somebody looks.

        Args:
            chosen: The layers to tell of.
            clip_factor: What the gradients had been multiplied by before they were measured.
        """
        pieces, weights, scale = self._weight_pieces(clip_factor), self._sampled(), self.loss_scale
        recording = self._recording
        around = recording.around(scale) if recording else dict
        dead = recording.dead() if recording else {}

        def measured() -> list[LayerRecord]:
            found: dict[Call, Around] = around()
            rows = [(layer, found.get(call) or Around()) for layer, call in chosen]
            return layer_records(rows, pieces(), weights, dead, scale)

        moved = self._moved
        if moved is None:
            return Layers(measured)
        names = [self.catalogue.name(tensor) for tensor in self._held]
        told = [layer for layer, _ in chosen]

        def updates() -> list[float | None]:
            return update_ratios(told, weights, dict(zip(names, moved.values, strict=True)))

        return Layers(measured, updates)

    def shares(self, chosen: Sequence[tuple[Layer, Call]], by_parameter: Sequence[float]) -> tuple[float, ...]:
        """The parts of the norm by layer, from those by parameter."""
        share = {self.catalogue.names[index]: part for index, part in zip(self.indices, by_parameter, strict=True)}
        return tuple(math.fsum(share[name] for name in layer.parameters if name in share) for layer, _ in chosen)

    def standing(self) -> Callable[[], tuple[set[int], dict[int, bool]]]:
        """Which weights the step moved, and which it left though it should not have; made from numbers alone, later.

        See :class:`diagnostics.contract.acts.Moved`. Gradient and value are looked at in the same sample.
        """
        assert self._moved is not None
        assert self._sampled_peaks is not None
        moved, peaks, norms = self._moved, self._sampled_peaks.values, self._weights.values
        least = NEGLIGIBLE * max(filter(math.isfinite, peaks), default=0.0)
        indices = [self.catalogue.index(tensor) for tensor in self._held]
        known = []
        for index, tensor, rate, peak, norm in zip(
            indices, self._held, self._rate_of_each(), peaks, norms, strict=True
        ):
            if peak < least:  # such as a bias before a normalisation: its gradient is rounding noise
                continue
            rms = norm / math.sqrt(max(1, min(tensor.numel(), statistics.UPDATE_SAMPLE)))
            known.append((index, Update(rate, peak, rms, statistics.resolution(tensor.dtype))))

        def told() -> tuple[set[int], dict[int, bool]]:
            distances = dict(zip(indices, moved.values, strict=True))
            changed = {index for index, distance in distances.items() if distance != 0}
            still = {index: update.lost for index, update in known if distances[index] == 0 and update.expected}
            return changed, still

        return told

    def _rate_of_each(self) -> list[float]:
        rates = self.learning_rates
        return [rates[place] if place < len(rates) else 0.0 for place in self._places]

    def _sampled(self) -> dict[str, Sampled]:
        sampled = {}
        for tensor, norm in zip(self._held, self._weights.values, strict=True):
            taken = statistics.sample(tensor, statistics.UPDATE_SAMPLE).numel()
            factor = math.sqrt(tensor.numel() / taken) if taken else 1.0
            sampled[self.catalogue.name(tensor)] = Sampled(norm * factor, factor)
        return sampled

    def _weight_pieces(self, clip_factor: float) -> Callable[[], dict[str, Piece]]:
        """Makes the pieces of weight gradients from numbers alone, later: a record must not keep tensors alive."""
        names = [self.catalogue.names[index] for index in self.indices]
        sizes, count = [gradient.numel() for gradient in self.gradients], len(self.gradients)
        norms, nonfinite = self.clipping.euclidean
        scale = self.clipping.scale
        peaks = [peak / scale for peak in self._recording.peaks.values] if self._recording else [None] * count
        fractions = self._recording.fractions.values if self._recording else [None] * (3 * count)

        def make() -> dict[str, Piece]:
            shares = [fractions[row * count : (row + 1) * count] for row in range(3)]
            columns = zip(sizes, norms, peaks, *shares, nonfinite, strict=True)
            return {name: Piece(*column).divided(clip_factor) for name, column in zip(names, columns, strict=True)}

        return make
