"""One step's clipping: measured, decided, done. The only code that writes gradients.

Gradients are touched only when ``clip_coef = max_norm / (total_norm + 1e-6) < 1`` (by value: when an element is beyond
the limit) and never on the word of a norm that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diagnostics import statistics
from diagnostics.clipping.groups import GroupState
from diagnostics.clipping.norms import GradientNorms, NormReading, p_norm, real_values, shares
from diagnostics.clipping.state import ClipState, Member
from diagnostics.records import ClipRecord
from diagnostics.statistics.reading import Reader
from diagnostics.statistics.stacks import Layout, Stacks


class _Part(NamedTuple):
    """Gradients that are clipped together."""

    name: str
    state: ClipState
    places: Sequence[int]
    reading: NormReading


class Clipping:
    """The gradients of one step between measuring and clipping: :meth:`settle`, then :meth:`clip`.

    Args:
        gradients: The gradients.
        state: The rule at work.
        reader: Who brings the numbers; it is asked at once.
        members: Where each gradient's parameter belongs; needed by rules that clip by group.
        euclidean: Measure 2-norms too where the rule looks at others.
        scale: An AMP loss scale that the gradients are still multiplied by; their norms are divided by it.
        layout: Which of the gradients are measured together, where that is known already.
    """

    def __init__(
        self,
        gradients: Sequence[Tensor],
        state: ClipState,
        reader: Reader,
        *,
        members: Sequence[Member] = (),
        euclidean: bool = False,
        scale: Tensor | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.state = state
        self._count = len(gradients)
        self._reader = reader
        groups = state.split(members) if isinstance(state, GroupState) else [("", state, range(self._count))]
        self.stacks = Stacks(gradients, layout)
        self.parts = [_part(name, at_work, places, self.stacks) for name, at_work, places in groups]
        wanted = euclidean or isinstance(state, GroupState)
        self._euclidean = [
            NormReading(part.reading.stacks) if wanted and part.reading.norm_type != 2 else part.reading
            for part in self.parts
        ]
        self._readings = {reading: reader.ask(reading.tensor()) for reading in self._every()}
        self._scale = None if scale is None else reader.ask(scale)
        self._norms: dict[NormReading, GradientNorms] = {}
        self._done = False  # whether the gradients are clipped already, or will be by the optimizer

    @property
    def scale(self) -> float:
        """What the gradients are still multiplied by."""
        return 1.0 if self._scale is None else self._scale.values[0]

    @property
    def norms(self) -> list[GradientNorms]:
        """The norms by part."""
        return [self._norms[part.reading] for part in self.parts]

    @property
    def by_gradient(self) -> list[float]:
        """The norm of each gradient, of its own part's type."""
        return self._scattered([one.parameters for one in self.norms])

    @property
    def measured(self) -> dict[int, Tensor]:
        """The same by place, 0-dim and as fp32 holds it: not read yet."""
        parts = [(part.places, part.reading.by_gradient.unbind()) for part in self.parts if len(part.places)]
        return {place: norm for places, norms in parts for place, norm in zip(places, norms, strict=True)}

    @property
    def euclidean(self) -> tuple[list[float], list[int]]:
        """The 2-norm of each gradient, and how many of its elements are not finite."""
        norms = [self._norms[reading] for reading in self._euclidean]
        return self._scattered([one.parameters for one in norms]), self._scattered([one.nonfinite for one in norms])

    @property
    def total(self) -> float:
        """The norm of all gradients, of the rule's type."""
        if not isinstance(self.state, GroupState):
            return self.norms[0].total
        return p_norm(self._sizes(), self.state.norm_type)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each gradient's part of ``total ** p``."""
        return shares(self._sizes(), self.total, self.state.norm_type)

    def tensor(self) -> Tensor:
        """The norm as torch returns it."""
        return self.parts[0].reading.total_of(self.norms[0])

    @torch.no_grad()
    def clip_unread(self, *, write: bool = True) -> tuple[Tensor | None, Tensor]:
        """Clips by a norm that only the device knows yet: multiplies by the coefficient, or by 1.

        Args:
            write: False leaves it to the optimizer to divide.

        Returns:
            What gradients are multiplied by, None if by nothing; and 1.0 where the norm is not finite, else 0.0. Both
            0-dim and not read. For a rule that clips all gradients by one norm that it knows beforehand.
        """
        (part,) = self.parts
        reading, self._done = part.reading, True
        finite = torch.isfinite(reading.total)
        if reading.coefficient is None:
            return None, (~finite).float()
        factor = torch.where(finite, reading.coefficient.clamp(max=1.0), 1.0)
        if write:
            _multiply(reading.gradients, factor)
        return factor, (~finite).float()

    def leave_to_optimizer(self) -> Tensor | None:
        """What a fused optimizer is to multiply the gradients by; None where that is not for it to do."""
        if len(self.parts) != 1 or not self.total < math.inf:
            return None
        (part,), (norms,) = self.parts, self.norms
        limit = part.state.limit(norms.total)
        if limit is None or norms.exact or part.state.clip_value is not None:
            return None
        coefficient = limit.max_norm / norms.total if norms.coefficient is None and norms.total else norms.coefficient
        if coefficient is None or coefficient >= 1:
            return None
        self._done = True
        known = part.reading.coefficient
        return torch.tensor(coefficient, device=part.reading.total.device) if known is None else known

    def release(self) -> None:
        """Lets go of the gradients; what is still to come are numbers."""
        self.stacks = Stacks(())
        for reading in self._every():
            reading.release()

    def settle(self, zero: Callable[[int], bool] | None = None, *, again: bool = True) -> None:
        """Reads the norms; a second time and in float64 where fp32 may not have held them.

        Args:
            zero: Look at each gradient's norm as well, and believe one of 0 where this says so.
            again: False reads once: a norm that fp32 has not held stays not finite, or zero.
        """
        suspects: dict[NormReading, list[int]] = {}
        for reading, places in self._every().items():
            known = None if zero is None else lambda place, places=places: zero(places[place])
            suspects[reading] = reading.suspects(self._readings[reading].values, known) if again else []
        closer = {one: self._reader.ask(one.exact(found)) for one, found in suspects.items() if found}
        for reading, found in suspects.items():
            rescued = closer[reading].values if found else ()
            norms = reading.norms(self._readings[reading].values, found, rescued)
            self._norms[reading] = norms.divided(self.scale, reading.max_norm) if self._scale is not None else norms

    def clip(self, *, write: bool = True) -> ClipRecord:
        """Clips as the rule says, if the norm is finite.

        Args:
            write: False only says what the rule thinks of gradients that somebody else is responsible for.

        Returns:
            What was seen and done, without shares: they take as long as all the rest, and not everybody asks.
        """
        records = [self._clip(part, norms, write=write) for part, norms in zip(self.parts, self.norms, strict=True)]
        if not isinstance(self.state, GroupState):
            return records[0]
        total, after = self.total, self._total_after(records)
        return ClipRecord(
            rule="group",
            norm_type=self.state.norm_type,
            max_norm=None,
            total_norm=total,
            clip_coef=after / total if total else 1.0,
            applied=any(record.applied for record in records),
            total_norm_after=after,
            parts=tuple(records),
        )

    def enter(self, total_norm: float) -> None:
        """After a step that was taken: lets the rule remember its norm; each group of several has its own."""
        if not isinstance(self.state, GroupState):
            self.state.enter(total_norm)
            return
        for part, norms in zip(self.parts, self.norms, strict=True):
            part.state.enter(norms.total)

    def _every(self) -> dict[NormReading, Sequence[int]]:
        """All that is read, with the places of its gradients."""
        readings = [part.reading for part in self.parts], self._euclidean
        return {reading: part.places for some in readings for reading, part in zip(some, self.parts, strict=True)}

    def _scattered(self, columns: Sequence[Sequence[Any]]) -> list[Any]:
        if not isinstance(self.state, GroupState):
            return list(columns[0])
        found: list[Any] = [None] * self._count
        for part, column in zip(self.parts, columns, strict=True):
            for place, value in zip(part.places, column, strict=True):
                found[place] = value
        return found

    def _sizes(self) -> list[float]:
        """The norm of each gradient, of the whole rule's type where the parts were measured by it or in 2-norms."""
        types = {part.state.norm_type for part in self.parts}
        return self.by_gradient if types == {self.state.norm_type} else self.euclidean[0]

    def _total_after(self, records: Sequence[ClipRecord]) -> float:
        sizes, after = self._sizes(), []
        for part, record in zip(self.parts, records, strict=True):
            total = p_norm([sizes[place] for place in part.places], self.state.norm_type)
            kept = record.total_norm_after / record.total_norm if record.applied else 1.0
            after.append(total * kept)
        return p_norm(after, self.state.norm_type)

    def _clip(self, part: _Part, norms: GradientNorms, *, write: bool) -> ClipRecord:
        state, total = part.state, norms.total
        limit = state.limit(total)
        record = ClipRecord(
            rule=state.kind,
            norm_type=state.norm_type,
            max_norm=None if limit is None else limit.max_norm,
            total_norm=total,
            clip_coef=None,
            applied=False,
            total_norm_after=total,
            threshold=state.clip_value if limit is None else limit.threshold,
            shares=shares(norms.parameters, total, state.norm_type) if isinstance(self.state, GroupState) else (),
            group=part.name,
        )
        write &= math.isfinite(total)
        if state.clip_value is not None:
            return self._by_value(record, part.reading, norms, state.clip_value, write=write)
        if limit is None:
            return record
        coefficient = norms.coefficient
        if coefficient is None:  # a threshold that follows the norm may be far below torch's epsilon
            coefficient = limit.max_norm / total if total else math.inf
        if not write or coefficient >= 1:
            return replace(record, clip_coef=coefficient)
        if not self._done:
            _scale(part.reading, norms, coefficient)
        return replace(record, clip_coef=coefficient, applied=True, total_norm_after=total * coefficient)

    def _by_value(
        self, record: ClipRecord, reading: NormReading, norms: GradientNorms, value: float, *, write: bool
    ) -> ClipRecord:
        if not norms.beyond:
            return replace(record, clip_coef=1.0)
        if not write:
            return record
        changed = [reading.gradients[place] for place in norms.beyond]
        for gradient in changed:
            _limit(gradient, value)
        after = self._reader.ask(statistics.parameter_norms(changed)).values
        total = p_norm(
            [*{**dict(enumerate(norms.parameters)), **dict(zip(norms.beyond, after, strict=True))}.values()], 2
        )
        return replace(record, clip_coef=total / record.total_norm, applied=True, total_norm_after=total)


