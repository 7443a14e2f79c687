"""The lawful training loop as a pure state machine: facts in, violations out. No torch.

The loop that keeps every rule::

    optimizer.zero_grad()            # gradients that a step has spent are cleared before they can be spent again
    for micro_batch in window:
        loss(micro_batch).backward() # one or more passes fill .grad
    clip(gradients)                  # after the last backward, before the step
    optimizer.step()                 # spends what is in .grad

Rules are judged by their effect on the gradients, never by which function was called: ``p.grad = None``,
``model.zero_grad()`` and ``p.grad.zero_()`` all clear, and may stand anywhere between one step and the next backward.
What is left in ``.grad`` is only judged when a step spends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diagnostics.records import SOLE_OPTIMIZER, Violation

EXCESS = 1e-3
"""Relative excess over the declared max_norm that is still taken for rounding."""

REMEDIES = {
    "missing_zero_grad": "Call optimizer.zero_grad() once per step: before the backward pass, or right after the step.",
    "step_without_grads": "Call loss.backward() before the step, and zero_grad() not between the two.",
    "clip_after_step": "Move the clipping between loss.backward() and optimizer.step().",
    "clip_before_backward": "Move the clipping between loss.backward() and optimizer.step().",
    "clip_ineffective": "Call monitor.clip_and_step(), or clip between loss.backward() and optimizer.step().",
}

_CAUSES = {
    "clip_after_step": "the clipping came after the step, when they were already spent",
    "clip_before_backward": "the clipping came before the backward pass, when there was nothing to clip",
    "clip_ineffective": "nothing had clipped them",
}


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward pass that accumulated.

    Attributes:
        accumulated: Parameters that it added to.
        leftover: Size of what ``.grad`` held when the pass began, for parameters whose gradient a step had spent and
            whose ``.grad`` was not None.
        replaced: Those of them whose ``.grad`` was no longer the tensor that the step had spent.
    """

    accumulated: frozenset[int]
    leftover: Mapping[int, float] = field(default_factory=dict)
    replaced: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Clip:
    """A call of ``monitor.clip_grad_norm_``, with the norm of each gradient that it was given, before it clipped."""

    norms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step.

    Attributes:
        optimizer: Its name.
        step: Its number.
        norms: Norm of each gradient that is not None, as the step spends it.
        rewritten: Parameters whose ``.grad`` is not the tensor that an earlier step spent, or was written to since.
        total_norm: Norm of all of them, of the declared type.
        max_norm: The declared threshold; None where nothing was declared.
        skipped: Whether nothing was spent after all.
    """

    optimizer: str
    step: int
    norms: Mapping[int, float]
    rewritten: frozenset[int] = frozenset()
    total_norm: float = 0.0
    max_norm: float | None = None
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class _Spent:
    """What a gradient still holds: contributions of this many steps, the first of them."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class _Excess:
    """A step that spent more than was declared, until its cause is known."""

    step: int
    total_norm: float
    max_norm: float


