"""The fleet for other programs and for papers: JSON, CSV, Markdown, LaTeX. Every text in it is escaped."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

from diagnostics.reports.fleet import Fleet, Row, Spread
from diagnostics.reports.gather import Gathered
from diagnostics.reports.table import Table, clean, tabulate

FORMATS = ("text", "json", "csv", "md", "latex")
SPREADS = ("slope", "decades", "clip_fraction", "loss")
COLUMNS = (
    "run",
    "runs",
    "sick",
    "verdict",
    "severity",
    *(f"{name}{end}" for name in SPREADS for end in ("", "_low", "_high")),
    "violations",
    "status",
    "overrides",
)
"""Of the CSV; a spread is the median, the lowest and the highest of the row's runs."""
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "…": r"\dots{}",
    "–": "--",
    "∞": r"$\infty$",
    "−": r"$-$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    **{one: f"\\{one}" for one in "&%$#_{}"},
}


def export(gathered: Gathered, form: str) -> str:
    """The rows in one of :data:`FORMATS` but ``text``.

    Args:
        gathered: What was found.
        form: ``json`` has everything, every run included; ``csv`` a line of plain numbers per row; ``md`` and ``latex``
            the table as the terminal shows it.
    """
    if form == "json":
        return to_json(gathered)
    if form == "csv":
        return to_csv(gathered.fleet)
    table = tabulate(gathered.fleet)
    return to_markdown(table) if form == "md" else to_latex(table)


def to_json(gathered: Gathered) -> str:
    """Everything; what is not finite is a text (``"NaN"``, ``"Infinity"``), because JSON has no such numbers.

    Example:
        >>> to_json(Gathered(Fleet(())))[:12]
        '{"common": ['
    """
    fleet = gathered.fleet
    content = {
        "common": fleet.common,
        "rows": [{**_flat(row), "overrides": row.overrides, "members": row.members} for row in fleet.rows],
        "separations": fleet.separations,
        "comparison": gathered.comparison,
        "troubles": fleet.troubles,
    }
    return json.dumps(_plain(content), ensure_ascii=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def to_csv(fleet: Fleet) -> str:
    """A line per row. A text that a spreadsheet would take for a formula has an apostrophe before it.

    Example:
        >>> to_csv(Fleet(())).split(",")[:3]
        ['run', 'runs', 'sick']
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_csv_cell(value) for value in _flat(row).values()] for row in fleet.rows)
    return stream.getvalue().rstrip("\n")


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    text = clean(value)
    return f"'{text}" if re.match(r"\s*[=+\-@＝＋－＠]", text) else text


def _flat(row: Row) -> dict[str, Any]:
    """A row as plain values, by :data:`COLUMNS`."""
    words = (row.label, len(row.members), row.sick, row.condition, row.severity)
    spreads = (value for name in SPREADS for value in _numbers(getattr(row, name)))
    rest = (len(row.violations), ", ".join(row.statuses), " ".join(row.overrides))
    return dict(zip(COLUMNS, (*words, *spreads, *rest), strict=True))


def _numbers(one: Spread | None) -> tuple[float | None, float | None, float | None]:
    return (one.median, one.low, one.high) if one else (None, None, None)


def to_markdown(table: Table) -> str:
    """A table for GitHub and notebooks."""
    rule = ["---:" if table.is_number(place) else "---" for place in range(len(table.headings))]
    lines = [map(_markdown, table.headings), rule, *(map(_markdown, line) for line in table.lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", clean(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_latex(table: Table) -> str:
    """A ``tabular`` with the rules of the package booktabs."""
    columns = "".join("r" if table.is_number(place) else "l" for place in range(len(table.headings)))
    return "\n".join(_latex_lines(table, columns))


def _latex_lines(table: Table, columns: str) -> Iterator[str]:
    yield r"% \usepackage{booktabs}"
    yield rf"\begin{{tabular}}{{{columns}}}"
    yield r"\toprule"
    yield _latex_line(map(latex, table.headings))
    yield r"\midrule"
    for line in table.lines:
        yield _latex_line(
            _latex_number(cell) if table.is_number(place) else latex(cell) for place, cell in enumerate(line)
        )
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def latex(text: str) -> str:
    r"""Text as LaTeX shows it.

    Example:
        >>> latex("100 % of a_b")
        '100 \\% of a\\_b'
    """
    return "".join(_LATEX.get(one, one) for one in clean(text))


def _latex_number(text: str) -> str:
    """Numbers in mathematical mode, so that a minus is one."""
    shown = re.sub(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?", lambda found: f"${_power(found[0])}$", text)
    return re.sub(r"[^$]+|\$[^$]*\$", lambda found: found[0] if found[0][0] == "$" else latex(found[0]), shown)


def _power(number: str) -> str:
    mantissa, _, exponent = number.partition("e")
    return rf"{mantissa}\cdot10^{{{int(exponent)}}}" if exponent else mantissa
