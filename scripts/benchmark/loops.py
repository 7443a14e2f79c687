"""The main table: what a training step costs in each variant, as a ratio to the stock loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark.timing import Clock, interleave, ratio, repetitions
from benchmark.variants import VARIANTS, Stage, Step
from benchmark.workloads import Training, Workload
from diagnostics.records import StepRecord

PERIOD = 10
BASELINE = "plain"


@dataclass(frozen=True)
class LoopRow:
    """One variant.

    Attributes:
        ratio: Cost of a step in units of the stock loop's; ``low`` and ``high`` end its 95 % interval.
        milliseconds: Median cost of a step.
        steps: Steps per block.
        recorded: Share of the timed steps that the Monitor recorded; None without one, as ``clipped``.
        clipped: Share of the timed steps that it clipped.
    """

    variant: str
    about: str
    ratio: float
    low: float
    high: float
    milliseconds: float
    steps: int
    recorded: float | None
    clipped: float | None


def compare(
    work: Workload,
    variants: Sequence[str],
    *,
    clipping: str,
    micro_batches: int,
    rounds: int,
    seconds: float,
    clock: Clock,
) -> list[LoopRow]:
    """Times the variants of one workload, the baseline among them whether asked for or not.

    Args:
        work: What to train.
        variants: Which ones.
        clipping: ``never``, ``always`` or ``tenth``.
        micro_batches: Backward passes per step.
        rounds: Blocks of each.
        seconds: How long a block of the baseline takes at least.
        clock: CPU time or wall time.

    Raises:
        RuntimeError: If a Monitor has not clipped just where the regime says.
    """
    names = list(dict.fromkeys([BASELINE, *variants]))
    with TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        trainings = {name: Training(work, clipping, micro_batches) for name in names}
        counted = {name: _counted(VARIANTS[name].start(trainings[name], stage)) for name in names}
        for name, steps in counted.items():
            _run(steps, VARIANTS[name].warm_up)
        block = repetitions(lambda: next(counted[BASELINE]), seconds, clock, PERIOD)
        sizes = {name: _multiple(block, VARIANTS[name].period) for name in names}
        blocks = {name: (lambda name=name: _run(counted[name], sizes[name])) for name in names}
        times = interleave(blocks, rounds, clock)
        rows = []
        for name in names:
            monitor = stage.monitors.get(id(trainings[name]))
            records = [] if monitor is None else [one for one in monitor.records if one.step >= VARIANTS[name].warm_up]
            _check(name, records[-sizes[name] :], trainings[name].clipped_share)
            rows.append(
                LoopRow(
                    name,
                    VARIANTS[name].about,
                    *ratio(times[name], times[BASELINE]),
                    milliseconds=1e3 * sorted(times[name])[rounds // 2],
                    steps=sizes[name],
                    recorded=_share([one.recorded for one in records]),
                    clipped=_share([one.clip.applied for one in records]),
                )
            )
        return rows


def _counted(step: Step) -> Iterator[None]:
    """A loop that takes a step each time it is asked."""
    for number in count():
        step(number)
        yield


def _run(steps: Iterator[None], times: int) -> int:
    for _ in range(times):
        next(steps)
    return times


def _multiple(least: int, period: int) -> int:
    return -(-least // period) * period


def _share(marks: Sequence[bool]) -> float | None:
    return sum(marks) / len(marks) if marks else None


def _check(name: str, block: Sequence[StepRecord], expected: float) -> None:
    clipped = _share([record.clip.applied for record in block])
    if clipped is not None and abs(clipped - expected) > 1e-9:
        raise RuntimeError(
            f"{name} clipped {clipped:.0%} of its last steps where the regime has {expected:.0%}: the figures would "
            "mean nothing. The norm of the gradient has drifted; run fewer rounds."
        )
