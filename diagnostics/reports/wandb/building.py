"""A fleet as a W&B Report: the table of verdicts, all runs by what they differ in, and a run set for each row.

The run sets filter by ``Config('…') == …``: wandb-workspaces leaves out, without a word, what it cannot parse, and a
filter that is left out selects every run. Characters that its parser would change, even inside of text, are escaped.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from diagnostics.records import RELATIVE_DEPTHS
from diagnostics.reports.fleet import Fleet, Row, Summary
from diagnostics.reports.wandb.markdown import headline, verdicts
from diagnostics.sinks.wandb.place import Place

MOST_RUN_SETS = 20


@dataclass(frozen=True, slots=True)
class RunSet:
    """Runs of one project that a filter selects.

    Attributes:
        name: For people.
        place: Of one of the runs.
        conditions: All of them hold.
    """

    name: str
    place: Place
    conditions: tuple[str, ...]


def build(fleet: Fleet, places: Mapping[Path, Place], entity: str, *, asks: bool) -> Any:
    """The Report, not yet saved.

    Args:
        fleet: The runs.
        places: By the path of the run log, where they are in W&B; one at least.
        entity: Whose the runs are where their place does not tell.
        asks: Whether W&B may be asked for what the run sets refer to.

    Returns:
        A ``wandb_workspaces.reports.v2.Report``.

    Raises:
        ModuleNotFoundError: The extra ``wandb-report`` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations are not the reader's
            wr: Any = import_module("wandb_workspaces.reports.v2")
    except ModuleNotFoundError as error:
        message = f'A W&B Report needs {error.name}; pip install "training-diagnostics[wandb-report]".'
        raise ModuleNotFoundError(message, name=error.name) from error
    first = next(iter(places.values()))
    owner = first.entity or entity
    rows = [one for row in fleet.rows for one in _row(row, places)]
    keys = list(dict.fromkeys(key for row in fleet.rows for key in _configured(row)))
    shown = rows[:MOST_RUN_SETS]
    note = f" The {len(shown)} sickest of {len(rows)} are shown." if len(shown) < len(rows) else ""

    def run_sets(sets: Iterable[RunSet], group_by: Sequence[str] = ()) -> list[Any]:
        return [
            wr.Runset(
                entity=one.place.entity or owner if asks else "",  # with an entity W&B is asked for the project's id
                project=one.place.project,
                name=one.name,
                filters=" and ".join(one.conditions),
                groupby=[f"config.{key}" for key in group_by],
            )
            for one in sets
        ]

    return wr.Report(
        entity=owner,
        project=first.project,
        title=f"Gradients by depth: {first.group or first.name}",
        description=headline(fleet),
        width="fluid",
        blocks=[
            wr.MarkdownBlock(text="\n".join(verdicts(fleet))),
            wr.H2(text="All runs" + (f", grouped by {', '.join(keys)}" if keys else "")),
            wr.PanelGrid(runsets=run_sets(_whole(places.values()), keys), panels=_curves(wr)),
            wr.H2(text="Row by row"),
            wr.MarkdownBlock(text=f"One run set for each row of the table.{note}"),
            wr.PanelGrid(runsets=run_sets(shown), panels=[*_by_depth(wr), *_curves(wr)]),
        ],
    )


def _whole(places: Iterable[Place]) -> list[RunSet]:
    """Every run: a run set for each group, and one for a project's runs that are in none."""
    found: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        found.setdefault((place.project, place.group), []).append(place)
    return [RunSet(one[0].group or one[0].project, one[0], _group(one[0]) or (_among(one),)) for one in found.values()]


def _group(place: Place) -> tuple[str, ...]:
    return (_equals("Metric", "Group", place.group),) if place.group else ()


def _among(places: Iterable[Place]) -> str:
    return f"Metric('ID') in [{', '.join(_literal(place.id) for place in places)}]"


def _row(row: Row, places: Mapping[Path, Place]) -> list[RunSet]:
    """The run sets of a row: its group and what it differs in, or its runs one by one where the config has it not."""
    found: dict[tuple[str, str], list[Summary]] = {}
    for run in row.members:
        if run.path in places:
            found.setdefault((places[run.path].project, places[run.path].group), []).append(run)
    sets = []
    for members in found.values():
        place, keys = places[members[0].path], _configured(row)
        if place.group and len(keys) == len(row.overrides):
            conditions = [_equals("Config", _nested(key), _typed(members[0].config[key])) for key in keys]
        else:
            conditions = [_among(places[run.path] for run in members)]
        sets.append(RunSet(row.label, place, (*_group(place), *conditions)))
    return sets


def _configured(row: Row) -> list[str]:
    """The keys that the row differs in and that stand in the configuration of its runs with a plain value."""
    keys = [override.partition("=")[0] for override in row.overrides]
    return [key for key in keys if all(_is_plain(run.config.get(key)) for run in row.members)]


def _is_plain(text: str | None) -> bool:
    return text is not None and isinstance(_typed(text), (str, int, float, type(None)))


def _nested(key: str) -> str:
    """A dotted key as W&B stores it: everything below a key of the top lies in its ``value``."""
    first, *rest = key.split(".")
    return ".".join([first, "value", *rest])


def _typed(text: str) -> Any:
    """A value of the flat configuration, which is text, as it stands in the configuration itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _equals(kind: str, key: str, value: Any) -> str:
    return f"{kind}({_literal(key)}) == {_literal(value)}"


def _literal(value: Any) -> str:
    """A Python literal without the characters that wandb-workspaces rewrites before it parses, even inside of text."""
    return re.sub(r"[=<>()]", lambda found: f"\\x{ord(found[0]):02x}", repr(value))


def _curves(wr: Any) -> list[Any]:
    step = "optim_step"
    return [
        wr.LinePlot(x=step, y=["depth/backward_slope"], title="Backward slope", title_y="decades per layer"),
        wr.LinePlot(x=step, y=["grad/total_norm"], title="Total norm before clipping", log_y=True),
        wr.LinePlot(x=step, y=["grad/clip_fraction"], title="Share of the steps so far that were clipped"),
        wr.LinePlot(x=step, y=["train/loss"], title="Training loss"),
        wr.BarPlot(
            metrics=[wr.SummaryMetric("diagnosis/severity")], title="Severity: 2 warning, 3 severe, 4 non-finite"
        ),
    ]


def _by_depth(wr: Any) -> list[Any]:
    keys = [f"depth/rms_{round(100 * depth):03d}" for depth in RELATIVE_DEPTHS]
    fields = {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}  # of wandb.plot.line_series
    profile = wr.CustomChart.from_table("report/profile_table", chart_fields=fields, chart_strings={"xname": "depth"})
    profile.chart_name = "wandb/lineseries/v0"
    return [
        wr.LinePlot(x="optim_step", y=keys, title="Output gradient rms at five relative depths", log_y=True),
        profile,
        wr.MediaBrowser(media_keys=["report/heatmap"], title="Output gradient by depth and step"),
    ]
