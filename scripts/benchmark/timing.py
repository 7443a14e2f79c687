"""How things are timed: blocks in random order within rounds, ratios within a round, a bootstrap interval."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import NamedTuple

RESAMPLES = 2000

Clock = Callable[[], float]
Block = Callable[[], int]
"""Does its work some times, and says how many."""


class Estimate(NamedTuple):
    """A median over rounds and the ends of its 95 % interval."""

    median: float
    low: float
    high: float


def interleave(blocks: Mapping[str, Block], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Runs every block once per round, in an order drawn anew for each.

    A full garbage collection takes longer than some blocks and comes once in several of them, so a median would miss
    it. The collector's time is therefore measured by itself, and what it took in all blocks of a name is spread evenly
    over them.

    Returns:
        Seconds per repetition, by block and round.
    """
    order = random.Random(0)  # noqa: S311 -- an order, no secret
    times: dict[str, list[float]] = {name: [] for name in blocks}
    collecting: dict[str, list[float]] = {name: [] for name in blocks}
    gc.collect()
    for _ in range(rounds):
        for name in order.sample(list(blocks), len(blocks)):
            with _collector(clock) as collector:
                begin = clock()
                repetitions = blocks[name]()
                taken = clock() - begin
            times[name].append((taken - sum(collector)) / repetitions)
            collecting[name].append(sum(collector) / repetitions)
    return {name: [one + fmean(collecting[name]) for one in times[name]] for name in blocks}


@contextmanager
def _collector(clock: Clock) -> Iterator[list[float]]:
    """The seconds that each garbage collection inside the block takes."""
    taken: list[float] = []
    begin = 0.0

    def note(phase: str, _: object) -> None:
        nonlocal begin
        if phase == "start":
            begin = clock()
        else:
            taken.append(clock() - begin)

    gc.callbacks.append(note)
    try:
        yield taken
    finally:
        gc.callbacks.remove(note)


def ratio(times: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The median of the ratios within each round, and its interval.

    Example:
        >>> ratio([2.0, 3.0, 4.0], [1.0, 1.5, 2.0])
        Estimate(median=2.0, low=2.0, high=2.0)
    """
    return estimate([one / other for one, other in zip(times, baseline, strict=True)])


def difference(times: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The median of the differences within each round, and its interval."""
    return estimate([one - other for one, other in zip(times, baseline, strict=True)])


def estimate(values: Sequence[float]) -> Estimate:
    """The median of some values, and what it is in 95 % of the samples drawn from them with replacement."""
    draw = random.Random(0)  # noqa: S311 -- a resample, no secret
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Estimate(median(values), medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1])


def repetitions(work: Callable[[], object], seconds: float, clock: Clock, multiple: int = 1) -> int:
    """How often work has to be done to take so many seconds, as a multiple; does it that often once to find out."""
    begin = clock()
    for _ in range(multiple):
        work()
    taken = max(clock() - begin, 1e-9)
    return multiple * max(1, -int(-seconds // taken))
