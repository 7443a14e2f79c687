"""Norms of some gradients: asked of the device, read by the one copy, and again in float64 where fp32 has no room."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics import statistics
from diagnostics.statistics.magnitudes import SMALL
from diagnostics.statistics.stacks import Stacks

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Norms of some gradients, read back to the host.

    Attributes:
        total: p-norm of all elements.
        coefficient: ``max_norm / (total + 1e-6)`` in the arithmetic of torch's own clip; None without a max_norm.
        parameters: p-norm of each gradient.
        nonfinite: Number of non-finite elements of each gradient.
        exact: Whether they were taken in float64 because fp32 could not hold them.
        beyond: Which gradients have an element whose magnitude is above the clip_value.
    """

    total: float
    coefficient: float | None
    parameters: tuple[float, ...]
    nonfinite: tuple[int, ...]
    exact: bool = False
    beyond: tuple[int, ...] = ()

    def divided(self, scale: float, max_norm: float | None) -> GradientNorms:
        """The norms of gradients that are still multiplied by an AMP loss scale."""
        total = self.total / scale
        return replace(
            self,
            total=total,
            coefficient=None if max_norm is None else max_norm / (total + EPSILON),
            parameters=tuple(norm / scale for norm in self.parameters),
        )


class NormReading:
    """Norms on the device, until the one copy to the host brings their values.

    Args:
        stacks: What to measure.
        norm_type: The p of the norm.
        max_norm: What to clip by, if that is known before the norm is.
        clip_value: Ask also which gradients have an element whose magnitude is above this.
    """

    def __init__(
        self,
        stacks: Stacks,
        norm_type: float = 2.0,
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.stacks = stacks
        self.gradients = gradients = stacks.tensors
        self._count = len(gradients)
        self.norm_type = norm_type
        self.max_norm = max_norm
        self._norms = statistics.stacked_norms(stacks, norm_type)
        self._beyond = None if clip_value is None else beyond(gradients, clip_value)
        self.total = statistics.total_norm(self._norms, norm_type)
        self.coefficient = None if max_norm is None else max_norm / (self.total + EPSILON)

    def tensor(self) -> Tensor:
        """What has to be read: the total, the coefficient if there is one, each gradient's norm, and which exceed."""
        wanted = (self.total, self.coefficient, self._norms, self._beyond)
        return statistics.pack([one for one in wanted if one is not None])

    @property
    def by_gradient(self) -> Tensor:
        """The norm of each gradient, not read yet: shape ``[len(gradients)]``."""
        return self._norms

    def suspects(self, values: Sequence[float], zero: Callable[[int], bool] | None = None) -> list[int]:
        """Which gradients fp32 may not have held: all if the total left its range, else none, or those that did.

        Args:
            values: What :meth:`tensor` was read as.
            zero: Judge every gradient on its own, and believe a norm of 0 where this says so.
        """
        norms, total = self._split(values)[0], values[0]
        if not statistics.trusted(total, self.norm_type):
            found = list(range(len(norms)))
        elif zero is None or statistics.trusted(min(norms, default=total), self.norm_type):
            return []  # none is larger than the total
        else:
            found = [place for place, norm in enumerate(norms) if not statistics.trusted(norm, self.norm_type)]
        return found if zero is None else [place for place in found if norms[place] != 0 or not zero(place)]

    def total_of(self, norms: GradientNorms) -> Tensor:
        """The total as a 0-dim tensor; float64 where the gradients' own norm cannot hold it."""
        if not norms.exact:
            return self.total
        limits = torch.finfo(self.total.dtype)
        fits = norms.total == 0 or not math.isfinite(norms.total) or limits.tiny <= norms.total <= limits.max
        dtype = self.total.dtype if fits else torch.float64
        return torch.tensor(norms.total, dtype=dtype, device=self.total.device)

    def exact(self, suspects: Sequence[int]) -> Tensor:
        """What has to be read of gradients that fp32 may not have held."""
        return statistics.exact_norms([self.gradients[index] for index in suspects], self.norm_type)

    def release(self) -> None:
        """Lets go of the gradients; what is still to come are numbers."""
        self.stacks, self.gradients = Stacks(()), ()

    def norms(
        self, values: Sequence[float], suspects: Sequence[int] = (), rescued: Sequence[float] = ()
    ) -> GradientNorms:
        """The norms from the numbers that were read.

        Args:
            values: What :meth:`tensor` was read as.
            suspects: Gradients that were measured again.
            rescued: What :meth:`exact` was read as: their norms, then their counts of non-finite elements.
        """
        measured, flags = self._split(values)
        parameters, nonfinite = list(measured), [0] * len(measured)
        if not (suspects or math.isfinite(values[0])):  # nobody could look closer: one element at least
            nonfinite = [int(not math.isfinite(norm)) for norm in parameters]
        for place, index in enumerate(suspects):
            parameters[index] = rescued[place]
            nonfinite[index] = int(rescued[len(suspects) + place])
        exact = bool(suspects) and not statistics.trusted(values[0], self.norm_type)
        total = p_norm(parameters, self.norm_type) if exact else values[0]
        coefficient = None if self.max_norm is None else self.max_norm / (total + EPSILON) if exact else values[1]
        beyond = tuple(place for place, flag in enumerate(flags) if flag)
        return GradientNorms(total, coefficient, tuple(parameters), tuple(nonfinite), exact, beyond)

    def _split(self, values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
        """The norms of the gradients, and the flags."""
        head = 1 if self.max_norm is None else 2
        return values[head : head + self._count], values[head + self._count :]


@torch.no_grad()
def beyond(gradients: Sequence[Tensor], value: float) -> Tensor:
    """Which gradients have an element whose magnitude is above a value, in the arithmetic of their own dtype.

    Of complex gradients the real and the imaginary part are looked at, each by itself.

    Returns:
        Shape ``[len(gradients)]``, boolean.

    Example:
        >>> beyond([torch.tensor([0.3, -0.1]), torch.tensor([0.3, -0.4])], 0.3)
        tensor([False,  True])
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    values = [real_values(gradient) for gradient in gradients]
    for place, part in enumerate(values):
        if part.numel():
            groups.setdefault((part.device, part.dtype), []).append(place)
    found = torch.zeros(len(values), dtype=torch.bool, device=values[0].device if values else None)
    for (device, _), places in groups.items():
        marks = torch.stack(_peaks([values[place] for place in places])) > value
        if len(places) == len(values):
            return marks
        found = found.to(device).index_copy(0, torch.tensor(places, device=device), marks)
    return found


def real_values(gradient: Tensor) -> Tensor:
    """What a gradient holds, as real numbers: a sparse one's coalesced values, pairs of numbers for a complex one."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values


def _peaks(values: Sequence[Tensor]) -> list[Tensor]:
    """Largest magnitudes in the dtype of the values; small ones share a kernel, which is slow for large ones."""
    few = [one for one in values if one.numel() <= SMALL]
    small = iter(torch._foreach_norm(few, math.inf) if few else ())  # noqa: SLF001 -- as torch's own clip
    return [next(small) if one.numel() <= SMALL else statistics.largest(one) for one in values]


def shares(norms: Sequence[float], total: float, norm_type: float) -> tuple[float, ...]:
    """Each norm's part of ``total ** p``; for ``p = inf`` the largest share the whole equally.

    Example:
        >>> shares([1.0, 1.0], 2.0, 1.0)
        (0.5, 0.5)
    """
    if not (math.isfinite(total) and total > 0):
        return (math.nan,) * len(norms)
    if math.isinf(norm_type):
        ties = sum(norm == total for norm in norms) or 1
        return tuple(float(norm == total) / ties for norm in norms)
    if norm_type == 2:
        return tuple([(norm / total) * (norm / total) for norm in norms])
    return tuple([(norm / total) ** norm_type for norm in norms])


def p_norm(norms: Sequence[float], norm_type: float) -> float:
    """The p-norm of non-negative numbers in float64, whatever their size; NaN if one is NaN.

    Example:
        >>> p_norm([3e300, 4e300], 2.0)
        5e+300
    """
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    peak = max(norms, default=0.0)
    if peak == 0 or math.isinf(peak) or math.isinf(norm_type):
        return peak
    powers = math.fsum((norm / peak) ** norm_type for norm in norms)
    return float(peak * powers ** (1 / norm_type))
