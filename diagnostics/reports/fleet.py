"""Many runs as one table: who differs only in the seed is one row, and which setting separates the sick from the sound.

Standard library only: a table of five hundred runs needs neither numpy nor figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from diagnostics.records import SEVERITY_NAMES, WARNING, RunInfo, condition_in_short

UNKNOWN = "unknown"
MANY_VALUES = 3  # more different numbers than this are split at one threshold


@dataclass(frozen=True, slots=True)
class Summary:
    """One run as the table needs it.

    Attributes:
        path: The run log.
        place: The folder, as given, below which it was found.
        name: For people.
        overrides: All of its Hydra overrides.
        config: Its configuration, flat: dotted key to value as text.
        seed: Random seed, where there is one.
        condition: The verdict's, or so far if the run has no end.
        severity: Likewise.
        slope: The last backward slope, in decades per layer; None if no step had one.
        decades: The decades of the same fit.
        clip_fraction: Share of the steps whose gradients were clipped; None without a step.
        violations: Rules of the loop that were broken, by name; a name per entry.
        loss: The last one.
        steps: Number of the last step plus one.
        status: ``finished``, ``stopped``, ``failed``, ``interrupted``, or ``no end``.
        error: Why it failed or was stopped, in one line; or None.
    """

    path: Path
    place: Path
    name: str
    overrides: tuple[str, ...]
    config: Mapping[str, str]
    seed: int | None
    condition: str
    severity: int
    slope: float | None
    decades: float | None
    clip_fraction: float | None
    violations: tuple[str, ...]
    loss: float | None
    steps: int
    status: str
    error: str | None = None

    @property
    def sick(self) -> bool | None:
        """Whether the verdict is a warning or worse, or a rule of the loop was broken; None where nothing is known."""
        if self.severity >= WARNING or self.violations:
            return True
        return None if self.condition == UNKNOWN else False


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of a number over the runs of a row that have it.

    Example:
        >>> Spread.of([3.0, 1.0, None, 2.0])
        Spread(count=3, median=2.0, low=1.0, high=3.0)
    """

    count: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of what is there; a NaN makes all of it NaN; None if nothing is there."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        broken = next((value for value in known if value != value), None)  # noqa: PLR0124 -- NaN
        if broken is not None:
            return cls(len(known), broken, broken, broken)
        return cls(len(known), median(known), min(known), max(known))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a run, or several that differ only in their seed.

    Attributes:
        overrides: What tells this row from the others, as ``key=value``.
        members: Its runs, the sickest first.
    """

    overrides: tuple[str, ...]
    members: tuple[Summary, ...]

    @property
    def label(self) -> str:
        """The run's name; for several runs what they share."""
        if len(self.members) == 1:
            return self.members[0].name
        return " ".join(self.overrides) or self.members[0].name

    @property
    def sick(self) -> int:
        """How many of the runs are sick."""
        return sum(member.sick is True for member in self.members)

    @property
    def condition(self) -> str:
        """The sickest run's."""
        return self.members[0].condition

    @property
    def severity(self) -> int:
        """The sickest run's."""
        return self.members[0].severity

    @property
    def violations(self) -> tuple[str, ...]:
        """Every rule that one of the runs broke, once."""
        return tuple(dict.fromkeys(rule for member in self.members for rule in member.violations))

    @property
    def slope(self) -> Spread | None:
        """Of the last backward slopes."""
        return Spread.of(member.slope for member in self.members)

    @property
    def decades(self) -> Spread | None:
        """Of the decades over the whole depth."""
        return Spread.of(member.decades for member in self.members)

    @property
    def clip_fraction(self) -> Spread | None:
        """Of the shares of clipped steps."""
        return Spread.of(member.clip_fraction for member in self.members)

    @property
    def loss(self) -> Spread | None:
        """Of the last losses."""
        return Spread.of(member.loss for member in self.members)

    @property
    def verdict(self) -> str:
        """The sickest run's, with its severity in words; never calm while a rule of the loop is broken."""
        if self.severity:
            return f"{self.condition} ({SEVERITY_NAMES[self.severity]})"
        return condition_in_short(self.condition, unlawful=bool(self.violations))

    @property
    def status(self) -> str:
        """How the runs ended, with counts where they ended differently."""
        counts = self.statuses
        return ", ".join(f"{count} {one}" if len(counts) > 1 else one for one, count in counts.items())

    @property
    def statuses(self) -> Mapping[str, int]:
        """How the runs ended, with counts, the most frequent first."""
        return _counted(member.status for member in self.members)

    @property
    def logs(self) -> tuple[Path, ...]:
        """The run logs."""
        return tuple(member.path for member in self.members)


