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


if TYPE_CHECKING:  # each name as itself: for type checkers that is what makes it public
    from diagnostics.clipping import clip_grad_norm_ as clip_grad_norm_
    from diagnostics.clipping import clip_gradients as clip_gradients
    from diagnostics.clipping.groups import ClipByGroup as ClipByGroup
    from diagnostics.clipping.rules import ClipByNorm as ClipByNorm
    from diagnostics.clipping.rules import ClipByQuantile as ClipByQuantile
    from diagnostics.clipping.rules import ClipByValue as ClipByValue
    from diagnostics.clipping.rules import ClipByZScore as ClipByZScore
    from diagnostics.clipping.rules import ClipRule as ClipRule
    from diagnostics.diagnosis import diagnose as diagnose
    from diagnostics.diagnosis.thresholds import Thresholds as Thresholds
    from diagnostics.first_pass import Preflight as Preflight
    from diagnostics.first_pass import assert_healthy as assert_healthy
    from diagnostics.first_pass import preflight as preflight
    from diagnostics.monitor import Monitor as Monitor
    from diagnostics.records import ClipRecord as ClipRecord
    from diagnostics.records import ContractError as ContractError
    from diagnostics.records import DepthFit as DepthFit
    from diagnostics.records import Diagnosis as Diagnosis
    from diagnostics.records import DiagnosisError as DiagnosisError
    from diagnostics.records import DiagnosticsWarning as DiagnosticsWarning
    from diagnostics.records import GradientStats as GradientStats
    from diagnostics.records import Layer as Layer
    from diagnostics.records import LayerRecord as LayerRecord
    from diagnostics.records import Layers as Layers
    from diagnostics.records import NonFiniteGradientError as NonFiniteGradientError
    from diagnostics.records import Remedy as Remedy
    from diagnostics.records import RunEnd as RunEnd
    from diagnostics.records import RunInfo as RunInfo
    from diagnostics.records import StepRecord as StepRecord
    from diagnostics.records import Verdict as Verdict
    from diagnostics.records import Violation as Violation
    from diagnostics.runlog import Run as Run
    from diagnostics.runlog import read_run as read_run
    from diagnostics.sinks import Sink as Sink
    from diagnostics.sinks.console import ConsoleSink as ConsoleSink
    from diagnostics.sinks.memory import MemorySink as MemorySink
    from diagnostics.sinks.runlog import RunLogSink as RunLogSink
    from diagnostics.sinks.wandb import WandbSink as WandbSink
    from diagnostics.watching import watch as watch
