"""Tasks: data, a loss and a way to count what was right.

A task hands out batches on the CPU; the loop moves them to its device. What is held out depends on the data alone,
never on a seed, so that two runs of one task are always judged by the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Batch: TypeAlias = tuple[Tensor, Tensor]

HOLD_OUT_EVERY = 5  # one image in five: enough held-out images (360) that one of them is 0.3 % of the accuracy


class Task(Protocol):
    """What the loop needs to know about a task."""

    name: str
    inputs: int
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
        """How many examples of a batch are right, a scalar."""
        ...


class Digits:
    """The 8x8 handwritten digits that scikit-learn ships: 1,797 grey images in ten classes.

    Every fifth image is held out, whatever the seed. Pixels are centred and scaled by the mean and the standard
    deviation over all training pixels, one number each.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> task = Digits()
        >>> images, labels = next(task.batches(batch_size=32, seed=0))
        >>> tuple(images.shape), tuple(labels.shape)
        ((32, 64), (32,))
        >>> sum(len(labels) for _, labels in task.held_out())
        360
    """

    name = "digits"
    inputs = 64
    outputs = 10

    def __init__(self) -> None:
        images, labels = _load_digits()
        held_out = torch.arange(len(labels)) % HOLD_OUT_EVERY == 0
        training = images[~held_out]
        scaled = (images - training.mean()) / training.std()
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
        images, labels = self._training
        if not 1 <= batch_size <= len(labels):
            raise ValueError(f"batch_size must be between 1 and {len(labels)} for {self.name}; got {batch_size}.")
        return _shuffled(images, labels, batch_size, torch.Generator().manual_seed(seed))

    def held_out(self) -> Iterator[Batch]:
        """The held-out images as one batch."""
        yield self._held_out

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats; chance is ln 10 = 2.303."""
        return functional.cross_entropy(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Number of images whose largest output is their label's."""
        return (outputs.argmax(dim=1) == targets).sum()


def _shuffled(images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield images[chosen], labels[chosen]


def _load_digits() -> Batch:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only this task needs it
    except ModuleNotFoundError as error:
        message = 'The digits come with scikit-learn, which is not installed; pip install "training-diagnostics[data]".'
        raise ModuleNotFoundError(message, name=error.name) from error
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.long)
