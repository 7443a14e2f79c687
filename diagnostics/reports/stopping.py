"""What stopping sick runs early saved, and whether it cost a good one. From run logs; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from diagnostics.records import WARNING
from diagnostics.runlog import Run

GOOD = 0.9
"""A good outcome: this share of the best accuracy of a healthy run with the same task, optimizer and steps."""
ACCURACY = "eval/accuracy"


def tell_stopping(runs: Sequence[Run]) -> Iterator[str]:
    """Sentences about the runs that ``diagnostics.on_diagnosis=stop`` stopped; none where no run could be stopped.

    What a stopped run would have become is only known from a twin: a run of the same configuration, seed included, that
    was not stopped. Without twins that is what is said.

    Args:
        runs: All runs of a sweep, or of several.

    Example:
        >>> list(tell_stopping([]))
        []
    """
    stopping = [run for run in runs if _section(run, "diagnostics").get("on_diagnosis") == "stop" and run.end]
    if not stopping:
        return
    stopped = [run for run in stopping if run.end and run.end.status == "stopped"]
    planned = sum(_planned(run) for run in stopping)
    saved = sum(_planned(run) - run.end.steps for run in stopped if run.end)
    yield f"Stopped when sick: {len(stopped)} of {len(stopping)} runs, which saved {saved:,} of {planned:,} steps."
    if stopped:
        yield _outcomes(stopped, runs)


def _outcomes(stopped: Sequence[Run], runs: Sequence[Run]) -> str:
    twins = {_identity(run): run for run in runs if run not in stopped and run.end and run.end.status == "finished"}
    pairs = [(run, twins[_identity(run)]) for run in stopped if _identity(run) in twins]
    if len(pairs) < len(stopped):
        return (
            f"What {len(stopped) - len(pairs)} of them would have become is not known: run the same with "
            "diagnostics.on_diagnosis=record, and report on both."
        )
    best = [_best(twin, runs) for _, twin in pairs]
    if not all(best):
        return "Nothing tells what a good outcome is: no healthy run has the same task, optimizer and number of steps."
    reached = [(_accuracy(twin) / most, run) for (run, twin), most in zip(pairs, best, strict=True)]
    lost = [f"{_name(run)} ({share:.0%})" for share, run in reached if share >= GOOD]
    if lost:
        return f"{len(lost)} of them would have had a good outcome: {', '.join(lost)} of the best accuracy."
    most = max(share for share, _ in reached)
    return (
        f"None of them would have had a good outcome: their twins that went on reached at most {most:.0%} of the best "
        f"accuracy with the same optimizer, where {GOOD:.0%} is good."
    )


def _section(run: Run, name: str) -> dict[str, Any]:
    section = run.info.config.get(name) if run.info else None
    return dict(section) if isinstance(section, dict) else {}


def _planned(run: Run) -> int:
    return int(_section(run, "trainer").get("steps", 0))


def _identity(run: Run) -> str:
    """All that makes a run what it is, but how it reacts and where it is written."""
    config = dict(run.info.config) if run.info else {}
    trainer = {key: value for key, value in _section(run, "trainer").items() if key != "patience"}
    diagnostics = {key: value for key, value in _section(run, "diagnostics").items() if key != "on_diagnosis"}
    return json.dumps({**config, "sink": None, "trainer": trainer, "diagnostics": diagnostics}, sort_keys=True)


def _accuracy(run: Run) -> float:
    return next((one.metrics[ACCURACY] for one in reversed(run.records) if ACCURACY in one.metrics), 0.0)


def _best(run: Run, runs: Sequence[Run]) -> float:
    """The best accuracy of a healthy run under the same conditions; 0 if there is none."""

    def peers(one: Run) -> tuple[Any, ...]:
        return _section(one, "task"), _section(one, "optimizer"), _planned(one)

    sound = [one for one in runs if peers(one) == peers(run) and one.end and one.end.verdict.severity < WARNING]
    return max(map(_accuracy, sound), default=0.0)


def _name(run: Run) -> str:
    return run.info.name if run.info else run.path.parent.name
