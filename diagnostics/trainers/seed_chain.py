"""The story that the project began with: an article's tables on gradient clipping, recomputed, ours beside them.

The article takes five numbers for gradients, clips them under several norms and thresholds, and takes one step with a
chain of four sigmoid layers. :func:`tell` prints its tables in its order, and after them what the article left open:
what the loop must not do, and where along the chain the gradient vanishes. The task and the model train the chain for
longer.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.clipping import ClipByNorm, clip_gradients
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.monitor import Monitor
from diagnostics.records import ClipRecord, Diagnosis, Violation
from diagnostics.trainers.tasks import Batch, Inputs

Write: TypeAlias = Callable[[str], object]

GRADIENTS = (125.0, 75.0, 45.0, 15.0, 5.0)
NORM_TYPES = {
    1.0: (265.0, 0.0037735848914204344),
    2.0: (153.3786163330078, 0.006519813631054263),
    3.0: (135.16899108886716, 0.007398146457602848),
    4.0: (129.34915161132812, 0.007731013151704421),
    math.inf: (125.0, 0.008),
}
FIRST_GRADIENTS = (153.3786163330078, 265.3299865722656, 385.389404296875, 507.83856201171875)
MAX_NORMS = (0.006519813631054263, 0.013039627262108526, 0.01955944089316279, 0.02607925452421705)

INPUT, TARGET, WEIGHT, LEARNING_RATE = 0.1, 1.0, 0.5, 1.0
MAX_NORM = 0.01208  # a tenth of the chain's total norm
CHAIN_GRADIENTS = (-3.959321e-05, -1.624328e-03, -1.452917e-02, -1.198795e-01)
CHAIN_COEFFICIENT = 0.10002593
CHAIN_CLIPPED = (-3.960347839893075e-06, -0.00016247491294052452, -0.001453293371014297, -0.01199105940759182)
CHAIN_WEIGHTS = (0.5000039339065552, 0.5001624822616577, 0.5014532804489136, 0.5119910836219788)
DEPTHS = (4, 8, 12)


class Row(NamedTuple):
    """One number of the article: what it is, its value there, ours, and their difference relative to the article's."""

    what: str
    article: float
    ours: float
    difference: float


class Watched(NamedTuple):
    """What a Monitor said about one step of a chain."""

    depth: int
    clipped: bool
    slope: float
    diagnosis: Diagnosis


class SigmoidChain(nn.Sequential):
    """Layers of one unit each, ``Linear(1, 1, bias=False)`` and Sigmoid, all weights equal.

    Args:
        inputs: Features of one example, or what a task feeds, which must be vectors; the article has one.
        outputs: Numbers to predict; the article has one.
        depth: Layers, at least 1.

    Raises:
        ValueError: The depth is no whole number from 1 on.

    Example:
        >>> SigmoidChain(1, 1, depth=4)(torch.tensor([0.1])).shape
        torch.Size([1])
    """

    def __init__(self, inputs: int | Inputs = 1, outputs: int = 1, *, depth: int = 4) -> None:
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be a whole number of at least 1; got {depth!r}.")
        features = inputs if isinstance(inputs, int) else inputs.required("sigmoid_chain", "vectors").features
        sizes = [features, *[1] * (depth - 1), outputs]
        linears = [nn.Linear(before, after, bias=False) for before, after in pairwise(sizes)]
        super().__init__(*(module for linear in linears for module in (linear, nn.Sigmoid())))
        for linear in linears:
            nn.init.constant_(linear.weight, WEIGHT)


