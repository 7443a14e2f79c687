"""The lawful training loop as a pure state machine: facts in, violations out. No torch.

The loop that keeps every rule::

    optimizer.zero_grad()            # gradients that a step has spent are cleared before they can be spent again
    for micro_batch in window:
        loss(micro_batch).backward() # one or more passes fill .grad
    clip(gradients)                  # after the last backward, before the step
    optimizer.step()                 # spends what is in .grad

Rules are judged by their effect on the gradients, never by which function was called: ``p.grad = None``,
``model.zero_grad()`` and ``p.grad.zero_()`` all clear, and may stand anywhere between one step and the next backward.
What is left in ``.grad`` is only judged when a step spends it. The rules themselves are in ``rules/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from diagnostics.contract.acts import Backward, Clip, Closing, Moved, Step
from diagnostics.contract.rules import REMEDIES, Finding, Judge
from diagnostics.contract.rules.clips import Clips
from diagnostics.contract.rules.gradients import Gradients
from diagnostics.contract.rules.parameters import Parameters
from diagnostics.contract.rules.replicas import Replicas
from diagnostics.records import Violation

__all__ = ["Backward", "Clip", "Closing", "Contract", "Moved", "Step"]


class Contract:
    """The rules of one training loop.

    Args:
        names: Parameter names by index; the list may grow while the loop runs.
        accumulate: Backward passes that one step is meant to spend.

    Attributes:
        judges: The families of rules, asked in this order; the first takes a pass before the windows do.

    Example:
        >>> contract = Contract(["weight"])
        >>> contract.backward(Backward(frozenset({0})))
        >>> contract.step(Step("optimizer", 0, {0: 1.0}))
        ()
        >>> contract.backward(Backward(frozenset({0}), leftover={0: 1.0}))
        >>> [violation.rule for violation in contract.step(Step("optimizer", 1, {0: 2.0}))]
        ['missing_zero_grad']
    """

    def __init__(self, names: Sequence[str], accumulate: int = 1) -> None:
        self.names = names
        gradients = Gradients(names, accumulate)
        self.judges: list[Judge] = [Clips(names, gradients.windows), gradients, Parameters(names), Replicas(names)]
        self._found: dict[tuple[str, tuple[str, ...]], Violation] = {}

    @property
    def violations(self) -> tuple[Violation, ...]:
        """All violations, oldest first, with their latest counts."""
        return tuple(sorted(self._found.values(), key=lambda violation: violation.step))

    def backward(self, fact: Backward) -> None:
        """Takes a backward pass."""
        for judge in self.judges:
            judge.backward(fact)

    def clip(self, fact: Clip) -> tuple[Violation, ...]:
        """Takes a clip call; one outside the window explains the excess of the step before it."""
        return self._report(finding for judge in self.judges for finding in judge.clip(fact))

    def step(self, fact: Step) -> tuple[Violation, ...]:
        """Takes a step; returns what it broke, and the cause of an earlier excess that only now is known."""
        return self._report(finding for judge in self.judges for finding in judge.step(fact))

    def moved(self, fact: Moved) -> tuple[Violation, ...]:
        """Takes what a recorded step did to the weights."""
        return self._report(finding for judge in self.judges for finding in judge.moved(fact))

    def close(self, fact: Closing | None = None) -> tuple[Violation, ...]:
        """The end of the loop; returns what is left to say."""
        last = fact or Closing()
        return self._report(finding for judge in self.judges for finding in judge.close(last))

    def _report(self, findings: Iterable[Finding]) -> tuple[Violation, ...]:
        return tuple(self._count(finding) for finding in findings)

    def _count(self, finding: Finding) -> Violation:
        names = finding.names or tuple(self.names[index] for index in finding.indices)
        key = (finding.rule, names)
        known = self._found.get(key)
        self._found[key] = (
            Violation(finding.rule, finding.step, names, finding.message, REMEDIES[finding.rule])
            if known is None
            else replace(known, count=known.count + 1)
        )
        return self._found[key]