class Contract:
    """The rules of one training loop.

    Args:
        names: Parameter names by index; the list may grow while the loop runs.

    Example:
        >>> contract = Contract(["weight"])
        >>> contract.backward(Backward(frozenset({0})))
        >>> contract.step(Step("optimizer", 0, {0: 1.0}))
        ()
        >>> contract.backward(Backward(frozenset({0}), leftover={0: 1.0}))
        >>> [violation.rule for violation in contract.step(Step("optimizer", 1, {0: 2.0}))]
        ['missing_zero_grad']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._inside: dict[int, _Spent] = {}  # parameters whose gradient still holds what a step has spent
        self._fresh: set[int] = set()  # parameters that a backward pass has added to since their last step
        self._excesses: dict[str, _Excess] = {}  # by optimizer
        self._found: dict[tuple[str, tuple[str, ...]], Violation] = {}

    @property
    def violations(self) -> tuple[Violation, ...]:
        """All violations, oldest first, with their latest counts."""
        return tuple(sorted(self._found.values(), key=lambda violation: violation.step))

    def backward(self, fact: Backward) -> None:
        """Takes a backward pass."""
        for index in list(self._inside):
            if fact.leftover.get(index, 0.0) == 0 or index in fact.replaced:
                del self._inside[index]
        self._fresh |= fact.accumulated

    def clip(self, fact: Clip) -> tuple[Violation, ...]:
        """Takes a clip call; one outside the window explains the excess of the step before it."""
        if self._fresh.intersection(fact.norms):
            return ()
        spent = any(norm != 0 for norm in fact.norms.values())
        rule = "clip_after_step" if spent else "clip_before_backward"
        return tuple(violation for name in list(self._excesses) for violation in self._explain(name, rule))

    def step(self, fact: Step) -> tuple[Violation, ...]:
        """Takes a step; returns what it broke, and the cause of an earlier excess that only now is known."""
        found = [*self._explain(fact.optimizer, "clip_ineffective")]
        if not any(norm != 0 for norm in fact.norms.values()):
            found += self._empty(fact)
        if fact.skipped:
            return tuple(found)
        found += self._spent_again(fact)
        self._spend(fact)
        return tuple(found)

    def close(self) -> tuple[Violation, ...]:
        """The end of the loop; returns what is left to say."""
        names = list(self._excesses)
        return tuple(violation for name in names for violation in self._explain(name, "clip_ineffective"))

    def _spend(self, fact: Step) -> None:
        for index, norm in fact.norms.items():
            if norm != 0:
                before = self._inside.get(index)
                self._inside[index] = _Spent(before.first if before else fact.step, before.count + 1 if before else 1)
            self._fresh.discard(index)
        if fact.max_norm is not None and fact.max_norm * (1 + EXCESS) < fact.total_norm < math.inf:
            self._excesses[fact.optimizer] = _Excess(fact.step, fact.total_norm, fact.max_norm)

    def _empty(self, fact: Step) -> Iterable[Violation]:
        if fact.norms:  # gradients that are exactly zero are a matter of the network, not of the loop
            return ()
        what = f"{_step(fact.optimizer, fact.step)} had nothing to spend: no parameter of the optimizer has a gradient"
        return self._report("step_without_grads", fact.step, (), f"{what}.")

    def _spent_again(self, fact: Step) -> Iterable[Violation]:
        for index, norm in fact.norms.items():
            if norm == 0 or (index in fact.rewritten and index not in self._fresh):
                self._inside.pop(index, None)
        stale = [index for index in fact.norms if index in self._inside]
        if not stale:
            return ()
        first = min(self._inside[index].first for index in stale)
        windows = 1 + max(self._inside[index].count for index in stale)
        message = (
            f"{_step(fact.optimizer, fact.step)} spent gradients that step {first} had already spent: .grad of "
            f"{describe([self.names[index] for index in stale])} was not cleared since and now holds the gradients of "
            f"{windows} steps instead of 1."
        )
        return self._report("missing_zero_grad", fact.step, stale, message)

    def _explain(self, optimizer: str, rule: str) -> tuple[Violation, ...]:
        excess = self._excesses.pop(optimizer, None)
        if excess is None:
            return ()
        message = (
            f"{_step(optimizer, excess.step)} spent gradients of total norm {excess.total_norm:.4g} where max_norm is "
            f"{excess.max_norm:.4g} ({excess.total_norm / excess.max_norm:.3g} times as much): {_CAUSES[rule]}."
        )
        return self._report(rule, excess.step, (), message)

    def _report(self, rule: str, step: int, indices: Iterable[int], message: str) -> tuple[Violation, ...]:
        names = tuple(self.names[index] for index in indices)
        key = (rule, names)
        known = self._found.get(key)
        if known is None:
            self._found[key] = Violation(rule, step, names, message, REMEDIES[rule])
        else:
            self._found[key] = replace(known, count=known.count + 1)
        return (self._found[key],)


def describe(names: Sequence[str], limit: int = 4) -> str:
    """Parameter names as people say them: a few by name, many by number.

    Example:
        >>> describe(["a.weight", "a.bias"])
        '2 parameters (a.weight, a.bias)'
        >>> describe(["a.weight"])
        'a.weight'
    """
    if len(names) == 1:
        return names[0]
    more = ", …" if len(names) > limit else ""
    return f"{len(names)} parameters ({', '.join(names[:limit])}{more})"


def _step(optimizer: str, step: int) -> str:
    return f"Step {step}" if optimizer == SOLE_OPTIMIZER else f"Step {step} of {optimizer}"
