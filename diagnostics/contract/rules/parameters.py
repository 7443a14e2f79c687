"""Which parameters a step reaches: every one that has a gradient is in an optimizer, and every one in it learns.

By effect: a gradient that no optimizer spends, and no gradient at all, are lawful where the loop moves the parameter by
hand or puts another in its place (a moving average that the optimizer was given too); a tensor that no model has is
lawful in an optimizer where it gets gradients (a loss with parameters of its own). Parameters that are in no optimizer
and get no gradient (an exponential average inside the model) are as good as frozen: nothing is said.

Not seen: which modules ran and what is unregistered, where there are no forward hooks (``every=0``, a compiled model)
or the model's own forward never runs; parameters inside a reentrant checkpoint; updates of sparse gradients, and those
inside a closure's step. A gradient too small to move a number in float32 has converged or vanished, and is no matter
of the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diagnostics.contract.acts import Backward, Closing, Moved, Step
from diagnostics.contract.rules import Finding, Judge, at, describe, modules

PATIENCE = 3
"""Steps, after the first that showed it, before something is taken for what it looks like."""
LAST_STEP = 100
"""When a module that has not run is taken for one that never will."""


@dataclass(slots=True)
class _Without:
    """A parameter that has had no gradient yet."""

    optimizer: str
    first: int
    foreign: bool
    steps: int = 0
    ran: int = 0
    first_ran: int = 0

    @property
    def ripe(self) -> bool:
        if self.foreign:
            return self.steps > PATIENCE
        return self.ran >= PATIENCE or self.first + self.steps > LAST_STEP

    @property
    def ripe_at_close(self) -> bool:
        return self.steps >= PATIENCE or not self.ran

    @property
    def since(self) -> int:
        return self.first_ran if self.ran else self.first


@dataclass(frozen=True, slots=True)
class _Seen:
    """Since which step, and how many times."""

    optimizer: str
    first: int
    count: int = 1
    lost: bool = False


class Parameters(Judge):
    """The rules ``param_not_in_optimizer`` to ``no_grad_flow``, and ``no_update``.

    Args:
        names: Parameter names by index.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._reached: set[int] = set()  # has had a gradient
        self._without: dict[int, _Without] = {}
        self._stranded: dict[int, _Seen] = {}
        self._by_hand: set[int] = set()
        self._still: dict[int, _Seen] = {}
        self._told: set[tuple[str, int]] = set()

    def backward(self, fact: Backward) -> None:
        """Takes a backward pass."""
        self._reached |= fact.accumulated

    def step(self, fact: Step) -> Iterable[Finding]:
        """Takes a step."""
        self._reached.update(fact.norms)
        if fact.unregistered:
            yield self._unregistered(fact)
        if fact.empty or self._without:
            yield from self._unreached(fact)
        yield from self._strand(fact.optimizer, fact.step, fact.stranded, PATIENCE + 1)

    def moved(self, fact: Moved) -> Iterable[Finding]:
        """Takes what a recorded step did to the weights."""
        for index in self._still.keys() & fact.moved:
            del self._still[index]
        for index, lost in fact.still.items():
            seen = self._still.get(index)
            count, first = (seen.count + 1, seen.first) if seen else (1, fact.step)
            self._still[index] = _Seen(fact.optimizer, first, count, lost)
        yield from self._stand_still(PATIENCE)

    def close(self, fact: Closing) -> Iterable[Finding]:
        """The end of the loop."""
        if not fact.finished:
            return
        yield from self._strand("", 0, fact.stranded, 2)
        ripe = {index: one for index, one in self._without.items() if one.ripe_at_close and self._is_without(index)}
        yield from self._tell_unreached(ripe)
        yield from self._stand_still(2)

    def _is_without(self, index: int) -> bool:
        return index not in self._reached

    def _unregistered(self, fact: Step) -> Finding:
        number = len(fact.unregistered)
        message = (
            f"The forward pass before step {fact.step} used {describe(fact.unregistered)}, known to no watched model "
            f"and no optimizer: {_count(number, 'parameter')} {_get(number)} gradients and {_does(number)} not learn."
        )
        return Finding("param_not_registered", fact.step, message, names=fact.unregistered)

    def _unreached(self, fact: Step) -> Iterable[Finding]:
        for index in self._without.keys() & (self._reached | fact.by_hand):
            del self._without[index]
        alone = bool(fact.empty) and not fact.norms and fact.empty <= fact.foreign
        if not fact.norms and not alone:
            return
        for index in sorted(fact.empty - self._reached - fact.by_hand):
            foreign = index in fact.foreign
            one = self._without.setdefault(index, _Without(fact.optimizer, fact.step, foreign))
            one.steps += PATIENCE + 1 if alone else 1
            if index in fact.ran:
                one.first_ran = one.first_ran if one.ran else fact.step
                one.ran += 1
        yield from self._tell_unreached({index: one for index, one in self._without.items() if one.ripe})

    def _tell_unreached(self, found: Mapping[int, _Without]) -> Iterable[Finding]:
        kinds: dict[tuple[str, bool, int, bool], list[int]] = {}
        for index, one in found.items():
            rule = "optimizer_param_not_in_model" if one.foreign else "no_grad_flow"
            if (rule, index) not in self._told:
                self._told.add((rule, index))
                kinds.setdefault((one.optimizer, one.foreign, one.since, one.ran > 0), []).append(index)
        for (optimizer, foreign, step, ran), indices in kinds.items():
            names = [self._names[index] for index in indices]
            if foreign:
                message = (
                    f"{at(optimizer, step)} and those after it held {_count(len(indices), 'tensor')} that no watched "
                    f"model has, and that never {_get(len(indices))} a gradient: the optimizer was made for another "
                    "model, or for parameters that have been replaced since."
                )
                yield Finding("optimizer_param_not_in_model", step, message, tuple(indices))
                continue
            why = "although the module ran" if ran else "nor did the module run where that was looked at"
            message = (
                f"{at(optimizer, step)} and those after it had no gradient for {describe(names)}, {why}: "
                f"{_count(len(modules(names)), 'module')} of the optimizer {_does(len(modules(names)))} not learn."
            )
            yield Finding("no_grad_flow", step, message, tuple(indices))

    def _strand(self, optimizer: str, step: int, stranded: Mapping[int, bool], looks: int) -> Iterable[Finding]:
        ripe: dict[tuple[str, int], list[int]] = {}
        for index, changed in stranded.items():
            if changed:
                self._by_hand.add(index)
            if index in self._by_hand:
                continue
            seen = self._stranded.get(index)
            seen = _Seen(optimizer, step) if seen is None else _Seen(seen.optimizer, seen.first, seen.count + 1)
            self._stranded[index] = seen
            if seen.count >= looks and ("stranded", index) not in self._told:
                self._told.add(("stranded", index))
                ripe.setdefault((seen.optimizer, seen.first), []).append(index)
        for (_, first), indices in ripe.items():
            names = [self._names[index] for index in indices]
            message = (
                f"Since step {first} {describe(names)} {_get(len(names))} gradients that no optimizer spends: "
                f"{_count(len(names), 'trainable parameter')} {_does(len(names))} not move."
            )
            yield Finding("param_not_in_optimizer", first, message, tuple(indices))

    def _stand_still(self, looks: int) -> Iterable[Finding]:
        ripe: dict[tuple[str, int, bool], list[int]] = {}
        for index, seen in self._still.items():
            if seen.count >= looks and ("still", index) not in self._told:
                self._told.add(("still", index))
                ripe.setdefault((seen.optimizer, seen.first, seen.lost), []).append(index)
        for (optimizer, first, lost), indices in ripe.items():
            why = (
                "the update is smaller than the resolution of the parameter's dtype and is rounded away"
                if lost
                else "its learning rate and gradient are not zero"
            )
            message = (
                f"{at(optimizer, first)} and the recorded ones after it left "
                f"{describe([self._names[index] for index in indices])} as before: {why}."
            )
            yield Finding("no_update", first, message, tuple(indices))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _does(number: int) -> str:
    return "do" if number != 1 else "does"


def _get(number: int) -> str:
    return "get" if number != 1 else "gets"
