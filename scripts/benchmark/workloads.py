"""What is trained while the clock runs: four models, one fixed batch each, and a clipping regime that is certain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diagnostics.trainers.cnn import CNN
from diagnostics.trainers.gpt import GPT
from diagnostics.trainers.tasks import Inputs

LEARNING_RATE = 1e-7
"""So small that the weights stay where they are, and with them the norm of the gradient, and the regime of clipping."""

SPIKE_EVERY, SPIKE_AT, SPIKE = 10, 5, 4.0
"""``tenth``: at steps 5, 15, … the loss is four times as large; a recorded step, a multiple of ten, is none of them."""

REGIMES: Mapping[str, float] = {"never": 10.0, "always": 0.1, "tenth": 2.0}
"""``max_norm`` as a multiple of the norm that the gradient has."""

VOCABULARY = 256


@dataclass(frozen=True)
class Workload:
    """A model that is neither vanishing nor exploding, and a batch for it.

    Attributes:
        name: On the command line.
        about: Its sizes in words.
        model: Makes the model; the caller sets the seed.
        batch: Makes inputs and targets, likewise.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def workload(name: str, *, quick: bool = False) -> Workload:
    """The workload of a name; with ``quick`` a very small one of the same kind."""
    return WORKLOADS[name](quick)


def _mlp(quick: bool) -> Workload:
    depth, width, batch = (4, 16, 8) if quick else (50, 256, 128)

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            linear = nn.Linear(width, width)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return Workload("mlp", f"{depth} x Linear({width}, {width}), batch {batch}", model, _vectors(batch, width))


def _narrow(quick: bool) -> Workload:
    depth, width, batch = (4, 16, 8) if quick else (500, 16, 32)

    def model() -> nn.Module:
        layers = [nn.Linear(width, width) for _ in range(depth)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)  # a chain of rotations, so that 500 layers pass the gradient on unchanged
        return nn.Sequential(*layers)

    return Workload("narrow", f"{depth} x Linear({width}, {width}), batch {batch}", model, _vectors(batch, width))


def _gpt(quick: bool) -> Workload:
    depth, width, context, batch = (1, 16, 8, 4) if quick else (6, 384, 128, 8)

    def model() -> nn.Module:
        return GPT(Inputs("tokens", (context,)), VOCABULARY, depth=depth, width=width, heads=2 if quick else 6)

    def tokens() -> tuple[Tensor, Tensor]:
        both = torch.randint(VOCABULARY, (2, batch, context))
        return both[0], both[1]

    return Workload("gpt", f"{depth} blocks, width {width}, context {context}, batch {batch}", model, tokens)


def _resnet(quick: bool) -> Workload:
    depth, width, size, batch = (2, 4, 8, 4) if quick else (17, 16, 32, 32)

    def model() -> nn.Module:
        shape = Inputs("images", (3, size, size))
        return CNN(shape, 10, depth=depth, width=width, init="kaiming", norm="batch", residual=True)

    def images() -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    about = f"{depth} convolutions and a Linear, base width {width}, images of 3x{size}x{size}, batch {batch}"
    return Workload("resnet", about, model, images)


def _vectors(batch: int, width: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, width), torch.randint(width, (batch,)))


WORKLOADS: Mapping[str, Callable[[bool], Workload]] = {"mlp": _mlp, "gpt": _gpt, "resnet": _resnet, "narrow": _narrow}


class Training:
    """One copy of a workload's model with an optimizer of its own; all copies start alike and see the same batch.

    Args:
        work: What to train.
        clipping: ``never``, ``always`` or ``tenth``.
        micro_batches: Backward passes per step, each over an equal part of the batch.

    Attributes:
        parameters: The model's, as a list: a generator that is walked at every clip would slow the stock loop down.
        max_norm: Makes the regime certain; :attr:`clipped_share` of the steps are above it.
    """

    def __init__(self, work: Workload, clipping: str, micro_batches: int = 1) -> None:
        torch.manual_seed(0)
        self.model = work.model()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
        inputs, targets = work.batch()
        self._parts = list(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True))
        self._spikes = clipping == "tenth"
        self.clipped_share = {"never": 0.0, "always": 1.0, "tenth": 1 / SPIKE_EVERY}[clipping]
        self.backward(0)
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        )
        self.max_norm = REGIMES[clipping] * norm.item()
        self.optimizer.zero_grad()

    @property
    def micro_batches(self) -> int:
        """Backward passes per step."""
        return len(self._parts)

    def backward(self, step: int) -> Tensor:
        """Clears the gradients and makes those of a step; the loss of the last micro-batch."""
        self.optimizer.zero_grad()
        factor = 1 / len(self._parts)
        if self._spikes and step % SPIKE_EVERY == SPIKE_AT:
            factor *= SPIKE
        for inputs, targets in self._parts:
            loss = cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
            if factor != 1:
                loss = loss * factor
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
