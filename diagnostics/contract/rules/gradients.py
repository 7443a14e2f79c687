"""What is inside the gradients that a step spends: nothing twice, nothing too many, nothing lost.

Known by effect: which passes added to a parameter, what ``.grad`` held when a pass began, and what a step found in it.
Where the loop has put another tensor into ``.grad`` since the pass, what is in that is the loop's affair.
Not seen: gradients that were zeroed in place (``zero_grad(set_to_none=False)``) of parameters that no pass begins or
ends with, between two passes of a window; windows whose passes reach disjoint parameters count as the longest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from diagnostics.contract.acts import Backward, Closing, Step
from diagnostics.contract.rules import Finding, Judge, at, describe
from diagnostics.contract.rules.windows import Windows

_REMEMBERED = 4096
_SURE = 1e-19
"""Gradients that are not smaller in sum have a 2-norm above zero, even where nobody may look at it more closely."""


@dataclass(frozen=True, slots=True)
class _Spent:
    """What gradients still hold: contributions of this many steps, the first of them, and its norms by parameter."""

    first: int
    count: int
    norms: Mapping[int, float]


class Gradients(Judge):
    """``missing_zero_grad``, ``zero_grad_before_step``, ``step_without_grads``, ``window_size``, ``dropped_window``.

    Args:
        names: Parameter names by index.
        accumulate: Backward passes that one step is meant to spend.
    """

    def __init__(self, names: Sequence[str], accumulate: int = 1) -> None:
        self.windows = Windows()
        self._names = names
        self._accumulate = accumulate
        self._inside: dict[int, _Spent] = {}  # parameters whose gradient still holds what a step has spent
        self._sizes: dict[int, float] = {}
        self._owners: dict[int, str] = {}  # which optimizer spends a parameter's gradient, as far as has been seen
        self._steps: dict[str, int] = {}  # the newest step by optimizer
        self._pass = 0
        self._unsound: set[int] = set()  # passes with gradients that were not finite
        self._aside: set[int] = set()  # passes in evaluation mode
        self._spent: set[int] = set()  # passes of which some step has spent a part

    def backward(self, fact: Backward) -> None:
        """Takes a backward pass."""
        if not fact.continued:
            self._pass += 1
            self._look(fact)
        self.windows.add(fact.accumulated, self._pass)
        self._sizes.update(fact.sizes)
        if not all(map(math.isfinite, fact.sizes.values())):
            self._unsound.add(self._pass)
        if not fact.training:
            self._aside.add(self._pass)
        for known in (self._unsound, self._aside, self._spent):
            if len(known) > _REMEMBERED:
                known.intersection_update(range(self._pass - _REMEMBERED // 2, self._pass + 1))

    def step(self, fact: Step) -> Iterable[Finding]:
        """Takes a step."""
        held = fact.norms.keys() | fact.empty
        spends = any(norm != 0 for norm in fact.norms.values())
        if not spends:
            yield from self._nothing(fact, held)
        if not fact.skipped:
            yield from self._spent_again(fact)
            if spends and self._accumulate > 1 and not fact.closure:
                yield from self._window(fact)
            self._spend(fact)
        self.windows.spend(held)

    def close(self, fact: Closing) -> Iterable[Finding]:
        """The end of the loop: passes of a short last window that no step has spent."""
        if self._accumulate == 1 or not fact.finished:
            return
        dropped: set[int] = set()
        passes: set[int] = set()
        for members, inside in self.windows.open():
            lost = set(inside) - self._spent - self._aside
            if lost and (there := (members & self._owners.keys()) - fact.cleared):
                dropped |= there
                passes |= lost
        if 0 < len(passes) < self._accumulate:
            step = self._last(dropped)
            message = (
                f"After step {step} came {_passes(len(passes))} that no step has spent, where a step is declared to "
                f"spend {self._accumulate}: the gradients of {self._describe(dropped)} are lost."
            )
            yield Finding("dropped_window", step, message, tuple(sorted(dropped)))

    def _look(self, fact: Backward) -> None:
        """What ``.grad`` held when the pass began."""
        if not fact.leftover:
            self._inside.clear()
        for index in list(self._inside):
            if fact.leftover.get(index, 0.0) == 0 or index in fact.replaced:
                del self._inside[index]
        cleared = set(fact.cleared)
        if fact.zeroed:  # few are looked at; what else the same optimizers spend went with them
            owners = {self._owners.get(index) for index in fact.zeroed}
            held = set().union(*(members for members, _ in self.windows.open()))
            cleared |= fact.zeroed | {index for index in held if self._owners.get(index) in owners}
        if cleared:
            self.windows.clear(cleared)

    def _nothing(self, fact: Step, held: AbstractSet[int]) -> Iterable[Finding]:
        """A step that finds no gradient, or nothing but zeros."""
        fresh = self.windows.fresh(held)
        wiped = fresh if not fact.norms else {index for index in fresh if not self._sizes.get(index, 0.0) < _SURE}
        passes = self.windows.inside(fresh)
        if wiped:  # by a closure's step, which may clear what it has spent; or by a loop that skips what is not finite
            if not fact.closure and self._unsound.isdisjoint(passes):
                message = (
                    f"{at(fact.optimizer, fact.step)} found nothing to spend, although {_passes(len(passes))} had made "
                    f"gradients for it: those of {self._describe(fresh)} were cleared between the backward pass and "
                    "the step, so nothing was learned."
                )
                yield Finding("zero_grad_before_step", fact.step, message, tuple(sorted(fresh)))
        elif not fact.norms and not (fact.foreign and fact.empty <= fact.foreign):
            what = f"{at(fact.optimizer, fact.step)} had nothing to spend: no parameter of the optimizer has a gradient"
            yield Finding("step_without_grads", fact.step, f"{what}.")

    def _spent_again(self, fact: Step) -> Iterable[Finding]:
        if not self._inside:
            return
        fresh = self.windows.fresh(fact.rewritten) if fact.rewritten else set()
        for index, norm in fact.norms.items():
            if norm == 0 or (index in fact.rewritten and index not in fresh):
                self._inside.pop(index, None)
        stale = [index for index in fact.norms if index in self._inside]
        if fact.replaced.issuperset(stale):
            return
        first = min(self._inside[index].first for index in stale)
        count = 1 + max(self._inside[index].count for index in stale)
        message = (
            f"{at(fact.optimizer, fact.step)} spent gradients that step {first} had already spent: .grad of "
            f"{self._describe(stale)} was not cleared since and now holds the gradients of {count} steps instead of 1"
        )
        before = math.hypot(*(self._inside[index].norms[index] for index in stale))
        now = math.hypot(*(fact.norms[index] for index in stale))
        size = f"; the gradient is {now / before:.3g} × the fresh one of step {first}" if 0 < before < math.inf else ""
        yield Finding("missing_zero_grad", fact.step, f"{message}{size}.", tuple(stale))

    def _window(self, fact: Step) -> Iterable[Finding]:
        """How many passes a step spends, where that is declared."""
        inside, wiped = self.windows.inside(fact.norms.keys()), self.windows.wiped(fact.norms.keys())
        declared = self._accumulate
        if len(inside) > declared:
            indices = tuple(index for index in fact.norms if len(self.windows.inside({index})) > declared)
            message = (
                f"{at(fact.optimizer, fact.step)} spent the gradients of {_passes(len(inside))} where accumulate="
                f"{declared} declares {declared}: {self._describe(indices)} moved on {len(inside) / declared:.3g} × "
                "the gradient that was meant."
            )
            yield Finding("window_size", fact.step, message, indices)
        lost = len(set(wiped) - self._spent - self._aside - self._unsound)
        known = fact.replaced.isdisjoint(fact.norms)
        if known and 0 < lost < declared and 0 < len(inside) < declared <= lost + len(inside):
            indices = tuple(index for index in fact.norms if self.windows.wiped({index}))
            message = (
                f"{at(fact.optimizer, fact.step)} spent the gradients of {_passes(len(inside))} where accumulate="
                f"{declared} declares {declared}: those of {_passes(lost)} into {self._describe(indices)} were cleared "
                "inside the window, before any step spent them."
            )
            yield Finding("zero_grad_before_step", fact.step, message, indices)

    def _spend(self, fact: Step) -> None:
        self._spent.update(*(inside for members, inside in self.windows.open() if members & fact.norms.keys()))
        self._owners.update(dict.fromkeys(fact.norms, fact.optimizer))
        again = {index: replace(one, count=one.count + 1) for index, one in self._inside.items() if index in fact.norms}
        new = dict.fromkeys(fact.norms, _Spent(fact.step, 1, fact.norms))
        if 0.0 in fact.norms.values():
            new = {index: spent for index, spent in new.items() if fact.norms[index] != 0}
            again = {index: spent for index, spent in again.items() if fact.norms[index] != 0}
        self._inside |= new | again
        self._steps[fact.optimizer] = fact.step

    def _last(self, indices: Iterable[int]) -> int:
        return max((self._steps.get(self._owners[index], 0) for index in indices), default=0)

    def _describe(self, indices: Iterable[int]) -> str:
        return describe([self._names[index] for index in sorted(indices)])


def _passes(number: int) -> str:
    return "1 backward pass" if number == 1 else f"{number} backward passes"
