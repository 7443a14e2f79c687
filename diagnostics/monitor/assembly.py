"""Numbers read from the device → columns of a step's record. No torch.

The other side of the border between device tensors, which live one step, and frozen records, which live in the process.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from diagnostics.records import Column, Layer

OUTSIDE = "(outside the model)"
_SINGLE = 2.0**-23
_SEVERAL = 8

Call: TypeAlias = tuple[int, int]
Numbers: TypeAlias = Sequence[float]


class Groups:
    """Which numbers belong to which row, so that each row gets one: the first of them, combined with the others.

    Args:
        members: By row, the places of its numbers; a row may have none.

    Example:
        >>> groups = Groups([[0], [], [1, 2]])
        >>> groups.rows, groups.fold([1.0, 3.0, 4.0], math.hypot)
        ((0, 2), [1.0, 5.0])
    """

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        self.size = len(members)
        filled = [(row, places) for row, places in enumerate(members) if places]
        self.rows = tuple(row for row, _ in filled)
        self.first = [places[0] for _, places in filled]
        self.more: list[tuple[list[int], list[int]]] = []  # the second of each row that has two, the third, and so on
        for turn in range(1, max((len(places) for _, places in filled), default=0)):
            others = [(at, places[turn]) for at, (_, places) in enumerate(filled) if len(places) > turn]
            self.more.append(([at for at, _ in others], [place for _, place in others]))
        self._sizes: tuple[Sequence[int], Column] | None = None

    def fold(self, values: Sequence[float], combine: Callable[[float, float], float]) -> list[float]:
        """One number for each row that has any."""
        at_place = values.__getitem__
        found = list(map(at_place, self.first))
        for rows, places in self.more:
            if len(rows) == len(found):
                found = list(map(combine, found, map(at_place, places)))
                continue
            for row, place in zip(rows, places, strict=True):
                found[row] = combine(found[row], values[place])
        return found

    def sizes(self, numel: Sequence[int]) -> Column:
        """The number of elements of each row; the same column for the same object."""
        if self._sizes is None or self._sizes[0] is not numel:
            self._sizes = numel, self.column(map(int, self.fold(numel, operator.add)), "q")
        return self._sizes[1]

    def column(self, numbers: Iterable[float], code: str = "d") -> Column:
        """The column of what :meth:`fold` returned."""
        return Column(array(code, numbers), None if len(self.rows) == self.size else self.rows, self.size)

    def mean(self, values: Numbers, weights: Sequence[int]) -> Column | None:
        """The mean of each row, weighted; not of rows whose weights are all zero."""
        if not self.more:
            return self.column(self.fold(values, operator.add))
        totals = self.fold(weights, operator.add)
        parts = self.fold([value * weight for value, weight in zip(values, weights, strict=True)], operator.add)
        single = set(range(len(self.first))).difference(self.more[0][0])
        means = [part / total if total else None for part, total in zip(parts, totals, strict=True)]
        for at in single:
            means[at] = values[self.first[at]]
        dense: list[float | None] = [None] * self.size
        for row, mean in zip(self.rows, means, strict=True):
            dense[row] = mean
        return Column.of(dense)


class Table:
    """The layers of a model in order of depth, and where each finds its numbers; kept from step to step.

    Args:
        entries: Layers, each with the call that it is.

    Attributes:
        layers: The layers.
        calls: Their calls.
    """

    def __init__(self, entries: Sequence[tuple[Layer, Call]]) -> None:
        self.layers = tuple(layer for layer, _ in entries)
        self.calls = tuple(call for _, call in entries)
        self._groups: dict[tuple[str, ...], Groups] = {}

    def groups(self, key: tuple[str, ...]) -> Groups:
        """Where each layer finds its own parameters among some names."""
        if key not in self._groups:
            if len(self._groups) == _SEVERAL:
                self._groups.clear()
            places = {name: place for place, name in enumerate(key)}
            own = [[places[name] for name in layer.parameters if name in places] for layer in self.layers]
            self._groups[key] = Groups(own)
        return self._groups[key]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Numbers about some gradients, by place; what only a recorded step measures may be missing."""

    numel: Sequence[int]
    norm: Numbers
    nonfinite: Sequence[float] = ()
    abs_max: Numbers = ()
    zero_fraction: Numbers = ()
    underflow_fraction: Numbers = ()
    underflow_fp16_fraction: Numbers = ()

    def divided(self, factor: float) -> Gradients:
        """The gradients as they were before they were multiplied by a factor."""
        if factor == 1:
            return self
        norm, peaks = ([number / factor for number in column] for column in (self.norm, self.abs_max))
        return replace(self, norm=norm, abs_max=peaks)

    def without_empty(self, shares: Mapping[int, float]) -> Gradients:
        """Those at some places without their rows of zeros, given the share of other rows; whole where all are zero."""
        found = replace(self, **{name: list(getattr(self, name)) for name in ("numel", *_FRACTIONS)})
        for place, share in shares.items():
            if 0 < share < 1:
                found.numel[place] = round(self.numel[place] * share)  # type: ignore[index] # lists by now
                for name in _FRACTIONS:
                    value = getattr(self, name)[place]
                    empty = 1 - share if name == "zero_fraction" else 0.0
                    getattr(found, name)[place] = max(0.0, (value - empty) / share)
        return found


