"""The clip rule that clips groups of parameters each on its own. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnostics.clipping.rules import ClipRule, checked, choice
from diagnostics.clipping.state import ClipState, Member

GROUPINGS = ("group", "optimizer", "name")
OTHERS = "others"
"""The group of all parameters whose name matches no pattern."""


@dataclass(frozen=True)
class ClipByGroup(ClipRule):
    """Clips groups of parameters each on its own, each with its own norm and its own history.

    ``ClipRecord.parts`` holds one record per group, called by the group's name; the record around them tells of all
    gradients together, with ``clip_coef = total_norm_after / total_norm``.

    Args:
        rule: What each group is clipped by, except those that ``rules`` names; None leaves them alone.
        by: What makes a group: ``"group"``, a parameter group of the optimizer, called ``"0"``, ``"1"`` …
            (``"<optimizer>/0"`` … where there are several); ``"optimizer"``; or ``"name"``, all parameters whose name
            matches the same pattern.
        rules: Group's name to rule or None; with ``by="name"`` regular expressions that are looked for in the
            parameter's name, of which the first that is found counts. The rest is the group ``"others"``.

    Raises:
        ValueError: If there are no patterns to go by, one is none, or by is something else.
        TypeError: If one of the rules is none, or clips by group itself.

    Example:
        >>> from diagnostics import ClipByNorm
        >>> rule = ClipByGroup(ClipByNorm(1.0), by="name", rules={"^embedding": ClipByNorm(0.1)})
        >>> [name for name, _, _ in rule.start().split([Member("embedding.weight"), Member("head.weight")])]
        ['^embedding', 'others']
    """

    rule: ClipRule | None
    by: str = "group"
    rules: Mapping[str, ClipRule | None] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", getattr(self.by, "name", self.by))  # Hydra brings an Enum
        object.__setattr__(self, "rules", dict(self.rules or {}))
        choice(self, "by", GROUPINGS)
        for name, rule in (("rule", self.rule), *((f"rules[{name!r}]", rule) for name, rule in self.named.items())):
            checked(name, rule)
            if isinstance(rule, ClipByGroup):
                raise TypeError(f"{name} must clip a group as a whole; got a ClipByGroup inside a ClipByGroup.")
        if self.by == "name":
            _check_patterns(self.named)

    @property
    def named(self) -> Mapping[str, ClipRule | None]:
        """The groups that have a rule of their own."""
        return self.rules or {}

    @property
    def norm_type(self) -> float:  # type: ignore[override]
        """The p of the norm of all gradients: the groups' own if they agree, else 2."""
        found = {rule.norm_type for rule in (self.rule, *self.named.values()) if rule is not None}
        return found.pop() if len(found) == 1 else 2.0

    def start(self) -> GroupState:
        """The rules at work, each group's with nothing remembered."""
        return GroupState(self)


class GroupState(ClipState):
    """What the rules of the groups remember.

    Args:
        rule: Which groups there are, and their rules.
    """

    def __init__(self, rule: ClipByGroup) -> None:
        super().__init__("group", rule.norm_type)
        self.by = rule.by
        self._group = rule
        self._states: dict[str, ClipState] = {}
        self._known: dict[str, str] = {}

    def split(self, members: Sequence[Member]) -> list[tuple[str, ClipState, list[int]]]:
        """The groups: name, rule at work, places of the members."""
        places: dict[str, list[int]] = {}
        for place, member in enumerate(members):
            places.setdefault(self._called(member), []).append(place)
        return [(name, self._state(name), found) for name, found in places.items()]

    def _called(self, member: Member) -> str:
        if self.by != "name":
            return member.group if self.by == "group" else member.optimizer
        name = self._known.get(member.name)
        if name is None:
            name = next((pattern for pattern in self._group.named if re.search(pattern, member.name)), OTHERS)
            self._known[member.name] = name
        return name

    def _state(self, name: str) -> ClipState:
        if name not in self._states:
            rule = self._group.named.get(name, self._group.rule)
            self._states[name] = ClipState("none", self.norm_type) if rule is None else rule.start()
        return self._states[name]

    def state_dict(self) -> dict[str, Any]:  # noqa: D102 -- as the base class
        return {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        for name, part in state.items():
            self._state(name).load_state_dict(part)


def _check_patterns(patterns: Iterable[str]) -> None:
    if not patterns:
        raise ValueError("rules must hold patterns of names with by='name'; got none.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:  # noqa: PERF203
            raise ValueError(f"rules must be by regular expressions; got {pattern!r} ({error}).") from None
