"""What a recorded step measures beyond norms: gradients between layers, peaks, fractions, dead units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diagnostics import statistics
from diagnostics.hooks.passes import BackwardPass
from diagnostics.monitor.assembly import Around, Gradients, profiled
from diagnostics.statistics import magnitudes
from diagnostics.statistics.dead import DeadUnits, unit_sizes
from diagnostics.statistics.reading import Reader
from diagnostics.statistics.stacks import Stacks


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
        self._read = [(one.roles, one.numel) for one in read]
        self._profiles = reader.ask(magnitudes.profiles(parts))
        self._norms = reader.ask(statistics.pack([one.norm for one in read if one.norm is not None]))
        self._shares = reader.ask(statistics.pack([one.share for one in measured if one.share is not None]))
        dims = {place: dead.units[name] for place, name in enumerate(names) if name in dead.units}
        rows = unit_sizes(gradients, dims)
        self._judged, shares = dead.update({tuple(names[place] for place in places): sizes for places, sizes in rows})
        self._dead = reader.ask(shares)
        self.peaks = reader.ask(magnitudes.peaks(gradients, rows))
        self.fractions = reader.ask(magnitudes.fractions(gradients))

    def dead(self) -> dict[str, float]:
        """The share of dead units by name of the weight."""
        return dict(zip(self._judged, self._dead.values, strict=True))

    def around(self, scale: float) -> Callable[[], tuple[Around, Gradients]]:
        """Makes what passed back through the layers from numbers alone, later: a record must not keep tensors alive.

        Args:
            scale: The loss scale.
        """
        made, read = self._made, self._read
        profiles, norms, shares = self._profiles.values, self._norms.values, self._shares.values

        def make() -> tuple[Around, Gradients]:
            around = Around()
            for place, (roles, numel, _) in enumerate(made):
                around.add(roles, numel, profiles[place], place)
            for (roles, numel), norm in zip(read, norms, strict=True):
                around.add(roles, numel, norm)
            outputs = profiled([numel for _, numel, _ in made], profiles, scale)
            fused = (place for place, one in enumerate(made) if one[2])
            return around, outputs.without_empty(dict(zip(fused, shares, strict=True))) if shares else outputs

        return make
