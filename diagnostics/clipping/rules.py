"""Clip rules: what a person asks for. No torch.

A rule is a frozen object that says how to clip and knows no history. Its ``start()`` makes the object that remembers: a
Monitor starts one for each optimizer, so two Monitors that were given the same rule never mix their histories.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from diagnostics.clipping.state import ClipState, QuantileState, ZScoreState

TARGETS = ("reciprocal", "threshold", "mean")


class ClipRule(ABC):
    """What all clip rules have in common: ``Monitor(clip=…)`` and ``clip_gradients`` take any of them.

    Attributes:
        norm_type: The p of the norm that it looks at.

    Example:
        >>> isinstance(ClipByNorm(max_norm=1.0), ClipRule)
        True
    """

    norm_type: float = 2.0
    _own: ClipState | None = None

    @abstractmethod
    def start(self) -> ClipState:
        """The rule at work, with nothing remembered yet."""

    def own(self) -> ClipState:
        """What ``clip_gradients`` works with: the history of this one object, to which no Monitor adds."""
        state = self._own
        if state is None:
            state = self.start()
            object.__setattr__(self, "_own", state)
        return state


@dataclass(frozen=True)
class ClipByNorm(ClipRule):
    """Scales all gradients together so that their norm is at most ``max_norm``.

    Args:
        max_norm: Largest norm that passes unchanged; positive, ``inf`` to measure only.
        norm_type: The p of the norm; positive, possibly ``inf``.

    Raises:
        ValueError: If one of them is not a positive number.

    Example:
        >>> ClipByNorm(max_norm=1.0)
        ClipByNorm(max_norm=1.0, norm_type=2.0)

    Source: Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (2013), algorithm 1.
    """

    max_norm: float
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        _positive(self, "max_norm", "norm_type")

    def start(self) -> ClipState:
        """The rule at work; there is nothing to remember."""
        return ClipState("norm", self.norm_type, max_norm=self.max_norm)


@dataclass(frozen=True)
class ClipByValue(ClipRule):
    """Limits every element of the gradient to ``-clip_value … clip_value``, which changes its direction.

    As ``torch.nn.utils.clip_grad_value_``, but a gradient without an element beyond the limit is not written to, and
    gradients that are not finite are left alone (torch's turns an infinite element into ``clip_value``). Of complex
    gradients the real and the imaginary part are limited. A step costs one more look at every element than with
    :class:`ClipByNorm`, and a second copy from the device if it clips.

    Args:
        clip_value: Largest magnitude that passes unchanged; positive.

    Raises:
        ValueError: If it is not a positive number.

    Example:
        >>> ClipByValue(clip_value=0.5)
        ClipByValue(clip_value=0.5)

    Source: Mikolov: Statistical language models based on neural networks (2012).
    """

    clip_value: float

    def __post_init__(self) -> None:
        _positive(self, "clip_value")

    def start(self) -> ClipState:
        """The rule at work; there is nothing to remember."""
        return ClipState("value", self.norm_type, clip_value=self.clip_value)


@dataclass(frozen=True)
class ClipByQuantile(ClipRule):
    """AutoClip: scales gradients whose norm is above a quantile of the norms of the steps before.

    The history holds norms before clipping, as the paper's: norms after clipping would never be above the threshold, so
    that it could only fall. Unlike there, a step's own norm enters after the step was judged, and the newest ``window``
    norms count instead of all. The coefficient is ``threshold / total_norm`` without an epsilon, since a threshold that
    follows the norm may be far smaller than 1e-6.

    Args:
        quantile: Which one, above 0 and at most 1. 0.1 is the paper's choice, by which about nine of ten steps are
            clipped; 0.9 clips about the largest tenth.
        window: Number of newest steps whose norms count.
        warmup: Number of first steps, at least 1, that only fill the history.
        max_norm: A norm that no step exceeds, those of the warm-up included; None for no such bound.
        norm_type: The p of the norm; positive, possibly ``inf``.

    Raises:
        ValueError: If one of them has a value that it cannot have.

    Example:
        >>> ClipByQuantile(0.9, warmup=10)
        ClipByQuantile(quantile=0.9, window=1000, warmup=10, max_norm=None, norm_type=2.0)

    Source: Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive gradient clipping for source separation networks
    (2020).
    """

    quantile: float
    window: int = 1000
    warmup: int = 25
    max_norm: float | None = None
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        _positive(self, "quantile", "norm_type", *(["max_norm"] if self.max_norm is not None else []))
        if self.quantile > 1:
            raise ValueError(f"quantile must be at most 1, as 0.1 for the tenth percentile; got {self.quantile!r}.")
        _steps(self, 1, "window", "warmup")
        if self.warmup > self.window:
            raise ValueError(f"warmup must be at most the window, {self.window} steps; got {self.warmup}.")

    def start(self) -> ClipState:
        """The rule at work, with an empty history."""
        bound = _bound(self.max_norm)
        return QuantileState(
            self.norm_type, quantile=self.quantile, window=self.window, warmup=self.warmup, bound=bound
        )


@dataclass(frozen=True)
class ClipByZScore(ClipRule):
    """ZClip: scales gradients whose norm lies more than ``z`` standard deviations above its moving average.

    Mean μ and variance σ² of the norm are moving averages with weight ``1 - alpha`` for the new norm; the warm-up sets
    them to those of its own norms. Above ``μ + zσ`` the norm is scaled down to one of

    - ``"reciprocal"``: ``μ + z²σ² / (norm - μ)``, the paper's choice: the farther out, the closer to the mean;
    - ``"threshold"``: ``μ + zσ``;
    - ``"mean"``: ``μ``.

    As in the paper, what enters the averages is the norm that a spike was scaled down to, so that spikes do not teach
    the rule that spikes are usual; all other steps enter with their norm as it was. Records call the rule
    ``"zscore_<target>"``. There is no epsilon in the coefficient, see :class:`ClipByQuantile`.

    Args:
        z: Standard deviations above the mean from which a norm is a spike; positive.
        alpha: Weight of the past in the moving averages, between 0 and 1.
        warmup: Number of first steps, at least 2, that only set mean and variance.
        target: What spikes are scaled down to.
        max_norm: A norm that no step exceeds, those of the warm-up included; None for no such bound.
        norm_type: The p of the norm; positive, possibly ``inf``.

    Raises:
        ValueError: If one of them has a value that it cannot have.

    Example:
        >>> ClipByZScore(z=3.0).start().kind
        'zscore_reciprocal'

    Source: Kumar, Owen, Roy Chowdhury, Güra: ZClip: Adaptive spike mitigation for LLM pre-training (2025).
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    target: str = "reciprocal"
    max_norm: float | None = None
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", getattr(self.target, "name", self.target))  # Hydra brings an Enum
        _positive(self, "z", "alpha", "norm_type", *(["max_norm"] if self.max_norm is not None else []))
        if self.alpha >= 1:
            raise ValueError(f"alpha must be below 1; got {self.alpha!r}.")
        _steps(self, 2, "warmup")
        choice(self, "target", TARGETS)

    def start(self) -> ClipState:
        """The rule at work, with nothing remembered."""
        return ZScoreState(
            self.norm_type,
            z=self.z,
            alpha=self.alpha,
            warmup=self.warmup,
            target=self.target,
            bound=_bound(self.max_norm),
        )


@dataclass(frozen=True)
class Measure(ClipRule):
    """No rule: gradients are measured and left alone."""

    def start(self) -> ClipState:
        """Nothing to remember."""
        return ClipState("none", self.norm_type)


def checked(name: str, rule: Any) -> None:
    """A TypeError if something is neither a rule nor None."""
    if rule is not None and not isinstance(rule, ClipRule):
        raise TypeError(f"{name} must be a rule such as ClipByNorm(max_norm=1.0), or None; got {rule!r}.")


def positive(name: str, value: float) -> float:
    """The value as a float if it is a positive number; a ValueError that says so otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
        raise ValueError(f"{name} must be a positive number; got {value!r}.")
    return float(value)


def choice(rule: ClipRule, name: str, choices: Iterable[str]) -> None:
    """A ValueError if an argument of a rule is none of these."""
    if getattr(rule, name) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(rule, name)!r}.")


def _positive(rule: ClipRule, *names: str) -> None:
    for name in names:
        object.__setattr__(rule, name, positive(name, getattr(rule, name)))


def _steps(rule: ClipRule, least: int, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a number of steps, at least {least}; got {value!r}.")


def _bound(max_norm: float | None) -> float:
    return math.inf if max_norm is None else max_norm
