"""The types of the configuration's keys under conf/clip, as schemas.py holds those of all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

MISSING: Any = "???"  # what OmegaConf calls a value that a file or a person has still to give

ClipTarget = Enum("ClipTarget", ["reciprocal", "threshold", "mean"])
ClipGrouping = Enum("ClipGrouping", ["group", "optimizer", "name"])


@dataclass
class NoClipConfig:
    """conf/clip/none.yaml."""


@dataclass
class ClipByNormConfig:
    """conf/clip/norm.yaml."""

    _target_: str = "diagnostics.ClipByNorm"
    max_norm: float = MISSING
    norm_type: float = MISSING


@dataclass
class ClipByValueConfig:
    """conf/clip/value.yaml."""

    _target_: str = "diagnostics.ClipByValue"
    clip_value: float = MISSING


@dataclass
class ClipByQuantileConfig:
    """conf/clip/quantile.yaml."""

    _target_: str = "diagnostics.ClipByQuantile"
    quantile: float = MISSING
    window: int = MISSING
    warmup: int = MISSING
    max_norm: float | None = MISSING
    norm_type: float = MISSING


@dataclass
class ClipByZScoreConfig:
    """conf/clip/zscore.yaml."""

    _target_: str = "diagnostics.ClipByZScore"
    z: float = MISSING
    alpha: float = MISSING
    warmup: int = MISSING
    target: ClipTarget = MISSING
    max_norm: float | None = MISSING
    norm_type: float = MISSING


@dataclass
class ClipByGroupConfig:
    """conf/clip/group.yaml."""

    _target_: str = "diagnostics.ClipByGroup"
    rule: Any = MISSING
    by: ClipGrouping = MISSING
    rules: Any = None


CLIP_SCHEMAS: Mapping[str, type] = {
    "clip_none": NoClipConfig,
    "clip_norm": ClipByNormConfig,
    "clip_value": ClipByValueConfig,
    "clip_quantile": ClipByQuantileConfig,
    "clip_zscore": ClipByZScoreConfig,
    "clip_group": ClipByGroupConfig,
}
