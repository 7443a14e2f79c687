"""Whether the replicas that the ranks of a process group hold are equal: the rule ``rank_divergence``.

What differs first is the cause; whatever differs after it, until all replicas are equal again, follows from it and is
counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from diagnostics.contract.acts import Compared, Step
from diagnostics.contract.rules import Finding, Judge, at, describe


class Replicas(Judge):
    """The rule ``rank_divergence``.

    Args:
        names: Parameter names by index.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._standing: dict[str, Finding] = {}

    def step(self, fact: Step) -> Iterable[Finding]:
        """Takes a step."""
        found = fact.compared
        if found is None:
            return
        if not (found.gradients or found.weights or found.steps):
            self._standing.pop(fact.optimizer, None)
            return
        finding = self._standing.get(fact.optimizer) or self._find(fact, found)
        self._standing[fact.optimizer] = finding
        yield finding

    def _find(self, fact: Step, found: Compared) -> Finding:
        when = at(fact.optimizer, fact.step)
        if found.steps:
            first, last = found.steps
            message = (
                f"{when}: the {found.ranks} ranks are not at the same step of the same optimizer (steps {first} to "
                f"{last} met), so a rank has left steps out; replicas are not compared any more."
            )
            return Finding("rank_divergence", fact.step, message)
        what, differing = ("weights", found.weights) if found.weights else ("gradients", found.gradients)
        indices = tuple(sorted(differing))
        told = f"{when}: the {what} of {describe([self._names[index] for index in indices])}"
        why = self._before_the_step if found.weights else self._before_averaging
        return Finding("rank_divergence", fact.step, f"{told} {why(differing, found.ranks)}.", indices)

    def _before_the_step(self, weights: Mapping[int, float], ranks: int) -> str:
        return f"differ between the {ranks} ranks before the step, {self._by(weights)}: no two train the same model"

    def _before_averaging(self, gradients: Mapping[int, float], ranks: int) -> str:
        if min(gradients.values()) == max(gradients.values()) == 1:
            return f"are there on some of the {ranks} ranks only: each rank would go its own way from here"
        return f"differ between the {ranks} ranks, {self._by(gradients)}: each rank would go its own way from here"

    def _by(self, differing: Mapping[int, float]) -> str:
        worst = max(differing, key=lambda index: differing[index])
        if math.isinf(differing[worst]):
            return f"not finite on one of them ({self._names[worst]})"
        return f"by up to {100 * differing[worst]:.2g} % ({self._names[worst]})"
