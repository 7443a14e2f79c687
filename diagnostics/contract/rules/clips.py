"""Clipping by its effect: a step spends no more than was declared, and the loss scale is out of the gradients first.

A step that spends more is one violation, named as soon as its cause is known and dated to the step. The user's own
clips are seen where they go through ``monitor.clip_grad_norm_``. Of torch's own function only the effect is seen, so
where it comes before the backward pass or after the step the cause reads "nothing had clipped them". A loop that
declares no ``clip=`` is held to the threshold of its own calls, where one ran outside the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from diagnostics.contract.acts import Backward, Clip, Closing, Step
from diagnostics.contract.rules import Finding, Judge, at, describe
from diagnostics.contract.rules.windows import Windows

EXCESS = 1e-3
"""Relative excess over the declared max_norm that is still taken for rounding; half types round more coarsely."""
LEAST_SCALE = 16.0
"""A loss scale below this is not looked for in the effect of a clip."""
LEAST_GUESS = 256.0
"""Nor a power of two below this where no scaler is known: loops divide by the number of their passes."""
LEAST_THRESHOLD = 1e-3
"""Nobody clips to less than this on purpose; a threshold that was not scaled with the losses is far below."""

_CAUSES = {
    "clip_after_step": "the clipping came after the step, when they were already spent",
    "clip_before_backward": "the clipping came before the backward pass, when there was nothing to clip",
    "clip_ineffective": "nothing had clipped them",
    "clip_mid_accumulation": "the clipping came before the last backward pass of the step, which added to it",
}


@dataclass(slots=True)
class _Inside:
    """A clip since the last step: what it clipped, and to what of that more was added afterwards."""

    clip: Clip
    members: set[int]
    more: set[int]


@dataclass(frozen=True, slots=True)
class _Excess:
    """A step that spent more than was declared, until its cause is known."""

    step: int
    total_norm: float
    max_norm: float | None
    spent: AbstractSet[int]


class Clips(Judge):
    """``clip_before_backward``, ``clip_after_step`` and the four others about clipping.

    Args:
        names: Parameter names by index.
        windows: Knows which gradients hold what no step has spent.
    """

    def __init__(self, names: Sequence[str], windows: Windows) -> None:
        self._names = names
        self._windows = windows
        self._excesses: dict[str, _Excess] = {}  # by optimizer
        self._outside: dict[str, str] = {}  # the cause of the newest excess that a clip outside the window explained
        self._inside: list[_Inside] = []
        self._touched: set[int] = set()  # written to by somebody in the middle of a window

    def backward(self, fact: Backward) -> None:
        """Takes a backward pass, before the windows do."""
        for one in self._inside:
            one.members -= fact.cleared
            one.more |= one.members & fact.accumulated
        if fact.touched:
            self._touched |= self._windows.fresh(fact.accumulated) - fact.cleared

    def clip(self, fact: Clip) -> Iterable[Finding]:
        """Takes a clip; one outside the window explains the excess of the step before it."""
        if math.isinf(fact.max_norm):  # it only measures
            return
        members = set(fact.norms)
        if self._windows.fresh(members):
            self._inside.append(_Inside(fact, members, set()))
            return
        spent = any(norm != 0 for norm in fact.norms.values())
        rule = "clip_after_step" if spent else "clip_before_backward"
        given = fact.given or members
        for name, excess in list(self._excesses.items()):
            if not given or given & excess.spent:
                self._outside[name] = rule
                yield from self._explain(name, rule, fact.max_norm)

    def step(self, fact: Step) -> Iterable[Finding]:
        """Takes a step."""
        yield from self._explain(fact.optimizer, "clip_ineffective")
        clips = [one for one in self._inside if not one.members.isdisjoint(fact.norms)]
        if not fact.skipped:
            yield from self._scaled(fact, clips)
            yield from self._exceeds(fact, clips)
        self._touched -= fact.norms.keys()
        for one in clips:
            one.members -= fact.norms.keys()
        self._inside = [one for one in self._inside if one.members]

    def close(self, fact: Closing) -> Iterable[Finding]:  # noqa: ARG002 -- it has been told all
        """The end of the loop: nothing comes to explain the last excess, so it has the cause of those before."""
        for name in list(self._excesses):
            yield from self._explain(name, self._outside.get(name, "clip_ineffective"))

    def _exceeds(self, fact: Step, clips: Sequence[_Inside]) -> Iterable[Finding]:
        limit, spent = fact.max_norm, fact.norms.keys()
        tolerance = max(EXCESS, 4 * fact.resolution)  # torch takes norm and coefficient in the gradients' own dtype
        if not math.isfinite(fact.total_norm) or (limit is not None and fact.total_norm <= limit * (1 + tolerance)):
            return
        if limit is None and clips:
            return
        self._excesses[fact.optimizer] = _Excess(fact.step, fact.total_norm, limit, spent)
        if self._touched & spent or any(one.more & spent for one in clips):
            yield from self._explain(fact.optimizer, "clip_mid_accumulation")
        elif clips:
            yield from self._partly(fact, clips)

    def _partly(self, fact: Step, clips: Sequence[_Inside]) -> Iterable[Finding]:
        """Clips inside the window that did not do what was declared."""
        spent = {index for index, norm in fact.norms.items() if norm != 0}
        left = sorted(spent.difference(*(one.members for one in clips)))
        if left:
            names = [self._names[index] for index in left]
            part = math.hypot(*(fact.norms[index] for index in left))
            cause = f"the clipping left out {describe(names)}, whose gradients have norm {part:.4g}"
        elif len(clips) > 1:
            cause = f"they were clipped in {len(clips)} parts, each to a norm of its own"
        else:
            cause = f"the clipping was told max_norm={clips[0].clip.max_norm:g}"
            yield from self._explain(fact.optimizer, "clip_ineffective", cause=cause)
            return
        yield from self._explain(fact.optimizer, "clip_subset", cause=cause, indices=left)

    def _scaled(self, fact: Step, clips: Sequence[_Inside]) -> Iterable[Finding]:
        """Whether gradients were divided by the loss scale after they had been clipped to a threshold meant without."""
        factor = 1.0
        for one in clips:
            if one.clip.coefficient < 1 and one.clip.norm_type == fact.norm_type and not one.more:
                factor = max(factor, self._divided(fact, one.clip))
                threshold = one.clip.max_norm / factor
                meant = LEAST_THRESHOLD if fact.max_norm is None else fact.max_norm * (1 - 10 * EXCESS)
                if factor >= LEAST_SCALE and threshold < meant:
                    yield self._scaled_by(fact, factor, threshold)
                    return
        limit, scale = fact.max_norm, fact.loss_scale
        if not clips and limit is not None and scale >= LEAST_SCALE and math.isfinite(limit):
            spent = fact.total_norm * scale
            if abs(spent - limit) < EXCESS * limit:  # torch's own function, by its effect
                yield self._scaled_by(fact, scale, fact.total_norm)

    def _divided(self, fact: Step, clip: Clip) -> float:
        """By what the gradients were divided between the clip and the step, where that can be a loss scale."""
        index = max(clip.norms, key=lambda one: clip.norms[one])
        now = fact.norms.get(index, 0.0)
        if not (0 < now < math.inf and math.isfinite(clip.norms[index])):
            return 1.0
        factor = clip.norms[index] * clip.coefficient / now
        known = fact.loss_scale > 1
        scale = fact.loss_scale if known else 2.0 ** round(math.log2(factor)) if factor > 0 else 1.0
        least = LEAST_SCALE if known else LEAST_GUESS
        return scale if scale >= least and abs(factor / scale - 1) < 10 * EXCESS else 1.0

    def _scaled_by(self, fact: Step, factor: float, threshold: float) -> Finding:
        message = (
            f"{at(fact.optimizer, fact.step)} spent gradients that were clipped while they were still multiplied by "
            f"the loss scale {factor:g}: what was clipped to is {threshold:.3g} once they are unscaled, "
            f"{factor:g} × less than it says."
        )
        return Finding("clip_scaled_grads", fact.step, message)

    def _explain(
        self,
        optimizer: str,
        rule: str,
        max_norm: float | None = None,
        *,
        cause: str | None = None,
        indices: Sequence[int] = (),
    ) -> Iterable[Finding]:
        excess = self._excesses.pop(optimizer, None)
        if excess is None:
            return
        limit = excess.max_norm if excess.max_norm is not None else max_norm
        if limit is None or excess.total_norm <= limit * (1 + EXCESS):
            return
        message = (
            f"{at(optimizer, excess.step)} spent gradients of total norm {excess.total_norm:.4g} where max_norm is "
            f"{limit:.4g} ({excess.total_norm / limit:.3g} times as much): {cause or _CAUSES[rule]}."
        )
        yield Finding(rule, excess.step, message, tuple(indices))
