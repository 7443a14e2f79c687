"""Diagnoses held against labels: sick runs called healthy, runs that learn called sick, and remedies that heal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from diagnostics.diagnosis import diagnose
from diagnostics.outcomes.labels import ENOUGH, Label, Runs, merge
from diagnostics.records import WARNING, Diagnosis, Remedy
from diagnostics.runlog import read_run

AT_INIT = 3  # records by which a run's beginning is judged: as many as confirm a diagnosis
GRADIENT_REASONS = ("gradient", "nonfinite")  # a run that is sick for one of these must not be called healthy
HEALTHY = "healthy"


@dataclass(frozen=True)
class Judgement:
    """A label beside the verdicts on the same run.

    Attributes:
        kind: As in the label; likewise the next four.
        overrides: Of the configuration.
        seed: Of the trainer.
        label: ``well`` or ``sick``.
        reason: Of a sick run.
        at_init: The verdict's condition after the first records.
        at_end: And after the last.
        agrees: Whether the last verdict is what the label demands: ``yes``, ``no``, or nothing where the reason is
            ``other`` and both would be right.
    """

    kind: str
    overrides: str
    seed: int
    label: str
    reason: str
    at_init: str
    at_end: str
    agrees: str


@dataclass(frozen=True)
class Healing:
    """A sick run, trained again with the first remedy of its worst diagnosis.

    Attributes:
        kind: As in the label.
        overrides: Of the sick run.
        seed: Of the trainer.
        condition: What it was diagnosed with at its end.
        remedy: The first remedy's override, or its words where it has none; then it heals nothing.
        score: Of the sick run.
        healed_score: With the remedy.
        twin_score: Of the shallow sound twin.
        healed: Whether the remedy's run reaches 90 % of the twin's score.
    """

    kind: str
    overrides: str
    seed: int
    condition: str
    remedy: str
    score: float
    healed_score: float
    twin_score: float
    healed: bool


def worst(diagnoses: Iterable[Diagnosis]) -> Diagnosis | None:
    """The worst diagnosis that still stands at warning or above, as a verdict has it.

    Example:
        >>> worst([Diagnosis("vanishing", 1, 0, 0, {}, "A notice.")]) is None
        True
    """
    standing = [one for one in diagnoses if one.cleared is None and one.confirmed and one.severity >= WARNING]
    return max(standing, key=lambda one: one.severity, default=None)


def judge(runs: Runs, label: Label) -> Judgement:
    """Diagnoses a labelled run from its log, which is trained again where it is missing."""
    runs.result(label.overrides, label.seed, logged=True)
    records = read_run(runs.log(label.overrides, label.seed)).records
    first, last = (worst(diagnose(part)) for part in (records[:AT_INIT], records))
    at_init, at_end = (one.condition if one else HEALTHY for one in (first, last))
    demanded = label.label == "well" or label.reason in GRADIENT_REASONS
    agrees = "" if not demanded else "yes" if (at_end == HEALTHY) == (label.label == "well") else "no"
    return Judgement(label.kind, label.overrides, label.seed, label.label, label.reason, at_init, at_end, agrees)


def heal(runs: Runs, label: Label) -> Healing | None:
    """Trains a sick run again with its first remedy; None where its end was called healthy."""
    runs.result(label.overrides, label.seed, logged=True)
    run = read_run(runs.log(label.overrides, label.seed))
    diagnosis = worst(diagnose(run.records, run=run.info))
    if diagnosis is None:
        return None
    first = next(iter(diagnosis.remedies), Remedy("none"))
    score = runs.result(merge(label.overrides, first.override), label.seed).score if first.override else 0.0
    return Healing(
        label.kind,
        label.overrides,
        label.seed,
        diagnosis.condition,
        first.override or first.text,
        label.score,
        round(score, 4),
        label.twin_score,
        healed=score >= ENOUGH * label.twin_score,
    )


def heal_each(runs: Runs, labels: Iterable[Label]) -> list[Healing]:
    """Heals every configuration once: with its first seed that is sick for a gradient reason and not called healthy."""
    healings: dict[str, Healing] = {}
    for one in labels:
        if one.reason in GRADIENT_REASONS and one.overrides not in healings and (found := heal(runs, one)):
            healings[one.overrides] = found
    return list(healings.values())


def agreement_page(judgements: Sequence[Judgement], labels: str = "labels.csv") -> str:
    """The outcome table as Markdown: totals, two rows per condition, what disagrees, and each configuration.

    Args:
        judgements: The labels beside the verdicts.
        labels: The file of the labels.
    """
    at_end = [one for one in judgements if one.agrees]
    missed = [one for one in at_end if one.label == "sick" and one.agrees == "no"]
    alarmed = [one for one in at_end if one.label == "well" and one.agrees == "no"]
    sick, well = (sum(one.label == name for one in at_end) for name in ("sick", "well"))
    configurations = list(dict.fromkeys((one.kind, one.overrides) for one in judgements))
    lines = [
        "# Outcome table",
        "",
        f"{len(configurations)} configurations, {len(judgements)} runs. Labels: `{labels}`, by outcome alone.",
        "",
        f"- sick for a gradient reason, called healthy at the end: **{len(missed)}** of {sick}",
        f"- learned, called sick at the end: **{len(alarmed)}** of {well}",
        "",
        "## By condition",
        "",
        *_table(["verdict", "state", "runs", "gradient", "nonfinite", "other", "well"], _by_condition(judgements)),
        "",
        "## What disagrees",
        "",
        *_table(["label", "at init", "at the end", "seeds", "configuration"], _disagreements(missed, alarmed)),
        "",
        "## By configuration",
        "",
        *_table(
            ["kind", "configuration", "label", "at init", "at the end", "agrees"],
            (_configuration(kind, name, judgements) for kind, name in configurations),
        ),
    ]
    return "\n".join(lines) + "\n"


def healing_page(healings: Sequence[Healing]) -> str:
    """How often first remedies heal, as Markdown."""
    conditions = list(dict.fromkeys(one.condition for one in healings))
    counts = [(name, [one for one in healings if one.condition == name]) for name in conditions]
    lines = [
        "# Healing table",
        "",
        f"The first remedy healed **{sum(one.healed for one in healings)}** of {len(healings)} sick runs, by outcome.",
        "Where the same repair found a label's reason, this only shows that the right one was named first.",
        "",
        *_table(
            ["condition", "runs", "healed"],
            ([name, len(some), sum(one.healed for one in some)] for name, some in counts),
        ),
        "",
        *_table(
            ["healed", "condition", "first remedy", "score", "with it", "twin", "configuration"],
            (
                [
                    "yes" if one.healed else "no",
                    one.condition,
                    f"`{one.remedy}`",
                    one.score,
                    one.healed_score,
                    one.twin_score,
                    f"`{one.overrides}`",
                ]
                for one in healings
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def _by_condition(judgements: Sequence[Judgement]) -> Iterable[list[object]]:
    states: list[tuple[str, Callable[[Judgement], str]]] = [
        ("at init", lambda one: one.at_init),
        ("at the end", lambda one: one.at_end),
    ]
    conditions = dict.fromkeys(name for one in judgements for name in (one.at_init, one.at_end))
    for condition in sorted(conditions, key=lambda name: (name != HEALTHY, name)):
        for state, verdict in states:
            found = Counter(one.reason or one.label for one in judgements if verdict(one) == condition)
            yield [condition, state, found.total(), *(found[name] for name in (*GRADIENT_REASONS, "other", "well"))]


def _disagreements(*groups: Sequence[Judgement]) -> Iterable[list[object]]:
    for one in dict.fromkeys((one.label, one.overrides) for group in groups for one in group):
        own = [each for group in groups for each in group if (each.label, each.overrides) == one]
        states = (_counted([getattr(each, name) for each in own]) for name in ("at_init", "at_end"))
        yield [own[0].label, *states, ", ".join(str(each.seed) for each in own), f"`{one[1]}`"]


def _configuration(kind: str, overrides: str, judgements: Sequence[Judgement]) -> list[str]:
    own = [one for one in judgements if one.overrides == overrides]
    columns = (
        [f"{one.label} {one.reason}".strip() for one in own],
        *([getattr(one, name) for one in own] for name in ("at_init", "at_end", "agrees")),
    )
    return [kind, f"`{overrides}`", *(_counted(column) for column in columns)]


def _counted(values: Sequence[str]) -> str:
    """Equal values once, different ones with how often each was found."""
    counts = Counter(value or "either" for value in values)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count} {value}" for value, count in counts.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