@dataclass(frozen=True, slots=True)
class Group:
    """The runs that share a value, or lie on one side of a threshold.

    Attributes:
        value: As text, e.g. ``"relu"`` or ``"≥ 0.5"``; ``"(not given)"`` where a run does not have the override.
        runs: How many, of those whose health is known.
        sick: How many of them are sick.
    """

    value: str
    runs: int
    sick: int


@dataclass(frozen=True, slots=True)
class Separation:
    """How well one setting separates the sick from the sound.

    Attributes:
        key: The override's.
        groups: The largest share of sick runs first.
        right: Runs whose health is guessed right from the other runs of the same group; a group of one is a coin toss
            and counts half. So a setting that is different in every run does not shine.
        runs: Runs whose health is known.
        baseline: The same without the setting: each run guessed from all others.
    """

    key: str
    groups: tuple[Group, ...]
    right: float
    runs: int
    baseline: float

    def __str__(self) -> str:
        groups = ", ".join(f"{one.value}: {one.sick} of {one.runs} sick" for one in self.groups)
        return f"{self.key} tells {self.right:g} of {self.runs} runs right (without it {self.baseline:g}): {groups}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """All runs that a report is about.

    Attributes:
        rows: The sickest first.
        common: The overrides that all runs share.
        separations: The settings that tell more than nothing, the best first.
        troubles: A sentence for each log that could not be read.
    """

    rows: tuple[Row, ...]
    common: tuple[str, ...] = ()
    separations: tuple[Separation, ...] = ()
    troubles: tuple[str, ...] = field(default=())

    @property
    def runs(self) -> tuple[Summary, ...]:
        """Every run, in the order of the rows."""
        return tuple(member for row in self.rows for member in row.members)

    @property
    def sick(self) -> int:
        """How many of them are sick."""
        return sum(row.sick for row in self.rows)


def assemble(runs: Iterable[Summary], troubles: Iterable[str] = ()) -> Fleet:
    """The table of the runs.

    Args:
        runs: In any order.
        troubles: Sentences about logs that could not be read.

    Example:
        >>> assemble([]).rows
        ()
    """
    runs = sorted(runs, key=_sickness)
    given = _settings(runs)
    differing = [{key: one for key, one in own.items() if _differs(key, given)} for own in given]
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, (run, own) in enumerate(zip(runs, differing, strict=True)):
        apart = {key: value for key, value in own.items() if not is_seed(key)}
        name = () if run.overrides or run.config else (run.name,)
        groups.setdefault((run.place, *name, *sorted(apart.items())), []).append(place)
    rows = []
    for places in groups.values():
        seeds = len(places) == 1 and _seed_tells(places[0], differing, groups)
        shown = [f"{key}={value}" for key, value in differing[places[0]].items() if seeds or not is_seed(key)]
        rows.append(Row(tuple(shown), tuple(runs[place] for place in places)))
    common = [f"{key}={value}" for key, value in given[0].items() if not _differs(key, given)] if runs else []
    return Fleet(tuple(rows), tuple(common), tuple(_separations(runs, differing)), tuple(troubles))


def is_seed(key: str) -> bool:
    """Whether an override sets a random seed.

    Example:
        >>> is_seed("trainer.seed"), is_seed("model.seedling")
        (True, False)
    """
    return key.rsplit(".", maxsplit=1)[-1] == "seed"


def flatten(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested configuration as dotted keys and values as text.

    Example:
        >>> dict(flatten({"model": {"depth": 3}, "lr": 0.1}))
        {'model.depth': '3', 'lr': '0.1'}
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def describe_info(info: RunInfo | None, fallback: str) -> tuple[str, tuple[str, ...], Mapping[str, str], int | None]:
    """Name, overrides, flat configuration and seed of a run."""
    if info is None:
        return fallback, (), {}, None
    return info.name, info.overrides, dict(flatten(info.config)), info.seed


def _sickness(run: Summary) -> tuple[object, ...]:
    return (-run.severity, -len(run.violations), run.status == "finished", run.name, str(run.path))


def _settings(runs: Sequence[Summary]) -> list[dict[str, str]]:
    """What each run was given: its overrides, or its whole configuration where no run has any."""
    if any(run.overrides for run in runs):
        return [dict(map(_parse, run.overrides)) for run in runs]
    return [dict(run.config) for run in runs]


def _parse(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _differs(key: str, given: Sequence[Mapping[str, str]]) -> bool:
    return any(one.get(key) != given[0].get(key) for one in given)


def _seed_tells(
    place: int, differing: Sequence[Mapping[str, str]], groups: Mapping[tuple[object, ...], Sequence[int]]
) -> bool:
    """Whether a row of one run is told from the others by nothing but its seed, as in a place of its own."""
    return len(groups) > 1 and all(is_seed(key) for key in differing[place])


def _counted(values: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _separations(runs: Sequence[Summary], given: Sequence[Mapping[str, str]]) -> list[Separation]:
    known = [(own, run.sick) for run, own in zip(runs, given, strict=True) if run.sick is not None]
    health = [sick for _, sick in known]
    if len(set(health)) < 2:
        return []
    baseline = _guessed_right([health])
    keys = dict.fromkeys(key for own, _ in known for key in own if not is_seed(key))
    found = [_separation(key, [(own.get(key), bool(sick)) for own, sick in known], baseline) for key in keys]
    return sorted((one for one in found if one.right > baseline), key=lambda one: (-one.right, one.key))


def _separation(key: str, pairs: Sequence[tuple[str | None, bool]], baseline: float) -> Separation:
    groups: dict[str, list[bool]] = {}
    for value, sick in pairs:
        groups.setdefault("(not given)" if value is None else value, []).append(sick)
    numbers = [_number(value) for value, _ in pairs]
    if len(groups) > MANY_VALUES and all(number is not None for number in numbers):
        groups = _split(sorted({number for number in numbers if number is not None}), numbers, pairs)
    shown = [Group(value, len(sick), sum(sick)) for value, sick in groups.items()]
    shown.sort(key=lambda group: (-group.sick / group.runs, group.value))
    return Separation(key, tuple(shown), _guessed_right(groups.values()), len(pairs), baseline)


def _split(
    values: Sequence[float], numbers: Sequence[float | None], pairs: Sequence[tuple[str | None, bool]]
) -> dict[str, list[bool]]:
    """The two sides of the threshold that tells most; the threshold is the smallest value of the upper side."""

    def sides(threshold: float, below: float) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] = {f"≤ {below:g}": [], f"≥ {threshold:g}": []}
        for number, (_, sick) in zip(numbers, pairs, strict=True):
            found[f"≥ {threshold:g}" if number is not None and number >= threshold else f"≤ {below:g}"].append(sick)
        return found

    right: Callable[[dict[str, list[bool]]], float] = lambda groups: _guessed_right(groups.values())  # noqa: E731
    return max((sides(above, below) for below, above in pairwise(values)), key=right)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _guessed_right(groups: Iterable[Sequence[bool | None]]) -> float:
    """How many runs the majority of the others in their group guesses right; a draw is half a run.

    No group is guessed worse than by tossing a coin: of one that is half sick the others always point the wrong way.
    """
    right = 0.0
    for group in groups:
        sick, sound = sum(map(bool, group)), sum(not one for one in group)
        guessed = 0.0
        for own, other, count in ((sick - 1, sound, sick), (sound - 1, sick, sound)):
            guessed += count * (1.0 if own > other else 0.5 if own == other else 0.0)
        right += max(guessed, len(group) / 2)
    return right
