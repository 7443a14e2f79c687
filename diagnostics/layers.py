"""The words about layers: which ones there are, what their gradients looked like, and the line through them.

Standard library only, frozen, plain numbers; records.py has the rest of the words and hands these on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of a module that owns parameters, at its place in the forward pass.

    Attributes:
        depth: Order of the call in the forward pass; 0 is the first module called.
        name: Qualified module name; ``name@k`` for the k-th call when a module is called more than once in one pass.
        kind: Class of the module, e.g. ``"Linear"``.
        parameters: Qualified names of the parameters that the module owns; empty at a later call of the same module.
        trunk: Whether the layer counts in the fit over depth; the package depth says which do not.
        steps_back: How many layers of the trunk the gradient passes on its longest way from the loss before it reaches
            this one; equal for layers that stand side by side. None where the order of the calls stands in for it.

    Example:
        >>> Layer(0, "0", "Linear", ("0.weight", "0.bias")).name
        '0'
    """

    depth: int
    name: str
    kind: str
    parameters: tuple[str, ...] = ()
    trunk: bool = True
    steps_back: int | None = None


def steps_back(layers: Sequence[Layer]) -> list[int]:
    """Where some layers of the trunk stand on the gradient's way back: 0 for where it begins, without gaps.

    Args:
        layers: In order of depth. If one of them has no ``steps_back`` of its own the order counts for all.

    Example:
        >>> towers = [Layer(0, "left", "Linear", steps_back=1), Layer(1, "right", "Linear", steps_back=1)]
        >>> steps_back([*towers, Layer(2, "head", "Linear", steps_back=0)])
        [1, 1, 0]
    """
    found = [layer.steps_back for layer in layers]
    places = {steps: place for place, steps in enumerate(sorted({steps for steps in found if steps is not None}))}
    if None in found:
        return list(reversed(range(len(layers))))
    return [places[steps] for steps in found if steps is not None]


@dataclass(frozen=True, slots=True)
class GradientStats:
    """What one gradient looked like.

    Attributes:
        numel: Number of elements.
        norm: Euclidean norm.
        rms: ``norm / sqrt(numel)``, the size of a typical element.
        abs_max: Largest magnitude.
        zero_fraction: Share of exact zeros, from a sample of at most about a thousand elements.
        underflow_fraction: Share of elements that are not zero but smaller in magnitude than the smallest normal number
            of the gradient's own dtype, from the same sample.
        nonfinite: Number of NaN and infinite elements; of an output gradient of more than 2,048 elements estimated
            from a sample, and at least 1 where there is one. Such a gradient's norm comes from the sample too at a step
            where it leaves the range of 1e-15 to 1e15, which fp32 is sure to hold; at those after it is exact.
        underflow_fp16_fraction: Share of elements that are not zero but smaller in magnitude than 6.1e-5, the smallest
            normal number of fp16, from the same sample: what a pass in fp16 would round or lose. Under a loss scaler an
            output gradient is judged as it is, scaled. bf16 has the range of fp32, so there is no such number for it.

    Example:
        >>> GradientStats(numel=4, norm=2.0, rms=1.0).nonfinite
        0
    """

    numel: int
    norm: float
    rms: float
    abs_max: float | None = None
    zero_fraction: float | None = None
    underflow_fraction: float | None = None
    nonfinite: int = 0
    underflow_fp16_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer at one step.

    Attributes:
        layer: Which one.
        output: The gradient of the loss with respect to the layer's output; None on a step that is not recorded. Of a
            fused recurrent layer only those results (one per example and step) count that have a gradient.
        weight: The gradient of the layer's own parameters before clipping; None where the layer has none of its own or
            none of them has a gradient.
        weight_norm: Euclidean norm of the trainable parameters, before the step, estimated from a sample of at most
            4,096 elements of each parameter, about 1,024 of one that has fewer than 65,536; None where all are frozen
            or the optimizer does not have them.
        update_ratio: ``‖w_after - w_before‖ / ‖w_before‖`` over the same sample; None if the weights were all zero.
        gain: The local gain, ``‖gradient at the layer's input‖ / ‖gradient at its output‖``: below 1 the layer shrinks
            what passes back through it. An input that several consumers read (a residual stream, a hidden state that
            is also a result) has the sum of their gradients, so there it tells of all of them together. None where
            the input needs no gradient, as the first layer's, on a step that is not recorded, and where the gradient at
            the output is zero.
        dead_fraction: Share of the layer's units, the rows of its weight's gradient, that were exactly zero at each of
            the last 10 recorded steps; None before there are so many, for embeddings (a token that did not occur is not
            dead) and for layers without a weight of two dimensions.
        stream_rms: Root mean square of the gradient at the residual stream behind the branch that the layer ends; None
            where it ends none (trunk.py says what is taken for a branch).

    Example:
        >>> LayerRecord(Layer(0, "0", "Linear"), output=None, weight=None).update_ratio is None
        True
    """

    layer: Layer
    output: GradientStats | None
    weight: GradientStats | None
    weight_norm: float | None = None
    update_ratio: float | None = None
    gain: float | None = None
    dead_fraction: float | None = None
    stream_rms: float | None = None

    @property
    def trunk_rms(self) -> float | None:
        """The gradient on the trunk: the residual stream's behind a branch, else the output's."""
        if self.stream_rms is not None or self.output is None:
            return self.stream_rms
        return self.output.rms

    @property
    def trunk_norm(self) -> float | None:
        """The norm of the same gradient, which the fit over depth takes: it does not change with a layer's width."""
        rms, output = self.trunk_rms, self.output
        return None if rms is None or output is None else rms * math.sqrt(output.numel)


@dataclass(frozen=True, slots=True)
class DepthFit:
    """A robust line through log10 of the output gradients' norm over depth.

    The norm and not the rms: with weights drawn for their number of inputs, as all usual initialisations draw them, a
    layer keeps the norm of what it passes back, while a narrower one behind a wider one changes the rms.

    Attributes:
        slope: The backward slope: decades by which the gradient changes per layer on the way back. Negative vanishes,
            positive explodes.
        intercept: log10 norm at the deepest fitted layer, where the backward pass begins.
        uncertainty: Standard error of the slope.
        depths: Number of layers that count; those that stand side by side count once.
        points: Number of layers that were fitted: those that count, less exact zeros and non-finite values.

    Example:
        >>> DepthFit(slope=-0.91, intercept=-1.0, uncertainty=0.01, depths=4, points=4).decades
        2.73
    """

    slope: float
    intercept: float
    uncertainty: float
    depths: int
    points: int

    @property
    def decades(self) -> float:
        """Decades between the first and the last layer that count: ``|slope| * (depths - 1)``."""
        return abs(self.slope) * (self.depths - 1)
