"""Numbers read from the device → records. No torch.

The other side of the border between device tensors, which live one step, and frozen records, which live in the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from diagnostics.records import GradientStats, Layer, LayerRecord

OUTSIDE = "(outside the model)"
_SINGLE = 2.0**-23


@dataclass(frozen=True, slots=True)
class Piece:
    """One measured part of a gradient: the gradient of one parameter, or of one output in one backward pass."""

    numel: int
    norm: float
    abs_max: float | None = None
    zero_fraction: float | None = None
    underflow_fraction: float | None = None
    underflow_fp16_fraction: float | None = None
    nonfinite: int = 0

    def divided(self, factor: float) -> Piece:
        """The piece as it was before it was multiplied by a factor."""
        if factor == 1:
            return self
        peak = None if self.abs_max is None else self.abs_max / factor
        return replace(self, norm=self.norm / factor, abs_max=peak)

    def without_empty(self, share: float) -> Piece:
        """The piece without rows of zeros, given the share of the other rows; all of it where there are no others."""
        if not 0 < share < 1 or self.zero_fraction is None:
            return self
        small = [self.underflow_fraction, self.underflow_fp16_fraction]
        own, fp16 = (None if one is None else one / share for one in small)
        zero = max(0.0, 1 - (1 - self.zero_fraction) / share)
        return Piece(round(self.numel * share), self.norm, self.abs_max, zero, own, fp16, self.nonfinite)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Norm of a parameter, estimated from a sample, and the factor from a norm over the sample to the whole's."""

    norm: float
    factor: float


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


def piece(numel: int, values: Sequence[float], scale: float = 1.0) -> Piece:
    """A Piece from a column of ``magnitudes.profiles``, divided by the loss scale.

    Example:
        >>> piece(4, [16.0, 8.0, 0.0, 0.0, 0.0, 0.0], scale=2.0).norm
        8.0
    """
    norm, peak, zero, own, fp16, nonfinite = values
    return Piece(numel, norm if math.isfinite(peak) else peak, peak, zero, own, fp16, int(nonfinite)).divided(scale)


def merge(pieces: Sequence[Piece]) -> GradientStats | None:
    """The statistics of several pieces taken together; None for no pieces. Fractions are weighted by size.

    Example:
        >>> merge([Piece(1, 3.0), Piece(1, 4.0)]).norm
        5.0
    """
    if not pieces:
        return None
    if len(pieces) == 1:  # as nearly all outputs are
        one = pieces[0]
        rms = one.norm / math.sqrt(one.numel) if one.numel else 0.0
        return GradientStats(
            one.numel,
            one.norm,
            rms,
            one.abs_max,
            one.zero_fraction,
            one.underflow_fraction,
            one.nonfinite,
            one.underflow_fp16_fraction,
        )
    numel = sum(part.numel for part in pieces)
    norm = math.hypot(*(part.norm for part in pieces))
    peaks = [part.abs_max for part in pieces if part.abs_max is not None]
    return GradientStats(
        numel=numel,
        norm=norm,
        rms=norm / math.sqrt(numel) if numel else 0.0,
        abs_max=_largest(peaks) if len(peaks) == len(pieces) else None,
        zero_fraction=_mean([(part.numel, part.zero_fraction) for part in pieces]),
        underflow_fraction=_mean([(part.numel, part.underflow_fraction) for part in pieces]),
        nonfinite=sum(part.nonfinite for part in pieces),
        underflow_fp16_fraction=_mean([(part.numel, part.underflow_fp16_fraction) for part in pieces]),
    )


@dataclass(slots=True)
class Around:
    """What passed back through one layer at a step.

    Attributes:
        outputs: The gradients of its outputs.
        inputs: Norms of the gradients of its inputs by the serial number of the call.
        made: Norms of those of its outputs, likewise.
        stream: Size and norm of the gradients of the stream behind the branch that it ends.
    """

    outputs: list[Piece] = field(default_factory=list)
    inputs: dict[int, list[float]] = field(default_factory=dict)
    made: dict[int, list[float]] = field(default_factory=dict)
    stream: list[tuple[int, float]] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        """Norm at the inputs over norm at the outputs, over those calls that have both."""
        both = self.inputs.keys() & self.made.keys()
        made = math.hypot(*(norm for serial in both for norm in self.made[serial]))
        read = math.hypot(*(norm for serial in both for norm in self.inputs[serial]))
        return read / made if 0 < made < math.inf else None

    def stream_rms(self, scale: float) -> float | None:
        """Root mean square of the stream's gradient, divided by the loss scale."""
        numel = sum(size for size, _ in self.stream)
        return math.hypot(*(norm for _, norm in self.stream)) / scale / math.sqrt(numel) if numel else None


def layer_records(
    layers: Sequence[tuple[Layer, Around]],
    gradients: Mapping[str, Piece],
    weights: Mapping[str, Sampled],
    dead: Mapping[str, float],
    scale: float = 1.0,
) -> list[LayerRecord]:
    """One record per layer, without what the step did to the weights.

    Args:
        layers: Layers in order of depth, each with what passed back through it.
        gradients: The gradients by name of the parameter; one that has none is not in it.
        weights: Norms of the parameters by name; empty on a step that is not recorded.
        dead: Shares of dead units by name of the weight; empty until enough steps are recorded.
        scale: The loss scale.
    """
    records = []
    for layer, around in layers:
        own = [gradients[name] for name in layer.parameters if name in gradients]
        held = [weights[name].norm for name in layer.parameters if name in weights]
        weight_norm = math.hypot(*held) if held else None
        dying = next((dead[name] for name in layer.parameters if name in dead), None)
        stream = around.stream_rms(scale)
        output = merge(around.outputs)
        records.append(LayerRecord(layer, output, merge(own), weight_norm, None, around.gain, dying, stream))
    return records


def update_ratios(
    layers: Sequence[Layer], weights: Mapping[str, Sampled], moved: Mapping[str, float]
) -> list[float | None]:
    """How far each layer's parameters moved, over how large they were before.

    Args:
        layers: Whose parameters.
        weights: Norms of the parameters before the step.
        moved: Norm of the difference over the same sample.
    """
    ratios: list[float | None] = []
    for layer in layers:
        held = [name for name in layer.parameters if name in moved]
        distance = math.hypot(*(moved[name] * weights[name].factor for name in held))
        before = math.hypot(*(weights[name].norm for name in held))
        ratios.append(distance / before if held and before > 0 else None)
    return ratios


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _mean(weighted: Sequence[tuple[int, float | None]]) -> float | None:
    total = sum(weight for weight, _ in weighted)
    known = [weight * value for weight, value in weighted if value is not None]
    return math.fsum(known) / total if total and len(known) == len(weighted) else None
