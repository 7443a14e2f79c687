"""The long-lag tasks of Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", Neural Computation 9(8).

Examples are generated, training ones without end. What matters stands early in a sequence and is asked for at its end;
the key ``lag`` is the least number of steps from the one to the other. All sequences of a task have the same length, so
that they form batches; the paper's vary by a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from diagnostics.trainers.tasks import Batch, Classification, Inputs

HELD_OUT = 1000  # examples: one of them is 0.1 % of the accuracy
HELD_OUT_SEED = -1  # no trainer's: those count from 0


class _Generated:
    """Batches of examples that a subclass generates."""

    name: str

    def _examples(self, count: int, generator: torch.Generator) -> Batch:
        raise NotImplementedError

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """New examples without end.

        Args:
            batch_size: Examples per batch.
            seed: Decides the examples; none gives the held-out ones.

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 for {self.name}; got {batch_size}.")
        generator = torch.Generator().manual_seed(seed)
        return iter(lambda: self._examples(batch_size, generator), None)

    def held_out(self) -> Iterator[Batch]:
        """The same 1,000 examples in every run, as one batch."""
        yield self._examples(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))


class TemporalOrder(_Generated, Classification):
    """In which order two symbols came (experiment 6a): X or Y early, X or Y later, then distractors to the end.

    A sequence begins with E and ends with B. In between it has letters drawn from a, b, c, d, but for an X or Y
    between lag/4 and lag/2 and another one between 5/4 and 3/2 of the lag. The classes are XX, XY, YX and YY.
    Symbols are one-hot vectors in the order a, b, c, d, X, Y, E, B. A lag of 40 gives the paper's 100 steps.

    Args:
        lag: Steps from the second X or Y to the end, at least 4; a sequence has 5/2 of it.

    Raises:
        ValueError: The lag is below 4.

    Example:
        >>> task = TemporalOrder(lag=8)
        >>> sequences, classes = next(task.batches(batch_size=5, seed=0))
        >>> tuple(sequences.shape), tuple(classes.shape)
        ((5, 20, 8), (5,))
    """

    name = "temporal_order"
    outputs = 4

    def __init__(self, *, lag: int = 10) -> None:
        if lag < 4:
            raise ValueError(f"lag must be at least 4 steps; got {lag}.")
        self.lag = lag
        self.inputs = Inputs("sequences", (5 * lag // 2, 8))

    def _examples(self, count: int, generator: torch.Generator) -> Batch:
        steps, lag = self.inputs.shape[0], self.lag
        symbols = torch.randint(0, 4, (count, steps), generator=generator)
        symbols[:, 0], symbols[:, -1] = 6, 7
        order = torch.randint(0, 2, (count, 2), generator=generator)
        first = torch.randint(lag // 4, lag // 2, (count,), generator=generator)
        second = torch.randint(5 * lag // 4, 3 * lag // 2, (count,), generator=generator)
        rows = torch.arange(count)
        symbols[rows, first], symbols[rows, second] = 4 + order[:, 0], 4 + order[:, 1]
        return functional.one_hot(symbols, 8).float(), 2 * order[:, 0] + order[:, 1]


class Adding(_Generated):
    """The sum of two marked numbers in a long sequence of numbers (experiment 4).

    A step has two features: a number drawn from [-1, 1] and a marker, which is 1 at two steps, -1 at the first and the
    last, else 0. One marked step is among steps 1 to 9, the other anywhere else in the first half. The target is
    0.5 + (x1 + x2) / 4, which lies between 0 and 1. Always saying 0.5 gives a loss of 1/24 = 0.0417. A lag of 50 gives
    the paper's 100 steps.

    Args:
        lag: Steps from a marked one to the end, at least 3; a sequence has twice as many.

    Raises:
        ValueError: The lag is below 3.

    Example:
        >>> task = Adding(lag=8)
        >>> sequences, targets = next(task.batches(batch_size=5, seed=0))
        >>> tuple(sequences.shape), tuple(targets.shape)
        ((5, 16, 2), (5, 1))
    """

    name = "adding"
    outputs = 1

    def __init__(self, *, lag: int = 10) -> None:
        if lag < 3:
            raise ValueError(f"lag must be at least 3 steps; got {lag}.")
        self.inputs = Inputs("sequences", (2 * lag, 2))

    def _examples(self, count: int, generator: torch.Generator) -> Batch:
        steps = self.inputs.shape[0]
        half, rows = steps // 2, torch.arange(count)
        numbers = 2 * torch.rand(count, steps, generator=generator) - 1
        markers = torch.zeros(count, steps)
        markers[:, 0] = markers[:, -1] = -1
        first = torch.randint(1, min(10, half), (count,), generator=generator)
        further = torch.randint(0, half - 2, (count,), generator=generator)
        second = 1 + (first + further) % (half - 1)  # any of steps 1 to half - 1 but the first
        markers[rows, first] = markers[rows, second] = 1
        targets = 0.5 + (numbers[rows, first] + numbers[rows, second]) / 4
        return torch.stack([numbers, markers], dim=2), targets[:, None]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Number of outputs that are nearer than 0.04 to their target, the paper's criterion."""
        return ((outputs - targets).abs() < 0.04).sum()
