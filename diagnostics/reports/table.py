"""The fleet as a table of text: in the terminal, in Markdown, in LaTeX."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from diagnostics.reports.fleet import Fleet, Row, Spread
from diagnostics.reports.view import number


@dataclass(frozen=True, slots=True)
class Table:
    """Headings, and a line of as many texts per row.

    Attributes:
        headings: Of the columns.
        lines: The rows.
        words: How many of the first columns are words; the others are numbers, but for the last.
    """

    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: int

    def is_number(self, place: int) -> bool:
        """Whether a column holds numbers."""
        return self.words <= place < len(self.headings) - 1


def tabulate(fleet: Fleet) -> Table:
    """The rows of a fleet as text; a column in which no row says anything of its own is left out.

    Example:
        >>> tabulate(Fleet(())).headings
        ('run', 'verdict', 'slope', 'clipped', 'violations', 'loss', 'status')
    """
    seeds = any(len(row.members) > 1 for row in fleet.rows)
    overridden = any(_told(row) != row.label for row in fleet.rows if row.overrides)
    columns = {"run": [clean(row.label) for row in fleet.rows]}
    if overridden:
        columns["overrides that differ"] = [clean(_told(row)) for row in fleet.rows]
    columns["verdict"] = [clean(row.verdict) for row in fleet.rows]
    words = len(columns)
    if seeds:
        columns["n"] = [str(len(row.members)) for row in fleet.rows]
        columns["sick"] = [str(row.sick) for row in fleet.rows]
    columns |= {
        "slope": [spread(row.slope, "+.2f") for row in fleet.rows],
        "clipped": [spread(row.clip_fraction, ".0%") for row in fleet.rows],
        "violations": [str(len(row.violations)) for row in fleet.rows],
        "loss": [spread(row.loss) for row in fleet.rows],
        "status": [clean(row.status) for row in fleet.rows],
    }
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), words)


def _told(row: Row) -> str:
    return " ".join(row.overrides)


def spread(one: Spread | None, form: str | None = None) -> str:
    """A median with its range where there is one.

    Example:
        >>> spread(Spread(3, -0.9, -1.0, -0.8), "+.2f"), spread(None)
        ('-0.90 (-1.00 … -0.80)', '–')
    """
    if one is None:
        return "–"
    told = [number(value) if form is None or value != value else format(value, form) for value in _values(one)]  # noqa: PLR0124
    return told[0] if len(set(told)) == 1 else f"{told[0]} ({told[1]} … {told[2]})"


def _values(one: Spread) -> tuple[float, float, float]:
    return one.median, one.low, one.high


def clean(text: str) -> str:
    """Names and overrides come from other people: nothing in them may move the cursor or turn the line around.

    Example:
        >>> clean(f"red{chr(27)}[31m")
        'red [31m'
    """
    return "".join(one if one.isprintable() else " " for one in text)


def in_terminal(table: Table, width: int | None = None) -> str:
    """The table with aligned columns.

    Args:
        table: The rows.
        width: Columns of the terminal, to which the words are cut; None cuts nothing.

    Returns:
        Lines under a line of headings.
    """
    lines = [table.headings, *table.lines]
    widths = [max(map(_wide, column)) for column in zip(*lines, strict=True)]
    free = table.words - 1  # the verdict is never cut
    if width is not None:
        spare = width - sum(widths[free:]) - 2 * (len(widths) - 1)
        widths[:free] = _share_out(widths[:free], max(spare, 0))
    return "\n".join(_line(table, line, widths) for line in lines)


def _share_out(widths: Sequence[int], spare: int) -> list[int]:
    """Columns that together are not wider than what there is, but wide enough to tell one run from another."""
    fair = max(spare // len(widths), 12)
    return [min(width, max(fair, spare - sum(widths) + width)) for width in widths]


def _line(table: Table, cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        _pad(_cut(cell, width), width, right=table.is_number(place))
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _pad(text: str, width: int, *, right: bool) -> str:
    space = " " * (width - _wide(text))
    return space + text if right else text + space


def _cut(text: str, width: int) -> str:
    if _wide(text) <= width:
        return text
    kept = ""
    for one in text:
        if _wide(kept + one) > width - 1:
            break
        kept += one
    return kept + "…"


def _wide(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )
