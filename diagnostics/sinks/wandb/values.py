"""What a step is in W&B's words: the profile over depth as one histogram, the layers one by one."""

from __future__ import annotations

import math
from typing import Any

from diagnostics.records import SOLE_OPTIMIZER, StepRecord

MOST_BINS = 512  # of a wandb.Histogram
PROFILE_FLOOR = 20


def within(optimizer: str) -> str:
    """What stands between a prefix and a key: nothing for the only optimizer, else its name and a slash."""
    return "" if optimizer == SOLE_OPTIMIZER else f"{optimizer}/"


def per_layer(record: StepRecord) -> dict[str, float]:
    """The output gradient's rms of every layer that has one."""
    prefix = f"layer_grad_rms/{within(record.optimizer)}d"
    outputs = [(one.layer.depth, one.output) for one in record.layers]
    return {f"{prefix}{depth:03d}": output.rms for depth, output in outputs if output is not None}


def profile(record: StepRecord) -> dict[str, Any]:
    """The profile over depth as one histogram: a bin per depth, evenly chosen ones where there are more than 512."""
    import wandb  # noqa: PLC0415 - loaded already, since there is a run

    layers = [one for one in record.layers if one.output is not None]
    count = min(len(layers), MOST_BINS)
    if count == 0:
        return {}
    chosen = [layers[i * (len(layers) - 1) // max(count - 1, 1)] for i in range(count)]
    depths = [one.layer.depth for one in chosen]
    heights = [_height(one.output.rms) for one in chosen if one.output is not None]
    histogram = wandb.Histogram(np_histogram=(heights, [*depths, depths[-1] + 1]))  # type: ignore[arg-type] # lists do
    return {f"depth/{within(record.optimizer)}profile": histogram}


def _height(rms: float) -> float:
    """Zero, NaN and infinity have height 0: a histogram takes finite ones only, and ``grad/nonfinite`` tells."""
    return max(0.0, PROFILE_FLOOR + math.log10(rms)) if 0 < rms < math.inf else 0.0
