"""What may be wrong with a run's gradients: one pure function per condition, from what is known to findings. No torch.

A finding is a Diagnosis that nobody has confirmed yet; the package around follows it over time. Each function gets a
:class:`~diagnostics.diagnosis.conditions.case.Case` and yields at most one finding. The explanations, with sources and
examples, are what ``diagnostics-explain`` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from diagnostics.diagnosis.conditions.case import Case
from diagnostics.diagnosis.conditions.depth import broken_at, dead, slope, stalled_layers
from diagnostics.diagnosis.conditions.history import clipped_always, spike
from diagnostics.diagnosis.conditions.numbers import denormal, nonfinite, underflow
from diagnostics.records import Diagnosis

Condition = Callable[[Case], Iterator[Diagnosis]]

CONDITIONS = (
    "nonfinite",
    "dead",
    "broken_at",
    "vanishing",
    "exploding",
    "spike",
    "underflow",
    "denormal",
    "clipped_always",
    "stalled_layers",
)
"""All that can be diagnosed; a run without any is healthy."""

AT_EVERY_STEP: dict[Condition, tuple[str, ...]] = {nonfinite: ("nonfinite",), spike: ("spike",)}
AT_RECORDED_STEPS: dict[Condition, tuple[str, ...]] = {
    dead: ("dead",),
    broken_at: ("broken_at",),
    slope: ("vanishing", "exploding"),
    underflow: ("underflow",),
    denormal: ("denormal",),
    clipped_always: ("clipped_always",),
    stalled_layers: ("stalled_layers",),
}


def examine(case: Case) -> tuple[dict[str, Diagnosis], tuple[str, ...]]:
    """Asks every condition that can be judged at this step.

    A layer that lets no gradient through, or a jump at one layer, is what a slope through all of them would be about:
    the more exact finding takes the slope's place.

    Args:
        case: The step, and what was kept of those before it.

    Returns:
        The findings by condition, and the names of all conditions that were judged.
    """
    asked = {**AT_EVERY_STEP, **(AT_RECORDED_STEPS if case.record.recorded else {})}
    found = {finding.condition: finding for condition in asked for finding in condition(case)}
    if "dead" in found or "broken_at" in found:
        found = {name: finding for name, finding in found.items() if name not in ("vanishing", "exploding")}
    return found, tuple(name for names in asked.values() for name in names)
