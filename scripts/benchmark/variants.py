"""The loops that are compared: the stock loop, ours at every level, and what other tools do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from benchmark.workloads import Training
from diagnostics.clipping import ClipByNorm, clip_grad_norm_
from diagnostics.monitor import Monitor
from diagnostics.sinks import Sink
from diagnostics.sinks.runlog import RunLogSink
from diagnostics.sinks.wandb import WandbSink, open_run

Step = Callable[[int], object]
"""Takes one training step, given its number."""

SETTLED = 60
"""A Monitor records the first fifty steps; only then has its schedule settled."""


class Stage:
    """What variants need around them, and closes when the comparison is over.

    One W&B run serves all of them: wandb.watch logs to the one active run, whichever that is.

    Args:
        folder: For run logs and the W&B run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.monitors: dict[int, Monitor] = {}
        self._numbers: Iterator[int] = count()

    @cached_property
    def wandb_run(self) -> Any:
        """An offline run."""
        return self.stack.enter_context(open_run(project="bench", directory=self.folder, mode="offline"))

    def run_log(self) -> RunLogSink:
        """A run log of its own."""
        return RunLogSink(self.folder / f"run_{next(self._numbers)}")

    def __enter__(self) -> Stage:  # noqa: PYI034 -- typing.Self came with Python 3.11
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


@dataclass(frozen=True)
class Variant:
    """One loop.

    Attributes:
        about: What it is, in the table.
        start: Takes a training and returns its step.
        period: Number of steps after which its work repeats; blocks are multiples of it.
        warm_up: Number of steps before the clock runs.
    """

    about: str
    start: Callable[[Training, Stage], Step]
    period: int = 1
    warm_up: int = 10


def plain(training: Training, _stage: Stage) -> Step:
    """The fastest loop that PyTorch offers."""

    def step(number: int) -> None:
        training.backward(number)
        torch.nn.utils.clip_grad_norm_(training.parameters, training.max_norm)
        training.optimizer.step()

    return step


def drop_in(training: Training, _stage: Stage) -> Step:
    """Our function in place of torch's, and no Monitor."""

    def step(number: int) -> None:
        training.backward(number)
        clip_grad_norm_(training.parameters, training.max_norm)
        training.optimizer.step()

    return step


def _note(reached: list[int], index: int, _parameter: Tensor) -> None:
    reached.append(index)


def bare(every: int) -> Callable[[Training, Stage], Step]:
    """What cannot be saved: the norms and the hooks of a Monitor with nothing behind them, and our own clip.

    A hook per parameter notes that it was reached; at each of so many steps one per layer takes the norm of its
    output's gradient. No contract, no statistics, no records.
    """

    def start(training: Training, _stage: Stage) -> Step:
        reached: list[int] = []
        norms: list[Tensor] = []
        for index, parameter in enumerate(training.parameters):
            note = partial(_note, reached, index)
            parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        modules = training.model.modules()
        layers = [module for module in modules if next(module.parameters(recurse=False), None) is not None]

        def take(gradient: Tensor) -> None:
            norms.append(torch.linalg.vector_norm(gradient))

        def listen(_module: Module, _given: object, output: Tensor) -> None:
            output.register_hook(take)  # type: ignore[no-untyped-call]

        def step(number: int) -> None:
            handles = [layer.register_forward_hook(listen) for layer in layers] if number % every == 0 else []
            training.backward(number)
            clip_grad_norm_(training.parameters, training.max_norm)
            training.optimizer.step()
            reached.clear()
            if handles:
                torch.stack(norms).tolist()
                norms.clear()
            for handle in handles:
                handle.remove()

        return step

    return start


def off(training: Training, stage: Stage) -> Step:
    """The stock loop after a Monitor was made and closed: what is left of it should cost nothing."""
    Monitor(training.model, training.optimizer, sinks=[]).close()
    return plain(training, stage)


def watched(
    every: int, sinks: Callable[[Stage], list[Sink]] = lambda _stage: [], **options: Any
) -> Callable[[Training, Stage], Step]:
    """A Monitor with its defaults, but for ``every``, the sinks and what is said. A broken rule ends the bench."""
    reaction = "record" if options.get("asynchronous") else "raise"

    def start(training: Training, stage: Stage) -> Step:
        monitor = Monitor(
            training.model,
            training.optimizer,
            clip=ClipByNorm(training.max_norm),
            accumulate=training.micro_batches,
            on_violation=reaction,
            on_diagnosis=reaction,
            every=every,
            sinks=sinks(stage),
            **options,
        )
        stage.monitors[id(training)] = stage.stack.enter_context(monitor)

        def step(number: int) -> None:
            monitor.clip_and_step(loss=training.backward(number))

        return step

    return start


