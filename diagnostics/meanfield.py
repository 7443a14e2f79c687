"""Mean-field theory of wide random nets: what a plain stack's initialisation does to the gradient.

In a wide net with independent weights of variance ``σ_w² / fan_in`` and biases of variance ``σ_b²`` pre-activations are
normal. Their variance settles at the fixed point ``q* = σ_w² E[φ(√q* z)²] + σ_b²`` with ``z ~ N(0, 1)``, and from there
on each layer multiplies the squared gradient by ``χ₁ = σ_w² E[φ'(√q* z)²]``: below 1 it vanishes, above it explodes.

Sources: Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016, equations 3 and
5; Schoenholz et al., Deep information propagation, 2017, equations 9 and 15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRAINABLE_SCALES = 6.0
"""Depth scales up to which nets trained in Schoenholz et al. 2017, figure 5: a rule of thumb from experiments."""

_STEPS = 500
_SETTLED = 1e-9
_DIVERGED = 1e6
_ALIKE = 1.5
"""By how much σ_w² may differ between layers that are taken to be drawn alike."""

# The midpoint rule: its error falls exponentially for smooth functions under a normal density, it holds at a variance
# where tanh is nearly a step, and no point lies on ReLU's kink.
_POINTS = [(place + 0.5) / 10 for place in range(-80, 80)]
_DENSITY = [math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / 10 for z in _POINTS]


class Activation(NamedTuple):
    """A function and its derivative."""

    value: Callable[[float], float]
    slope: Callable[[float], float]


def _sigmoid(x: float) -> float:
    return (1 + math.tanh(x / 2)) / 2


def _normal_share(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _gelu_slope(x: float) -> float:
    return _normal_share(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS: Mapping[str, Activation] = {
    "identity": Activation(lambda x: x, lambda _: 1.0),
    "relu": Activation(lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "tanh": Activation(math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    "sigmoid": Activation(_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
    "gelu": Activation(lambda x: x * _normal_share(x), _gelu_slope),
    "erf": Activation(math.erf, lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x)),
}
"""What may stand between two layers."""


def chi(activation: str, weight: float, bias: float) -> float:
    """χ₁, by which a layer multiplies the squared gradient at the fixed point.

    Args:
        activation: A key of ``ACTIVATIONS``.
        weight: σ_w², fan-in times the variance of the weights.
        bias: σ_b², the variance of the biases.

    Example:
        >>> round(chi("relu", 2.0, 0.0), 9), round(chi("relu", 1.0, 0.0), 9)
        (1.0, 0.5)
        >>> round(chi("tanh", 1.5**2, 0.05**2), 3)
        1.137
    """
    value, slope = ACTIVATIONS[activation]
    variance = 1.0
    for _ in range(_STEPS):
        before, variance = variance, weight * _mean_square(value, variance) + bias
        if abs(variance - before) <= _SETTLED or variance > _DIVERGED:
            break
    return weight * _mean_square(slope, variance)


def trainable_depth(chi: float) -> float:
    """Layers up to which an initialisation trains, about: six depth scales ``ξ = 1 / |ln χ₁|``.

    Returns:
        A number of layers; infinity at ``χ₁ = 1``, zero where no gradient passes.

    Example:
        >>> round(trainable_depth(0.5), 1), trainable_depth(1.0), trainable_depth(0.0)
        (8.7, inf, 0.0)
    """
    if chi <= 0:
        return 0.0
    rate = abs(math.log(chi))
    return TRAINABLE_SCALES / rate if rate > 0 else math.inf


def _mean_square(function: Callable[[float], float], variance: float) -> float:
    """E[f(√q z)²] for a standard normal z."""
    root = math.sqrt(variance)
    return math.fsum(density * function(root * z) ** 2 for z, density in zip(_POINTS, _DENSITY, strict=True))


# which nets the theory is about


class Stack(NamedTuple):
    """A plain stack: its activation, and its layers' weights and biases in forward order."""

    activation: str
    weights: list[Tensor]
    biases: list[Tensor | None]

    def variances(self) -> Tensor:
        """σ_w² of the hidden layers, then σ_b² of each, shape ``[2 * hidden]``."""
        hidden = list(zip(self.weights, self.biases, strict=True))[1:-1]
        weights = [weight.detach().double().square().sum() / len(weight) for weight, _ in hidden]
        zero = self.weights[0].new_zeros((), dtype=torch.float64)
        biases = [zero if bias is None else bias.detach().double().square().mean() for _, bias in hidden]
        return torch.stack([*weights, *biases])

    def chi(self, variances: Sequence[float]) -> float | None:
        """χ₁ from the numbers of :meth:`variances`; None if the hidden layers were not drawn alike."""
        weights, biases = variances[: len(variances) // 2], variances[len(variances) // 2 :]
        if not 0 < max(weights) <= _ALIKE * min(weights):
            return None
        return chi(self.activation, math.fsum(weights) / len(weights), math.fsum(biases) / len(biases))


# Names of autograd's nodes; for a layer's the places of its input, weight and bias among the node's parents.
_LAYERS = {"AddmmBackward0": (1, 2, 0), "MmBackward0": (0, 1, None), "ConvolutionBackward0": (0, 1, 2)}
_BETWEEN = {f"{name.capitalize()}Backward0": name for name in ACTIVATIONS}
_SAME_VALUES = {
    f"{name}Backward0"
    for name in ("Alias", "Clone", "Permute", "ReshapeAlias", "T", "ToCopy", "Transpose", "UnsafeView", "View")
}


def plain_stack(node: Any) -> Stack | None:
    """Reads a plain stack off the graph of its loss.

    That is one chain of at least three Linear layers or convolutions of stride 1, all but the first and the last with
    as many outputs as inputs, with the same activation behind each but the last and nothing else between them. What
    stands behind the last layer is the loss's affair.

    Args:
        node: ``loss.grad_fn``.

    Returns:
        The stack, None if the net is anything else.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> stack = plain_stack(model(torch.ones(3, 2)).mean().grad_fn)
        >>> stack.activation, [tuple(weight.shape) for weight in stack.weights]
        ('tanh', [(4, 2), (4, 4), (1, 4)])
    """
    layers: list[tuple[Tensor, Tensor | None]] = []
    between: list[tuple[str, ...]] = [()]
    while node is not None:
        name, parents = node.name(), [parent for parent, _ in node.next_functions]
        if name in _LAYERS:
            source, weight, bias = (None if place is None else parents[place] for place in _LAYERS[name])
            held = _leaf(weight)
            if held is None or set(getattr(node, "_saved_stride", ())) - {1}:
                return None
            layers.append((held, _leaf(bias)))
            between.append(())
            parents = [source]
        elif name in _BETWEEN:
            between[-1] += (_BETWEEN[name],)
        elif layers and name not in _SAME_VALUES:
            return None
        ahead = [parent for parent in parents if parent is not None]
        if len(ahead) > 1:
            return None
        node = ahead[0] if ahead else None
    kinds = set(between[1:-1])
    square = all(weight.dim() > 1 and weight.shape[0] == weight.shape[1] for weight, _ in layers[1:-1])
    if len(layers) < 3 or len(kinds) > 1 or not square:
        return None
    (kind,) = kinds
    if len(kind) > 1:
        return None
    weights, biases = zip(*reversed(layers), strict=True)
    return Stack("".join(kind) or "identity", list(weights), list(biases))


def _leaf(node: Any) -> Tensor | None:
    """The tensor that a node hands on unchanged, where it is a leaf."""
    while node is not None and node.name() in _SAME_VALUES:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)