class SeedChain:
    """The article's task: one example, whose input is 0.1 and whose target is 1.

    Args:
        story: Whether to print the article's tables first.

    Example:
        >>> inputs, targets = next(SeedChain(story=False).batches(batch_size=1, seed=0))
        >>> inputs, targets
        (tensor([[0.1000]]), tensor([[1.]]))
    """

    name = "seed_chain"
    inputs = Inputs("vectors", (1,))
    outputs = 1

    def __init__(self, *, story: bool = True) -> None:
        if story:
            tell()

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """The example, as often as a batch is to have examples; the seed has nothing to decide."""
        del seed
        while True:
            yield torch.full((batch_size, 1), INPUT), torch.full((batch_size, 1), TARGET)

    def held_out(self) -> Iterator[Batch]:
        """The example: there is no other."""
        yield torch.tensor([[INPUT]]), torch.tensor([[TARGET]])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Number of outputs that are nearer than 0.1 to their target."""
        return ((outputs - targets).abs() < 0.1).sum()


def tell(write: Write = print) -> float:
    """Tells the story: the article's tables in its order with ours beside them, and what they leave open.

    Args:
        write: Takes one line.

    Returns:
        The largest relative difference between a number of the article and ours.

    Example:
        >>> tell(write=lambda line: None) < 1e-6
        True
    """
    write("The article's numbers, and ours beside them")
    chapters = (_norm_types, _first_gradients, _max_norms, _chain)
    largest = max(chapter(write) for chapter in chapters)
    _unlawful_loops(write)
    _verdicts(write)
    return largest


def norm_type_rows() -> list[Row]:
    """Total norm and coefficient of the five gradients under five norms; max_norm is 1.

    Example:
        >>> norm_type_rows()[0]
        Row(what='norm_type 1    total_norm', article=265.0, ours=265.0, difference=0.0)
    """
    rows = []
    for norm_type, (total_norm, coefficient) in NORM_TYPES.items():
        record = clip_numbers(GRADIENTS, 1.0, norm_type)
        rows.append(_row(f"norm_type {norm_type:<4g} total_norm", total_norm, record.total_norm))
        rows.append(_row(f"norm_type {norm_type:<4g} clip_coef", coefficient, record.clip_coef))
    return rows


def first_gradient_rows() -> list[Row]:
    """Total norm while the first of the five gradients grows to i times its size.

    Example:
        >>> [round(row.ours) for row in first_gradient_rows()]
        [153, 265, 385, 508]
    """
    rows = []
    for i, total_norm in enumerate(FIRST_GRADIENTS, start=1):
        record = clip_numbers((i * GRADIENTS[0], *GRADIENTS[1:]), 1.0, 2.0)
        rows.append(_row(f"first gradient 125 * {i}, total_norm", total_norm, record.total_norm))
    return rows


def max_norm_rows() -> list[Row]:
    """The coefficient of the five gradients under four thresholds.

    Example:
        >>> [round(row.ours, 4) for row in max_norm_rows()]
        [0.0065, 0.013, 0.0196, 0.0261]
    """
    return [
        _row(f"max_norm {i}, clip_coef", coefficient, clip_numbers(GRADIENTS, float(i), 2.0).clip_coef)
        for i, coefficient in enumerate(MAX_NORMS, start=1)
    ]


def chain_rows() -> list[Row]:
    """One clipped step of the chain of four layers: gradients, coefficient, weights, and what the step leaves behind.

    Example:
        >>> [row.what for row in chain_rows()][3:6]
        ['gradient of weight 4', 'clip_coef', 'clipped gradient of weight 1']
    """
    chain, optimizer = _chain_and_optimizer(4)
    optimizer.zero_grad()
    _backward(chain)
    rows = _rows("gradient of weight", CHAIN_GRADIENTS, _gradients(chain))
    record = clip_gradients(chain.parameters(), ClipByNorm(MAX_NORM))
    rows.append(_row("clip_coef", CHAIN_COEFFICIENT, record.clip_coef))
    rows += _rows("clipped gradient of weight", CHAIN_CLIPPED, _gradients(chain))
    optimizer.step()
    rows += _rows("after the step: weight", CHAIN_WEIGHTS, [weight.item() for weight in chain.parameters()])
    return rows + _rows("after the step: gradient of weight", CHAIN_CLIPPED, _gradients(chain))


def equal_entries_ratio(count: int) -> float:
    """1-norm over 2-norm of so many equal gradients, which is the square root of their number.

    Example:
        >>> equal_entries_ratio(10_000)
        100.0
    """
    numbers = [1.0] * count
    return clip_numbers(numbers, 1.0, 1.0).total_norm / clip_numbers(numbers, 1.0, 2.0).total_norm


def clip_numbers(numbers: Sequence[float], max_norm: float, norm_type: float) -> ClipRecord:
    """What clipping does to some numbers taken as gradients.

    Example:
        >>> clip_numbers([3.0, 4.0], 1.0, 2.0).total_norm
        5.0
    """
    holder = nn.Parameter(torch.zeros(len(numbers)))
    holder.grad = torch.tensor(numbers)
    return clip_gradients(holder, ClipByNorm(max_norm, norm_type))


def train_without_zero_grad() -> tuple[Violation, ...]:
    """What a Monitor finds in three steps of the chain that never clear the gradients.

    Example:
        >>> [violation.rule for violation in train_without_zero_grad()]
        ['missing_zero_grad']
    """
    chain, optimizer = _chain_and_optimizer(4)
    with _monitor(chain, optimizer, max_norm=None) as monitor:
        for _ in range(3):
            _backward(chain)
            monitor.clip_and_step()
    return monitor.violations


def train_clipping_too_late() -> tuple[Violation, ...]:
    """What a Monitor finds in three steps of the chain that clip after ``optimizer.step()``.

    Example:
        >>> [violation.rule for violation in train_clipping_too_late()]
        ['clip_after_step']
    """
    chain, optimizer = _chain_and_optimizer(4)
    with _monitor(chain, optimizer, MAX_NORM) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            _backward(chain)
            optimizer.step()
            monitor.clip_grad_norm_(chain.parameters(), MAX_NORM)
    return monitor.violations


def watch_chain(depth: int, *, clipped: bool) -> Watched:
    """What a Monitor says about one step of a chain.

    Example:
        >>> watch_chain(4, clipped=True).diagnosis.condition
        'vanishing'
    """
    chain, optimizer = _chain_and_optimizer(depth)
    with _monitor(chain, optimizer, MAX_NORM if clipped else None) as monitor:
        optimizer.zero_grad()
        _backward(chain)
        fit = monitor.clip_and_step().fit
    assert fit is not None
    return Watched(depth, clipped, fit.slope, monitor.diagnoses[0])


def _norm_types(write: Write) -> float:
    ratios = " and ".join(f"{equal_entries_ratio(count):g} times for n = {count:,}" for count in (100, 10_000))
    return _table(
        write,
        "1. Five gradients (125, 75, 45, 15, 5) under five norms, max_norm 1",
        norm_type_rows(),
        "A larger norm_type gives a smaller total_norm: the article sees it in five numbers, and it holds for any. "
        "That norm_type hardly matters is true of these five, whose norms lie between 125 and 265, and not in general: "
        f"of n equal gradients the 1-norm is sqrt(n) times the 2-norm ({ratios}), so that a max_norm means nothing "
        "without its norm_type.",
    )


def _first_gradients(write: Write) -> float:
    remark = "One large gradient soon is the whole norm, and all others are scaled down with it."
    return _table(write, "2. The first gradient grows, norm_type 2", first_gradient_rows(), remark)


def _max_norms(write: Write) -> float:
    remark = "The coefficient is max_norm / (total_norm + 1e-6); gradients are touched only where it is below 1."
    return _table(write, "3. max_norm grows, norm_type 2", max_norm_rows(), remark)


def _chain(write: Write) -> float:
    return _table(
        write,
        f"4. Four sigmoid layers, weights {WEIGHT}, input {INPUT}, target {TARGET:g}, SGD with lr {LEARNING_RATE:g}, "
        f"max_norm {MAX_NORM}",
        chain_rows(),
        "The step leaves the gradients where they are: without zero_grad the next backward pass adds to them.",
    )


def _unlawful_loops(write: Write) -> None:
    write("\n5. The same chain in a loop that breaks a rule, three steps")
    for mistake, violations in (
        ("without zero_grad", train_without_zero_grad()),
        ("clipping after the step", train_clipping_too_late()),
    ):
        for violation in violations:
            _say(write, f"{mistake}: {violation}".replace("×", "x"))


def _verdicts(write: Write) -> None:
    write("\n6. Where along the chain the gradient vanishes")
    seen = [watch_chain(depth, clipped=clipped) for depth in DEPTHS for clipped in (False, True)]
    for one in seen:
        how = "clipped" if one.clipped else "not clipped"
        _say(write, f"{one.depth:2} layers, {how:11} {one.slope:+.4f} decades per layer: {one.diagnosis.condition}")
    _say(write, f"At {seen[-1].depth} layers, clipped: {seen[-1].diagnosis.message}")


def _table(write: Write, title: str, rows: Sequence[Row], remark: str) -> float:
    """Prints a table and what is to be said about it; returns the largest relative difference."""
    write(f"\n{title}")
    write(f"   {'':36} {'article':>15} {'ours':>15} {'difference':>11}")
    for row in rows:
        write(f"   {row.what:36} {row.article:15.9g} {row.ours:15.9g} {row.difference:11.1e}")
    _say(write, remark)
    return max(row.difference for row in rows)


def _say(write: Write, text: str) -> None:
    for line in textwrap.wrap(text, 100, break_on_hyphens=False):
        write(f"   {line}")


def _row(what: str, article: float, ours: float | None) -> Row:
    assert ours is not None
    return Row(what, article, ours, abs(ours - article) / abs(article))


def _rows(what: str, article: Sequence[float], ours: Sequence[float]) -> list[Row]:
    numbered = enumerate(zip(article, ours, strict=True), start=1)
    return [_row(f"{what} {number}", there, here) for number, (there, here) in numbered]


def _chain_and_optimizer(depth: int) -> tuple[SigmoidChain, torch.optim.Optimizer]:
    chain = SigmoidChain(depth=depth)
    return chain, torch.optim.SGD(chain.parameters(), lr=LEARNING_RATE)


def _monitor(chain: SigmoidChain, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Monitor:
    return Monitor(
        chain,
        optimizer,
        clip=None if max_norm is None else ClipByNorm(max_norm),
        on_violation="record",
        on_diagnosis="record",
        sinks=[],
        thresholds=Thresholds(confirm=1),  # the article takes one step
    )


def _backward(chain: SigmoidChain) -> None:
    loss = functional.mse_loss(chain(torch.tensor([INPUT])), torch.tensor([TARGET]))
    loss.backward()  # type: ignore[no-untyped-call]


def _gradients(chain: SigmoidChain) -> list[float]:
    return [weight.grad.item() for weight in chain.parameters() if weight.grad is not None]
