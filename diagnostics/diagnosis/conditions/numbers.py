"""Conditions of the numbers themselves: not finite, too small for a half type, too small for the hardware."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diagnostics.diagnosis.conditions.case import Case, places
from diagnostics.records import NONFINITE, WARNING, Diagnosis, GradientStats, LayerRecord

_SKIPS_IN_A_ROW = 10
_NO_HALF_TYPE = 1e-30
"""fp16's subnormal numbers end at 6e-8, divided by a loss scale above 1e-13: smaller ones are fp32's or bf16's."""


def nonfinite(case: Case) -> Iterator[Diagnosis]:
    """NaN or infinity in a gradient: an overflow that the loss scaler corrects is no illness, ten in a row are."""
    record, skips = case.record, case.memory.skips
    scaler_at_work = record.loss_scale != 1.0 and record.skipped and skips < _SKIPS_IN_A_ROW
    in_loss = record.loss is not None and not math.isfinite(record.loss)
    broken = record.nonfinite > 0 or not math.isfinite(record.clip.total_norm) or in_loss
    if not broken or scaler_at_work:
        return
    deepest = next((one for one in reversed(case.layers) if _is_broken(one)), None)
    evidence = {"nonfinite": float(record.nonfinite), "total_norm": record.clip.total_norm, "skipped": float(skips)}
    if record.loss is not None:
        evidence["forward"] = float(in_loss)
    largest = case.memory.largest
    before = ""
    if largest is not None:
        evidence |= {"largest_depth": float(largest.depth), "largest_norm": largest.size}
        before = (
            f" Before, at step {largest.step}, the largest gradient was that of depth {largest.depth} "
            f"({largest.name}), of norm {largest.size:.3g}."
        )
    lost = f", {skips} steps in a row were skipped" if skips > 1 else ""
    where = _origin(case, deepest, in_loss=in_loss)
    message = f"{record.nonfinite} gradient elements are NaN or infinite{where}{lost}.{before}"
    yield case.finding("nonfinite", NONFINITE, deepest.layer.depth if deepest else None, evidence, message)


def underflow(case: Case) -> Iterator[Diagnosis]:
    """Half-precision gradients of which a large part is below the type's smallest normal number.

    Source: Micikevicius et al., Mixed Precision Training, 2018.
    """
    limit = case.thresholds.underflow_share
    fp16 = case.record.loss_scale != 1.0  # only fp16 needs a scaler
    shares = ("output.underflow_fraction", "output.underflow_fp16_fraction") if fp16 else ("output.underflow_fraction",)
    if not case.reaches(limit, *shares):
        return
    lost = [(_share(one.output, half=True, fp16=fp16), one) for one in case.trunk[:-1]]
    share, worst = max(lost, key=lambda pair: pair[0], default=(0.0, None))
    if worst is None or share < limit:
        return
    scaled = f", though the loss is multiplied by {case.record.loss_scale:g}" if case.record.loss_scale != 1 else ""
    message = (
        f"{share:.0%} of the output gradient at {places([worst])} are below the smallest normal number of its half "
        f"type{scaled}: what is lost there is lost for all layers before it."
    )
    evidence = {"share": share, "threshold": limit, "loss_scale": case.record.loss_scale}
    yield case.finding("underflow", WARNING, worst.layer.depth, evidence, message)


def denormal(case: Case) -> Iterator[Diagnosis]:
    """fp32 gradients so small that the hardware computes them slowly, in a matrix product 225 times as slowly."""
    limit = case.thresholds.denormal_share
    if not case.reaches(limit, "output.underflow_fraction", "weight.underflow_fraction"):
        return
    slow = [one for one in case.trunk if max(_share(one.output), _share(one.weight)) >= limit]
    if not slow:
        return
    share = max(max(_share(one.output), _share(one.weight)) for one in slow)
    message = (
        f"up to {share:.0%} of the gradient at {places(slow)} are subnormal numbers, with which a CPU calculates many "
        "times more slowly."
    )
    evidence = {"share": share, "threshold": limit, "layers": float(len(slow))}
    yield case.finding("denormal", WARNING, slow[0].layer.depth, evidence, message)


def _share(stats: GradientStats | None, *, half: bool = False, fp16: bool = False) -> float:
    """Share of subnormal numbers, in a half type or in a wide one, as the size of the gradient tells."""
    if stats is None or not math.isfinite(stats.rms) or half != (stats.rms >= _NO_HALF_TYPE):
        return 0.0
    return max(stats.underflow_fraction or 0.0, (stats.underflow_fp16_fraction or 0.0) if fp16 else 0.0)


def _origin(case: Case, deepest: LayerRecord | None, *, in_loss: bool) -> str:
    if in_loss:
        return f"; they come from the forward pass, for the loss itself is {case.record.loss}"
    if deepest is None:
        return ""
    where = f"first at depth {deepest.layer.depth} ({deepest.layer.name})"
    if case.record.loss is None:
        return f"; the backward pass met them {where}"
    return f"; the loss is finite, so they arose in the backward pass, {where}"


def _is_broken(one: LayerRecord) -> bool:
    return any(stats is not None and stats.nonfinite > 0 for stats in (one.output, one.weight))
