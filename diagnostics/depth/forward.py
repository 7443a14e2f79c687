"""What forward passes show: the order of calls, the trunk, and whose gradient is that of which tensor.

No hook is registered here: the package hooks tells of calls, and is told which tensors to listen to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diagnostics.depth import Call, CallOrder, Owner
from diagnostics.depth.trunk import Node, Noted, Trunk, find_trunk
from diagnostics.records import Layer

OUTPUT, INPUT, STREAM = "output", "input", "stream"
_MAX_TRUNKS = 16
"""How many different orders of calls the trunk is looked for in: layers dropped at random have millions."""


class Role(NamedTuple):
    """What a gradient is to a layer: that of an output, of an input, or of the stream that its branch joins."""

    kind: str
    call: Call


class Roles(list[Role]):
    """What one gradient is to which layers; more may be found as the forward pass goes on.

    Attributes:
        serial: Number of the forward pass over all passes, by which inputs find the outputs of the same call.
        fused: Whether it is that of a fused recurrent layer's results.
    """

    __slots__ = ("fused", "serial")

    def __init__(self, roles: Iterable[Role] = (), serial: int = 0, *, fused: bool = False) -> None:
        super().__init__(roles)
        self.serial = serial
        self.fused = fused


class Point(NamedTuple):
    """A tensor, or the graph's node that made it, whose gradient is wanted, and for whom."""

    place: Tensor | Node
    roles: Roles


class TracedPass(NamedTuple):
    """A forward pass that was traced, for all models that run its graph: which model's, its calls, and their trunk."""

    root: int
    calls: tuple[Call, ...]
    trunk: Trunk


_serials = count()


@dataclass(slots=True)
class _Pass:
    """One forward pass of a model: its calls, and what they read and made."""

    serial: int = field(default_factory=_serials.__next__)
    begun: bool = False
    counts: bool = False
    ranks: dict[int, int] = field(default_factory=dict)
    attached: dict[Call, int] = field(default_factory=dict)  # in their order
    noted: list[Noted] = field(default_factory=list)
    trace: list[Call] = field(default_factory=list)
    roles: dict[Any, Roles] = field(default_factory=dict)  # by node, no tensors: those must be free to go


