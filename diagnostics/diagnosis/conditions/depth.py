"""Conditions along the depth: a slope, a jump at one layer, layers without any gradient, layers that stand still."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median, quantiles

from diagnostics.diagnosis.conditions.case import Case, has_gradient, places
from diagnostics.records import NOTICE, SEVERE, WARNING, Diagnosis, Layer, LayerRecord, Layers, steps_back

_FADED = 1e-20
"""So small an output gradient may have rounded to zero one layer further back: that is a slope, not a dead layer."""
_LOOKED_UP = ("Embedding", "EmbeddingBag")
"""Most rows of these do not move in a healthy run: their tokens were not in the batch."""
_NEIGHBOURS = 3
_LEAST_FOR_A_JUMP = 6
_ROUNDED_BACK = 1e-10
"""What stands for an update ratio of zero: fp32 has rounded the weights back to where they were."""


def slope(case: Case) -> Iterator[Diagnosis]:
    """Vanishing or exploding: decades beyond their own uncertainty."""
    fit, thresholds = case.fit, case.thresholds
    if fit is None:
        return
    condition = "vanishing" if fit.slope < 0 else "exploding"
    certain = max(0.0, abs(fit.slope) - fit.uncertainty) * (fit.depths - 1)
    kept = min(case.standing.get(condition, 0), thresholds.severity(certain / (1 - thresholds.hysteresis)))
    severity = max(thresholds.severity(certain), kept)
    if severity == 0:
        return
    limit = (thresholds.notice_decades, thresholds.warning_decades, thresholds.severe_decades)[severity - 1]
    evidence = {
        "slope": fit.slope,
        "uncertainty": fit.uncertainty,
        "decades": fit.decades,
        "threshold": limit,
        "depths": fit.depths,
    }
    rate = f"{abs(fit.slope):.2f} decades per layer on the way back, {fit.decades:.1f} over {fit.depths} layers"
    seen = zip(case.record.layers.layers, case.values("output.norm"), strict=True)
    first = next((layer.depth for layer, norm in seen if norm is not None), None)
    if fit.slope > 0:
        message = (
            f"the gradient grows by {rate}. The first layers are thrown about; clipping bounds the step and leaves "
            "the slope as it is."
        )
        yield case.finding(condition, severity, first, evidence, message)
        return
    message = (
        f"the gradient fades by {rate}. The first layers hardly learn, and clipping cannot cure it: it multiplies "
        "all layers by one number and leaves the slope as it is."
    )
    slower = _behind_the_fastest(case)
    if severity == NOTICE and slower > thresholds.stalled_decades:
        severity, evidence["stalled_decades"] = WARNING, slower
        message += f" Their weights move by {slower:.1f} decades less than the fastest layer's, relative to their size."
    yield case.finding(condition, severity, first, evidence, message)


def stalled_layers(case: Case) -> Iterator[Diagnosis]:
    """Layers whose update/weight ratio is decades below the others': a notice, for they may still do no harm.

    Update ratios come after their step was judged, so this tells of the recorded step before.
    """
    behind, layers = _stalled(case)
    limit = case.thresholds.stalled_decades
    slow = [(decades, one) for decades, one in zip(behind, layers, strict=True) if decades > limit]
    if not slow or 2 * len(slow) > len(layers):
        return
    decades, worst = max(slow, key=lambda pair: pair[0])
    message = (
        f"the weights of {places([one for _, one in slow])} hardly move: per step, relative to their size, up to "
        f"{decades:.1f} decades less than those of the faster layers."
    )
    evidence = {"decades": decades, "threshold": limit, "layers": float(len(slow))}
    yield case.finding("stalled_layers", NOTICE, worst.depth, evidence, message)


def dead(case: Case) -> Iterator[Diagnosis]:
    """Exact zeros: layers that no gradient passes, or units that have none.

    A layer without a gradient of its own (frozen, unused, a later step of an unrolled cell) is not judged, and nothing
    is where the loss itself has no gradient left. Source: Lu et al., Dying ReLU and Initialization, 2019.
    """
    silent, above = _silent(case) if 0 in case.values("weight.norm") else ([], [])
    if not silent:
        yield from _dead_units(case)
        return
    if _has_faded(above[0]):
        return
    last = silent[-1]
    below = [one for one in case.trunk if one.weight is not None and one.layer.depth <= last.layer.depth]
    cut = len(below) == len(silent)
    died = [one for one in silent if one.layer.name in case.memory.alive]
    since = "they had one before" if died else "never had one"
    message = (
        f"{places(silent)}: the gradient is exactly zero ({since}). It arrives at depth {above[0].layer.depth} "
        f"({above[0].layer.name}) and ends at {last.layer.name}"
        + (", so nothing before that layer learns." if cut else ", while other paths still carry one.")
    )
    evidence = {"layers": float(len(silent)), "of": float(len(below)), "born": float(not died), "threshold": 0.0}
    yield case.finding("dead", SEVERE if cut else WARNING, last.layer.depth, evidence, message)


def broken_at(case: Case) -> Iterator[Diagnosis]:
    """One depth where the gradient ends (a detached graph) or jumps against all the other layers."""
    found = _detached(case) or _jump(case)
    if found is not None:
        yield found


def _stalled(case: Case) -> tuple[list[float], list[Layer]]:
    """By how many decades each layer's update ratio stays below the upper quartile over depth, and the layers.

    The quartile and not the median, since in a deep net that vanishes more than half of the layers stand still.
    """
    logs, layers = _update_ratios(case, branches=True)
    if not logs or max(logs) - min(logs) < case.thresholds.stalled_decades:
        return [], []
    usual = quantiles(logs, n=4, method="inclusive")[-1]
    return [usual - log for log in logs], layers


def _behind_the_fastest(case: Case) -> float:
    """By how many decades the first third of the layers stays below the fastest one."""
    logs, _ = _update_ratios(case, branches=False)
    return max(logs) - median(logs[: (len(logs) + 2) // 3]) if logs else 0.0


def _update_ratios(case: Case, *, branches: bool) -> tuple[list[float], list[Layer]]:
    """log10 of the last known update ratios and their layers, on the trunk or on its branches too; none below three."""
    last = case.memory.unjudged or Layers()
    known = [
        (layer, ratio)
        for layer, norm, ratio in zip(last.layers, last.values("weight.norm"), last.values("update_ratio"), strict=True)
        if (layer.trunk or (branches and "Norm" not in layer.kind))
        and layer.kind not in _LOOKED_UP
        and norm is not None
        and norm > 0
        and ratio is not None
        and math.isfinite(ratio)
    ]
    if len(known) < 3:
        return [], []
    return [math.log10(max(ratio, _ROUNDED_BACK)) for _, ratio in known], [layer for layer, _ in known]


def _silent(case: Case) -> tuple[list[LayerRecord], list[LayerRecord]]:
    """Layers of the trunk that get exact zeros while later ones have a gradient, and those later ones."""
    trunk, measured = case.trunk, any(norm is not None for norm in case.values("output.norm"))
    silent = [one for one in trunk if _is_zero(one, measured=measured)]
    while silent:
        above = [one for one in trunk if has_gradient(one) and one.layer.depth > silent[-1].layer.depth]
        if above:
            return silent, above
        silent.pop()  # the last layers have nothing to pass on, which is no fault of theirs
    return [], []


def _is_zero(one: LayerRecord, *, measured: bool) -> bool:
    """Whether a layer with a gradient of its own gets exact zeros; an output that no gradient reached is none."""
    own = one.weight is not None and one.weight.numel > 0 and one.weight.norm == 0
    return own and (one.output is not None and one.output.norm == 0 if measured else True)


def _has_faded(one: LayerRecord) -> bool:
    stats = one.output or one.weight
    assert stats is not None
    return stats.rms < _FADED or (stats.underflow_fraction or 0.0) >= 0.5


def _dead_units(case: Case) -> Iterator[Diagnosis]:
    limit = case.thresholds.dead_units
    if not case.reaches(limit, "dead_fraction"):
        return
    counted = [one for one in case.trunk if one.dead_fraction is not None]
    if len(counted) < 2 or (counted[-1].dead_fraction or 0.0) >= limit:  # the loss itself has no gradient left
        return
    worst = max(counted[:-1], key=lambda one: one.dead_fraction or 0.0)
    share = worst.dead_fraction or 0.0
    if share < limit or share == 1.0:  # all of them: the whole layer, which has a gradient just now
        return
    message = (
        f"{share:.0%} of the units at {places([worst])} get a gradient of exactly zero from every example: they do not "
        "learn any more."
    )
    yield case.finding("dead", WARNING, worst.layer.depth, {"dead_fraction": share, "threshold": limit}, message)


def _detached(case: Case) -> Diagnosis | None:
    """Trainable layers at the beginning that have never had a gradient, though all that come behind them have."""
    if None not in case.values("output.norm"):
        return None
    reached = [one for one in case.layers if has_gradient(one)]
    if not reached or not any(one.output is not None for one in reached):
        return None
    first = reached[0].layer
    cut = [one for one in case.trunk if one.layer.depth < first.depth and _is_unreached(one)]
    if not cut or any(one.layer.name in case.memory.alive for one in cut):
        return None
    message = (
        f"no gradient goes further back than depth {first.depth} ({first.name}); trainable and never reached: "
        f"{places(cut)}. Look for detach(), no_grad(), .item(), .data, argmax or rounding between the two."
    )
    evidence = {"layers": float(len(cut)), "first_reached": float(first.depth), "threshold": 0.0}
    return case.finding("broken_at", SEVERE, cut[-1].layer.depth, evidence, message)


def _is_unreached(one: LayerRecord) -> bool:
    """Whether a layer's own parameters are in the optimizer and trainable, and neither they nor its output were met."""
    return one.weight_norm is not None and one.output is None and (one.weight is None or one.weight.norm == 0)


