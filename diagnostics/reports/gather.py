"""Many run logs → one table in the terminal, the sickest run first, and each run's page beside its log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diagnostics.records import SEVERITY_NAMES
from diagnostics.reports.page import PAGE, write_page
from diagnostics.reports.stopping import tell_stopping
from diagnostics.reports.view import number
from diagnostics.runlog import FILE_NAME, Run, read_run

HEADINGS = ("run", "overrides that differ", "verdict", "slope", "clipped", "violations", "loss", "status")
WORDS = 3  # the first columns are words, the others numbers, but for the last


@dataclass(frozen=True, slots=True)
class Summary:
    """One run as a row of the table.

    Attributes:
        path: The run log.
        name: For people.
        overrides: All of its Hydra overrides.
        condition: The verdict's, or so far if the run has no end.
        severity: Likewise.
        slope: The last backward slope, in decades per layer; None if no step had one.
        clipped: Share of the steps whose gradients were clipped; None without a step.
        violations: Rules of the loop that were broken.
        loss: Of the last step.
        status: ``finished``, ``stopped``, ``failed``, ``interrupted``, or ``no end``.
    """

    path: Path
    name: str
    overrides: tuple[str, ...]
    condition: str
    severity: int
    slope: float | None
    clipped: float | None
    violations: int
    loss: float | None
    status: str


def find_logs(places: Iterable[str | Path]) -> list[Path]:
    """The run logs at or below the places, each once.

    Raises:
        FileNotFoundError: A place does not exist, or no run log lies there.

    Example:
        >>> find_logs(["nowhere"])
        Traceback (most recent call last):
        FileNotFoundError: There is no nowhere; give the folder of a run, of a sweep, or of several.
    """
    found: dict[Path, Path] = {}
    folders = list(map(Path, places))
    for place in folders:
        if not place.exists():
            raise FileNotFoundError(f"There is no {place}; give the folder of a run, of a sweep, or of several.")
        logs = [place] if place.is_file() else sorted(place.rglob(FILE_NAME))
        found |= {log.resolve(): log for log in logs if log.resolve() not in found}
    if not found:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"There is no run log ({FILE_NAME}) in {where}; sink=[runlog] makes a run write one.")
    return list(found.values())


def summarize(run: Run) -> Summary:
    """A run in one row.

    Example:
        >>> summarize(Run(None, (), (), None, Path("mlp/run.jsonl"))).status
        'no end'
    """
    verdict = run.judge()
    return Summary(
        path=run.path,
        name=run.info.name if run.info else run.path.parent.name,
        overrides=run.info.overrides if run.info else (),
        condition=verdict.condition,
        severity=verdict.severity,
        slope=next((one.fit.slope for one in reversed(run.records) if one.fit), None),
        clipped=sum(one.clip.applied for one in run.records) / len(run.records) if run.records else None,
        violations=len(run.violations),
        loss=next((one.loss for one in reversed(run.records) if one.loss is not None), None),
        status=run.end.status if run.end else "no end",
    )


def by_health(rows: Iterable[Summary]) -> list[Summary]:
    """The sickest first: by severity, then by broken rules; after that runs that did not finish, then by name.

    Example:
        >>> by_health([])
        []
    """
    return sorted(rows, key=lambda row: (-row.severity, -row.violations, row.status == "finished", row.name))


def table(rows: Sequence[Summary], width: int | None = None) -> str:
    """The rows as text; a column in which no row says anything of its own is left out.

    Args:
        rows: In the order of the table.
        width: Columns of the terminal, to which the words are cut; None cuts nothing.

    Returns:
        Lines under a line of headings.
    """
    common = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    cells = [HEADINGS, *(_cells(row, common) for row in rows)]
    if all(line[1] in ("", line[0]) for line in cells[1:]):
        cells = [(line[0], *line[2:]) for line in cells]
    words = len(cells[0]) - len(HEADINGS) + WORDS
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        spare = width - sum(widths[words - 1 :]) - 2 * (len(widths) - 1)
        widths[: words - 1] = _share_out(widths[: words - 1], max(spare, 0))
    return "\n".join(_line(line, widths, words) for line in cells)


def _cells(row: Summary, common: set[str]) -> tuple[str, ...]:
    return (
        _clean(row.name),
        _clean(" ".join(one for one in row.overrides if one not in common)),
        f"{row.condition} ({SEVERITY_NAMES[row.severity]})" if row.severity else row.condition,
        "–" if row.slope is None else f"{row.slope:+.2f}",
        "–" if row.clipped is None else f"{row.clipped:.0%}",
        str(row.violations),
        number(row.loss),
        row.status,
    )


def _share_out(widths: Sequence[int], spare: int) -> list[int]:
    """Columns that together are not wider than what there is, but wide enough to tell one run from another."""
    fair = max(spare // len(widths), 12)
    return [min(width, max(fair, spare - sum(widths) + width)) for width in widths]


def _line(cells: Sequence[str], widths: Sequence[int], words: int) -> str:
    padded = [
        f"{_cut(cell, width):{'<' if place < words or place == len(cells) - 1 else '>'}{width}}"
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _clean(text: str) -> str:
    """Names and overrides come from other people: nothing in them may move the cursor."""
    return "".join(one if one.isprintable() else " " for one in text)


def report(places: Iterable[str | Path], width: int | None = None) -> Iterator[str]:
    """What is to be said about all runs at or below the places; makes the pages that are missing or out of date.

    Args:
        places: Run logs, folders of runs, of sweeps, or folders of those.
        width: Columns of the terminal; None for as many as there need to be.

    Yields:
        The table, then lines about runs that were stopped, pages, and logs that cannot be read.

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
        ...     print(next(report([folder])))
        run  verdict  slope  clipped  violations  loss  status
        mlp  unknown      –        –           0     –  no end
    """
    rows: list[Summary] = []
    troubles: list[str] = []
    pages: dict[Path, str] = {}
    runs: list[Run] = []
    for log in find_logs(places):
        try:
            run = read_run(log)
        except (OSError, ValueError) as error:
            troubles.append(str(error))
            continue
        runs.append(run)
        rows.append(summarize(run))
        pages[log] = _page(run)
    rows = by_health(rows)
    if rows:
        yield table(rows, width)
        yield ""
        yield from tell_stopping(runs)
        yield from dict.fromkeys(pages[row.path] for row in rows)
    yield from troubles


def _page(run: Run) -> str:
    """Makes the page unless it is newer than the log; a page that cannot be made must not hide the table."""
    page = run.path.with_name(PAGE)
    try:
        if not page.exists() or page.stat().st_mtime < run.path.stat().st_mtime:
            write_page(run)
    except ModuleNotFoundError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the other runs are more important
        return f"{page} could not be written ({type(error).__name__}: {error})."
    return str(page)
