"""Recurrent networks, unrolled in time: each step of a sequence is one layer deeper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.trainers.models import at_least_one, option
from diagnostics.trainers.tasks import Inputs


def _default(_weight: Tensor) -> None:
    """Leaves what PyTorch drew: uniform within 1 / sqrt(width)."""


RECURRENT_INITS: Mapping[str, Callable[[Tensor], object]] = {"default": _default, "orthogonal": nn.init.orthogonal_}


class Recurrent(nn.Module):
    """What :class:`RNN`, :class:`GRU` and :class:`LSTM` share; a sequence goes in step by step.

    A sequence is taken as it is, an image as the sequence of its rows from top to bottom (Le et al. 2015 read MNIST
    pixel by pixel), tokens through an embedding. One prediction comes from the last state, with tokens one from every
    state. Layers of a pass: the cell once per step, ``cell@0`` first, then the head; tokens add the embedding in front.
    A fused cell is one layer however long the sequence: its steps stay inside of one call.

    Args:
        inputs: What a task feeds: sequences, images or tokens.
        outputs: Numbers to predict.
        cell: ``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell``, or the module that runs all steps of it.
        width: Numbers in the hidden state, at least 1.
        fused: Whether ``cell`` runs all steps in one call, which is faster and hides the depth.
        recurrent_init: The square matrices, one for each gate, that a state is multiplied by: ``default`` or
            ``orthogonal``.
        recurrent_scale: What those are multiplied by: with ``orthogonal`` their largest singular value.
        options: Further arguments of the cell.

    Raises:
        ValueError: An option that does not exist, a width below 1, or a task that feeds something else.

    Example:
        >>> model = Recurrent(Inputs("sequences", (7, 2)), 3, cell=nn.GRUCell, width=4)
        >>> model(torch.zeros(5, 7, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        *,
        cell: Callable[..., nn.Module],
        width: int,
        fused: bool = False,
        recurrent_init: str = "default",
        recurrent_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind = inputs.required(type(self).__name__.lower(), "sequences", "images", "tokens").kind
        at_least_one(width=width)
        self.fused = fused
        features = {"sequences": inputs.shape[-1], "images": inputs.shape[0] * inputs.shape[-1], "tokens": width}
        self.embedding = nn.Embedding(outputs, width) if self.kind == "tokens" else None
        self.cell = cell(features[self.kind], width, **options, **({"batch_first": True} if fused else {}))
        self.head = nn.Linear(width, outputs)
        self._scale_recurrent_weights(recurrent_init, recurrent_scale)

    def forward(self, examples: Tensor) -> Tensor:
        """Maps ``(batch, steps, features)`` or ``(batch, channels, height, width)`` to ``(batch, outputs)``.

        Tokens, ``(batch, context)``, are mapped to ``(batch, context, outputs)``.
        """
        states = self._states(self._steps(examples))
        result: Tensor = self.head(states if self.kind == "tokens" else states[:, -1])
        return result

    def _steps(self, examples: Tensor) -> Tensor:
        """Any kind of example as ``(batch, steps, features)``."""
        if self.embedding is not None:
            embedded: Tensor = self.embedding(examples)
            return embedded
        return examples.transpose(1, 2).flatten(2) if self.kind == "images" else examples

    def _states(self, steps: Tensor) -> Tensor:
        """The hidden state after every step: ``(batch, steps, width)``."""
        if self.fused:
            fused_states: Tensor = self.cell(steps)[0]
            return fused_states
        state, states = None, []
        for step in steps.unbind(dim=1):
            state = self.cell(step, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, dim=1)

    @torch.no_grad()
    def _scale_recurrent_weights(self, init: str, scale: float) -> None:
        draw = option(RECURRENT_INITS, init, "recurrent_init")
        for name, weight in self.cell.named_parameters():
            if name.startswith("weight_hh"):
                for gate in torch.split(weight, weight.shape[1]):
                    draw(gate)
                weight[:] = scale * weight


class RNN(Recurrent):
    """Elman's network: the state is an activation of a linear map of input and last state.

    Args:
        inputs: What a task feeds: sequences, images (their rows are the steps) or tokens.
        outputs: Numbers to predict.
        width: Numbers in the hidden state, at least 1.
        activation: ``tanh`` or ``relu``.
        fused: Whether one call of ``nn.RNN`` runs all steps, instead of one of ``nn.RNNCell`` for each.
        recurrent_init: ``default`` (uniform within 1 / sqrt(width)) or ``orthogonal`` (Saxe et al. 2014).
        recurrent_scale: What the recurrent weights are multiplied by.

    Raises:
        ValueError: An option that does not exist, a width below 1, or a task that feeds something else.

    Example:
        >>> RNN(Inputs("images", (1, 8, 8)), 10, width=4)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        *,
        width: int = 64,
        activation: str = "tanh",
        fused: bool = False,
        recurrent_init: str = "default",
        recurrent_scale: float = 1.0,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            cell=nn.RNN if fused else nn.RNNCell,
            width=width,
            fused=fused,
            recurrent_init=recurrent_init,
            recurrent_scale=recurrent_scale,
            nonlinearity=option({"tanh": "tanh", "relu": "relu"}, activation, "activation"),
        )


class GRU(Recurrent):
    """Gated recurrent units (Cho et al. 2014).

    Args:
        inputs: What a task feeds: sequences, images (their rows are the steps) or tokens.
        outputs: Numbers to predict.
        width: Numbers in the hidden state, at least 1.
        fused: Whether one call of ``nn.GRU`` runs all steps, instead of one of ``nn.GRUCell`` for each.
        recurrent_init: ``default`` (uniform within 1 / sqrt(width)) or ``orthogonal``, each gate for itself.
        recurrent_scale: What the recurrent weights are multiplied by.

    Raises:
        ValueError: An option that does not exist, a width below 1, or a task that feeds something else.

    Example:
        >>> GRU(Inputs("tokens", (6,)), 256, width=4)(torch.zeros(5, 6, dtype=torch.long)).shape
        torch.Size([5, 6, 256])
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        *,
        width: int = 64,
        fused: bool = False,
        recurrent_init: str = "default",
        recurrent_scale: float = 1.0,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            cell=nn.GRU if fused else nn.GRUCell,
            width=width,
            fused=fused,
            recurrent_init=recurrent_init,
            recurrent_scale=recurrent_scale,
        )


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000).

    Args:
        inputs: What a task feeds: sequences, images (their rows are the steps) or tokens.
        outputs: Numbers to predict.
        width: Numbers in the hidden state, at least 1; the cell state has as many.
        forget_bias: Sum of the forget gate's two biases; None leaves what PyTorch drew, about 0. With b a memory keeps
            a share of about sigmoid(b) per step in the beginning: 0.5 for 0, 0.73 for 1.
        fused: Whether one call of ``nn.LSTM`` runs all steps, instead of one of ``nn.LSTMCell`` for each.
        recurrent_init: ``default`` (uniform within 1 / sqrt(width)) or ``orthogonal``, each gate for itself.
        recurrent_scale: What the recurrent weights are multiplied by.

    Raises:
        ValueError: An option that does not exist, a width below 1, or a task that feeds something else.

    Example:
        >>> LSTM(Inputs("sequences", (7, 2)), 1, width=4)(torch.zeros(5, 7, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        *,
        width: int = 64,
        forget_bias: float | None = 1.0,
        fused: bool = False,
        recurrent_init: str = "default",
        recurrent_scale: float = 1.0,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            cell=nn.LSTM if fused else nn.LSTMCell,
            width=width,
            fused=fused,
            recurrent_init=recurrent_init,
            recurrent_scale=recurrent_scale,
        )
        if forget_bias is not None:
            self._set_forget_bias(width, forget_bias)

    @torch.no_grad()
    def _set_forget_bias(self, width: int, bias: float) -> None:
        for name, parameter in self.cell.named_parameters():
            if name.startswith("bias"):
                parameter[width : 2 * width] = bias if name.startswith("bias_ih") else 0.0
