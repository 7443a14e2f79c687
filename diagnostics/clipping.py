"""Clip rules, and the only code that writes gradients.

``torch.nn.utils.clip_grad_norm_`` multiplies every gradient at every step, by 1.0 where nothing is to be clipped, and
one infinite element turns all finite gradients into zeros. Here gradients are touched only when
``clip_coef = max_norm / (total_norm + 1e-6) < 1`` and never on the word of a norm that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from diagnostics import statistics
from diagnostics.records import ClipRecord, NonFiniteGradientError

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class ClipByNorm:
    """Scales all gradients together so that their norm is at most ``max_norm``.

    Args:
        max_norm: Largest norm that passes unchanged; positive, ``inf`` to measure only.
        norm_type: The p of the norm; positive, possibly ``inf``.

    Raises:
        ValueError: If one of them is not a positive number.

    Example:
        >>> ClipByNorm(max_norm=1.0)
        ClipByNorm(max_norm=1.0, norm_type=2.0)

    Source: Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (2013), algorithm 1.
    """

    max_norm: float
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", positive("max_norm", self.max_norm))
        object.__setattr__(self, "norm_type", positive("norm_type", self.norm_type))


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Norms of some gradients, read back to the host.

    Attributes:
        total: p-norm of all elements.
        coefficient: ``max_norm / (total + 1e-6)`` in the arithmetic of torch's own clip; None without a rule.
        parameters: p-norm of each gradient.
        nonfinite: Number of non-finite elements of each gradient.
        exact: Whether they were taken in float64 because fp32 could not hold them.
    """

    total: float
    coefficient: float | None
    parameters: tuple[float, ...]
    nonfinite: tuple[int, ...]
    exact: bool = False


class NormReading:
    """Norms on the device, until the one copy to the host brings their values.

    Args:
        gradients: What to measure.
        rule: What to clip by; None to measure only.
    """

    def __init__(self, gradients: Sequence[Tensor], rule: ClipByNorm | None) -> None:
        self.gradients = gradients
        self.rule = rule
        self.norm_type = 2.0 if rule is None else rule.norm_type
        self._norms = statistics.parameter_norms(gradients, self.norm_type)
        self.total = statistics.total_norm(self._norms, self.norm_type)
        self.coefficient = None if rule is None else rule.max_norm / (self.total + EPSILON)

    def tensor(self) -> Tensor:
        """What has to be read: the total, the coefficient where there is a rule, and each gradient's norm."""
        head = [self.total] if self.coefficient is None else [self.total, self.coefficient]
        return statistics.pack([*head, self._norms])

    def suspects(self, values: Sequence[float], *, each: bool = False) -> list[int]:
        """Which gradients fp32 may not have held: all if the total left its range, else none, or those that did.

        Args:
            values: What :meth:`tensor` was read as.
            each: Judge every gradient on its own where the total is sound.
        """
        if not statistics.trusted(values[0], self.norm_type):
            return list(range(len(self.gradients)))
        norms = values[len(values) - len(self.gradients) :]
        return [i for i, norm in enumerate(norms) if not statistics.trusted(norm, self.norm_type)] if each else []

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

    def norms(
        self, values: Sequence[float], suspects: Sequence[int] = (), rescued: Sequence[float] = ()
    ) -> GradientNorms:
        """The norms from the numbers that were read.

        Args:
            values: What :meth:`tensor` was read as.
            suspects: Gradients that were measured again.
            rescued: What :meth:`exact` was read as: their norms, then their counts of non-finite elements.
        """
        head = 1 if self.rule is None else 2
        parameters, nonfinite = list(values[head:]), [0] * len(self.gradients)
        for place, index in enumerate(suspects):
            parameters[index] = rescued[place]
            nonfinite[index] = int(rescued[len(suspects) + place])
        exact = 0 < len(suspects) == len(self.gradients)
        total = p_norm(parameters, self.norm_type) if exact else values[0]
        coefficient = None if self.rule is None else self.rule.max_norm / (total + EPSILON) if exact else values[1]
        return GradientNorms(total, coefficient, tuple(parameters), tuple(nonfinite), exact)


def clip(reading: NormReading, norms: GradientNorms, *, write: bool = True) -> ClipRecord:
    """Multiplies the gradients if, and only if, their norm is finite and above the rule's.

    Args:
        reading: The gradients, the rule and the coefficient on the device.
        norms: What was read of them.
        write: False only says what the rule thinks of gradients that somebody else is responsible for.

    Returns:
        What was seen and done; shares are by parameter.
    """
    rule, total, coefficient = reading.rule, norms.total, norms.coefficient
    applied = write and coefficient is not None and math.isfinite(total) and coefficient < 1
    factor = coefficient if applied and coefficient is not None else 1.0
    if applied:
        _scale(reading, factor, exact=norms.exact)
    return ClipRecord(
        rule="none" if rule is None else "norm",
        norm_type=reading.norm_type,
        max_norm=None if rule is None else rule.max_norm,
        total_norm=total,
        clip_coef=coefficient,
        applied=applied,
        total_norm_after=total * factor,
        threshold=None if rule is None else rule.max_norm,
        shares=shares(norms.parameters, total, reading.norm_type),
    )


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
    return tuple((norm / total) ** norm_type for norm in norms)


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


