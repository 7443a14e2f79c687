"""Automatic mixed precision: what a GradScaler has to be asked, without waiting for the device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState


def unscale(scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Divides gradients by the loss scale, once per step: what the loop has unscaled already is left alone."""
    for optimizer in optimizers:
        _unscale_once(scaler, optimizer)


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """The scale as a tensor (``get_scale()`` would wait for it); None before the first loss was scaled."""
    scale: Tensor | None = scaler._scale  # noqa: SLF001
    return scale


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step that the loop asked of its GradScaler, which left it out without the optimizer's hooks hearing of it.

    Attributes:
        place: Which of the optimizers.
        scale: The loss scale that was too large.
    """

    place: int
    scale: Tensor


class ScalerWatch:
    """Finds out, after ``scaler.update()``, which steps the scaler left out, without a write or a wait.

    The scaler keeps what became of each optimizer in a mapping that ``update()`` replaces by an empty one. Whoever has
    the old one still sees which optimizers were to step; those whose step hooks did not fire did not.

    Args:
        scaler: The scaler.
        optimizers: The optimizers.
    """

    def __init__(self, scaler: torch.amp.GradScaler, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._scaler = scaler
        # Hooks hold this object, and from a hook no way may lead back to the weights, or they are never freed.
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._scale: Tensor | None = None
        self._stepped: set[int] = set()
        self.forget()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note that an optimizer's step hook has fired."""
        self._stepped.add(id(optimizer))

    def look(self) -> list[SkippedStep]:
        """The steps that were left out since the last look, if there was an ``update()``."""
        states = self._scaler._per_optimizer_states  # noqa: SLF001 -- torch has no public way to ask
        scale = loss_scale(self._scaler)
        if self._scale is None and scale is not None:
            self._scale = scale.clone()
        if states is self._states or self._scale is None or scale is None:
            return []
        places = {id(reference()): place for place, reference in enumerate(self._optimizers)}
        asked = [one for one in places if self._states.get(one, {}).get("stage") is OptState.STEPPED]
        found = [SkippedStep(places[one], self._scale) for one in asked if one not in self._stepped]
        self.forget()
        self._scale = scale.clone()
        return found

    def forget(self) -> None:
        """What happened so far is not looked at any more."""
        self._states = self._scaler._per_optimizer_states  # noqa: SLF001
        self._stepped.clear()


def inside_step(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler hands to a fused step that is running: the scale still to be divided by, and the overflow.

    None where there is nothing: such a step is the only one that starts although gradients are scaled or not finite.
    """
    stepping = list(optimizers)
    return _first(stepping, "grad_scale"), _first(stepping, "found_inf")


def _first(optimizers: Iterable[torch.optim.Optimizer], name: str) -> Tensor | None:
    held = (getattr(optimizer, name, None) for optimizer in optimizers)
    return next((value for value in held if value is not None), None)


def _unscale_once(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:  # torch says that it has been done by an error only
        if "already been called" not in str(error):
            raise
