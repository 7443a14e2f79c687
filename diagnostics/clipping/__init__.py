"""Clipping as functions: a drop-in for torch's, and the same with any rule.

``torch.nn.utils.clip_grad_norm_`` multiplies every gradient at every step, by 1.0 where nothing is to be clipped, and
one infinite element turns all finite gradients into zeros. Here gradients are touched only when there is something to
clip, and never on the word of a norm that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from diagnostics import statistics
from diagnostics.clipping.groups import ClipByGroup, GroupState
from diagnostics.clipping.rules import ClipByNorm, ClipByQuantile, ClipByValue, ClipByZScore, ClipRule, Measure, checked
from diagnostics.clipping.state import ClipState, Member
from diagnostics.clipping.writing import Clipping
from diagnostics.records import ClipRecord, NonFiniteGradientError
from diagnostics.statistics.reading import Reader

__all__ = [
    "ClipByGroup",
    "ClipByNorm",
    "ClipByQuantile",
    "ClipByValue",
    "ClipByZScore",
    "ClipRule",
    "clip_grad_norm_",
    "clip_gradients",
    "rule_of",
    "tensors_of",
]


def clip_gradients(parameters: Tensor | Iterable[Any], rule: ClipRule | ClipState | None) -> ClipRecord:
    """Clips by a rule and says what it did.

    A rule that adapts to the norms of earlier calls remembers them in the rule object, where no Monitor adds to them.
    To keep several histories apart, or to save one, give what ``rule.start()`` returns: it has ``state_dict()``.

    Args:
        parameters: Tensors whose ``.grad`` is to be clipped; those without one are left out. For a
            :class:`ClipByGroup` also parameter groups, as ``optimizer.param_groups``, or pairs of name and tensor, as
            ``model.named_parameters()``.
        rule: How; None to measure only.

    Returns:
        The record; its shares are by parameter, in the order given, without those that have no gradient.

    Raises:
        TypeError: If parameters are not tensors, or the rule is none.
        ValueError: If parameters is an exhausted iterator, or does not tell the groups of a ClipByGroup.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2)); weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], ClipByNorm(max_norm=1.0)).total_norm
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    if not isinstance(rule, ClipState):
        checked("rule", rule)
    state = rule if isinstance(rule, ClipState) else (rule or Measure()).own()
    members: list[Member] = []
    if isinstance(state, GroupState):
        members, parameters = _grouped(parameters, state.by)
    clipping = Clipping(statistics.gradients_of(tensors_of(parameters))[1], state, Reader(), members=members)
    clipping.settle()
    record = clipping.clip()
    clipping.enter(record.total_norm)
    return replace(record, shares=clipping.shares)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.utils.clip_grad_norm_`` with the same results, but it never does harm.

    The same: norms, coefficient and clipped gradients of fp32 and fp64 gradients bit for bit; None gradients, one
    tensor, any iterable, mixed dtypes and devices; the returned norm is 0-dim, on the first gradient's device.
    Different, on purpose:

    - Gradients are not written to, not even their version moves, when ``clip_coef >= 1``.
    - A norm that is NaN or infinite leaves them alone.
    - Norms of half types are accumulated and returned in fp32; finite gradients whose fp32 norm overflows or underflows
      are measured again in float64, and the norm is returned in float64 if fp32 cannot hold it.
    - Of gradients that are spread over ranks (DTensor) the norm of the whole is returned, a plain tensor.
    - A parameter given twice counts once. Sparse gradients work, and so do empty ones with ``norm_type=inf``.
    - ``max_norm <= 0`` (0 wipes gradients, and a negative one reverses them), ``norm_type <= 0``, NaN, True and an
      iterator with nothing left in it are errors.

    Args:
        parameters: One tensor or an iterable of tensors.
        max_norm: Largest norm that passes unchanged; positive: a number, or a tensor or array of one element.
        norm_type: The p of the norm; positive, possibly ``inf`` or ``"inf"``.
        error_if_nonfinite: Raise if the norm is NaN or infinite.
        foreach: Accepted for compatibility; the result does not depend on it, and the fast kernels are always used.

    Returns:
        The total norm before clipping, 0-dim; float64 where fp32 cannot hold it.

    Raises:
        ValueError: If max_norm or norm_type is not a positive number, or parameters is an exhausted iterator.
        TypeError: If parameters are not tensors.
        NonFiniteGradientError: A RuntimeError, if asked for.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2)); weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=10.0)
        tensor(5.)
    """
    del foreach
    rule = rule_of(max_norm, norm_type)
    clipping = Clipping(statistics.gradients_of(tensors_of(parameters))[1], rule.start(), Reader())
    clipping.settle()
    if error_if_nonfinite and not math.isfinite(clipping.total):
        raise NonFiniteGradientError(
            f"The total norm of order {rule.norm_type:g} is {clipping.total}, so gradients cannot be clipped; look for "
            "the first non-finite layer, or pass error_if_nonfinite=False to leave them as they are."
        )
    clipping.clip()
    return clipping.tensor()


def rule_of(max_norm: Any, norm_type: Any) -> ClipByNorm:
    """The rule that torch's arguments mean: numbers, tensors or arrays of one element, and "inf" for the norm_type."""
    return ClipByNorm(_number(max_norm), math.inf if norm_type == "inf" else _number(norm_type))


def _number(given: Any) -> Any:
    return float(given) if math.prod(getattr(given, "shape", (0,))) == 1 else given


def tensors_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list; a clear error for what holds none, such as a generator that was used up before."""
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be tensors; got {type(parameters).__name__}: pass model.parameters().")
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for kind in set(map(type, tensors)):
        if not issubclass(kind, Tensor):
            raise TypeError(f"parameters must be tensors; got {kind.__name__}: pass model.parameters().")
    if not tensors and isinstance(parameters, Iterator):
        raise ValueError(
            f"parameters must yield tensors; got a {type(parameters).__name__} with nothing left in it: "
            "pass a list, which can be read again."
        )
    return tensors


def _grouped(parameters: Any, by: str) -> tuple[list[Member], list[Tensor]]:
    """Where the parameters that have a gradient belong, and all parameters, out of what an optimizer takes."""
    if by == "optimizer":
        raise ValueError(
            "rule must not clip by optimizer in clip_gradients, which knows none; got one: pass it to a Monitor."
        )
    members: dict[int, Member] = {}
    tensors: list[Any] = []
    for place, given in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        group = given if isinstance(given, Mapping) else {"params": [given]}
        held = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        names = group.get("param_names", ())
        for index, one in enumerate(held):
            name, tensor = one if isinstance(one, tuple) else (names[index] if index < len(names) else "", one)
            members.setdefault(id(tensor), Member(name, group=str(place) if isinstance(given, Mapping) else "0"))
            tensors.append(tensor)
    if by == "name" and not all(member.name for member in members.values()):
        raise ValueError("parameters must have names for a rule by name; got tensors: pass model.named_parameters().")
    owners = statistics.gradients_of(tensors_of(tensors or parameters))[0]
    return [members[id(owner)] for owner in owners], tensors
