"""Which parameters a model used: a walk through the autograd graph of its outputs, back to its inputs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diagnostics.depth.forward import tensors_in

LONGEST = 100_000
"""Nodes of the graph that are looked at, at most."""


class Leaves:
    """The Parameter leaves of the first forward pass with gradients enabled.

    What the model was given is not its own: the walk stops at its inputs.

    Attributes:
        found: The parameters; empty before that pass.
    """

    def __init__(self) -> None:
        self.found: list[weakref.ref[nn.Parameter]] = []
        self.done = False
        self._inputs: list[Any] | None = None

    def begins(self, arguments: Any) -> None:
        """The model was called with these."""
        if not self.done:
            self._inputs = [tensor if tensor.is_leaf else tensor.grad_fn for tensor in tensors_in(arguments)]

    def ends(self, output: Any) -> None:
        """It returned this."""
        inputs, self._inputs = self._inputs, None
        if self.done or inputs is None:
            return
        nodes = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
        if nodes:
            self.done = True
            self.found = [weakref.ref(leaf) for leaf in _leaves(nodes, inputs)]


def where(parameter: nn.Parameter, models: Mapping[str, nn.Module]) -> str:
    """Where a parameter that no model has is found in one all the same: in a plain list, mapping or attribute.

    Example:
        >>> model = nn.Module(); model.blocks = [nn.Linear(2, 1)]
        >>> where(model.blocks[0].weight, {"": model})
        'blocks[0].weight'
    """
    for prefix, model in models.items():
        for path, module in model.named_modules(prefix=prefix):
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    for place, held in _held(value):
                        name = _name(held, parameter)
                        if name is not None:
                            return f"{path}.{key}{place}{name}".lstrip(".")
    return f"a parameter of shape {tuple(parameter.shape)}"


def _leaves(nodes: list[Any], inputs: list[Any]) -> Iterator[nn.Parameter]:
    seen = {id(one) for one in inputs}
    waiting = list(nodes)
    kept: list[
        Any
    ] = []  # nodes are made anew in Python when they are asked for: an id holds only while its object lives
    while waiting and len(kept) < LONGEST:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        kept.append(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in seen:
            yield leaf
        waiting += [following for following, _ in node.next_functions if following is not None]


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield "", value
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{place}]", one) for place, one in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", one) for key, one in value.items())


def _name(held: Any, parameter: nn.Parameter) -> str | None:
    if held is parameter:
        return ""
    if isinstance(held, nn.Module):
        return next((f".{name}" for name, one in held.named_parameters() if one is parameter), None)
    return None
