"""Tells a person at a terminal how the run went: silent while it runs, a table by depth and a verdict at its end.

New violations and diagnoses are warnings of the Monitor, so this sink does not repeat them; it says when one clears.
"""

from __future__ import annotations

import math
import random
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

from diagnostics.records import SOLE_OPTIMIZER, Diagnosis, LayerRecord, RunEnd, StepRecord, Violation
from diagnostics.sinks import Event

MOST_ROWS, HEAD, TAIL = 40, 13, 13
SAMPLE = 1_000
PROFILE_WIDTH = 60
BLOCKS, ZERO, NOT_FINITE = "▁▂▃▄▅▆▇█", "·", "!"
_ASCII = str.maketrans(BLOCKS + ZERO + "…−‖±×", "_.-:=+*#0~-|~x") | {ord("χ"): "chi", ord("₁"): "_1"}


class ConsoleSink:
    """Prints, at the end of a run, its layers by depth, what clipping did, what was wrong and the verdict.

    Args:
        write: Takes a text without its last newline; a progress bar's own ``write`` keeps the bar whole.
        width: Columns to fill; the terminal's, but 70 to 120, if None.

    Example:
        >>> from diagnostics.records import ClipRecord, Verdict
        >>> sink = ConsoleSink()
        >>> sink.write(StepRecord(0, ClipRecord("norm", 2.0, 1.0, 4.0, 0.25, applied=True, total_norm_after=1.0)))
        >>> sink.write(RunEnd("finished", "", 1, Verdict("healthy", 0, "healthy")))
        clipped 1 of 1 steps, median coefficient 0.25, max_norm 1
        violations: none
        verdict: healthy
    """

    def __init__(self, write: Callable[[str], object] = print, *, width: int | None = None) -> None:
        self._write = write
        self._width = width
        self._optimizers: dict[str, _Account] = {}
        self._violations: dict[tuple[str, tuple[str, ...]], Violation] = {}

    def write(self, event: Event) -> None:
        """Counts a step, remembers a violation, prints at the end."""
        if isinstance(event, StepRecord):
            self._take(event)
        elif isinstance(event, Violation):
            self._remember(event)
        elif isinstance(event, RunEnd):
            say(self._write, "\n".join(self._report(event)))

    def close(self) -> None:
        """Nothing to release."""

    def _take(self, record: StepRecord) -> None:
        self._optimizers.setdefault(record.optimizer, _Account()).take(record)
        for violation in record.violations:
            self._remember(violation)
        for one in record.diagnoses:
            if one.confirmed and one.cleared is not None:
                say(
                    self._write,
                    _clean(f"step {record.step}: {one.condition} has cleared; it stood since step {one.step}."),
                )

    def _remember(self, violation: Violation) -> None:
        key = (violation.rule, violation.parameters)
        self._violations[key] = replace(self._violations.get(key, violation), count=violation.count)

    def _report(self, end: RunEnd) -> list[str]:
        width = self._width or console_width()
        lines: list[str] = []
        for name, account in self._optimizers.items():
            lines += [] if name == SOLE_OPTIMIZER else [_clean(f"optimizer {name}")]
            lines += account.report(width)
        lines.append(f"violations: {len(self._violations) or 'none'}")
        for one in self._violations.values():
            often = f" ({one.count} times)" if one.count > 1 else ""
            lines += paragraph(f"{one.rule}{often}: {one.message}", width, "  ")
            lines += paragraph(f"try: {one.remedy}", width, "    ")
            lines.append(f"    more: diagnostics-explain {_clean(one.rule)}")
        if end.status != "finished":
            lines += paragraph(f"{end.status} after {end.steps} steps" + (f": {end.error}" if end.error else ""), width)
        return [*lines, *paragraph(f"verdict: {end.verdict}", width)]


@dataclass
class _Sample:
    """An even sample of a stream of any length, whose median is close to the stream's (reservoir sampling)."""

    values: list[float] = field(default_factory=list)
    seen: int = 0
    # A generator of its own: the run's random numbers must not depend on who watches it.
    draw: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - no secret hangs on it

    def add(self, value: float) -> None:
        self.seen += 1
        place = len(self.values) if self.seen <= SAMPLE else self.draw.randrange(self.seen)
        self.values[place : place + 1] = [value] if place < SAMPLE else []


@dataclass
class _Account:
    """What is kept of one optimizer's steps; its size does not grow with the run."""

    last: StepRecord | None = None
    steps: int = 0
    skipped: int = 0
    coefficients: _Sample = field(default_factory=_Sample)
    norms: _Sample = field(default_factory=_Sample)
    largest: float = 0.0
    standing: dict[tuple[str, int], Diagnosis] = field(default_factory=dict)

    def take(self, record: StepRecord) -> None:
        clip = record.clip
        self.steps += 1
        self.skipped += record.skipped
        if record.recorded or self.last is None or not self.last.recorded:
            self.last = record
        if clip.applied and clip.clip_coef is not None:
            self.coefficients.add(clip.clip_coef)
        if math.isfinite(clip.total_norm):
            self.norms.add(clip.total_norm)
            self.largest = max(self.largest, clip.total_norm)
        for one in record.diagnoses:
            self.standing[one.condition, one.step] = one
            if one.cleared is not None:
                del self.standing[one.condition, one.step]

    def report(self, width: int) -> list[str]:
        lines = [*depth_table(self.last, width), self._clipping()] if self.last else []
        if self.skipped:
            lines.append(f"skipped {self.skipped} of {self.steps} steps, whose gradients were not finite")
        for one in self.standing.values():
            lines += diagnosis_lines(one, width)
        return lines

    def _clipping(self) -> str:
        assert self.last is not None
        clip = self.last.clip
        norms = f"largest norm {self.largest:.3g}"
        if clip.rule == "none":
            typical = f"median norm {median(self.norms.values):.3g}, " if self.norms.values else ""
            return f"no clipping in {self.steps} steps, {typical}{norms}"
        told = f"median coefficient {median(self.coefficients.values):.3g}" if self.coefficients.values else norms
        by = "" if clip.rule == "norm" else f"by {clip.rule}, "
        return f"clipped {self.coefficients.seen} of {self.steps} steps, {told}, {by}{clip.terms}"


