"""The other tables: one clip call, one layer's hooks, and the memory that a Monitor holds."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from benchmark.timing import Block, Clock, difference, interleave, ratio, repetitions
from benchmark.variants import SETTLED, Stage, Step, plain, watched
from benchmark.workloads import Training, Workload
from diagnostics.clipping import clip_grad_norm_

MOST_BYTES = 2e9
SHRINK = 1 - 1e-4
"""So far below the norm that the last call left is the limit of the next; thousands of calls stay far from zero."""

Clip = Callable[[list[nn.Parameter], float], Tensor]


@dataclass(frozen=True)
class ClipRow:
    """One size of model.

    Attributes:
        microseconds: One call of torch's; None where the gradients would not fit into memory.
        never: Cost of one call of ours that does not clip, in units of torch's; ``never_low`` and ``never_high`` end
            its interval.
        always: The same where both clip.
    """

    tensors: int
    elements: int
    microseconds: float | None = None
    never: float | None = None
    never_low: float | None = None
    never_high: float | None = None
    always: float | None = None
    always_low: float | None = None
    always_high: float | None = None
    skipped: str = ""


def clip_calls(
    tensors: Sequence[int], elements: Sequence[int], *, rounds: int, seconds: float, clock: Clock
) -> Iterator[ClipRow]:
    """What one call of our ``clip_grad_norm_`` costs against torch's, by number and size of the gradients."""
    for number in tensors:
        for numel in elements:
            need = 4.0 * number * numel
            if need > MOST_BYTES:
                yield ClipRow(number, numel, skipped=f"{need / 1e9:.1f} GB of gradients")
                continue
            torch.manual_seed(0)
            # Weights that are all one number: only gradients take memory.
            parameters = [nn.Parameter(torch.empty(1).expand(numel)) for _ in range(number)]
            for parameter in parameters:
                parameter.grad = torch.randn(numel)
            times = interleave(_clip_blocks(parameters, seconds, clock), rounds, clock)
            yield ClipRow(
                number,
                numel,
                1e6 * sorted(times["torch never"])[rounds // 2],
                *ratio(times["ours never"], times["torch never"]),
                *ratio(times["ours always"], times["torch always"]),
            )


def _clip_blocks(parameters: list[nn.Parameter], seconds: float, clock: Clock) -> dict[str, Block]:
    def norm() -> float:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()

    times = repetitions(lambda: torch.nn.utils.clip_grad_norm_(parameters, 2 * norm()), seconds, clock)

    def never(clip: Clip) -> int:
        limit = 2 * norms[0]
        for _ in range(times):
            clip(parameters, limit)
        return times

    def always(clip: Clip) -> int:
        limit = norms[0]
        for _ in range(times):
            limit *= SHRINK  # each call finds what the one before has left
            clip(parameters, limit)
        norms[0] = limit
        return times

    norms = [norm()]
    ours, theirs = clip_grad_norm_, torch.nn.utils.clip_grad_norm_
    return {
        "torch never": lambda: never(theirs),
        "ours never": lambda: never(ours),
        "torch always": lambda: always(theirs),
        "ours always": lambda: always(ours),
    }


@dataclass(frozen=True)
class HookRow:
    """One kind of hook: what it adds to a training step for each layer, with the ends of its interval."""

    hook: str
    microseconds: float
    low: float
    high: float


def hooks(work: Workload, *, rounds: int, seconds: float, clock: Clock) -> list[HookRow]:
    """What hooks on outputs cost for each layer: empty ones, and a Monitor's beyond one without output gradients."""
    with Stage(Path()) as stage, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # at the first layer, whose input has none
        blocks = {}
        for name, (start, register) in HOOKS.items():
            training = Training(work, "never")
            modules = [one for one in training.model.modules() if any(True for _ in one.parameters(recurse=False))]
            for module in modules:
                register(module)
            blocks[name] = _block(start(training, stage), seconds, clock)
        times = interleave(blocks, rounds, clock)
    layers = len(modules)
    return [
        HookRow(name, *(1e6 * value / layers for value in difference(times[name], times[beyond])))
        for name, beyond in BEYOND.items()
    ]


def _block(step: Step, seconds: float, clock: Clock) -> Block:
    """As many steps as take so many seconds, after the warm-up."""
    numbers = count()
    for number in islice(numbers, SETTLED):
        step(number)
    times = repetitions(lambda: step(next(numbers)), seconds, clock, multiple=5)

    def block() -> int:
        for number in islice(numbers, times):
            step(number)
        return times

    return block


def _nothing(*_: object) -> None:
    """An empty hook."""


def _empty(_module: nn.Module) -> None:
    """Registers no hook."""


def _forward(module: nn.Module) -> None:
    module.register_forward_hook(_nothing)


def _output(module: nn.Module) -> None:
    def after_call(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(_nothing)  # type: ignore[no-untyped-call]

    module.register_forward_hook(after_call)


def _full_backward(module: nn.Module) -> None:
    module.register_full_backward_hook(_nothing)


NEVER_AGAIN = 10**9
"""As ``every``: only the first fifty steps are recorded."""

HOOKS: dict[str, tuple[Callable[[Training, Stage], Step], Callable[[nn.Module], None]]] = {
    "no hook": (plain, _empty),
    "empty forward hook": (plain, _forward),
    "empty hook on the output, from a forward hook": (plain, _output),
    "empty full backward hook": (plain, _full_backward),
    "Monitor(every=0)": (watched(0), _empty),
    "Monitor() between recorded steps": (watched(NEVER_AGAIN), _empty),
    "Monitor() at a recorded step": (watched(1), _empty),
}
BEYOND = {name: "Monitor(every=0)" if name.startswith("Monitor()") else "no hook" for name in [*HOOKS][1:]}
"""What each kind of hook is compared with."""


@dataclass(frozen=True)
class MemoryRow:
    """What a Monitor holds after so many steps, in bytes: tensors that are not the loop's, and Python objects.

    Attributes:
        model: Bytes of weights, gradients and optimizer state, for comparison.
    """

    workload: str
    steps: int
    tensors: int
    python: int
    model: int


def memory(work: Workload, steps: Iterable[int]) -> Iterator[MemoryRow]:
    """What a Monitor with its defaults holds beyond the loop itself, after each number of steps."""
    training = Training(work, "never")
    stock = plain(training, Stage(Path()))
    for number in range(2):
        stock(number)
    gc.collect()
    before = _storages()
    tracemalloc.start()
    try:
        with Stage(Path()) as stage:
            step = watched(10)(training, stage)
            done = 0
            for wanted in sorted(steps):
                for number in range(done, wanted):
                    step(number)
                done = wanted
                training.optimizer.zero_grad()
                gc.collect()
                held = sum(size for place, size in _storages().items() if place not in before)
                python = tracemalloc.get_traced_memory()[0]
                yield MemoryRow(work.name, done, held, python, sum(before.values()))
    finally:
        tracemalloc.stop()


def _storages() -> dict[int, int]:
    """Address and bytes of everything that a tensor holds."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]  # isinstance wakes lazy modules up
    storages = [one.untyped_storage() for one in tensors if not isinstance(one, FakeTensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