class Forward:
    """The forward passes of some models.

    Args:
        owners: Their layers' modules.
        roots: Number of models.

    Attributes:
        orders: Order of calls by model.
        trunks: What is known of the trunk, likewise.
        version: Grows whenever either changes.
        ran: Owners that were called with gradients enabled since somebody emptied the set.
    """

    def __init__(self, owners: Sequence[Owner], roots: int) -> None:
        self.orders = [CallOrder() for _ in range(roots)]
        self.trunks = [Trunk() for _ in range(roots)]
        self.version = 0
        self.ran: set[int] = set()
        self._owners = owners
        self._passes = [_Pass() for _ in range(roots)]
        self._read: list[set[tuple[Call, ...]]] = [set() for _ in range(roots)]
        self._adopted: set[tuple[int, tuple[Call, ...]]] = set()
        self._roles: dict[Call, tuple[Role, Role, Role]] = {}
        self._vary = [False] * roots  # whether passes have been seen to come in several orders

    def place(self, layer: Layer, call: Call) -> Layer:
        """A layer with what is known of its place in the trunk."""
        root = self._owners[call[0]].root
        trunk = self.trunks[root]
        if not trunk.steps_back:
            return layer
        on_trunk = (layer.trunk and call not in trunk.branch) or call in trunk.ends
        steps = trunk.steps_back.get(call)
        later = sum(1 + max(other.steps_back.values(), default=-1) for other in self.trunks[root + 1 :])
        return replace(layer, trunk=on_trunk, steps_back=None if steps is None else steps + later)

    def begin(self, root: int) -> None:
        """A model's forward begins."""
        self._end(root)
        self._passes[root].begun = True
        self._passes[root].counts = torch.is_grad_enabled()

    def called(self, index: int, given: Iterable[Any], made: Any) -> list[Point]:
        """A layer was called; what it read and made.

        Args:
            index: Which owner.
            given: Its arguments.
            made: Its result.

        Returns:
            Tensors and nodes to listen to, whose roles may still grow.
        """
        owner = self._owners[index]
        root, one = owner.root, self._passes[owner.root]
        if not one.begun or (not one.counts and torch.is_grad_enabled()):
            self.begin(root)
            one = self._passes[root]
        if not one.counts:
            return []
        rank = one.ranks.get(index, 0)
        one.ranks[index] = rank + 1
        roles = self._roles_of((index, rank))
        call = roles[0].call
        one.trace.append(call)
        outputs = _differentiable((made,))
        if not outputs:
            return []
        inputs = _differentiable(given)
        one.attached[call] = len(one.attached)
        if self._notes(root):
            one.noted.append(Noted(call, tuple(map(_node, inputs)), tuple(map(_node, outputs))))
        fused = isinstance(owner.module(), nn.RNNBase)
        points = [*self._points(one, outputs, roles[0], fused=fused), *self._points(one, inputs, roles[1], fused=fused)]
        return [*points, *self._streams(root, call, inputs)] if self.trunks[root].streams else points

    def called_again(self, index: int, given: Iterable[Any], made: Any) -> list[Point]:
        """A layer of a checkpointed segment runs again in the backward pass: only a reentrant one has new tensors."""
        one, call = self._passes[self._owners[index].root], (index, 0)
        outputs = _differentiable((made,))
        if call in one.attached or not outputs:
            return []
        made_it, read_it, _ = self._roles_of(call)
        one.attached[call] = len(one.attached)
        return [*self._points(one, outputs, made_it), *self._points(one, _differentiable(given), read_it)]

    def ended(self, root: int, result: Any) -> Iterator[Point]:
        """A model's forward has ended; what it returned."""
        one = self._passes[root]
        if one.counts:
            results = _differentiable((result,))
            joins = self._look_for_trunk(root, tuple(map(_node, results)))
            for node, ends in joins.items():
                yield from self._points(one, [node], self._roles_of(ends)[2])
            if not joins:
                yield from self._streams(root, None, results)

    def traced(self, root: int, result: Any) -> TracedPass:
        """A forward that was only traced has ended; it has not run by that."""
        for _ in self.ended(root, result):  # tells the tensors that are listened to whose residual stream they are
            pass
        one, self._passes[root] = self._passes[root], _Pass()
        return TracedPass(root, tuple(one.trace), self.trunks[root])

    def adopt(self, seen: TracedPass) -> None:
        """Takes what a trace has shown, of this model or of an equal one whose compiled graph it shares."""
        if (seen.root, seen.calls) not in self._adopted:
            self._adopted.add((seen.root, seen.calls))
            self.version += self.orders[seen.root].extend(seen.calls)
            self.version += self.trunks[seen.root].take(seen.trunk)

    def forget(self) -> None:
        """The passes that have begun are not to count."""
        self._passes = [_Pass() for _ in self._passes]

    def settle(self) -> None:
        """Every pass has ended."""
        for root in range(len(self._passes)):
            self._end(root)

    def separate(self) -> None:
        """After a backward pass: calls outside a model's own forward begin a new pass."""
        for one in self._passes:
            one.begun = False

    def _roles_of(self, call: Call) -> tuple[Role, Role, Role]:
        """What gradients can be to a layer; always the same objects, since every pass has some for each layer."""
        found = self._roles.get(call)
        if found is None:
            self._roles[call] = found = Role(OUTPUT, call), Role(INPUT, call), Role(STREAM, call)
        return found

    def _notes(self, root: int) -> bool:
        """Whether a pass notes what its calls read and made: until the graph of every order of calls has been read."""
        return (self._vary[root] or not self._read[root]) and len(self._read[root]) < _MAX_TRUNKS

    def _points(self, one: _Pass, places: Iterable[Tensor | Node], role: Role, *, fused: bool = False) -> list[Point]:
        """Those of some places that are new; one that is known gets one more role."""
        found = []
        for place in places:
            key = place
            if isinstance(place, Tensor):
                key = (_node(place), place.output_nr) if place.output_nr else _node(place)
            known = one.roles.get(key)
            if known is None:
                one.roles[key] = known = Roles((role,), one.serial, fused=fused)
                found.append(Point(place, known))
            elif role not in known:
                known.append(role)
        return found

    def _streams(self, root: int, reader: Call | None, tensors: Sequence[Tensor]) -> Iterator[Point]:
        """The joins that are next to some tensors: of several that fit, the one whose branch was called last."""
        one, streams = self._passes[root], self.trunks[root].streams
        for number, tensor in enumerate(tensors) if streams else ():
            joins: dict[Node, Call] = {}
            for locator in streams.get((reader, number), ()):
                node = locator.find(_node(tensor)) if locator.ends in one.attached else None
                if node is not None:
                    joins[node] = max(locator.ends, joins.get(node, locator.ends), key=one.attached.__getitem__)
            for node, ends in joins.items():
                place = tensor if node is tensor.grad_fn else node
                yield from self._points(one, [place], self._roles_of(ends)[2])

    def _end(self, root: int) -> None:
        self._look_for_trunk(root)
        one, self._passes[root] = self._passes[root], _Pass()
        self.version += self.orders[root].extend(one.trace)
        self.ran.update(index for index, _ in one.trace)

    def _look_for_trunk(self, root: int, results: Sequence[Node] = ()) -> dict[Node, Call]:
        """Reads the graph of a pass whose calls came in a new order; returns its joins."""
        one, trace = self._passes[root], tuple(self._passes[root].trace)
        if not one.attached or trace in self._read[root] or len(self._read[root]) == _MAX_TRUNKS:
            return {}
        if not one.noted:
            self._vary[root] = True  # from the next pass on
            return {}
        self._read[root].add(trace)
        try:
            trunk, joins = find_trunk(one.noted, self._owners, results)
        except (AttributeError, RuntimeError, TypeError):  # torch promises nothing about nodes of the graph
            return {}
        self.version += self.trunks[root].take(trunk)
        return joins


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value: itself, or in mappings, sequences and dataclasses, nested as they may be.

    Example:
        >>> [tensor.item() for tensor in tensors_in({"loss": torch.tensor(1.0), "states": (torch.tensor(2.0), None)})]
        [1.0, 2.0]
    """
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, (tuple, list)):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, one.name) for one in fields(value))
    for part in parts:
        yield from tensors_in(part)


def _differentiable(values: Iterable[Any]) -> list[Tensor]:
    """Of the tensors in some values those that take a gradient and are no parameters."""
    tensors: list[Tensor] = []
    for value in values:
        if type(value) is Tensor:  # nearly always, and a fifth of the time
            tensors.append(value)
        else:
            tensors += tensors_in(value)
    return [one for one in tensors if one.requires_grad and not (one.is_leaf and isinstance(one, nn.Parameter))]


def _node(tensor: Tensor) -> Node:
    """The node that made a tensor; the leaf's own where nothing made it."""
    made_by = tensor.grad_fn
    return torch.autograd.graph.get_gradient_edge(tensor).node if made_by is None else made_by