_FRACTIONS = ("zero_fraction", "underflow_fraction", "underflow_fp16_fraction")


def profiled(numel: Sequence[int], profiles: Numbers, scale: float = 1.0) -> Gradients:
    """Gradients from the rows of ``magnitudes.profiles``, divided by the loss scale.

    Example:
        >>> profiled([4], [16.0, 8.0, 0.0, 0.0, 0.0, 0.0], scale=2.0).norm
        [8.0]
    """
    count = len(numel)
    norms, peaks, zero, own, fp16, nonfinite = (profiles[row * count : (row + 1) * count] for row in range(6))
    norms = [norm if math.isfinite(peak) else peak for norm, peak in zip(norms, peaks, strict=True)]
    broken = zip(nonfinite, peaks, strict=True)  # a sample may have missed the only one
    nonfinite = [0 if math.isfinite(peak) else max(1, round(count)) for count, peak in broken]
    return Gradients(numel, norms, nonfinite, peaks, zero, own, fp16).divided(scale)


def gradient_columns(part: str, groups: Groups, found: Gradients) -> dict[str, Column]:
    """The statistics of the gradients of each layer taken together. Fractions are weighted by size.

    Example:
        >>> gradient_columns("weight", Groups([[0, 1]]), Gradients([1, 1], [3.0, 4.0]))["weight.norm"]
        Column.of([5.0])
    """
    if not groups.rows:
        return {}
    columns: dict[str, Column | None] = {
        "numel": groups.sizes(found.numel),
        "norm": groups.column(groups.fold(found.norm, math.hypot)),
    }
    if found.abs_max:
        columns["abs_max"] = groups.column(groups.fold(found.abs_max, _larger))
    for name in _FRACTIONS if found.zero_fraction else ():
        columns[name] = groups.mean(getattr(found, name), found.numel)
    if any(found.nonfinite):
        columns["nonfinite"] = groups.column(map(int, groups.fold(found.nonfinite, operator.add)), "q")
    return {f"{part}.{name}": column for name, column in columns.items() if column is not None}


@dataclass(frozen=True, slots=True)
class Update:
    """Why a parameter should have moved at a step that left it as it was.

    Attributes:
        rate: Its learning rate.
        peak: Largest magnitude of its gradient, in the sample that its value is looked at in.
        rms: Size of a typical element of its value.
        resolution: Relative distance of neighbouring numbers in its dtype.
    """

    rate: float
    peak: float
    rms: float
    resolution: float

    @property
    def expected(self) -> bool:
        """Whether it should have moved: neither the learning rate nor the gradient is to blame.

        A gradient that is so small that it would not move a number in float32 is no fault of the loop: the run has
        converged, or the gradient vanishes.
        """
        if not (self.rate != 0 and 0 < self.peak < math.inf):
            return False
        return self.lost or abs(self.rate) * self.peak > 100 * _SINGLE * self.rms

    @property
    def lost(self) -> bool:
        """Whether the update is rounded away even for a gradient of size 1, or by a dtype that is coarser than float32.

        Example:
            >>> Update(rate=1e-5, peak=0.1, rms=1.0, resolution=2**-7).lost
            True
            >>> Update(rate=1e-3, peak=0.1, rms=1.0, resolution=2**-23).lost
            False
        """
        size = abs(self.rate) * min(self.peak, 1.0)
        least = self.rms * self.resolution / 4
        return size < least and (
            abs(self.rate) < least or (self.resolution > _SINGLE and size > _SINGLE * self.rms / 4)
        )


def number_column(
    name: str, groups: Groups, values: Numbers, combine: Callable[[float, float], float]
) -> dict[str, Column]:
    """One number for each layer that has any."""
    return {name: groups.column(groups.fold(values, combine))} if groups.rows else {}


def update_ratios(groups: Groups, norms: Numbers, moved: Numbers) -> list[float | None]:
    """How far each layer's parameters moved, over how large they were before.

    Args:
        groups: Where each layer finds its parameters.
        norms: The norm of each parameter before the step.
        moved: The norm of its change.
    """
    ratios: list[float | None] = [None] * groups.size
    both = zip(groups.rows, groups.fold(moved, math.hypot), groups.fold(norms, math.hypot), strict=True)
    for row, distance, before in both:
        ratios[row] = distance / before if before > 0 else None
    return ratios


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
