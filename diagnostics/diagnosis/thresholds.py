"""When a number becomes a diagnosis. conf/diagnostics/ has the same values and why; a test holds them equal."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = (
    "dead_units",
    "underflow_share",
    "denormal_share",
    "clipped_share",
    "clipped_coefficient",
    "lasting_share",
    "recovered_loss",
    "standing_share",
)
"""Those that are shares."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a number becomes a diagnosis.

    Attributes:
        notice_decades: Decades between the first and the last layer from which a slope is worth a notice.
        warning_decades: From which it is a warning; the lesson's four-layer sigmoid chain has 2.73.
        severe_decades: From which it is severe.
        hysteresis: Share by which decades must fall below a limit before the severity falls.
        stalled_decades: Decades by which update/weight ratios stay below those of the faster layers: of the upper
            quartile to be stalled, of the fastest one to raise a notice of vanishing to a warning.
        broken_decades: Decades by which the gradient jumps between two neighbouring layers.
        dead_units: Share of a layer's units whose gradient is exactly zero.
        underflow_share: Share of a half-precision gradient that is smaller than the smallest normal number.
        denormal_share: The same of an fp32 gradient.
        clipped_share: Share of the steps in the history that were clipped.
        clipped_coefficient: Median coefficient that they were multiplied by, below which clipping sets the size of
            the step.
        still_ratio: Update/weight ratio below which weights stand still; the usual one is about 1e-3.
        spike_decades: Decades by which the total norm jumps above its history for a notice; twice that is a warning.
        spike_sigmas: Robust standard deviations of the history by which it must jump besides.
        history: Steps that the history holds.
        confirm: Recorded steps in a row that confirm a condition.
        clear: Recorded steps in a row without it that clear it.
        lasting_share: Share of the steps so far for which a slope at warning or above must have stood so that its end
            alone does not clear it: the first layers have missed that part of the training.
        recovered_loss: Share of the loss at the slope's end below which the loss must fall to clear such a slope; of
            the loss at its onset, to leave a notice one.
        standing_share: Share of the steps so far for which a notice of a slope must have stood to become a warning,
            while the loss has not recovered.
        standing_steps: Steps before which no notice has stood for long.

    Raises:
        ValueError: If the decades do not increase from a positive number, a share is not between 0 and 1, another
            number is not positive, or a count is too small.

    Example:
        >>> Thresholds().warning_decades
        2.5
    """

    notice_decades: float = 1.5
    warning_decades: float = 2.5
    severe_decades: float = 5.0
    hysteresis: float = 0.2
    stalled_decades: float = 1.5
    broken_decades: float = 3.0
    dead_units: float = 0.9
    underflow_share: float = 0.5
    denormal_share: float = 0.25
    clipped_share: float = 0.95
    clipped_coefficient: float = 0.1
    still_ratio: float = 1e-5
    spike_decades: float = 1.0
    spike_sigmas: float = 8.0
    history: int = 50
    confirm: int = 3
    clear: int = 3
    lasting_share: float = 0.1
    recovered_loss: float = 0.15
    standing_share: float = 0.5
    standing_steps: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.notice_decades <= self.warning_decades <= self.severe_decades:
            raise ValueError(
                "notice_decades, warning_decades and severe_decades must be positive and in this order; got "
                f"{self.notice_decades}, {self.warning_decades}, {self.severe_decades}."
            )
        for name in SHARES:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share above 0 and at most 1; got {getattr(self, name)}.")
        for name in ("stalled_decades", "broken_decades", "still_ratio", "spike_decades", "spike_sigmas"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number; got {getattr(self, name)}.")
        for name, unit in (("confirm", "recorded step"), ("clear", "recorded step"), ("standing_steps", "step")):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 {unit}; got {getattr(self, name)}.")
        if not 0 <= self.hysteresis < 1:
            raise ValueError(f"hysteresis must be at least 0 and below 1; got {self.hysteresis}.")
        if self.history < 10:
            raise ValueError(f"history must be at least 10 steps; got {self.history}.")

    def severity(self, decades: float) -> int:
        """0 to 3 for so many decades."""
        limits = (self.notice_decades, self.warning_decades, self.severe_decades)
        return sum(decades >= limit for limit in limits)
