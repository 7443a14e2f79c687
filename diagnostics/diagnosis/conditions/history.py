"""Conditions over time: a jump of the total norm, and clipping that never stops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median, quantiles

from diagnostics.diagnosis.conditions.case import Case, deviation
from diagnostics.records import NOTICE, WARNING, Diagnosis, Layers

_ENOUGH = 20
"""Steps without which a history tells nothing."""


def spike(case: Case) -> Iterator[Diagnosis]:
    """The total norm far above its history: decades, and many robust standard deviations of its logarithm.

    The median and the median absolute deviation do not move for a spike, and what is not finite is no part of them.
    """
    norm, history, limits = case.record.clip.total_norm, case.memory.norms, case.thresholds
    if len(history) < min(_ENOUGH, limits.history) or not 0 < norm < math.inf:
        return
    size = math.log10(norm)
    if size < min(history) + limits.spike_decades:  # spares the two medians on nearly every step
        return
    usual = median(history)
    threshold = max(limits.spike_decades, limits.spike_sigmas * deviation(history, usual))
    jump = size - usual
    if jump < threshold:
        return
    worst = _largest_share(case)
    where = f", most of it at depth {worst[0]} ({worst[1]})" if worst else ""
    message = (
        f"the total norm is {norm:.3g}, {10**jump:.3g} times the median of the last {len(history)} steps{where}. The "
        "batch, the learning rate and the loss of this step are the first to look at."
    )
    evidence = {"decades": jump, "threshold": threshold, "total_norm": norm, "median": 10**usual}
    severity = WARNING if jump >= 2 * limits.spike_decades else NOTICE
    yield case.finding("spike", severity, worst[0] if worst else None, evidence, message)


def clipped_always(case: Case) -> Iterator[Diagnosis]:
    """Clipping at nearly every step, by a small coefficient: max_norm times the learning rate is the size of a step.

    A warning only where the weights stand still for it; an optimizer that divides by the gradient's own size does not
    care.
    """
    limits, coefficients = case.thresholds, case.memory.coefficients
    if len(coefficients) < limits.history:
        return
    share = sum(coefficient < 1 for coefficient in coefficients) / len(coefficients)
    typical = median(coefficients)
    if share < limits.clipped_share or typical > limits.clipped_coefficient:
        return
    last = case.memory.unjudged or Layers()
    pairs = zip(last.layers, last.values("update_ratio"), strict=True)
    ratios = [ratio for layer, ratio in pairs if layer.trunk and ratio]
    still = bool(ratios) and max(ratios) < limits.still_ratio
    # The ninth decile: clipping is meant for the few steps that stand out.
    norms = sorted(10**norm for norm in case.memory.norms)
    usual = quantiles(norms, n=10, method="inclusive")[-1]
    message = (
        f"{share:.0%} of the last {len(coefficients)} steps were clipped, by a median coefficient of {typical:.2g}: "
        "not the gradient's size but max_norm sets the step."
    )
    if still:
        message += f" The weights hardly move: at most {max(ratios):.1g} of their size per step."
    evidence = {"clip_fraction": share, "coefficient": typical, "threshold": limits.clipped_coefficient}
    evidence["norm_p90"] = usual
    yield case.finding("clipped_always", WARNING if still else NOTICE, None, evidence, message)


def _largest_share(case: Case) -> tuple[int, str] | None:
    """Depth and name of the layer that makes the largest part of the norm."""
    shares = case.record.clip.shares
    if not shares or len(shares) != len(case.record.layers):
        return None
    layer = case.record.layers.layers[max(range(len(shares)), key=shares.__getitem__)]
    return layer.depth, layer.name