def clip_gradients(parameters: Tensor | Iterable[Tensor], rule: ClipByNorm | None) -> ClipRecord:
    """Clips by a rule and says what it did.

    Args:
        parameters: Tensors whose ``.grad`` is to be clipped; those without one are left out.
        rule: How; None to measure only.

    Returns:
        The record; its shares are by parameter, in the order given, without those that have no gradient.

    Raises:
        TypeError: If parameters are not tensors, or the rule is none.
        ValueError: If parameters is an exhausted iterator.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2)); weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], ClipByNorm(max_norm=1.0)).total_norm
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    if rule is not None and not isinstance(rule, ClipByNorm):
        raise TypeError(f"rule must be a rule such as ClipByNorm(max_norm=1.0), or None; got {rule!r}.")
    reading = NormReading(statistics.gradients_of(tensors_of(parameters))[1], rule)
    return clip(reading, read_norms(reading))


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.utils.clip_grad_norm_`` with the same results, but it never does harm.

    Gradients are not touched when ``clip_coef >= 1``. A norm that is not finite leaves them alone. Finite gradients
    whose fp32 norm overflows are clipped, and a norm of half types is accumulated in fp32. A parameter given twice
    counts once.

    Args:
        parameters: One tensor or an iterable of tensors.
        max_norm: Largest norm that passes unchanged; positive.
        norm_type: The p of the norm; positive, possibly ``inf``.
        error_if_nonfinite: Raise if the norm is NaN or infinite.
        foreach: Accepted for compatibility; the result does not depend on it, and the fast kernels are always used.

    Returns:
        The total norm before clipping, 0-dim; float64 where fp32 cannot hold it.

    Raises:
        ValueError: If max_norm or norm_type is not a positive number, or parameters is an exhausted iterator.
        TypeError: If parameters are not tensors.
        NonFiniteGradientError: A RuntimeError, if asked for.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2)); weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=10.0)
        tensor(5.)
    """
    del foreach
    rule = ClipByNorm(max_norm, norm_type)
    reading = NormReading(statistics.gradients_of(tensors_of(parameters))[1], rule)
    norms = read_norms(reading)
    if error_if_nonfinite and not math.isfinite(norms.total):
        raise NonFiniteGradientError(
            f"The total norm of order {rule.norm_type:g} is {norms.total}, so gradients cannot be clipped; look for "
            "the first non-finite layer, or pass error_if_nonfinite=False to leave them as they are."
        )
    clip(reading, norms)
    return reading.total_of(norms)


def read_norms(reading: NormReading) -> GradientNorms:
    """Reads norms back, a second time and in float64 where fp32 may not have held them."""
    reader = statistics.Reader()
    values = reader.ask(reading.tensor()).values
    suspects = reading.suspects(values)
    return (
        reading.norms(values, suspects, reader.ask(reading.exact(suspects)).values)
        if suspects
        else reading.norms(values)
    )


def positive(name: str, value: float) -> float:
    """The value as a float if it is a positive number; a ValueError that says so otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
        raise ValueError(f"{name} must be a positive number; got {value!r}.")
    return float(value)


def tensors_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list; a clear error for what holds none, such as a generator that was used up before."""
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be tensors; got {type(parameters).__name__}: pass model.parameters().")
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters must be tensors; got {type(tensor).__name__}: pass model.parameters().")
    if not tensors and isinstance(parameters, Iterator):
        raise ValueError(
            f"parameters must yield tensors; got a {type(parameters).__name__} with nothing left in it: "
            "pass a list, which can be read again."
        )
    return tensors


@torch.no_grad()
def _scale(reading: NormReading, coefficient: float, *, exact: bool) -> None:
    gradients = [gradient for gradient in reading.gradients if gradient.numel()]
    if exact:
        for gradient in gradients:
            values = gradient._values() if gradient.is_sparse else gradient  # noqa: SLF001 -- the only writable view
            values.copy_(values.to(statistics.wide(values.dtype)).mul_(coefficient))
        return
    assert reading.coefficient is not None
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), members in groups.items():
        torch._foreach_mul_(members, reading.coefficient.to(device))
