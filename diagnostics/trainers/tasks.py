"""Tasks: data, a loss and a way to count what was right.

A task hands out batches on the CPU; the loop moves them to its device. What is held out depends on the data alone,
never on a seed, so that two runs of one task are always judged by the same examples.

A task says in :class:`Inputs` what it feeds, and a model's constructor refuses what it does not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Batch: TypeAlias = tuple[Tensor, Tensor]

KINDS = ("vectors", "images", "sequences", "tokens")
HOLD_OUT_EVERY = 5  # one image in five: enough held-out images (360) that one of them is 0.3 % of the accuracy


@dataclass(frozen=True)
class Inputs:
    """What a task feeds a model: the kind and the shape of one example.

    Attributes:
        kind: ``vectors`` of shape (features,), ``images`` of (channels, height, width) and ``sequences`` of (steps,
            features) want one prediction for each example; ``tokens`` of (context,), whole numbers below the number of
            outputs, want one for each token.
        shape: Of one example, without the batch.

    Example:
        >>> Inputs("images", (1, 8, 8)).required("mlp", "vectors", "images").features
        64
        >>> Inputs("images", (1, 8, 8)).required("gpt", "tokens")
        Traceback (most recent call last):
        ValueError: gpt takes tokens, and the task feeds images of 1x8x8; choose another model or another task.
    """

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")

    def __str__(self) -> str:
        return f"{self.kind} of {'x'.join(str(size) for size in self.shape)}"

    @property
    def features(self) -> int:
        """Numbers in one example."""
        return torch.Size(self.shape).numel()

    def required(self, model: str, *kinds: str) -> Inputs:
        """These inputs, if the model takes their kind.

        Raises:
            ValueError: It does not; one sentence says what it takes and what the task feeds.
        """
        if self.kind not in kinds:
            taken = " or ".join([*filter(None, [", ".join(kinds[:-1])]), kinds[-1]])
            raise ValueError(f"{model} takes {taken}, and the task feeds {self}; choose another model or another task.")
        return self


class Task(Protocol):
    """What the loop needs to know about a task; ``inputs`` and ``outputs`` are what a model's constructor is given."""

    name: str
    inputs: Inputs
    outputs: int

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Shuffled training batches without end."""
        ...

    def held_out(self) -> Iterator[Batch]:
        """All examples that training never sees, once."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many examples of a batch are right, a scalar; one with several predictions counts by their share."""
        ...


class Classification:
    """Loss and count of right answers where outputs are class scores and targets class numbers.

    Example:
        >>> scores = torch.tensor([[[2.0, 1.0], [2.0, 1.0]]])  # one example with two predictions, both of class 0
        >>> Classification().correct(scores, torch.tensor([[0, 1]])).item()
        0.5
    """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over all predictions, in nats; chance is the logarithm of the number of classes."""
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Number of examples whose largest score is their target's; a share where each has several predictions."""
        right = (outputs.argmax(dim=-1) == targets).float()
        return right.reshape(len(targets), -1).mean(dim=1).sum()


class Digits(Classification):
    """The 8x8 handwritten digits that scikit-learn ships: 1,797 grey images in ten classes.

    Every fifth image is held out, whatever the seed. Pixels are centred and scaled by the mean and the standard
    deviation over all training pixels, one number each.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> task = Digits()
        >>> images, labels = next(task.batches(batch_size=32, seed=0))
        >>> tuple(images.shape), tuple(labels.shape)
        ((32, 1, 8, 8), (32,))
        >>> sum(len(labels) for _, labels in task.held_out())
        360
    """

    name = "digits"
    inputs = Inputs("images", (1, 8, 8))
    outputs = 10

    def __init__(self) -> None:
        images, labels = _load_digits()
        held_out = torch.arange(len(labels)) % HOLD_OUT_EVERY == 0
        training = images[~held_out]
        scaled = ((images - training.mean()) / training.std()).reshape(-1, *self.inputs.shape)
        self._training = scaled[~held_out], labels[~held_out]
        self._held_out = scaled[held_out], labels[held_out]

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Shuffled training batches without end; each epoch has its own order and leaves out an incomplete last batch.

        Args:
            batch_size: Examples per batch; at most the number of training examples.
            seed: Decides the order. The same seed gives the same batches on every machine.

        Raises:
            ValueError: There are fewer training examples than ``batch_size``.
        """
        return shuffled(*self._training, batch_size, seed, self.name)

    def held_out(self) -> Iterator[Batch]:
        """The held-out images as one batch."""
        yield self._held_out


def shuffled(images: Tensor, labels: Tensor, batch_size: int, seed: int, name: str) -> Iterator[Batch]:
    """Batches without end of examples that are all in memory; refuses at once a batch that the data cannot fill.

    Example:
        >>> shuffled(torch.zeros(3, 2), torch.zeros(3), batch_size=4, seed=0, name="digits")
        Traceback (most recent call last):
        ValueError: batch_size must be between 1 and 3 for digits; got 4.
    """
    if not 1 <= batch_size <= len(labels):
        raise ValueError(f"batch_size must be between 1 and {len(labels)} for {name}; got {batch_size}.")
    return _epochs(images, labels, batch_size, torch.Generator().manual_seed(seed))


def _epochs(images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield images[chosen], labels[chosen]


@cache
def _load_digits() -> Batch:
    """Read once per process, which takes half a second; nobody writes to what it returns."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only this task needs it
    except ModuleNotFoundError as error:
        message = 'The digits come with scikit-learn, which is not installed; pip install "training-diagnostics[data]".'
        raise ModuleNotFoundError(message, name=error.name) from error
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.long)
