"""What one step measures: asked of the device in one go, read by one copy, turned into records."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import Tensor

from diagnostics import statistics
from diagnostics.clipping.groups import GroupState
from diagnostics.clipping.writing import Clipping
from diagnostics.contract.acts import NOBODY, Compared
from diagnostics.contract.rules.clips import EXCESS
from diagnostics.depth.forward import Role
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor import amp
from diagnostics.monitor.assembly import (
    Gradients,
    Groups,
    Table,
    Update,
    gradient_columns,
    number_column,
    update_ratios,
)
from diagnostics.monitor.catalogue import EMPTY, Catalogue
from diagnostics.monitor.recording import Recording
from diagnostics.monitor.unit import Unit
from diagnostics.records import ClipRecord, Column, Layers
from diagnostics.statistics.reading import Reader, Reading
from diagnostics.statistics.samples import Samples
from diagnostics.statistics.stacks import Stacks

NEGLIGIBLE = 1e-4
"""A gradient so much smaller than the optimizer's largest is not expected to move its parameter."""


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
    merged = replace(own, total_norm_after=found.total_norm)
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


def _trainable(parameters: list[Tensor]) -> list[Tensor]:
    """Those that are not frozen; the very list if that is all."""
    frozen = [tensor for tensor in parameters if not tensor.requires_grad]
    return [tensor for tensor in parameters if tensor.requires_grad] if frozen else parameters


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
        reader: Reader,
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
        self.parameters, self.gradients = statistics.gradients_of(held)
        self._roster = catalogue.roster(self.parameters)
        self.indices = self._roster.indices
        still_scaled, overflow = amp.inside_step(unit.optimizers)
        self._overflow = None if overflow is None else reader.ask(overflow)
        members = unit.members(self.parameters, catalogue.name) if isinstance(unit.clipping, GroupState) else ()
        self.clipping = Clipping(
            self.gradients,
            unit.clipping,
            reader,
            members=members,
            euclidean=True,
            scale=still_scaled,
            layout=self._roster.layout,
        )
        self._scale = None if loss_scale is None else reader.ask(loss_scale)
        names, stacks = self._roster.names, self.clipping.stacks
        self._recording = Recording(reader, self.passes, names, stacks, catalogue.dead) if recorded else None
        self._held = _trainable(held) if recorded else []
        self._held_roster = catalogue.roster(self._held) if recorded else EMPTY
        self._before = Samples(Stacks(self._held, self._held_roster.layout))
        self._weight_norms = self._before.norms()
        self._weights = reader.ask(self._weight_norms)
        self._places = unit.rate_places(self._held) if recorded else []
        self._moved: Reading | None = None
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

    def settle(self, *, again: bool = True) -> None:
        """Reads everything that was asked for; a second time, unless told not to, for what fp32 may not have held."""
        self.clipping.settle(lambda place: self.indices[place] in self._zeros, again=again)
        self.by_gradient = self.clipping.by_gradient

    @property
    def resolution(self) -> float:
        """Relative distance of neighbouring numbers in the coarsest dtype of the parameters."""
        return max(self._roster.resolutions, default=0.0)

    @property
    def zeros(self) -> AbstractSet[int]:
        """Gradients that are exactly zero."""
        if 0.0 not in self.by_gradient:
            return NOBODY
        return {index for index, norm in zip(self.indices, self.by_gradient, strict=True) if norm == 0}

    def fingerprint(self) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """What tells a replica from another, by parameter, 0-dim and not read yet; of a recorded step, before it.

        Returns:
            The norms of the gradients, the norms of samples of the weights, and the sums of those samples.
        """
        gradients = {self.indices[place]: norm for place, norm in self.clipping.measured.items()}
        held = self._held_roster.indices
        norms = dict(zip(held, self._weight_norms.unbind(), strict=True))
        return gradients, norms, dict(zip(held, self._before.projections().unbind(), strict=True))

    def sampled_norms(self) -> dict[int, float]:
        """The norm of each trainable parameter's sample before a recorded step, by index."""
        return dict(zip(self._held_roster.indices, self._weights.values, strict=True))

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
        self._moved = self.reader.ask(self._before.moved(self._held))
        self._before = Samples(Stacks(()))

    def release(self) -> None:
        """After the step: lets go of the gradients, of which nothing but numbers is wanted any more."""
        self.gradients = []
        self.clipping.release()
        for one in self.passes:
            one.gradients = []

    def in_range(self) -> dict[Role, bool]:
        """Whether fp32 holds the norm of each gradient between layers that was recorded, by its first role."""
        return {} if self._recording is None else self._recording.in_range()

    def layers(self, table: Table, clip_factor: float = 1.0) -> Layers:
        """The layers' records, made from numbers alone when somebody looks: a record must not keep tensors alive.

        Args:
            table: The layers to tell of.
            clip_factor: What the gradients had been multiplied by before they were measured.
        """
        own, gradients = self._roster.names, self._weight_gradients().divided(clip_factor)
        if self._recording is None:
            return Layers.from_columns(table.layers, lambda: gradient_columns("weight", table.groups(own), gradients))
        around, dead, scale = self._recording.around(self.loss_scale), self._recording.dead(), self.loss_scale
        held = self._held_roster
        norms = held.estimated(self._weights.values)

        def measured() -> dict[str, Column]:
            passed, outputs = around()
            weights, judged = table.groups(held.names), table.groups(tuple(dead))
            return {
                **gradient_columns("output", Groups(passed.outputs(table.calls)), outputs),
                **gradient_columns("weight", table.groups(own), gradients),
                **passed.columns(table.calls, scale),
                **number_column("weight_norm", weights, norms, math.hypot),
                **number_column("dead_fraction", judged, [*dead.values()], max),
            }

        moved = self._moved
        if moved is None:
            return Layers.from_columns(table.layers, measured)

        def updates() -> list[float | None]:
            distances = held.estimated(moved.values)
            return update_ratios(table.groups(held.names), norms, distances)

        return Layers.from_columns(table.layers, measured, updates)

    def shares(self, table: Table) -> tuple[float, ...]:
        """The parts of the norm by layer."""
        groups = table.groups(self._roster.names)
        found = [0.0] * groups.size
        for row, share in zip(groups.rows, groups.fold(self.clipping.shares, operator.add), strict=True):
            found[row] = share
        return tuple(found)

    def standing(self) -> Callable[[], tuple[set[int], dict[int, bool]]]:
        """Which weights the step moved, and which it left though it should not have; made from numbers alone, later.

        See :class:`diagnostics.contract.acts.Moved`. Gradient and value are looked at in the same sample.
        """
        assert self._moved is not None
        assert self._recording is not None
        moved, held, rates, norms = self._moved, self._held_roster, self._rate_of_each(), self._weights.values
        peaks = dict(zip(self.indices, self._recording.sampled_peaks.values, strict=True))
        least = NEGLIGIBLE * max(filter(math.isfinite, peaks.values()), default=0.0)

        def update(place: int) -> Update | None:
            peak = peaks.get(held.indices[place], 0.0)
            if peak < least:  # such as a bias before a normalisation: its gradient is rounding noise
                return None
            rms = norms[place] * held.factors[place] / math.sqrt(max(1, held.sizes[place]))
            return Update(rates[place], peak, rms, held.resolutions[place])

        def told() -> tuple[set[int], dict[int, bool]]:
            where = [place for place, distance in enumerate(moved.values) if distance == 0]
            still = {held.indices[place]: update(place) for place in where}
            changed = set(held.indices).difference(still)
            return changed, {index: one.lost for index, one in still.items() if one is not None and one.expected}

        return told

    def _rate_of_each(self) -> list[float]:
        rates = self.learning_rates
        return [rates[place] if place < len(rates) else 0.0 for place in self._places]

    def _weight_gradients(self) -> Gradients:
        norms, nonfinite = self.clipping.euclidean
        sizes, scale = self._roster.sizes, self.clipping.scale
        count = len(sizes)
        kept = array("d", norms)
        if self._recording is None:
            return Gradients(sizes, kept, nonfinite if any(nonfinite) else ())
        peaks, fractions = self._recording.peaks.values, self._recording.fractions.values
        shares = (fractions[row * count : (row + 1) * count] for row in range(3))
        return Gradients(sizes, kept, nonfinite, [peak / scale for peak in peaks], *shares)
