"""The verdicts of a fleet as the Markdown of a W&B Report."""

from __future__ import annotations

import re
from collections.abc import Iterator

from diagnostics.reports.fleet import Fleet, Row, Spread
from diagnostics.reports.table import clean

HEADINGS = ("run", "differs in", "runs", "sick", "verdict", "slope", "clipped", "violations", "loss", "status")


def headline(fleet: Fleet) -> str:
    """How many runs are sick, in a sentence.

    Example:
        >>> headline(Fleet(()))
        '0 of 0 runs are sick.'
    """
    return f"{fleet.sick} of {len(fleet.runs)} runs are sick."


def verdicts(fleet: Fleet) -> Iterator[str]:
    """The table of verdicts in Markdown, the sickest first, and what separates the sick from the sound."""
    yield headline(fleet)
    yield ""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|" + "---|" * len(HEADINGS)
    for row in fleet.rows:
        yield "| " + " | ".join(map(escape, _cells(row))) + " |"
    yield ""
    for separation in fleet.separations:
        yield f"- {escape(str(separation))}"
    for trouble in fleet.troubles:
        yield f"- {escape(trouble)}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        " ".join(row.overrides),
        str(len(row.members)),
        str(row.sick),
        row.verdict,
        _spread(row.slope, "+.2f"),
        _spread(row.clip_fraction, ".0%"),
        ", ".join(row.violations),
        _spread(row.loss, ".4g"),
        row.status,
    )


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "–"
    middle = format(spread.median, form)
    return middle if spread.count == 1 else f"{middle} ({spread.low:{form}} to {spread.high:{form}})"


def escape(text: str) -> str:
    """Names and overrides come from other people: in Markdown they are text and nothing else."""
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", clean(text))
