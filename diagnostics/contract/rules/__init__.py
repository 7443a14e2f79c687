"""The rules of a training loop, each family in a module of its own; the package contract asks them all. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diagnostics.contract.acts import Backward, Clip, Closing, Moved, Step
from diagnostics.records import SOLE_OPTIMIZER

_MOVE_CLIP = "Move the clipping between loss.backward() and optimizer.step()."

REMEDIES = {
    "missing_zero_grad": "Call optimizer.zero_grad() once per step: before the backward pass, or right after the step.",
    "zero_grad_before_step": "Move optimizer.zero_grad() behind optimizer.step(), or before the first backward pass.",
    "step_without_grads": "Call loss.backward() before the step, and zero_grad() not between the two.",
    "clip_after_step": _MOVE_CLIP,
    "clip_before_backward": _MOVE_CLIP,
    "clip_mid_accumulation": "Clip once, after the last loss.backward() of the step.",
    "clip_scaled_grads": "Call scaler.unscale_(optimizer) before clipping, or use monitor.clip_and_step().",
    "clip_subset": "Clip all parameters of the optimizer in one call: clip_grad_norm_(model.parameters(), max_norm).",
    "clip_ineffective": "Call monitor.clip_and_step(), or clip between loss.backward() and optimizer.step().",
    "param_not_in_optimizer": "Give them to the optimizer, or freeze them: parameter.requires_grad_(False).",
    "optimizer_param_not_in_model": "Make the optimizer after the model is complete: SGD(model.parameters(), ...).",
    "param_not_registered": "Keep modules in nn.ModuleList or nn.ModuleDict, parameters in nn.ParameterList or as "
    "attributes, before the optimizer is made.",
    "no_grad_flow": "Use the module's output in the loss (no detach(), .data or no_grad() on the way), or freeze it: "
    "module.requires_grad_(False).",
    "no_update": "Raise the learning rate, or keep the weights in float32 (torch.autocast for the rest).",
    "window_size": "Step after every window of passes, at an epoch's end too, or declare more by accumulate=.",
    "rank_divergence": "Wrap the model in DistributedDataParallel and call the wrapper, or average the gradients over "
    "the ranks before every step; start from the same weights (rank 0's, or one seed). Ranks that are meant to differ: "
    "process_group=False.",
    "dropped_window": "Step on a short last window, or clear the gradients where it is meant to be dropped.",
}
"""The line to add or move, by rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that was broken: which, at which step, for which parameters, in words."""

    rule: str
    step: int
    message: str
    indices: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


class Judge:
    """A family of rules: it is told what the loop does, and says what is broken. A subclass judges what it needs."""

    def backward(self, fact: Backward) -> None:
        """Takes a backward pass."""

    def clip(self, fact: Clip) -> Iterable[Finding]:  # noqa: ARG002 -- here and below: nothing to say
        """Takes a clip of the loop's own."""
        return ()

    def step(self, fact: Step) -> Iterable[Finding]:  # noqa: ARG002
        """Takes a step."""
        return ()

    def moved(self, fact: Moved) -> Iterable[Finding]:  # noqa: ARG002
        """Takes what a recorded step did to the weights."""
        return ()

    def close(self, fact: Closing) -> Iterable[Finding]:  # noqa: ARG002
        """The end of the loop."""
        return ()


def describe(names: Sequence[str], limit: int = 4) -> str:
    """Parameter names as people say them: a few by name, many by number and module.

    Example:
        >>> describe(["a.weight", "a.bias"])
        '2 parameters (a.weight, a.bias)'
        >>> describe(["a.weight"])
        'a.weight'
        >>> describe([f"block.{i}.{name}" for i in range(9) for name in ("weight", "bias")])
        '18 parameters of 9 modules (block.0, block.1, block.2, block.3, …)'
    """
    if len(names) == 1:
        return names[0]
    if len(names) <= limit:
        return f"{len(names)} parameters ({', '.join(names)})"
    homes = modules(names)
    if len(homes) == len(names):
        return f"{len(names)} parameters ({', '.join(names[:limit])}, …)"
    more = ", …" if len(homes) > limit else ""
    count = f"{len(homes)} modules" if len(homes) > 1 else "1 module"
    return f"{len(names)} parameters of {count} ({', '.join(homes[:limit])}{more})"


def modules(names: Iterable[str]) -> list[str]:
    """The modules that parameters belong to, each once; a parameter of the model itself stands by its own name.

    Example:
        >>> modules(["0.weight", "0.bias", "scale"])
        ['0', 'scale']
    """
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def at(optimizer: str, step: int) -> str:
    """A step as a sentence begins with it."""
    return f"Step {step}" if optimizer == SOLE_OPTIMIZER else f"Step {step} of {optimizer}"


def times(number: int) -> str:
    """A small number as people say it.

    Example:
        >>> times(1), times(2), times(7)
        ('once', 'twice', '7 times')
    """
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