def say(write: Callable[[str], object], text: str) -> None:
    """Writes a text, in ASCII where a terminal or a file takes nothing else."""
    try:
        write(text)
    except UnicodeEncodeError:
        write(text.translate(_ASCII).encode("ascii", "replace").decode())


def console_width() -> int:
    """Columns to fill: the terminal's, but 70 to 120."""
    return min(max(shutil.get_terminal_size().columns, 70), 120)


def diagnosis_lines(one: Diagnosis, width: int) -> list[str]:
    """A diagnosis and what to try."""
    lines = paragraph(f"{one}" if one.confirmed else f"{one} (unconfirmed)", width)
    for remedy in one.remedies:
        lines += paragraph(f"try: {remedy}", width, "    ")
    return [*lines, f"    more: diagnostics-explain {one.condition}"]


def depth_table(record: StepRecord, width: int, title: str | None = None) -> list[str]:
    """The layers of a step by depth, and its output gradients as one line of blocks; the title says which step."""
    layers = record.layers
    if not layers:
        return []
    shares = record.clip.shares if len(record.clip.shares) == len(layers) else (None,) * len(layers)
    kind_width = min(max(len(one.layer.kind) for one in layers), 14, width - 57)
    name_width = min(max(5, *(len(one.layer.name) for one in layers)), max(width - 49 - kind_width, 8))
    lines = [
        title or f"step {record.step}" + (", the last recorded one:" if record.recorded else ":"),
        " " * (name_width + kind_width + 9) + "    output     weight    update    share",
        f"depth  {'layer':{name_width}}  {'kind':{kind_width}}  grad rms  grad norm   /weight  of norm",
    ]
    rows = _chosen(len(layers))
    lines += [_row(layers[row], shares[row], name_width, kind_width) for row in rows]
    if len(rows) < len(layers):
        lines.append(f"{len(layers) - len(rows)} of {len(layers)} layers are left out of this table.")
    return [*lines, *_profile(record, width)]


def _row(record: LayerRecord, share: float | None, name_width: int, kind_width: int) -> str:
    name, kind = _fit(record.layer.name, name_width), _fit(record.layer.kind, kind_width)
    output = _number(None if record.output is None else record.output.rms)
    weight = _number(None if record.weight is None else record.weight.norm)
    told = "-" if share is None else f"{share:.1%}"
    return (
        f"{record.layer.depth:5}  {name:{name_width}}  {kind:{kind_width}}  "
        f"{output:>8}  {weight:>9}  {_number(record.update_ratio):>8}  {told:>7}"
    )


def _chosen(count: int) -> list[int]:
    """All rows of a short table; of a long one its head, its tail and evenly spaced rows between."""
    if count <= MOST_ROWS:
        return list(range(count))
    between = MOST_ROWS - HEAD - TAIL
    gap = (count - HEAD - TAIL) / (between + 1)
    middle = [HEAD + math.floor(gap * (i + 1)) for i in range(between)]
    return [*range(HEAD), *middle, *range(count - TAIL, count)]


def _profile(record: StepRecord, width: int) -> list[str]:
    """The output gradient over depth in one line: a block per layer, its height the logarithm of the rms."""
    sizes = [one.output.rms for one in record.layers if one.output is not None]
    logs = [math.log10(size) for size in sizes if math.isfinite(size) and size > 0]
    if len(logs) < 2:
        return []
    low, high = min(logs), max(logs)
    count = min(len(sizes), width - len("first layer  last layer"), PROFILE_WIDTH)
    drawn = [sizes[i * (len(sizes) - 1) // max(count - 1, 1)] for i in range(count)]
    line = "".join(_block(size, low, max(high - low, 1.0)) for size in drawn)
    lines = [f"first layer {line} last layer", f"output gradient rms {10**low:.1e} to {10**high:.1e}, log scale"]
    if record.fit:
        lines.append(f"backward slope {record.fit.slope:+.2f} ± {record.fit.uncertainty:.2g} decades per layer")
    return lines


def _block(size: float, low: float, decades: float) -> str:
    if not math.isfinite(size):
        return NOT_FINITE
    return BLOCKS[round((math.log10(size) - low) / decades * (len(BLOCKS) - 1))] if size > 0 else ZERO


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _fit(text: str, width: int) -> str:
    text = _clean(text)
    return text if len(text) <= width else "…" + text[1 - width :]


def paragraph(text: str, width: int, indent: str = "") -> list[str]:
    """A text of other people's words in lines of a width."""
    return textwrap.wrap(_clean(text), width, initial_indent=indent, subsequent_indent=indent + "  ")


def _clean(text: str) -> str:
    """Names and messages come from other people's code: nothing in them may move the cursor or hide text."""
    return "".join(one if one.isprintable() else " " for one in text)
