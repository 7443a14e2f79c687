"""Gradient diagnostics by depth, clip-and-step and a checked training loop for PyTorch.

The public names are resolved on first use: ``import diagnostics`` loads neither torch nor wandb.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

_HOMES = {
    "records": [
        "ClipRecord",
        "ContractError",
        "DepthFit",
        "Diagnosis",
        "DiagnosisError",
        "DiagnosticsWarning",
        "GradientStats",
        "Layer",
        "LayerRecord",
        "Layers",
        "NonFiniteGradientError",
        "Remedy",
        "RunEnd",
        "RunInfo",
        "StepRecord",
        "Verdict",
        "Violation",
    ],
    "clipping.groups": ["ClipByGroup"],
    "clipping.rules": ["ClipByNorm", "ClipByQuantile", "ClipByValue", "ClipByZScore", "ClipRule"],
    "clipping": ["clip_grad_norm_", "clip_gradients"],
    "diagnosis.thresholds": ["Thresholds"],
    "diagnosis": ["diagnose"],
    "monitor": ["Monitor"],
    "first_pass": ["Preflight", "assert_healthy", "preflight"],
    "runlog": ["Run", "read_run"],
    "sinks": ["Sink"],
    "sinks.console": ["ConsoleSink"],
    "sinks.memory": ["MemorySink"],
    "sinks.runlog": ["RunLogSink"],
    "sinks.wandb": ["WandbSink"],
    "watching": ["watch"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF]

try:
    __version__ = version("training-diagnostics")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'diagnostics' has no attribute {name!r}")
    value = getattr(import_module(f"diagnostics.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from diagnostics.clipping import clip_grad_norm_, clip_gradients
    from diagnostics.clipping.groups import ClipByGroup
    from diagnostics.clipping.rules import ClipByNorm, ClipByQuantile, ClipByValue, ClipByZScore, ClipRule
    from diagnostics.diagnosis import diagnose
    from diagnostics.diagnosis.thresholds import Thresholds
    from diagnostics.first_pass import Preflight, assert_healthy, preflight
    from diagnostics.monitor import Monitor
    from diagnostics.records import (
        ClipRecord,
        ContractError,
        DepthFit,
        Diagnosis,
        DiagnosisError,
        DiagnosticsWarning,
        GradientStats,
        Layer,
        LayerRecord,
        Layers,
        NonFiniteGradientError,
        Remedy,
        RunEnd,
        RunInfo,
        StepRecord,
        Verdict,
        Violation,
    )
    from diagnostics.runlog import Run, read_run
    from diagnostics.sinks import Sink
    from diagnostics.sinks.console import ConsoleSink
    from diagnostics.sinks.memory import MemorySink
    from diagnostics.sinks.runlog import RunLogSink
    from diagnostics.sinks.wandb import WandbSink
    from diagnostics.watching import watch
