"""What ``diagnostics-report`` does, from the words of a request to the lines that are printed and the files written."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from diagnostics.records import DiagnosticsWarning
from diagnostics.reports.exports import export
from diagnostics.reports.gather import Gathered, gather
from diagnostics.reports.page import PAGE, write_fleet, write_page
from diagnostics.reports.request import USAGE, WANDB, Request, parse, place_in_wandb
from diagnostics.reports.stopping import tell_stopping
from diagnostics.reports.table import clean, in_terminal, tabulate
from diagnostics.runlog import read_run

if TYPE_CHECKING:
    from diagnostics.reports.comparison import Comparison

PAGE_OF_MANY = "report.html"
MOST_SEPARATIONS = 8
FETCHED = Path("wandb-logs")
"""Where run logs from W&B go, below the working directory."""


def make(words: Sequence[str], width: int | None = None) -> int | str:
    """What the command does: prints the report and writes its files.

    What another program reads from stdout is the report alone; where the files lie goes to stderr then.

    Args:
        words: Of the command line.
        width: Columns of the terminal; None for as many as there need to be.

    Returns:
        The exit status: 0, 2 without a word, or a sentence.

    Example:
        >>> make(["nowhere"])
        'There is no nowhere; give the folder of a run, of a sweep, or of several.'
    """
    if not words or {"-h", "--help"} & {*words}:
        _say(USAGE.splitlines(), sys.stdout)
        return 0 if words else 2
    try:
        report = Report(parse(words), width)
        _say(report.printed(), sys.stdout)
        if report.request.format == "text":
            _say(("", *report.written()), sys.stdout)
        else:
            _say(report.written(), sys.stderr)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return str(error)
    return 0


def _say(lines: Iterable[str], stream: TextIO) -> None:
    for line in lines:
        stream.write(f"{line}\n")
        stream.flush()


@dataclass
class Report:
    """One report.

    Args:
        request: What was asked for.
        width: Columns of the terminal; None for as many as there need to be.

    Raises:
        FileNotFoundError: A place does not exist, or there is no run log.
        ValueError: A place in W&B is not named in full.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diagnostics import RunInfo
        >>> from diagnostics.runlog import RunLogWriter
        >>> with TemporaryDirectory() as folder:
        ...     writer = RunLogWriter(folder)
        ...     writer.write(RunInfo(name="mlp"))
        ...     writer.close()
        ...     print(next(Report(Request((folder,), page=False)).printed()))
        run  verdict  slope  clipped  violations  loss  status
        mlp  unknown      –        –           0     –  no end
    """

    request: Request
    width: int | None = None
    _warned: tuple[str, ...] = field(default=(), init=False)

    @cached_property
    def folders(self) -> tuple[Path, ...]:
        """The places on disk; what lies in W&B is fetched first."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", DiagnosticsWarning)
            found = tuple(_fetch(place) if place.startswith(WANDB) else Path(place) for place in self.request.places)
        self._warned = tuple(str(one.message) for one in said)
        return found

    @cached_property
    def gathered(self) -> Gathered:
        """What was found."""
        request = self.request
        return gather(self.folders, page=request.page is not False or request.figures is not None)

    def printed(self) -> Iterator[str]:
        """The report itself, for the terminal or for another program."""
        if self.request.format != "text":
            yield export(self.gathered, self.request.format)
            return
        fleet = self.gathered.fleet
        if fleet.rows:
            yield in_terminal(tabulate(fleet), self.width)
        if fleet.separations:
            yield ""
            yield from (
                "What separates the sick from the sound:",
                *(f"  {clean(str(one))}" for one in fleet.separations[:MOST_SEPARATIONS]),
            )
        if self.gathered.comparison:
            yield ""
            yield from compared(self.gathered.comparison)
        if len(fleet.runs) == 1:
            yield from _what_if(fleet.runs[0].path)
        if any(run.config.get("diagnostics.on_diagnosis") == "stop" for run in fleet.runs):
            yield from tell_stopping([read_run(run.path) for run in fleet.runs])

    def written(self) -> Iterator[str]:
        """Writes the files that were asked for; yields where they lie, and what could not be read or written."""
        fleet, request = self.gathered.fleet, self.request
        if fleet.rows and request.page is not False:
            yield from _or_sentence("The page", self._page)
        if fleet.rows and request.figures is not None:
            yield from _or_sentence("The figures", self._figures)
        if fleet.rows and request.wandb:
            yield from _or_sentence("The W&B Report", self._publish)
        yield from map(clean, (*self._warned, *fleet.troubles))

    def _page(self) -> Iterator[str]:
        gathered, chosen = self.gathered, self.request.page
        runs = gathered.fleet.runs
        own = runs[0].path.with_name(PAGE) if len(runs) == 1 else common_folder(self.folders) / PAGE_OF_MANY
        page = own if isinstance(chosen, bool) else chosen
        page.parent.mkdir(parents=True, exist_ok=True)
        if len(runs) == 1:
            yield str(write_page(runs[0].path, page))
        else:
            yield str(write_fleet(page, gathered.fleet, gathered.described, gathered.comparison))

    def _figures(self) -> Iterator[str]:
        from diagnostics.reports.drawing import write_figures  # noqa: PLC0415 -- only where figures are wanted
        from diagnostics.reports.overlays import of_fleet  # noqa: PLC0415 -- likewise
        from diagnostics.reports.view import figures_of  # noqa: PLC0415 -- likewise

        assert self.request.figures is not None
        runs = self.gathered.fleet.runs
        if len(runs) == 1:
            figures = figures_of(read_run(runs[0].path))
        else:
            figures = of_fleet(self.gathered.fleet, self.gathered.described, self.gathered.comparison)
        written = write_figures(figures, self.request.figures)
        yield f"{len(written)} files of figures: {self.request.figures}"

    def _publish(self) -> Iterator[str]:
        yield from _wandb().publish(self.gathered.fleet, common_folder(self.folders))


