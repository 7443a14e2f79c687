"""The trunk: which layers the fit over depth follows, found in the autograd graph of one forward pass.

In a plain net every way back from the loss to the first layer passes every layer. A skip connection leads around the
layers of a block: what those do to the gradient is a branch, and the gradient that reaches the first layer is that of
the residual stream. So a *join* is looked for: a node of the graph where two ways meet, of which one leads back to an
earlier node of the same shape without passing a layer (a residual or highway connection), or of which one passes a
single layer that reads the same tensor as the other way (a projection shortcut; also a gate, and queries beside keys).
Layers between the two nodes are branch layers: recorded, not fitted. In their place the last of them stands for the
join, with the gradient that arrives there.

A skip over more than ``MAX_SPAN`` layers is not taken for a block's, nor one that ends in a concatenation: layers under
them (U-Net, DenseNet, states of a recurrent net that are stacked) stay in the trunk. Layers side by side, as those of
two towers, stand at one place: ``steps_back`` is the longest way to the loss, counted in layers of the trunk.

The graph is read once per new order of calls, when the forward pass has ended; nothing is computed on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple, TypeAlias

from diagnostics.depth import Call, Owner

MAX_SPAN = 16
"""Most layers, normalisations included, that one skip may lead around: the largest block in use has about ten."""

_MAX_NODES = 200_000
_MAX_PATH = 12

Node: TypeAlias = Any
"""``torch.autograd.graph.Node``."""


class Noted(NamedTuple):
    """A call of a layer in one forward pass, and the nodes that made its inputs and outputs."""

    call: Call
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


class Locator(NamedTuple):
    """How to find a join again: from a node next to it, the edges to follow back, and the nodes that lie there."""

    ends: Call
    edges: tuple[int, ...]
    names: tuple[str, ...]

    def find(self, node: Node) -> Node | None:
        """The join's node, None where the graph looks different from what it was."""
        for edge, name in zip(self.edges, self.names, strict=True):
            following = node.next_functions
            if edge >= len(following) or following[edge][0] is None or following[edge][0].name() != name:
                return None
            node = following[edge][0]
        return node


@dataclass(slots=True)
class Trunk:
    """What the passes of one model have shown about its trunk.

    Attributes:
        branch: Calls that skip connections lead around.
        ends: Those calls that stand for a join, and are therefore fitted.
        steps_back: The longest way to the loss of every call whose place in the graph was seen.
        streams: Joins by the call whose input they are next to; under None those next to the model's result.
    """

    branch: set[Call] = field(default_factory=set)
    ends: set[Call] = field(default_factory=set)
    steps_back: dict[Call, int] = field(default_factory=dict)
    streams: dict[tuple[Call | None, int], list[Locator]] = field(default_factory=dict)

    def take(self, other: Trunk) -> bool:
        """Takes what one more pass has shown; returns whether that is news."""
        before = (len(self.branch), len(self.ends), dict(self.steps_back), sum(map(len, self.streams.values())))
        self.branch |= other.branch
        self.ends |= other.ends
        for call, steps in other.steps_back.items():
            self.steps_back[call] = max(steps, self.steps_back.get(call, 0))
        for place, locators in other.streams.items():
            known = self.streams.setdefault(place, [])
            known += [locator for locator in locators if locator not in known]
        return before != (len(self.branch), len(self.ends), self.steps_back, sum(map(len, self.streams.values())))


def find_trunk(
    noted: Sequence[Noted], owners: Sequence[Owner], results: Sequence[Node] = ()
) -> tuple[Trunk, dict[Node, Call]]:
    """Reads the graph of one forward pass.

    Args:
        noted: The calls of layers in their order.
        owners: The modules that were called.
        results: Nodes that made the model's result.

    Returns:
        The trunk, and the joins with the calls that stand for them. An empty trunk, so that the order of the calls
        counts, for a graph that is too large or not in order.
    """
    graph = _Graph(noted, owners, results)
    if not graph.order:
        return Trunk(), {}
    joins: dict[Node, Call] = {}
    trunk = Trunk()
    swallowed: set[Node] = set()
    for node in graph.order:
        if node in swallowed or node in graph.inside or len(set(graph.parents(node))) < 2:
            continue
        window = graph.window(node)
        if window is None:
            continue
        swallowed |= window.nodes
        trunk.branch |= window.calls
        composite = [call for call in graph.made_by.get(node, ()) if call in graph.composite]
        ends = composite[0] if composite else graph.last(window.calls)
        trunk.ends.add(ends)
        trunk.branch.discard(ends) if composite else joins.setdefault(node, ends)
    trunk.steps_back = graph.steps_back(trunk, joins)
    trunk.streams = graph.locate(joins, results)
    return trunk, joins


