"""What one backward pass left behind: gradients between layers, and what it found in ``.grad``; still on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from diagnostics.depth.forward import OUTPUT, Roles
from diagnostics.hooks.marks import NOTHING, Look
from diagnostics.statistics import dead, magnitudes

_NOWHERE = Look()


@dataclass(slots=True)
class MeasuredGradient:
    """The gradient of a tensor between layers: taken apart where it is an output's, else its norm alone.

    Attributes:
        roles: What it is to which layers.
        numel: Number of elements.
        parts: What there is to know of it; None where no layer made the tensor.
        norm: Euclidean norm where that is so.
        exact: Whether that holds whatever its size.
        share: For a fused recurrent layer the share of its results, one per example and step, that have a gradient.
    """

    roles: Roles
    numel: int
    parts: magnitudes.Parts | Tensor | None = None
    norm: Tensor | None = None
    exact: bool = True
    share: Tensor | None = None


@dataclass(slots=True)
class BackwardPass:
    """One backward pass that accumulated into watched parameters; statistics still on the device.

    Attributes:
        held: Parameters that a step had spent and whose ``.grad`` was not None when the pass began.
        leftover: 1-norm of those gradients at that moment; a norm without squares, so that none is too small for it.
        replaced: Those of them whose ``.grad`` was no longer the tensor that the step had spent.
        cleared: Parameters to which an earlier pass had added what no step has spent, and whose ``.grad`` was None.
        before: A few gradients of earlier passes that no step has spent, as they were when the pass began.
        touched: Whether somebody had written to those.
        accumulated: Parameters that the pass added to.
        ends: The ones that it reached first and last.
        after: Those two when the pass ended.
        continued: Whether it is the rest of a pass in the middle of which a step was taken.
        training: Whether a model was in training mode.
        gradients: Those of tensors between layers, in the order of the backward pass.
    """

    held: tuple[int, ...] = ()
    leftover: Tensor = NOTHING
    replaced: frozenset[int] = frozenset()
    cleared: frozenset[int] = frozenset()
    before: Look = _NOWHERE
    touched: bool = False
    accumulated: set[int] = field(default_factory=set)
    ends: tuple[int, ...] = ()
    after: Look = _NOWHERE
    continued: bool = False
    training: bool = True
    gradients: list[MeasuredGradient] = field(default_factory=list)


def measured(roles: Roles, gradient: Tensor, *, exact: bool) -> MeasuredGradient:
    """What is kept of a gradient that arrives at a tensor between layers; for ``exact`` see ``magnitudes``."""
    numel = gradient.numel()
    if not any(role.kind == OUTPUT for role in roles):
        return MeasuredGradient(roles, numel, norm=magnitudes.euclidean_norm(gradient, exact=exact), exact=exact)
    share = dead.row_share(gradient) if roles.fused else None
    return MeasuredGradient(roles, numel, magnitudes.take_apart(gradient, exact=exact), share=share)
