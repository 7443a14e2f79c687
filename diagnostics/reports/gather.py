"""Many run logs → the fleet: found wherever they lie, each looked at once, and none stops the others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.records import StepRecord
from diagnostics.reports.fleet import Fleet, Summary, assemble, flatten
from diagnostics.runlog import FILE_NAME, Run, read_run

if TYPE_CHECKING:
    from diagnostics.reports.comparison import Comparison

MANY = 32
"""From so many logs on, more than one process pays."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a report keeps of a run log.

    Attributes:
        summary: Its row; None if the log cannot be read.
        described: What the page shows of it; None where no page is wanted.
        profile: Its part in a comparison, as ``comparison.relative_profile`` gives it; empty where there is none.
        trouble: Why the log, or its page, is missing.
    """

    summary: Summary | None
    described: Mapping[str, Any] | None = None
    profile: tuple[float, ...] = ()
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that a report is made from.

    Attributes:
        fleet: The rows.
        described: What a page shows, by the path of the run log.
        comparison: Of the places, where there are several.
    """

    fleet: Fleet
    described: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    comparison: Comparison | None = None


def find_logs(places: Iterable[str | Path]) -> dict[Path, Path]:
    """The run logs at or below the places, each once, with the place that it was found at.

    Raises:
        FileNotFoundError: A place does not exist, or no run log lies there.

    Example:
        >>> find_logs(["nowhere"])
        Traceback (most recent call last):
        FileNotFoundError: There is no nowhere; give the folder of a run, of a sweep, or of several.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    folders = list(map(Path, places))
    for place in folders:
        if not place.exists():
            raise FileNotFoundError(f"There is no {place}; give the folder of a run, of a sweep, or of several.")
        for log in [place] if place.is_file() else sorted(place.rglob(FILE_NAME)):
            found.setdefault(log.resolve(), (log, place))
    if not found:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"There is no run log ({FILE_NAME}) in {where}; sink=[runlog] makes a run write one.")
    return dict(found.values())


def summarize(run: Run, place: Path | None = None) -> Summary:
    """A run in one row.

    Args:
        run: As ``read_run`` returns it; it may have crashed or be going on.
        place: Where it was found; its own folder if None.

    Example:
        >>> summarize(Run(None, (), (), None, Path("mlp/run.jsonl"))).status
        'no end'
    """
    verdict, info = run.judge(), run.info
    fit = next((one.fit for one in _newest(run.records) if one.fit), None)
    return Summary(
        path=run.path,
        place=run.path.parent if place is None else place,
        name=info.name if info else run.path.parent.name,
        overrides=info.overrides if info else (),
        config=dict(flatten(info.config)) if info else {},
        seed=info.seed if info else None,
        condition=verdict.condition,
        severity=verdict.severity,
        slope=fit.slope if fit else None,
        decades=fit.decades if fit else None,
        clip_fraction=_clip_fraction(run),
        violations=tuple(one.rule for one in run.violations),
        loss=next((one.loss for one in _newest(run.records) if one.loss is not None), None),
        steps=run.records[-1].step + 1 if run.records else 0,
        status=run.end.status if run.end else "no end",
        error=run.end.error if run.end else None,
    )


def _newest(records: Sequence[StepRecord]) -> Iterator[StepRecord]:
    """From the last on, and no further than a report need look for a number that stands on some steps only."""
    return (records[place] for place in range(len(records) - 1, max(-1, len(records) - 1001), -1))


def _clip_fraction(run: Run) -> float | None:
    """As the run itself counted it, or else from its steps."""
    told = run.end.summary.get("clip_fraction") if run.end else None
    if told is None and run.records and len({record.optimizer for record in run.records[-10:]}) == 1:
        told = run.records[-1].clip.clip_fraction
    if told is not None or not run.records:
        return told
    try:
        from diagnostics.reports.history import histories  # noqa: PLC0415 -- the table is made without numpy, too
    except ModuleNotFoundError:
        return sum(record.clip.applied for record in run.records) / len(run.records)
    return sum(int(one.applied.sum()) for one in histories(run.records, ()).values()) / len(run.records)


def gather(places: Iterable[str | Path], *, page: bool = False) -> Gathered:
    """Looks at every run log at or below the places.

    Args:
        places: Run logs, folders of runs, of sweeps, or folders of those. Several are compared with the first.
        page: Whether what a page of several runs shows is wanted, too; that of one is made from its log.

    Raises:
        FileNotFoundError: A place does not exist, or there is no run log.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diagnostics import RunInfo
        >>> from diagnostics.runlog import RunLogWriter
        >>> with TemporaryDirectory() as folder:
        ...     writer = RunLogWriter(folder)
        ...     writer.write(RunInfo(name="mlp"))
        ...     writer.close()
        ...     gather([folder]).fleet.rows[0].label
        'mlp'
    """
    logs = find_logs(places)
    several = len(set(logs.values())) > 1
    runs = len(logs) if page and len(logs) > 1 else 0
    looks = list(_each(partial(_look, page=runs, profile=several), logs.items()))
    summaries = [look.summary for look in looks if look.summary]
    fleet = assemble(summaries, dict.fromkeys(look.trouble for look in looks if look.trouble))
    described = {look.summary.path: look.described for look in looks if look.summary and look.described}
    return Gathered(fleet, described, _compare(looks) if several else None)


def _each(look: Any, logs: Iterable[tuple[Path, Path]]) -> Iterator[Look]:
    """Looks at all logs, with as many processes as there are processors where there are many."""
    logs, processors = list(logs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if len(logs) < MANY or processors < 2:
        yield from map(look, logs)
        return
    # A new interpreter each: a copy of a process that has threads, as numpy's, may hang.
    context, done = multiprocessing.get_context("spawn"), 0
    with suppress(BrokenProcessPool), ProcessPoolExecutor(min(processors, 8), mp_context=context) as pool:
        for done, one in enumerate(pool.map(look, logs, chunksize=8), start=1):  # noqa: B007 -- what is left to do
            yield one
    yield from map(look, logs[done:])  # a program that was typed into an interpreter cannot be started anew


def _look(found: tuple[Path, Path], page: int, *, profile: bool) -> Look:
    """One run log; one that cannot be read must not hide the others.

    Args:
        found: The log, and the place that it was found at.
        page: Number of runs on the page; 0 for no page.
        profile: Whether it is part of a comparison.
    """
    log, place = found
    try:
        run = read_run(log)
        summary = summarize(run, place)
    except (OSError, ValueError) as error:
        return Look(None, trouble=str(error))
    try:
        return Look(summary, _describe(run, page) if page else None, _profile(run) if profile else ())
    except ModuleNotFoundError as error:
        return Look(summary, trouble=str(error))
    except Exception as error:  # noqa: BLE001 -- whatever it is, the table is more important
        return Look(summary, trouble=f"{log} cannot be drawn ({type(error).__name__}: {error}).")


def _describe(run: Run, runs: int) -> Mapping[str, Any]:
    from diagnostics.reports.view import columns_for, describe  # noqa: PLC0415 -- only where a page is wanted

    return describe(run, columns_for(runs))


def _profile(run: Run) -> tuple[float, ...]:
    from diagnostics.reports.comparison import relative_profile  # noqa: PLC0415 -- numpy
    from diagnostics.reports.history import histories  # noqa: PLC0415 -- likewise

    first = next(iter(histories(run.records, ("trunk_rms",)).values()), None)
    return () if first is None else tuple(map(float, relative_profile(first)))


def _compare(looks: Sequence[Look]) -> Comparison:
    from diagnostics.reports.comparison import compare  # noqa: PLC0415 -- numpy

    known: dict[str, list[Look]] = {}
    for look in looks:
        if look.summary:
            known.setdefault(str(look.summary.place), []).append(look)
    fleets = {place: assemble(look.summary for look in own if look.summary) for place, own in known.items()}
    return compare(fleets, {place: [look.profile for look in own if look.profile] for place, own in known.items()})
