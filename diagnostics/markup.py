"""Records as HTML for a notebook: every text is escaped. Standard library only.

What records.py makes its ``_repr_html_`` of; it stands to the left of the records and knows their fields by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def line(strong: str, rest: str) -> str:
    """A paragraph with its first words in bold.

    Example:
        >>> line("a < b", "holds")
        '<p><strong>a &lt; b</strong> holds</p>'
    """
    return f"<p><strong>{escape(strong)}</strong> {escape(rest)}</p>"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers have three digits, None is a dash.

    Example:
        >>> table(["size"], [[0.12345], [None]])
        '<table><thead><tr><th>size</th></tr></thead><tbody><tr><td>0.123</td></tr><tr><td>–</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def violation(self: Any) -> str:
    """A Violation with its remedy."""
    times = f", {self.count:,} times" if self.count > 1 else ""
    return line(f"{self.rule} at step {self.step:,}{times}:", self.message) + _items([self.remedy])


def diagnosis(self: Any) -> str:
    """A Diagnosis with its remedies."""
    return line(str(self).removesuffix(self.message), self.message) + _items(self.remedies)


def step(self: Any) -> str:
    """A StepRecord: its numbers, its layers by depth, and what was found at it."""
    clip = self.clip
    numbers = {
        "loss": self.loss,
        "total norm": clip.total_norm,
        "after clipping": clip.total_norm_after,
        "threshold": clip.threshold,
        "slope, decades per layer": self.fit.slope if self.fit else None,
        "skipped": "yes" if self.skipped else "no",
    }
    layers = [_by_depth(one) for one in self.layers]
    parts = [line(f"step {self.step:,}", f"of {self.optimizer}"), table(tuple(numbers), [tuple(numbers.values())])]
    if layers:
        headings = ("depth", "layer", "kind", "output gradient rms", "weight gradient norm", "update / weight")
        parts.append(table(headings, layers))
    return "".join([*parts, *map(diagnosis, self.diagnoses), *map(violation, self.violations)])


def _by_depth(one: Any) -> tuple[object, ...]:
    rms, norm = (
        None if part is None else getattr(part, name) for part, name in ((one.output, "rms"), (one.weight, "norm"))
    )
    return (one.layer.depth, one.layer.name, one.layer.kind, rms, norm, one.update_ratio)


def _items(values: Iterable[object]) -> str:
    inside = "".join(f"<li>{escape(str(value))}</li>" for value in values)
    return f"<ul>{inside}</ul>" if inside else ""


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))
