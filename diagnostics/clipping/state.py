"""What clip rules remember from step to step: numbers only, no torch.

What enters a history is the norm of a step that was taken. A norm that is zero, NaN or infinite never does, nor does
that of a step that was skipped; and a step is judged before its own norm enters. So none of these can change what a
rule does later, and a spike cannot raise the threshold that is to catch it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """What a rule makes of one norm: the ``threshold`` above which it is clipped, and to which ``max_norm`` then."""

    threshold: float
    max_norm: float


class Member(NamedTuple):
    """Where a parameter belongs: what ``ClipByGroup`` goes by."""

    name: str = ""
    optimizer: str = ""
    group: str = ""


class ClipState:
    """A rule at work, and what it remembers. This one remembers nothing.

    Args:
        kind: What records call the rule.
        norm_type: The p of the norm that it looks at.
        max_norm: Its threshold, if that is the same at every step.
        clip_value: The largest magnitude of an element, if it clips by value.

    Example:
        >>> ClipState("norm", 2.0, max_norm=1.0).limit(5.0)
        Limit(threshold=1.0, max_norm=1.0)
    """

    def __init__(
        self, kind: str, norm_type: float, *, max_norm: float | None = None, clip_value: float | None = None
    ) -> None:
        self.kind = kind
        self.norm_type = norm_type
        self.max_norm = max_norm
        self.clip_value = clip_value

    def limit(self, total_norm: float) -> Limit | None:  # noqa: ARG002 -- here it is the same for all
        """What the rule makes of a norm; None if it does not clip by norm. Remembers nothing."""
        return None if self.max_norm is None else Limit(self.max_norm, self.max_norm)

    def enter(self, total_norm: float) -> None:
        """Remembers the norm, before clipping, of a step that was taken, if it is positive and finite."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remembers what another one did."""


class NormWindow:
    """The newest norms, kept in order of size, so that their quantiles cost next to nothing.

    Args:
        size: How many.

    Example:
        >>> window = NormWindow(3)
        >>> for norm in (9.0, 1.0, float("nan"), 2.0, 4.0):
        ...     window.add(norm)
        >>> window.quantile(0.5), len(window)
        (2.0, 3)
    """

    def __init__(self, size: int) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size

    def __len__(self) -> int:
        return len(self._order)

    def add(self, norm: float) -> None:
        """Takes a norm that is positive and finite, and lets go of the oldest if there are too many."""
        if not 0 < norm < math.inf:
            return
        if len(self._order) == self._size:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(norm)
        insort(self._sorted, norm)

    def quantile(self, q: float) -> float:
        """The q-quantile, interpolated linearly between neighbours; NaN of nothing."""
        if not self._sorted:
            return math.nan
        position = q * (len(self._sorted) - 1)
        low = self._sorted[math.floor(position)]
        return low + (self._sorted[math.ceil(position)] - low) * (position % 1)

    def state_dict(self) -> dict[str, Any]:
        """The norms, oldest first."""
        return {"norms": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Holds the norms of another one; the newest if they are too many."""
        self._order, self._sorted = deque(), []
        for norm in state["norms"]:
            self.add(float(norm))


class QuantileState(ClipState):
    """What ``ClipByQuantile`` remembers: the newest norms before clipping.

    Args:
        norm_type: The p of the norm.
        quantile: Which quantile of them is the threshold.
        window: How many.
        warmup: Steps before there is a threshold.
        bound: A norm that no step exceeds.
    """

    def __init__(self, norm_type: float, *, quantile: float, window: int, warmup: int, bound: float) -> None:
        super().__init__("quantile", norm_type)
        self._quantile, self._warmup, self._bound = quantile, warmup, bound
        self._norms = NormWindow(window)

    def limit(self, total_norm: float) -> Limit:  # noqa: ARG002, D102 -- a step's own norm has no say
        warm = len(self._norms) >= self._warmup
        threshold = min(self._norms.quantile(self._quantile), self._bound) if warm else self._bound
        return Limit(threshold, threshold)

    def enter(self, total_norm: float) -> None:  # noqa: D102 -- as the base class
        self._norms.add(total_norm)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self._norms.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._norms.load_state_dict(state)


class ZScoreState(ClipState):
    """What ``ClipByZScore`` remembers: mean and variance of the norm, and the norms of the warm-up.

    Args:
        norm_type: The p of the norm.
        z: Standard deviations above the mean from which a norm is a spike.
        alpha: Weight of the past.
        warmup: Steps before there is a threshold.
        target: What spikes are scaled down to.
        bound: A norm that no step exceeds.
    """

    def __init__(self, norm_type: float, *, z: float, alpha: float, warmup: int, target: str, bound: float) -> None:
        super().__init__(f"zscore_{target}", norm_type)
        self._z, self._alpha, self._warmup, self._target, self._bound = z, alpha, warmup, target, bound
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def limit(self, total_norm: float) -> Limit:  # noqa: D102 -- as the base class
        threshold, max_norm = self._spike(total_norm)
        return Limit(min(threshold, self._bound), min(max_norm, self._bound))

    def enter(self, total_norm: float) -> None:  # noqa: D102
        if not 0 < total_norm < math.inf:
            return
        if len(self._first) < self._warmup:
            self._first.append(total_norm)
            self._mean = math.fsum(self._first) / len(self._first)
            self._variance = math.fsum((norm - self._mean) ** 2 for norm in self._first) / len(self._first)
            return
        norm = min(total_norm, self._spike(total_norm).max_norm)
        self._mean = self._alpha * self._mean + (1 - self._alpha) * norm
        self._variance = self._alpha * self._variance + (1 - self._alpha) * (norm - self._mean) ** 2

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._first = [float(norm) for norm in state["first"]]
        self._mean, self._variance = float(state["mean"]), float(state["variance"])

    def _spike(self, norm: float) -> Limit:
        """The threshold, and what a norm above it is scaled down to: the threshold itself for all others."""
        if len(self._first) < self._warmup:
            return Limit(math.inf, math.inf)
        threshold = self._mean + self._z * math.sqrt(self._variance)
        if norm > threshold and self._target == "reciprocal":
            return Limit(threshold, self._mean + self._z**2 * self._variance / (norm - self._mean))
        return Limit(threshold, self._mean if norm > threshold and self._target == "mean" else threshold)
