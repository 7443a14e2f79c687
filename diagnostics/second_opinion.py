"""A sick run, again and briefly with each of its remedies: which one heals it, by outcome and by verdict. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from diagnostics.records import WARNING, Remedy, StepRecord, Verdict

SHARE = 3
"""The reruns take one in so many of the run's steps."""
FEWEST = 50
HEALED = 0.5
"""By outcome healed is what makes at most this share of the sick run's mistakes after the same number of steps."""
ACCURACY = "eval/accuracy"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has come to.

    Attributes:
        accuracy: On the held-out examples.
        verdict: The Monitor's.
    """

    accuracy: float
    verdict: Verdict


def brief(steps: int) -> int:
    """How many steps a rerun takes.

    Example:
        >>> brief(600), brief(90), brief(10)
        (200, 50, 10)
    """
    return min(steps, max(FEWEST, steps // SHARE))


def accuracy_at(records: Sequence[StepRecord], steps: int) -> float:
    """The accuracy of a run after so many steps, as its nearest evaluation has it.

    Example:
        >>> from diagnostics.records import ClipRecord
        >>> clip = ClipRecord("none", 2.0, None, 1.0, None, applied=False, total_norm_after=1.0)
        >>> accuracy_at([StepRecord(step, clip, metrics={ACCURACY: step / 100}) for step in (0, 50)], steps=40)
        0.5
    """
    known = [(abs(one.step - steps), one.metrics[ACCURACY]) for one in records if ACCURACY in one.metrics]
    return min(known)[1] if known else 0.0


def second_opinion(
    condition: str, remedies: Sequence[Remedy], rerun: Callable[[str], Outcome], accuracy: float, steps: int
) -> Iterator[str]:
    """Tries every remedy that has an override.

    Args:
        condition: What the run suffers from.
        remedies: In the order in which they were named.
        rerun: Runs the same with an override for ``steps`` steps.
        accuracy: The sick run's after as many steps.
        steps: Of each rerun.

    Yields:
        A heading, a line for each remedy as soon as it is known, and which one heals.
    """
    tried = [remedy for remedy in remedies if remedy.override]
    if not tried:
        yield f"second opinion on {condition}: no remedy has an override that could be tried."
        return
    yield f"second opinion on {condition}, {steps} steps each; without a remedy: accuracy {accuracy:.2f}"
    healing = []
    for remedy in tried:
        assert remedy.override is not None
        outcome = rerun(remedy.override)
        by_outcome = 1 - outcome.accuracy <= HEALED * (1 - accuracy)
        by_verdict = outcome.verdict.severity < WARNING
        if by_outcome and by_verdict:
            healing.append((outcome.accuracy, remedy.override))
        word = "healed" if by_outcome and by_verdict else "not healed"
        yield f"  {remedy.override}: {word}: accuracy {outcome.accuracy:.2f}, {outcome.verdict.condition}"
    best = max(healing, default=None)
    yield f"  best: {best[1]}" if best else "  none of them heals in so few steps."
