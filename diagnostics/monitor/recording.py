"""What a recorded step measures beyond norms: gradients between layers, peaks, fractions, dead units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from diagnostics import statistics
from diagnostics.depth import Call
from diagnostics.depth.forward import OUTPUT, STREAM, Role, Roles
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor.assembly import Gradients, profiled
from diagnostics.records import Column
from diagnostics.statistics import magnitudes
from diagnostics.statistics.dead import DeadUnits, unit_sizes
from diagnostics.statistics.reading import Reader
from diagnostics.statistics.samples import Samples
from diagnostics.statistics.stacks import STACKED, Stacks


class Around:
    """What passed back through the layers at a step, by the calls that they are."""

    def __init__(self) -> None:
        self._outputs: dict[Call, list[int]] = {}
        self._made: dict[tuple[Call, int], float] = {}  # norms by call and serial number of the pass that it was in
        self._read: dict[tuple[Call, int], float] = {}
        self._stream: dict[Call, tuple[int, float]] = {}

    def add(self, roles: Roles, numel: int, norm: float, place: int | None = None) -> None:
        """Takes a gradient.

        Args:
            roles: What it is to which layers.
            numel: Number of elements.
            norm: Euclidean norm.
            place: Of what else is known of it.
        """
        for kind, call in roles:
            if kind == STREAM:
                size, other = self._stream.get(call, (0, 0.0))
                self._stream[call] = size + numel, math.hypot(other, norm)
                continue
            norms, key = self._made if kind == OUTPUT else self._read, (call, roles.serial)
            norms[key] = math.hypot(norms[key], norm) if key in norms else norm
            if kind == OUTPUT and place is not None:
                self._outputs.setdefault(call, []).append(place)

    def outputs(self, calls: Iterable[Call]) -> list[Sequence[int]]:
        """The places of the gradients of each call's outputs."""
        return [self._outputs.get(call, ()) for call in calls]

    def columns(self, calls: Sequence[Call], scale: float) -> dict[str, Column]:
        """What is known of the layers beside their output gradients.

        The gain is the norm at the inputs over that at the outputs, over those passes that have both.

        Args:
            calls: The layers' calls.
            scale: The loss scale.
        """
        sums: dict[Call, tuple[float, float]] = {}
        for key, read in self._read.items():
            if key in self._made:
                before = sums.get(key[0])
                pair = read, self._made[key]
                sums[key[0]] = pair if before is None else (math.hypot(before[0], read), math.hypot(before[1], pair[1]))
        gains = {call: read / made for call, (read, made) in sums.items() if 0 < made < math.inf}
        streams = {call: norm / scale / math.sqrt(size) for call, (size, norm) in self._stream.items() if size}
        columns = {name: Column.of(map(found.get, calls)) for name, found in (("gain", gains), ("stream_rms", streams))}
        return {name: column for name, column in columns.items() if column is not None}


class Recording:
    """Asks a reader for what only a recorded step takes.

    Args:
        reader: Who brings the numbers.
        passes: Backward passes that the step spends.
        names: Of the gradients.
        gradients: The weight gradients.
        dead: Counts for how long units have had no gradient.

    Attributes:
        peaks: The largest magnitude of every weight gradient.
        fractions: Shares of small numbers in every weight gradient, as ``magnitudes.fractions`` gives them.
        sampled_peaks: The largest magnitude in a sample of every weight gradient.
    """

    def __init__(
        self,
        reader: Reader,
        passes: Sequence[BackwardPass],
        names: Sequence[str],
        gradients: Stacks,
        dead: DeadUnits,
    ) -> None:
        measured = [one for each in passes for one in each.gradients]
        parts = [one.parts for one in measured if one.parts is not None]
        self._made = [(one.roles, one.numel, one.share is not None) for one in measured if one.parts is not None]
        read = [one for one in measured if one.norm is not None]
        self._read = [(one.roles, one.numel, one.exact) for one in read]
        self._profiles = reader.ask(magnitudes.profiles(parts))
        self._norms = reader.ask(statistics.pack([one.norm for one in read if one.norm is not None]))
        self._shares = reader.ask(statistics.pack([one.share for one in measured if one.share is not None]))
        dims = {place: dead.units[name] for place, name in enumerate(names) if name in dead.units}
        rows = unit_sizes(gradients, dims)
        self._judged, shares = dead.update({tuple(names[place] for place in places): sizes for places, sizes in rows})
        self._dead = reader.ask(shares)
        self.peaks = reader.ask(magnitudes.peaks(gradients, rows))
        samples = Samples(gradients)
        self.fractions = reader.ask(magnitudes.fractions(samples))
        self.sampled_peaks = reader.ask(samples.peaks())

    def dead(self) -> dict[str, float]:
        """The share of dead units by name of the weight."""
        return dict(zip(self._judged, self._dead.values, strict=True))

    def in_range(self) -> dict[Role, bool]:
        """Whether fp32 holds the norm of each gradient that is not a small one, by its first role."""
        norms = zip(self._made, self._profiles.values, strict=False), zip(self._read, self._norms.values, strict=True)
        return {roles[0]: magnitudes.is_held(norm) for (roles, numel, _), norm in chain(*norms) if numel > STACKED}

    def around(self, scale: float) -> Callable[[], tuple[Around, Gradients]]:
        """Makes what passed back through the layers from numbers alone, later: a record must not keep tensors alive.

        Args:
            scale: The loss scale.
        """
        made = self._made
        profiles, norms, shares = self._profiles.values, self._norms.values, self._shares.values
        both = zip(self._read, norms, strict=True)
        read = [(roles, numel, norm) for (roles, numel, exact), norm in both if exact or magnitudes.is_held(norm)]

        def make() -> tuple[Around, Gradients]:
            around = Around()
            for place, (roles, numel, _) in enumerate(made):
                around.add(roles, numel, profiles[place], place)
            for roles, numel, norm in read:
                around.add(roles, numel, norm)
            outputs = profiled([numel for _, numel, _ in made], profiles, scale)
            fused = (place for place, one in enumerate(made) if one[2])
            return around, outputs.without_empty(dict(zip(fused, shares, strict=True))) if shares else outputs

        return make
