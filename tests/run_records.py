"""Step records and run logs that figures and pages are tested with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diagnostics.diagnosis import diagnose, fit_depth
from diagnostics.records import (
    ClipRecord,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    RunEnd,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
)

ATTACK = "<img src=x onerror=\"document.title='owned';alert(1)\">"
VIOLATION = Violation("missing_zero_grad", 1, ("0.weight",), "Step 1 spent them again.", "Call zero_grad().", 9)
HEALTHY = Verdict("healthy", 0, "healthy")
INFO = RunInfo(
    name="mlp",
    started="2026-01-02T03:04:05+00:00",
    command="python scripts/train.py model.activation=sigmoid",
    overrides=("model.activation=sigmoid",),
    config={
        "model": {
            "_target_": "diagnostics.trainers.models.MLP",
            "activation": "sigmoid",
            "init": "default",
            "norm": "none",
            "residual": False,
        }
    },
    seed=3,
    device="cuda:0",
    versions={"torch": "2.13.0"},
    git={"commit": "1a2b3c4d", "dirty": True},
)


def record(
    step: int, rms: Sequence[float | None], *, norm: float = 0.5, names: list[str] | None = None, **changes: Any
) -> StepRecord:
    """A recorded step with one layer per rms; a layer that was not called has None; every third normalises."""
    rows = []
    for depth, value in enumerate(rms):
        kind = "LayerNorm" if depth % 3 == 1 else "Linear"
        layer = Layer(depth, names[depth] if names else f"body.{depth}", kind, (f"{depth}.weight",), kind == "Linear")
        stats = None if value is None else GradientStats(16, 4 * value, value)
        rows.append(LayerRecord(layer, stats, stats, 2.0, 1e-3, gain=0.5 if depth else None))
    applied = math.isfinite(norm) and norm > 1
    after = 1.0 if applied else norm
    shares = tuple([1 / len(rms)] * len(rms))
    clip = ClipRecord("norm", 2.0, 1.0, norm, 1 / (norm + 1e-6), applied, after, 1.0, shares)
    made = StepRecord(step, clip, layers=Layers(rows), recorded=True, skipped=not math.isfinite(norm))
    return replace(made, fit=fit_depth(rows), **changes)


def fading(count: int, slope: float = -0.9, depths: int = 10) -> list[StepRecord]:
    """Steps of a net whose gradient changes by exactly ``slope`` decades per layer of the trunk on the way back."""
    trunk = [depth for depth in range(depths) if depth % 3 != 1]
    place = [sum(other > depth for other in trunk) for depth in range(depths)]
    return [record(step, [10 ** (-1 + slope * steps_back) for steps_back in place]) for step in range(count)]


def diagnosed(records: list[StepRecord], info: RunInfo | None = None) -> list[StepRecord]:
    """The records with what diagnosis.py makes of them, as a Monitor writes them."""
    return [*records[:-1], replace(records[-1], diagnoses=diagnose(records, run=info))]


def end(verdict: Verdict = HEALTHY, status: str = "finished", error: str | None = None) -> RunEnd:
    """The end of a run of five steps."""
    return RunEnd(status, "2026-01-02T03:05:00+00:00", 5, verdict, error=error)


HARD = {
    "nothing": [],
    "no step recorded": [replace(one, recorded=False, layers=Layers(), fit=None) for one in fading(3)],
    "one step of one layer": [record(0, [1.0])],
    "all NaN": [record(step, [math.nan] * 3, norm=math.nan) for step in range(3)],
    "all infinite": [record(step, [math.inf] * 3, norm=math.inf) for step in range(3)],
    "all zero": [record(step, [0.0] * 3, norm=0.0) for step in range(3)],
    "both ends of the range": [record(0, [5e-324, 1e308], norm=1e308), record(1, [1e308, 5e-324], norm=5e-324)],
    "a layer that comes later": [record(0, [1.0]), record(1, [1.0, 0.1]), record(7, [None, 0.1, 0.2])],
    "a rule with dollar signs": [record(0, [1.0], violations=(replace(VIOLATION, rule="$x_{$"),))],
}
"""Runs of which a figure or a page is hard to make."""