def _what_if(log: Path) -> Iterator[str]:
    if find_spec("numpy") is None:
        return
    from diagnostics.reports.history import histories  # noqa: PLC0415 -- numpy
    from diagnostics.reports.whatif import told, what_if  # noqa: PLC0415 -- likewise

    quantities = ("clip.total_norm", "clip.threshold", "weight.norm", "weight.abs_max")
    for history in histories(read_run(log).records, quantities).values():
        yield from ("", *told(what_if(history)))


def compared(comparison: Comparison) -> Iterator[str]:
    """Before and after, by depth, for the terminal.

    Args:
        comparison: Of two places or more.

    Yields:
        A sentence, then a line per place with its profile, and one with the difference to the first.
    """
    yield clean(comparison.sentence)
    for side in comparison.sides:
        yield clean(f"  {side.label}: {', '.join(f'{count} {name}' for name, count in side.conditions.items())}")
    lines = [("median log10 rms at relative depth", *(f"{depth:.1f}" for depth in comparison.depths))]
    for place, side in enumerate(comparison.sides):
        lines.append((clean(side.label), *(_decades(value) for value in side.profile)))
        if place:
            lines.append(("  difference", *(_decades(value, "+.2f") for value in comparison.differences(place))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *values in lines:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])


def _decades(value: float, form: str = ".2f") -> str:
    return "–" if value != value else format(value, form)  # noqa: PLR0124 -- NaN


def common_folder(folders: Sequence[Path]) -> Path:
    """The folder that all of them lie in, which for one is itself.

    Example:
        >>> common_folder([Path("sweep/before"), Path("sweep/after")]).as_posix()
        'sweep'
    """
    known = [folder if folder.is_dir() or not folder.is_file() else folder.parent for folder in folders]
    try:
        return Path(os.path.commonpath(known))
    except ValueError:  # one absolute, one relative; or on several drives
        return Path(os.path.commonpath([folder.resolve().parent for folder in known]))


def _fetch(place: str) -> Path:
    """Fetches the run logs of a group from W&B."""
    folder = FETCHED.joinpath(*place_in_wandb(place))
    _wandb().fetch(place, folder)
    return folder


def _wandb() -> Any:
    """What knows W&B, which takes seconds to import."""
    return import_module("diagnostics.reports.wandb")


def _or_sentence(what: str, write: Callable[[], Iterator[str]]) -> Iterator[str]:
    """What was written, or why not: whatever it is, the other parts of the report are more important."""
    try:
        yield from write()
    except ModuleNotFoundError as error:
        yield str(error)
    except Exception as error:  # noqa: BLE001 -- see above
        yield f"{what} could not be written ({type(error).__name__}: {error})."
