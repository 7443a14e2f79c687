"""Which backward passes are inside a gradient and have been spent by no step yet."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

KEPT = 64
"""Passes remembered of gradients that nobody spends."""


@dataclass(slots=True)
class _Group:
    """Parameters with one history: passes that are inside their gradients, and passes that were wiped unspent."""

    members: set[int]
    inside: tuple[int, ...] = ()
    wiped: tuple[int, ...] = ()


class Windows:
    """Parameters grouped by the passes that have added to them since their last step.

    Most passes add to the same parameters, so there are few groups, and the work is done by set operations.

    Example:
        >>> windows = Windows()
        >>> windows.add({0, 1}, 7)
        >>> windows.add({1}, 8)
        >>> windows.inside({0}), windows.inside({0, 1}), windows.fresh({0, 1, 2}) == {0, 1}
        ((7,), (7, 8), True)
        >>> windows.clear({0, 1})
        >>> windows.inside({0, 1}), windows.wiped({0, 1})
        ((), (7, 8))
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def add(self, members: AbstractSet[int], number: int) -> None:
        """A pass has added to these parameters."""
        new = set(members)
        for group in self._split(members):
            if not group.inside or group.inside[-1] != number:
                group.inside = (*group.inside, number)[-KEPT:]
            new -= group.members
        if new:
            self._groups.append(_Group(new, (number,)))

    def clear(self, members: AbstractSet[int]) -> None:
        """The gradients of these parameters were wiped."""
        for group in self._split(members):
            group.wiped = (*group.wiped, *group.inside)[-KEPT:]
            group.inside = ()

    def spend(self, members: AbstractSet[int]) -> None:
        """A step has spent the gradients of these parameters: their history begins anew."""
        self._split(members)
        self._groups = [group for group in self._groups if not group.members <= members]

    def fresh(self, members: AbstractSet[int]) -> set[int]:
        """Those of the parameters whose gradient holds what no step has spent."""
        return {index for group in self._groups if group.inside for index in group.members & members}

    def inside(self, members: AbstractSet[int]) -> tuple[int, ...]:
        """The passes inside the gradients of these parameters, of the one that holds most."""
        return max((group.inside for group in self._touching(members)), key=len, default=())

    def wiped(self, members: AbstractSet[int]) -> tuple[int, ...]:
        """The passes that were wiped unspent from the gradients of these parameters, likewise."""
        return max((group.wiped for group in self._touching(members)), key=len, default=())

    def open(self) -> list[tuple[set[int], tuple[int, ...]]]:
        """Everything that nobody has spent: parameters and passes."""
        return [(group.members, group.inside) for group in self._groups if group.inside]

    def _touching(self, members: AbstractSet[int]) -> Iterable[_Group]:
        return (group for group in self._groups if not group.members.isdisjoint(members))

    def _split(self, members: AbstractSet[int]) -> list[_Group]:
        """The groups that lie within these parameters, after those that lie partly within were cut in two."""
        within = []
        for group in list(self._groups):
            common = group.members & members
            if not common:
                continue
            if len(common) < len(group.members):
                self._groups.append(_Group(group.members - common, group.inside, group.wiped))
                group.members = common
            within.append(group)
        return within
