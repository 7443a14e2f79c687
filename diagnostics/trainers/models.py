"""Models whose depth, activation, initialisation and normalisation are dials, so that gradients can misbehave.

Depth means the same in all of them. A layer is one call of a module that owns parameters, and the layers of a pass
stand in the order of their calls. The key ``depth`` counts what a model repeats on purpose: hidden layers of an MLP,
blocks of a CNN or GPT. A recurrent model repeats its cell once per step of the sequence, so the task sets its depth.

A model's constructor takes what the task feeds and the number of outputs, refuses what it cannot work with in one
sentence, and takes everything else by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from diagnostics.trainers.tasks import Inputs

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}
NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "none": lambda _width: nn.Identity(),
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
}
# torch.nn.init.calculate_gain's numbers; GELU has none there and behaves like ReLU away from zero.
GAINS = {"relu": 2**0.5, "tanh": 5 / 3, "sigmoid": 1.0, "gelu": 2**0.5, "identity": 1.0}


def _default(_weight: Tensor, _gain: float) -> None:
    """Leaves what nn.Linear drew: uniform with standard deviation 1/sqrt(3 * fan_in)."""


def _kaiming(weight: Tensor, gain: float) -> None:
    nn.init.normal_(weight, std=gain / weight[0].numel() ** 0.5)


def _xavier(weight: Tensor, _gain: float) -> None:
    nn.init.xavier_normal_(weight)


def _orthogonal(weight: Tensor, gain: float) -> None:
    nn.init.orthogonal_(weight, gain)


INITS: Mapping[str, Callable[[Tensor, float], None]] = {
    "default": _default,
    "kaiming": _kaiming,
    "xavier": _xavier,
    "orthogonal": _orthogonal,
}
WITH_GAIN = ("kaiming", "orthogonal")  # those whose weights are multiplied by a gain

Option = TypeVar("Option")


class Block(nn.Module):
    """Linear, normalisation, activation; with a residual connection the input is added to the result.

    Example:
        >>> Block(8, 8, activation="tanh", norm="layer", residual=True).residual
        True
    """

    def __init__(self, inputs: int, outputs: int, *, activation: str, norm: str, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = option(NORMS, norm, "norm")(outputs)
        self.activation = option(ACTIVATIONS, activation, "activation")()
        self.residual = residual

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, inputs)`` to ``(batch, outputs)``."""
        result: Tensor = self.activation(self.norm(self.linear(hidden)))
        return hidden + result if self.residual else result


class MLP(nn.Module):
    """A multilayer perceptron: ``depth`` hidden layers of one width, then a linear layer to the outputs.

    Args:
        inputs: Features of one example, or what a task feeds: vectors, or images, which are flattened.
        outputs: Numbers to predict.
        depth: Hidden layers, at least 1. Layers of a pass: ``depth + 1`` Linear, and as many normalisations as hidden
            layers where there are any.
        width: Units of each hidden layer, at least 1.
        activation: ``relu``, ``tanh``, ``sigmoid``, ``gelu`` or ``identity``.
        init: Weights of all Linear layers. ``default`` leaves PyTorch's; ``kaiming`` is normal with standard deviation
            ``gain / sqrt(fan_in)`` (He et al. 2015); ``xavier`` is normal with variance ``2 / (fan_in + fan_out)``
            (Glorot and Bengio 2010), without a gain; ``orthogonal`` has orthonormal rows or columns times the gain
            (Saxe et al. 2014). The gain is ``torch.nn.init.calculate_gain``'s for the activation (ReLU's for GELU), 1
            for the last layer. All but ``default`` set biases to zero.
        gain: In place of the activation's, with ``kaiming`` or ``orthogonal``. With ``kaiming`` it is the sigma_w of
            mean-field theory: tanh is ordered below 1 and chaotic above it (Poole et al. 2016).
        norm: Between Linear and activation: ``none``, ``layer`` or ``batch``.
        residual: Whether each hidden layer but the first, which changes the width, adds its input to its result.

    Raises:
        ValueError: An option that does not exist, a size below 1, or a task that feeds something else.

    Example:
        >>> import torch
        >>> model = MLP(64, 10, depth=2, width=32)
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
        >>> sum(isinstance(module, nn.Linear) for module in model.modules())
        3
    """

    def __init__(
        self,
        inputs: int | Inputs,
        outputs: int,
        *,
        depth: int = 4,
        width: int = 128,
        activation: str = "relu",
        init: str = "default",
        gain: float | None = None,
        norm: str = "none",
        residual: bool = False,
    ) -> None:
        super().__init__()
        features = inputs if isinstance(inputs, int) else inputs.required("mlp", "vectors", "images").features
        at_least_one(depth=depth, width=width)
        self.hidden = nn.Sequential(
            *(
                Block(width if i else features, width, activation=activation, norm=norm, residual=residual and i > 0)
                for i in range(depth)
            )
        )
        self.head = nn.Linear(width, outputs)
        initialise(self, self.head, init, activation, gain)

    def forward(self, examples: Tensor) -> Tensor:
        """Maps ``(batch, ...)`` with ``inputs`` numbers per example to ``(batch, outputs)``."""
        result: Tensor = self.head(self.hidden(examples.flatten(1)))
        return result


def at_least_one(**sizes: int) -> None:
    """Refuses a size below 1.

    Example:
        >>> at_least_one(depth=3, width=0)
        Traceback (most recent call last):
        ValueError: width must be at least 1; got 0.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")


def initialise(model: nn.Module, head: nn.Linear, init: str, activation: str, gain: float | None = None) -> None:
    """Draws the weights of all Linear and Conv2d layers; ``init`` and ``gain`` as :class:`MLP` documents them.

    Raises:
        ValueError: An option that does not exist, or a gain that is not positive or that the init does not use.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> initialise(model, model[-1], init="kaiming", activation="relu")
        >>> model[0].bias.any().item()
        False
    """
    draw = option(INITS, init, "init")
    if gain is not None and not 0 < gain < math.inf:
        raise ValueError(f"gain must be a positive number; got {gain}.")
    if gain is not None and init not in WITH_GAIN:
        raise ValueError(f"gain needs init={' or '.join(WITH_GAIN)}; got init={init}.")
    hidden_gain = GAINS[activation] if gain is None else gain
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            draw(module.weight, 1.0 if module is head else hidden_gain)
            if init != "default" and module.bias is not None:
                nn.init.zeros_(module.bias)


def option(options: Mapping[str, Option], choice: str, name: str) -> Option:
    """What a choice stands for.

    Example:
        >>> option({"relu": nn.ReLU}, "tanh", "activation")
        Traceback (most recent call last):
        ValueError: activation must be one of relu; got 'tanh'.
    """
    if choice not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {choice!r}.")
    return options[choice]