def wandb_watch(log_freq: int) -> Callable[[Training, Stage], Step]:
    """The stock loop under wandb.watch, which needs a ``run.log`` at each step to write what its hooks left."""

    def start(training: Training, stage: Stage) -> Step:
        stage.wandb_run.watch(training.model, log="gradients", log_freq=log_freq)

        def step(number: int) -> None:
            loss = training.backward(number)
            torch.nn.utils.clip_grad_norm_(training.parameters, training.max_norm)
            training.optimizer.step()
            stage.wandb_run.log({"train/loss": loss.item()})

        return step

    return start


def lightning_grad_norm(training: Training, _stage: Stage) -> Step:
    """One norm and one host read per parameter at each step, and the norm of the norms, before clipping."""
    named = dict(training.model.named_parameters())

    def step(number: int) -> None:
        training.backward(number)
        norms = {name: p.grad.norm(2.0).item() for name, p in named.items() if p.grad is not None}
        norms["total"] = torch.tensor(list(norms.values())).norm(2.0).item()
        torch.nn.utils.clip_grad_norm_(training.parameters, training.max_norm)
        training.optimizer.step()

    return step


def composer_optimizer_monitor(training: Training, _stage: Stage) -> Step:
    """At each tenth step the norms of every parameter, gradient, first moment and update, one host read each."""
    group = training.optimizer.param_groups[0]

    def update(state: Mapping[str, Tensor]) -> Tensor:
        first, second = group["betas"]
        steps = state["step"].item()
        denominator: Tensor = (state["exp_avg_sq"] / (1 - second**steps)).sqrt() + group["eps"]
        direction: Tensor = state["exp_avg"] / (1 - first**steps) / denominator
        return direction.mul(group["lr"])

    def step(number: int) -> None:
        training.backward(number)
        torch.nn.utils.clip_grad_norm_(training.parameters, training.max_norm)
        training.optimizer.step()
        if number % 10 == 0:
            with torch.no_grad():
                for parameter in training.parameters:
                    state = training.optimizer.state[parameter]
                    for tensor in (parameter, parameter.grad, state["exp_avg"], update(state)):
                        torch.linalg.vector_norm(tensor).item()

    return step


VARIANTS: Mapping[str, Variant] = {
    "plain": Variant("the fastest stock loop, with torch's clip_grad_norm_", plain),
    "twin": Variant("the same once more: the noise", plain),
    "off": Variant("the same after a Monitor was closed", off),
    "drop_in": Variant("our clip_grad_norm_, no Monitor", drop_in),
    "bare": Variant("the hooks of a Monitor alone, and our clip", bare(10), period=10),
    "bare_dense": Variant("the same with output gradients at each step", bare(1)),
    "every_0": Variant("Monitor(every=0): norms, clip, contract", watched(0)),
    "default": Variant("Monitor()", watched(10), period=10, warm_up=SETTLED),
    "dense": Variant("Monitor(every=1): output gradients at each step", watched(1)),
    "fold": Variant(
        "Monitor(fold=True): the fused step multiplies", watched(10, fold=True), period=10, warm_up=SETTLED
    ),
    "asynchronous": Variant("Monitor(asynchronous=True)", watched(10, asynchronous=True), period=10, warm_up=SETTLED),
    "run_log": Variant(
        "Monitor() with a run log", watched(10, lambda stage: [stage.run_log()]), period=10, warm_up=SETTLED
    ),
    "run_log_wandb": Variant(
        "Monitor() with a run log and W&B offline",
        watched(10, lambda stage: [stage.run_log(), WandbSink(stage.wandb_run, own=True)]),
        period=100,  # one recorded step in ten carries a profile
        warm_up=SETTLED,
    ),
    "watch_1": Variant("wandb.watch(log_freq=1)", wandb_watch(1)),
    "watch_10": Variant("wandb.watch(log_freq=10)", wandb_watch(10), period=10),
    "watch_100": Variant("wandb.watch(log_freq=100)", wandb_watch(100), period=100),
    "lightning": Variant("what Lightning's grad_norm computes", lightning_grad_norm),
    "composer": Variant("what Composer's OptimizerMonitor computes", composer_optimizer_monitor, period=10),
}
