"""What a training loop does, as the contract is told of it: backward passes, clips, steps, how far the weights moved.

Standard library only. Parameters are indices, and numbers have been read from the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward pass that accumulated, and what it found in ``.grad``.

    Attributes:
        accumulated: Parameters that it added to.
        leftover: Size of what ``.grad`` held when the pass began, for parameters whose gradient a step had spent and
            whose ``.grad`` was not None.
        replaced: Those of them whose ``.grad`` was no longer the tensor that the step had spent.
        cleared: Parameters to which an earlier pass had added what no step has spent, and whose ``.grad`` was None.
        zeroed: Parameters of which the same is known with a ``.grad`` that was all zero; a few are looked at.
        touched: Whether gradients that no step had spent had been written to since the pass before.
        sizes: 1-norm, in a sample, of a few of the gradients when the pass ended.
        continued: Whether it is the rest of the pass before, in the middle of which a step was taken.
        training: Whether a watched model was in training mode.
    """

    accumulated: frozenset[int]
    leftover: Mapping[int, float] = field(default_factory=dict)
    replaced: frozenset[int] = NOBODY
    cleared: frozenset[int] = NOBODY
    zeroed: frozenset[int] = NOBODY
    touched: bool = False
    sizes: Mapping[int, float] = field(default_factory=dict)
    continued: bool = False
    training: bool = True


@dataclass(frozen=True, slots=True)
class Clip:
    """A call of ``monitor.clip_grad_norm_``.

    Attributes:
        norms: Norm of each gradient that it was given, before it clipped.
        given: All parameters that it was given, those without a gradient included.
        max_norm: Its threshold.
        norm_type: The p of its norms.
        coefficient: What it multiplied the gradients by; 1.0 if it left them alone.
    """

    norms: Mapping[int, float]
    given: AbstractSet[int] = NOBODY
    max_norm: float = 1.0
    norm_type: float = 2.0
    coefficient: float = 1.0


@dataclass(frozen=True, slots=True)
class Compared:
    """What differs between the ranks of a process group at a recorded step, beyond rounding; the same on every rank.

    Attributes:
        ranks: How many there are.
        gradients: Parameters whose gradients differ, and by how much of the largest norm: 1.0 where a rank has none,
            inf where one is not finite.
        weights: Parameters whose values differed before the step, likewise.
        steps: The first and the last number of the steps that met here, if it was not the same one on all ranks.
    """

    ranks: int
    gradients: Mapping[int, float] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    steps: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step.

    Attributes:
        optimizer: Its name.
        step: Its number.
        norms: Norm of each gradient that is not None, as the step spends it.
        rewritten: Parameters whose ``.grad`` is not the tensor that an earlier step spent, or was written to since.
        replaced: Parameters whose ``.grad`` is not the tensor that the newest pass left, so that what is in it is not
            known; the two that the pass began and ended with are looked at.
        total_norm: Norm of all of them, of the declared type.
        max_norm: The declared threshold; None where nothing was declared.
        norm_type: The p of the norms.
        resolution: Relative distance of neighbouring numbers in the coarsest dtype of the gradients.
        skipped: Whether nothing was spent after all.
        closure: Whether the step evaluated a closure, which runs the backward passes inside it.
        loss_scale: What the losses were multiplied by; 1.0 without a scaler.
        empty: Trainable parameters of the optimizer whose ``.grad`` is None.
        by_hand: Those of them that a model has no more or has only by now, or that move all the same.
        ran: Parameters whose module ran with gradients enabled since the step before.
        foreign: Parameters of the optimizer that no model has.
        stranded: Parameters of a model that have a gradient and are in no optimizer, and whether their values have
            changed since they were first told of.
        unregistered: Parameters that the first forward pass used and that no model has, as people would find them.
        compared: What differs between ranks; None where nothing was compared.
    """

    optimizer: str
    step: int
    norms: Mapping[int, float]
    rewritten: frozenset[int] = NOBODY
    replaced: frozenset[int] = NOBODY
    total_norm: float = 0.0
    max_norm: float | None = None
    norm_type: float = 2.0
    resolution: float = 0.0
    skipped: bool = False
    closure: bool = False
    loss_scale: float = 1.0
    empty: frozenset[int] = NOBODY
    by_hand: frozenset[int] = NOBODY
    ran: frozenset[int] = NOBODY
    foreign: frozenset[int] = NOBODY
    stranded: Mapping[int, bool] = field(default_factory=dict)
    unregistered: tuple[str, ...] = ()
    compared: Compared | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What a recorded step did to the weights, which is known one step later.

    Attributes:
        optimizer: Its name.
        step: Its number.
        moved: Parameters that changed.
        still: Parameters that should have changed, since their gradient and learning rate were not zero, and did not;
            each with whether the update was lost in the rounding of the parameter's dtype.
    """

    optimizer: str
    step: int
    moved: AbstractSet[int] = NOBODY
    still: Mapping[int, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Closing:
    """The last look, when the loop is over.

    Attributes:
        finished: Whether it ended as it was meant to, and not by an exception.
        cleared: Parameters whose ``.grad`` is None by now.
        stranded: As for a step.
    """

    finished: bool = True
    cleared: frozenset[int] = NOBODY
    stranded: Mapping[int, bool] = field(default_factory=dict)
