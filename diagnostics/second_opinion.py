"""A sick run, again and briefly with each of its remedies: which one heals it, by outcome and by verdict. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diagnostics.records import WARNING, Remedy, StepRecord, Verdict
from diagnostics.runlog import log_file

SHARE = 3
"""The reruns take one in so many of the run's steps."""
FEWEST = 50
HEALED = 0.5
"""By outcome healed is what makes at most this share of the sick run's mistakes after the same number of steps."""
ACCURACY = "eval/accuracy"
_KIND = "second_opinion"
_LONGEST = 1 << 16  # bytes of the last line of a log


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has come to.

    Attributes:
        accuracy: On the held-out examples.
        verdict: The Monitor's.
    """

    accuracy: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Trial:
    """A sick run, again and briefly with one of its remedies.

    Attributes:
        override: The remedy.
        accuracy: On the held-out examples.
        condition: The verdict's.
        healed: Whether outcome and verdict both say so.
    """

    override: str
    accuracy: float
    condition: str
    healed: bool

    def __str__(self) -> str:
        return f"{'healed' if self.healed else 'not healed'}: accuracy {self.accuracy:.2f}, {self.condition}"


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """What each remedy makes of a sick run.

    Attributes:
        condition: What the run suffers from.
        steps: Of each trial.
        accuracy: The sick run's after as many steps.
        trials: One for each remedy that has an override, in the order in which they were named.

    Example:
        >>> SecondOpinion("vanishing", 200, 0.1, (Trial("a=1", 0.7, "healthy", True),)).best
        'a=1'
    """

    condition: str
    steps: int
    accuracy: float
    trials: tuple[Trial, ...]

    @property
    def best(self) -> str | None:
        """The override that heals best; None where none does."""
        return max(((one.accuracy, one.override) for one in self.trials if one.healed), default=(0.0, None))[1]


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
    condition: str,
    remedies: Sequence[Remedy],
    rerun: Callable[[str], Outcome],
    *,
    accuracy: float,
    steps: int,
    say: Callable[[str], object],
) -> SecondOpinion:
    """Tries every remedy that has an override.

    Args:
        condition: What the run suffers from.
        remedies: In the order in which they were named.
        rerun: Runs the same with an override for ``steps`` steps.
        accuracy: The sick run's after as many steps.
        steps: Of each rerun.
        say: Told a heading, a line for each remedy as soon as it is known, and which one heals.
    """
    tried = [remedy.override for remedy in remedies if remedy.override]
    if tried:
        say(f"second opinion on {condition}, {steps} steps each; without a remedy: accuracy {accuracy:.2f}")
    trials = []
    for override in tried:
        outcome = rerun(override)
        by_outcome = 1 - outcome.accuracy <= HEALED * (1 - accuracy)
        healed = by_outcome and outcome.verdict.severity < WARNING
        trials.append(Trial(override, outcome.accuracy, outcome.verdict.condition, healed))
        say(f"  {override}: {trials[-1]}")
    opinion = SecondOpinion(condition, steps, accuracy, tuple(trials))
    if not tried:
        say(f"second opinion on {condition}: no remedy has an override that could be tried.")
    else:
        say(f"  best: {opinion.best}" if opinion.best else "  none of them heals in so few steps.")
    return opinion


def append(path: str | Path, opinion: SecondOpinion) -> None:
    """Adds to the log of a run what its remedies made of it, after the run's end: only then is it asked.

    Args:
        path: The run log, or its folder.
        opinion: On the run.
    """
    line = json.dumps({_KIND: asdict(opinion)}, separators=(",", ":"))
    with log_file(path).open("a", encoding="ascii") as file:
        file.write(f"{line}\n")


def read_second_opinion(path: str | Path) -> SecondOpinion | None:
    """What a run's remedies made of it, from its log; None where nobody asked.

    Args:
        path: The run log, or its folder.
    """
    with log_file(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST))
        last = file.read().splitlines()[-1]
    if not last.startswith(f'{{"{_KIND}":'.encode()):
        return None
    content = json.loads(last)[_KIND]
    return SecondOpinion(**{**content, "trials": tuple(Trial(**trial) for trial in content["trials"])})