def _part(name: str, state: ClipState, places: Sequence[int], every: Stacks) -> _Part:
    own = every if len(places) == len(every.tensors) else Stacks([every.tensors[place] for place in places])
    reading = NormReading(own, state.norm_type, max_norm=state.max_norm, clip_value=state.clip_value)
    return _Part(name, state, places, reading)


@torch.no_grad()
def _scale(reading: NormReading, norms: GradientNorms, coefficient: float) -> None:
    gradients = [gradient for gradient in reading.gradients if gradient.numel()]
    if norms.exact:
        for gradient in gradients:
            values = gradient._values() if gradient.is_sparse else gradient  # noqa: SLF001 -- the only writable view
            values.copy_(values.to(statistics.wide(values.dtype)).mul_(coefficient))
        return
    _multiply(gradients, coefficient if reading.coefficient is None else reading.coefficient)


def _multiply(gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), members in groups.items():
        torch._foreach_mul_(members, factor.to(device) if isinstance(factor, Tensor) else factor)


@torch.no_grad()
def _limit(gradient: Tensor, value: float) -> None:
    once = gradient.coalesce() if gradient.is_sparse else gradient  # a row met several times counts with its sum
    real_values(once).clamp_(-value, value)
    if once is not gradient:
        gradient.copy_(once)