def _jump(case: Case) -> Diagnosis | None:
    """A change between two neighbours, in rms and in norm, that is twice any other one and lasts.

    In both, since where the number of elements changes (pooling, a head) one of the two jumps without a reason. The
    layers around it, three on either side, must agree that the level has changed. The last layer, whose output is the
    loss's own business, and the first have too few neighbours to tell; of layers side by side nobody is a neighbour.
    """
    sized = zip(case.record.layers.layers, case.values("trunk_rms"), case.values("trunk_norm"), strict=True)
    sizes = [(one, rms, norm) for one, rms, norm in sized if one.trunk and rms and norm and math.isfinite(norm)]
    layers = [one for one, _, _ in sizes]
    least = 10**case.thresholds.broken_decades
    if len(layers) < _LEAST_FOR_A_JUMP or max(size[1] for size in sizes) < least * min(size[1] for size in sizes):
        return None
    if len(set(steps_back(layers))) < len(layers):
        return None
    columns = [[math.log10(size) for size in column] for column in zip(*(pair for _, *pair in sizes), strict=True)]
    jumps = [min(pair, key=abs) for pair in zip(*map(_jumps, columns), strict=True)]
    *_, second, place = sorted(range(1, len(layers) - 2), key=lambda place: abs(jumps[place]))
    size, limit = jumps[place], max(case.thresholds.broken_decades, 2 * abs(jumps[second]))
    lasting = min(abs(_level_change(column, place)) for column in columns)
    if abs(size) < limit or lasting < case.thresholds.broken_decades:
        return None
    before, behind = layers[place], layers[place + 1]
    what = "loses" if size < 0 else "gains"
    message = (
        f"between depth {behind.depth} ({behind.name}) and {before.depth} ({before.name}) the "
        f"gradient {what} {abs(size):.1f} decades on its way back, and nothing like it between the other layers. Look "
        "at what stands between these two."
    )
    evidence = {"decades": abs(size), "threshold": limit, "depths": float(len(layers))}
    severity = SEVERE if abs(size) >= case.thresholds.severe_decades else WARNING
    return case.finding("broken_at", severity, before.depth, evidence, message)


def _jumps(column: Sequence[float]) -> list[float]:
    """What each layer changes on the way back, less what layers usually change."""
    steps = [nearer - deeper for nearer, deeper in pairwise(column)]
    usual = median(steps)
    return [step - usual for step in steps]


def _level_change(column: Sequence[float], place: int) -> float:
    usual = median(nearer - deeper for nearer, deeper in pairwise(column))
    near, deep = column[max(0, place + 1 - _NEIGHBOURS) : place + 1], column[place + 1 : place + 1 + _NEIGHBOURS]
    between = (len(near) + len(deep)) / 2
    return median(near) - median(deep) - usual * between
