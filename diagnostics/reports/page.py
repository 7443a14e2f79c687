"""Runs → one HTML file that opens from disk: no network, light and dark, printable; of one run or of five hundred.

The page carries its data as JSON, each kind of figure once as a Vega-Lite specification, and the library that draws
them. A policy in its head allows these very scripts and nothing else, so that no text of a run can ever run. A page of
one run is the same page without the table of runs.
"""

# ruff: noqa: PLC0415 -- figures, numpy and the library are loaded when a page is written

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.reports.drawing import figures_extra, look
from diagnostics.reports.fleet import Fleet, Row, Spread, Summary
from diagnostics.reports.view import badge, describe, drawn, number
from diagnostics.runlog import Run, read_run

if TYPE_CHECKING:
    from diagnostics.reports.comparison import Comparison
    from diagnostics.reports.drawing import Figure

PAGE = "page.html"
HERE = Path(__file__).parent


def write_page(run_log: str | Path | Run, page: str | Path | None = None) -> Path:
    """Writes the page of one run.

    Args:
        run_log: The run log, its folder, or what was read from it; the run may have crashed or be going on.
        page: The file to write, replaced if it is there; ``page.html`` beside the run log if None.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no run log.
        ModuleNotFoundError: vl-convert or numpy is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diagnostics import RunInfo
        >>> from diagnostics.runlog import RunLogWriter
        >>> with TemporaryDirectory() as folder:
        ...     writer = RunLogWriter(folder)
        ...     writer.write(RunInfo(name="mlp"))
        ...     writer.close()
        ...     write_page(folder).name
        'page.html'
    """
    run = run_log if isinstance(run_log, Run) else read_run(run_log)
    path = run.path.with_name(PAGE) if page is None else Path(page)
    shown = describe(run)
    title = f"{shown['name']}: {shown['badges'][0][0]}"
    return _write(path, render(title, None, [shown]))


def write_fleet(
    page: str | Path, fleet: Fleet, described: Mapping[Path, Mapping[str, Any]], comparison: Comparison | None = None
) -> Path:
    """Writes one page for many runs.

    Args:
        page: The file to write, replaced if it is there.
        fleet: The rows of its table.
        described: Each run as :func:`diagnostics.reports.view.describe` gives it, by the path of its log. A run that is
            left out has a row and cannot be opened.
        comparison: Of the folders that the runs come from.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: vl-convert or numpy is not installed.
    """
    numbers = {path: place for place, path in enumerate(described)}
    shown = _fleet(Path(page), fleet, described, numbers, comparison)
    return _write(Path(page), render(shown["headline"], shown, described.values()))


def render(title: str, fleet: Mapping[str, Any] | None, runs: Iterable[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        title: Of the window.
        fleet: What the table of runs is made from; None for the page of one run.
        runs: As :func:`diagnostics.reports.view.describe` gives them.
    """
    with figures_extra():
        from diagnostics.reports.specifications import BY_NAME

        library = _library()
    script = (HERE / "page.js").read_text(encoding="utf-8")
    tables = {"fleet": fleet, "specifications": BY_NAME, "look": look()}
    tables |= {f"run-{number}": run for number, run in enumerate(runs)}
    parts = {
        "title": html.escape(title),
        "hashes": " ".join(map(_hash, (library, script))),
        "style": (HERE / "page.css").read_text(encoding="utf-8").strip(),
        "data": "\n".join(
            f'<script type="application/json" id="{name}">{_json(one)}</script>' for name, one in tables.items()
        ),
        "library": library,
        "script": script,
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


@cache
def _library() -> str:
    """Vega, Vega-Lite and what embeds them, which leave nothing but a name behind."""
    import vl_convert

    text = re.sub(
        "</(script)", r"<\\/\1", vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), flags=re.IGNORECASE
    )
    return f"(() => {{{text}\n}})();"


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _fleet(
    page: Path,
    fleet: Fleet,
    described: Mapping[Path, Mapping[str, Any]],
    numbers: Mapping[Path, int],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """What the page shows of all runs together."""
    runs, sick = len(fleet.runs), fleet.sick
    worst = fleet.rows[0] if fleet.rows else None
    return {
        "name": page.parent.resolve().name,
        "headline": f"{sick} of {runs} runs {'is' if sick == 1 else 'are'} sick" if runs else "No run",
        "tone": _badge(worst.members[0])[1] if worst else "unknown",
        "common": list(fleet.common),
        "rows": [_row(str(place), row, described, numbers) for place, row in enumerate(fleet.rows)],
        "separations": [
            {
                "key": one.key,
                "right": f"{one.right:g}",
                "runs": one.runs,
                "baseline": f"{one.baseline:g}",
                "groups": [{"value": group.value, "runs": group.runs, "sick": group.sick} for group in one.groups],
            }
            for one in fleet.separations
        ],
        "troubles": list(fleet.troubles),
        "comparison": [drawn(one) for one in _compared(comparison)] or None,
        "sentence": comparison.sentence if comparison else "",
    }


def _row(
    place: str, row: Row, described: Mapping[Path, Mapping[str, Any]], numbers: Mapping[Path, int]
) -> dict[str, Any]:
    """A line of the table; its runs are lines of their own where there are several."""
    from diagnostics.reports.overlays import band

    first = row.members[0]
    profiles = [described[path]["profile"] for path in row.logs if path in described]
    many = len(row.members) > 1
    members = [Row(_own(one, row), (one,)) for one in row.members] if many else []
    mark = _badge(first)
    words = [row.label, *row.overrides, mark[0], row.status, *row.violations, *(one.name for one in row.members)]
    return {
        "id": place,
        "label": row.label,
        "overrides": list(row.overrides),
        "badge": list(mark),
        "severity": row.severity,
        "violations": list(row.violations),
        "runs": len(row.members),
        "sick": row.sick,
        "slope": _spread(row.slope, "{:+.2f}"),
        "clipped": _spread(row.clip_fraction, "{:.0%}"),
        "loss": _spread(row.loss, ""),
        "status": row.status,
        "run": None if many else numbers.get(first.path),
        "members": [_row(f"{place}.{at}", one, described, numbers) for at, one in enumerate(members)],
        "band": band(profiles) or None,
        "depths": max(map(len, profiles), default=0),
        "words": " ".join(words).lower(),
    }


def _own(member: Summary, row: Row) -> tuple[str, ...]:
    """What tells a run from the others of its row."""
    shared = set.intersection(*(set(one.overrides) for one in row.members))
    return tuple(one for one in member.overrides if one not in shared)


def _badge(run: Summary) -> tuple[str, str]:
    return badge(run.condition, run.severity, unlawful=bool(run.violations))


def _spread(one: Spread | None, form: str) -> dict[str, Any] | None:
    """Median and range, each as a number to sort by and as text."""
    if one is None:
        return None
    low, middle, high = (form.format(value) if form else number(value) for value in (one.low, one.median, one.high))
    finite = one.median if abs(one.median) < float("inf") else None
    return {"median": finite, "shown": middle, "range": "" if low == high else f"{low} to {high}"}


def _compared(comparison: Comparison | None) -> tuple[Figure, ...]:
    from diagnostics.reports.overlays import compared

    return compared(comparison) if comparison else ()
