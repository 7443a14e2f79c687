"""What a condition is given: one step, and the little that was kept of those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import DepthFit, Diagnosis, Layer, LayerRecord, Layers, StepRecord

MAD_TO_SIGMA = 1.4826
"""Makes a median absolute deviation comparable with a standard deviation, for normally distributed values."""

_NEWEST_LOSSES = 20
"""A single batch's loss says little; so few are not yet history."""


@dataclass(frozen=True, slots=True)
class Largest:
    """The layer whose gradient was the largest at the last recorded step at which all gradients were finite."""

    name: str
    depth: int
    size: float
    step: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What is kept of one optimizer's steps; it does not grow with their number.

    Attributes:
        norms: log10 of the newest total norms that were positive and finite, oldest first.
        losses: The newest finite losses that were passed in, oldest first.
        coefficients: What clipping multiplied the newest steps' gradients by; 1 where it did not.
        skips: Skipped steps in a row.
        alive: Names of the layers that have ever had a gradient.
        largest: The last finite recorded step's largest layer.
        unjudged: The last recorded step's layers, whose update ratios came after it was judged.
    """

    norms: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    skips: int = 0
    alive: frozenset[str] = frozenset()
    largest: Largest | None = None
    unjudged: Layers | None = None

    @property
    def usual_loss(self) -> float | None:
        """The median of the newest losses; None where there were none."""
        return median(self.losses) if self.losses else None

    def after(self, record: StepRecord, history: int) -> Memory:
        """The memory with one more step in it."""
        norm, coefficient = record.clip.total_norm, record.clip.clip_coef
        usable, loss = 0 < norm < math.inf, record.loss
        memory = replace(
            self,
            norms=(*self.norms, math.log10(norm))[-history:] if usable else self.norms,
            losses=self.losses if loss is None or not math.isfinite(loss) else (*self.losses, loss)[-_NEWEST_LOSSES:],
            coefficients=(*self.coefficients, min(coefficient, 1.0))[-history:]
            if usable and coefficient is not None
            else self.coefficients,
        )
        if not record.recorded:
            return memory
        newly = [layer.name for layer in _reached(record.layers) if layer.name not in self.alive]
        return replace(
            memory,
            alive=self.alive.union(newly) if newly else self.alive,
            largest=_largest(record.layers, record.step) or self.largest,
            unjudged=record.layers,
        )


@dataclass(frozen=True, slots=True)
class Case:
    """One step as the conditions see it.

    Attributes:
        record: The step.
        fit: The line over its depth; None where there is none.
        memory: What was kept of the optimizer's earlier steps; its ``skips`` count this one.
        thresholds: When a number becomes a finding.
        standing: How severe each condition is that stands confirmed.
    """

    record: StepRecord
    fit: DepthFit | None
    memory: Memory
    thresholds: Thresholds
    standing: Mapping[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        """All layers, without update ratios."""
        return self.record.layers.before_step

    def values(self, name: str) -> list[float | None]:
        """One quantity of all layers, which costs no objects: see :meth:`Layers.values`."""
        return self.record.layers.values(name)

    def reaches(self, limit: float, *names: str) -> bool:
        """Whether one of these quantities is as large as that at some layer."""
        return any(value is not None and value >= limit for name in names for value in self.values(name))

    @property
    def trunk(self) -> list[LayerRecord]:
        """The layers that count in the fit."""
        return [one for one in self.layers if one.layer.trunk]

    def finding(
        self, condition: str, severity: int, depth: int | None, evidence: dict[str, float], message: str
    ) -> Diagnosis:
        """A finding of this step."""
        return Diagnosis(condition, severity, self.record.step, depth, evidence, message)


def has_gradient(one: LayerRecord) -> bool:
    """Whether anything but exact zeros has reached a layer."""
    return any(stats is not None and stats.norm != 0 for stats in (one.weight, one.output))


def deviation(values: Sequence[float], centre: float) -> float:
    """A standard deviation that outliers do not move: from the median absolute deviation."""
    return MAD_TO_SIGMA * median(abs(value - centre) for value in values)


def places(layers: Sequence[LayerRecord | Layer]) -> str:
    """Layers as people say them.

    Example:
        >>> from diagnostics.records import Layer
        >>> places([LayerRecord(Layer(2, "hidden.2", "Linear"), None, None)])
        'depth 2 (hidden.2)'
    """
    first, *_, last = [one.layer if isinstance(one, LayerRecord) else one for one in (*layers, layers[-1])]
    if len(layers) == 1:
        return f"depth {first.depth} ({first.name})"
    return f"{len(layers)} layers, depth {first.depth} ({first.name}) to {last.depth} ({last.name})"


def _reached(layers: Layers) -> list[Layer]:
    """Layers that anything but exact zeros has reached."""
    norms = zip(layers.values("weight.norm"), layers.values("output.norm"), strict=True)
    return [layer for layer, pair in zip(layers.layers, norms, strict=True) if pair[0] or pair[1]]


def _largest(layers: Layers, step: int) -> Largest | None:
    norms = zip(layers.layers, layers.values("weight.norm"), layers.values("output.norm"), strict=True)
    sizes = [(output if weight is None else weight, layer) for layer, weight, output in norms]
    known = [(size, layer) for size, layer in sizes if size is not None]
    if not known or not all(math.isfinite(size) for size, _ in known):
        return None
    size, layer = max(known, key=lambda pair: pair[0])
    return Largest(layer.name, layer.depth, size, step)
