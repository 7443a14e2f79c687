"""A convolutional network with or without residual connections and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from diagnostics.trainers.models import ACTIVATIONS, at_least_one, initialise, option
from diagnostics.trainers.tasks import Inputs

CNN_NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "none": lambda _width: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda width: nn.GroupNorm(math.gcd(width, 8), width),
}
STAGES = 3  # as the ResNets for CIFAR-10 have: He et al. 2016, section 4.2


class ConvBlock(nn.Module):
    """3x3 convolution, normalisation, activation; with a residual connection the input is added to the result.

    A block that changes the width or the resolution has no residual connection.

    Example:
        >>> ConvBlock(8, 16, stride=2, activation="relu", norm="group", residual=True).residual
        False
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, activation: str, norm: str, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm = option(CNN_NORMS, norm, "norm")(outputs)
        self.activation = option(ACTIVATIONS, activation, "activation")()
        self.residual = residual and inputs == outputs and stride == 1

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        result: Tensor = self.activation(self.norm(self.conv(hidden)))
        return hidden + result if self.residual else result


class CNN(nn.Module):
    """``depth`` blocks of one 3x3 convolution each in three stages, the mean over all places, a linear layer.

    Each further stage has twice the width and half the resolution. Stages are as equal as ``depth`` allows, the earlier
    ones longer; with fewer than three blocks there are fewer stages.

    Args:
        inputs: What a task feeds: images.
        outputs: Numbers to predict.
        depth: Blocks, at least 1. Layers of a pass: ``depth`` convolutions and one Linear, and as many normalisations
            as blocks where there are any.
        width: Channels of the first stage, at least 1.
        activation: ``relu``, ``tanh``, ``sigmoid``, ``gelu`` or ``identity``.
        init: ``default``, ``kaiming``, ``xavier`` or ``orthogonal``, as :class:`~diagnostics.trainers.models.MLP` has
            them.
        norm: Between convolution and activation: ``none``, ``batch``, or ``group``: in 8 groups, or as many as divide
            both 8 and the width.
        residual: Whether each block that changes neither width nor resolution adds its input to its result.

    Raises:
        ValueError: An option that does not exist, a size below 1, or a task that feeds no images.

    Example:
        >>> import torch
        >>> model = CNN(Inputs("images", (1, 8, 8)), 10, depth=3, width=8)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> [block.conv.out_channels for block in model.blocks]
        [8, 16, 32]
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        *,
        depth: int = 6,
        width: int = 16,
        activation: str = "relu",
        init: str = "default",
        norm: str = "none",
        residual: bool = False,
    ) -> None:
        super().__init__()
        channels = inputs.required("cnn", "images").shape[0]
        at_least_one(depth=depth, width=width)
        stages = [STAGES * i // max(depth, STAGES) for i in range(depth)]
        widths = [channels, *(width * 2**stage for stage in stages)]
        self.blocks = nn.Sequential(
            *(
                ConvBlock(
                    widths[i],
                    widths[i + 1],
                    stride=2 if i and stages[i] > stages[i - 1] else 1,
                    activation=activation,
                    norm=norm,
                    residual=residual and i > 0,
                )
                for i in range(depth)
            )
        )
        self.head = nn.Linear(widths[-1], outputs)
        initialise(self, self.head, init, activation)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(batch, channels, height, width)`` to ``(batch, outputs)``."""
        result: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return result
