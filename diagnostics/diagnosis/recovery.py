"""Whether a run has made up for a slope that is gone: what the slope cost, and what has become of the loss. No torch.

Layers that stood still have missed that part of the training, and the slope of a later step does not show it: eight
ReLU layers under SGD lost theirs at step 190 of 300 and ended at a third of their shallow twin's accuracy. So a slope
that stood for long is not forgiven for being gone, but for the loss that has fallen since. A short one is.

Nor is a slope harmless for being gentle: one of two decades costs nothing where the optimizer makes up for it, and most
of the training where it does not. The loss tells: a notice that has stood for most of a run, whose loss has come down
no further than a slope would have to be forgiven, is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import NOTICE, WARNING, Diagnosis

GONE = "gone_since"
"""Evidence of a diagnosis that stands for what it cost: the step since which the slope itself is below a warning."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a slope has cost so far.

    Attributes:
        steps: Steps for which it was a warning or worse.
        judged: The last step at which it was looked for.
        found: The last one at which it was a warning or worse.
        loss: The usual loss then; None where no loss was passed in.
        noticed: Steps for which it was a notice or worse.
        onset: The usual loss when it was first looked for.
    """

    steps: int = 0
    judged: int = -1
    found: int = -1
    loss: float | None = None
    noticed: int = 0
    onset: float | None = None

    def after(self, severity: int, step: int, loss: float | None) -> Cost:
        """The cost with one more judged step.

        Example:
            >>> Cost(judged=9).after(2, 20, 2.3)
            Cost(steps=11, judged=20, found=20, loss=2.3, noticed=11, onset=2.3)
        """
        new = step - self.judged
        noticed = self.noticed + new * (severity >= NOTICE)
        known = replace(self, judged=step, noticed=noticed, onset=loss if self.onset is None else self.onset)
        return known if severity < WARNING else replace(known, steps=self.steps + new, found=step, loss=loss)

    def remains(self, loss: float | None, thresholds: Thresholds) -> bool:
        """Whether the slope stood for more than its share of the steps so far and the loss has not come down since.

        Without a loss, or with one that may be negative and therefore has no ratio, nobody can tell: it does not.
        """
        if loss is None or self.loss is None or self.loss <= 0:
            return False
        return (
            self.steps > thresholds.lasting_share * (self.judged + 1) and loss > thresholds.recovered_loss * self.loss
        )

    def weighs(self, loss: float | None, thresholds: Thresholds) -> bool:
        """Whether a notice has stood for so long, with so little to show for it, that it is a warning.

        Where nobody can tell, for want of a loss, it is none.
        """
        if loss is None or self.onset is None or self.onset <= 0 or self.judged + 1 < thresholds.standing_steps:
            return False
        long = self.noticed > thresholds.standing_share * (self.judged + 1)
        return long and loss > thresholds.recovered_loss * self.onset

    def weighed(self, diagnosis: Diagnosis, loss: float | None) -> Diagnosis:
        """The diagnosis that is a warning for that."""
        evidence: Mapping[str, float] = {**diagnosis.evidence, "steps": float(self.noticed)}
        message = (
            f"{diagnosis.message} It has stood for {self.noticed} of {self.judged + 1} steps, and the loss has come "
            f"down from {self.onset:.3g} to {loss:.3g} only."
        )
        return replace(diagnosis, evidence=evidence, message=message)

    def told(self, diagnosis: Diagnosis, loss: float | None) -> Diagnosis:
        """The diagnosis that stands for what it has cost."""
        evidence: Mapping[str, float] = {**diagnosis.evidence, GONE: float(self.found + 1), "steps": float(self.steps)}
        message = (
            f"the slope stood for {self.steps} steps and is gone since step {self.found + 1}, but the loss has not "
            f"recovered: {loss:.3g}, after {self.loss:.3g} then. The first layers have lost that part of the training; "
            "this clears once the loss has come down, or the rest of the run makes it a small part."
        )
        return replace(diagnosis, evidence=evidence, message=message)

    def made_up(self, diagnosis: Diagnosis) -> Diagnosis:
        """The same when it clears: what it says is past."""
        if GONE not in diagnosis.evidence:
            return diagnosis
        message = f"the slope stood for {self.steps} steps, until step {self.found}; the run has made up for it since."
        return replace(diagnosis, message=message)