class _Window(NamedTuple):
    """What lies between a join and the node where its ways part."""

    nodes: set[Node]
    calls: set[Call]


@dataclass(slots=True)
class _Reached:
    """How a node is reached from a join.

    Attributes:
        past: The join's parents from which a way leads here past all layers, one bit each.
        through: Those from which one leads through layers.
        fewest: Through how few layers that count.
    """

    past: int = 0
    through: int = 0
    fewest: int = 1_000_000

    @property
    def twice(self) -> bool:
        """Whether ways from different parents meet here."""
        return (self.past | self.through).bit_count() > 1


class _Graph:
    """The graph of one pass with the calls of layers marked in it.

    Attributes:
        order: All nodes but those of leaves, latest first; empty if they cannot be ordered.
        inside: Node to the call of a layer, without layers inside, that it belongs to.
        made_by: Node to the calls whose output it made.
        read_by: Node to the calls whose input it made, and which input.
        composite: Calls of layers that have layers inside.
        place: Call to its place in the order of calls.
    """

    def __init__(self, noted: Sequence[Noted], owners: Sequence[Owner], results: Sequence[Node]) -> None:
        self._noted = noted
        self._owners = owners
        self._parents: dict[Node, list[Node]] = {}
        self.place = {one.call: place for place, one in enumerate(noted)}
        around = _parents_of_paths(noted, owners)
        self.composite = {one.call for one in noted if owners[one.call[0]].path in around}
        self.made_by: dict[Node, list[Call]] = {}
        self.read_by: dict[Node, list[tuple[Call, int]]] = {}
        for one in noted:
            for node in one.outputs:
                self.made_by.setdefault(node, []).append(one.call)
            for number, node in enumerate(one.inputs):
                self.read_by.setdefault(node, []).append((one.call, number))
        self.order = self._ordered([*results, *self.made_by, *self.read_by])
        self.inside: dict[Node, Call] = {}
        if self.order:
            for one in noted:
                if one.call not in self.composite:
                    self._mark(one)

    def parents(self, node: Node) -> list[Node]:
        """The nodes that a node hands gradients on to, leaves left out."""
        if node not in self._parents:
            following = (parent for parent, _ in node.next_functions)
            self._parents[node] = [one for one in following if one is not None and one.name() != _LEAF]
        return self._parents[node]

    def last(self, calls: Iterable[Call]) -> Call:
        """The call that came last; a normalisation only where there is nothing else."""
        return max(calls, key=lambda call: (self._owners[call[0]].trunk, self.place[call]))

    def window(self, join: Node) -> _Window | None:
        """The layers that a skip connection leads around on its way to a join; None if the node is no such join."""
        shape = _shape(join)
        reached = {
            parent: _Reached(past=1 << bit, fewest=0) for bit, parent in enumerate(dict.fromkeys(self.parents(join)))
        }
        waiting = [(-_number(node), id(node), node) for node in reached]
        heapify(waiting)
        window = _Window({join}, set())
        while waiting and shape is not None and len(window.calls) <= MAX_SPAN:
            node = heappop(waiting)[2]  # the latest, so that all ways to it are known
            at = reached[node]
            if at.past and at.through and at.twice and _shape(node) == shape:
                return window
            if not waiting and at.fewest == 1 and at.twice and self._shortcut(join, node, window.calls):
                return window
            window.nodes.add(node)
            window.calls.update(self.made_by.get(node, ()))
            window.calls.update([self.inside[node]] if node in self.inside else [])
            for parent in self.parents(node):
                if parent not in reached:
                    reached[parent] = _Reached()
                    heappush(waiting, (-_number(parent), id(parent), parent))
                self._reach(at, reached[parent], self._leaves(node, parent))
        return None

    def _reach(self, child: _Reached, parent: _Reached, left: Call | None) -> None:
        """A node is reached from another one, perhaps by leaving a layer."""
        if left is None:
            parent.past |= child.past
            parent.through |= child.through
        else:
            parent.through |= child.past | child.through
        counts = left is not None and self._owners[left[0]].trunk
        parent.fewest = min(parent.fewest, child.fewest + counts)

    def _leaves(self, node: Node, parent: Node) -> Call | None:
        """The call of a layer that ends between two nodes."""
        call = self.inside.get(node)
        return None if call is None or self.inside.get(parent) == call else call

    def _shortcut(self, join: Node, fork: Node, calls: set[Call]) -> bool:
        """Whether layers read the very tensor where the ways part, and come together again in one shape."""
        read = _shape(fork) is not None and any(call in calls for call, _ in self.read_by.get(fork, ()))
        return read and len(calls) > 1 and all(_shape(parent) == _shape(join) for parent in self.parents(join))

    def steps_back(self, trunk: Trunk, joins: Mapping[Node, Call]) -> dict[Call, int]:
        """The longest way from the loss to every call, counted in layers of the trunk."""
        fitted = {call for call in self.place if self._owners[call[0]].trunk and call not in trunk.branch}
        level = dict.fromkeys(self.order, 0)
        for node in self.order:
            composite = any(call in fitted and call in self.composite for call in self.made_by.get(node, ()))
            for parent in self.parents(node):
                counts = node in joins or composite or self._leaves(node, parent) in fitted
                level[parent] = max(level[parent], level[node] + counts)
        found = {one.call: max((level[node] for node in one.outputs), default=0) for one in self._noted if one.outputs}
        return found | {call: level[node] for node, call in joins.items()}

    def locate(
        self, joins: Mapping[Node, Call], results: Sequence[Node]
    ) -> dict[tuple[Call | None, int], list[Locator]]:
        """For every join the nearest way to it from an input of a layer, or from the model's result."""
        places: list[tuple[tuple[Call | None, int], Node]] = [((None, i), node) for i, node in enumerate(results)]
        places += [((one.call, i), node) for one in self._noted for i, node in enumerate(one.inputs)]
        found: dict[Node, tuple[tuple[Call | None, int], Locator]] = {}
        for place, start in places:
            for node, edges, names in self._near(start):
                if node in joins:
                    if node not in found or len(edges) < len(found[node][1].edges):
                        found[node] = (place, Locator(joins[node], edges, names))
                    break
        located: dict[tuple[Call | None, int], list[Locator]] = {}
        for place, locator in found.values():
            located.setdefault(place, []).append(locator)
        return located

    def _near(self, start: Node) -> Iterator[tuple[Node, tuple[int, ...], tuple[str, ...]]]:
        """Nodes behind one, nearest first, as far as no layer lies between."""
        waiting: list[tuple[Node, tuple[int, ...], tuple[str, ...]]] = [(start, (), ())]
        seen = {start}
        for node, edges, names in waiting:
            yield node, edges, names
            if node in self.inside or len(edges) == _MAX_PATH:
                continue
            for edge, (parent, _) in enumerate(node.next_functions):
                if parent is not None and parent not in seen and parent.name() != _LEAF:
                    seen.add(parent)
                    waiting.append((parent, (*edges, edge), (*names, parent.name())))

    def _ordered(self, starts: Iterable[Node]) -> list[Node]:
        """Everything behind some nodes, latest first."""
        seen, waiting = set(starts), [*starts]
        while waiting:
            node = waiting.pop()
            for parent in self.parents(node):
                if _number(parent) >= _number(node):
                    return []
                if parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
            if len(seen) > _MAX_NODES:
                return []
        return sorted(seen, key=_number, reverse=True)

    def _mark(self, one: Noted) -> None:
        """Marks what a layer computed, from its outputs back to its inputs."""
        waiting = [node for node in one.outputs if node not in one.inputs and node not in self.inside]
        while waiting:
            node = waiting.pop()
            self.inside[node] = one.call
            waiting += [
                parent
                for parent in self.parents(node)
                if parent not in one.inputs and parent not in self.inside and parent not in self.made_by
            ]


_LEAF = "torch::autograd::AccumulateGrad"


def _number(node: Node) -> int:
    """Nodes are numbered as they are made."""
    return int(node._sequence_nr())  # noqa: SLF001 -- a method of torch.autograd.graph.Node without a public name


def _shape(node: Node) -> tuple[int, ...] | None:
    """The shape of what a node made; None if it made several things."""
    made = node._input_metadata  # noqa: SLF001 -- likewise
    return tuple(made[0].shape) if len(made) == 1 else None


def _parents_of_paths(noted: Sequence[Noted], owners: Sequence[Owner]) -> set[str]:
    """The paths of all modules around the called ones."""
    around: set[str] = set()
    for path in {owners[one.call[0]].path for one in noted}:
        parts = path.split(".") if path else []
        around |= {".".join(parts[:size]) for size in range(len(parts))}
    return around
