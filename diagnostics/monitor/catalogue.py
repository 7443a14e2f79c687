"""Parameters by index and name, and the table of layers: what stays the same from step to step."""

from __future__ import annotations

import math
import operator
import re
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from diagnostics import statistics
from diagnostics.contract.acts import NOBODY
from diagnostics.depth import Call, find_owners, layer_table, unit_weights
from diagnostics.depth.forward import Forward
from diagnostics.hooks import Watcher
from diagnostics.monitor.assembly import OUTSIDE, Table
from diagnostics.records import Layer
from diagnostics.statistics.dead import DeadUnits
from diagnostics.statistics.samples import sample_size
from diagnostics.statistics.stacks import Layout

_SEVERAL = 8


class Roster(NamedTuple):
    """Some parameters in order.

    Attributes:
        indices: Theirs.
        names: Theirs.
        sizes: Their numbers of elements.
        factors: From the norm of each one's sample to the norm of the whole.
        layout: Which of their gradients are measured together.
        resolutions: Relative distance of neighbouring numbers in their dtypes.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    factors: tuple[float, ...]
    layout: Layout
    resolutions: tuple[float, ...]

    def estimated(self, norms: Sequence[float]) -> array[float]:
        """The norm of each parameter from that of its sample."""
        return array("d", map(operator.mul, norms, self.factors))


EMPTY = Roster((), (), (), (), Layout([]), ())


class Catalogue:
    """Parameters by index and name, and the table of layers.

    Args:
        models: Name to model.
        pattern: Regular expression on the names of the layers to tell of; None for all.
    """

    def __init__(self, models: Mapping[str, nn.Module], pattern: str | None = None) -> None:
        self.models = list(models)
        self.owners, named = find_owners(models)
        self.dead = DeadUnits(unit_weights(self.owners, named))
        self.names = list(named)
        self._tensors = [weakref.ref(tensor) for tensor in named.values()]
        self._index = {id(tensor): index for index, tensor in enumerate(named.values())}
        self._homes = {name: owner.root for owner in self.owners for name in owner.parameters}
        self._inside = len(self.names)
        self._admitted: set[int] = set()
        places = {name: place for place, name in enumerate(self.names)}
        self._of_owners = [[places[name] for name in owner.parameters] for owner in self.owners]
        self._pattern = None if pattern is None else re.compile(pattern)
        self._tables: dict[int | None, Table] = {}
        self._version = (-1, -1)
        self._rosters: dict[tuple[int, ...], Roster] = {}
        self._newest: tuple[Sequence[Tensor], Roster | None] = ((), None)
        self._adopted: Sequence[Tensor] = ()

    def tensors(self) -> list[Tensor]:
        """The parameters by index."""
        return [tensor for tensor in (reference() for reference in self._tensors) if tensor is not None]

    def adopt(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Takes in tensors that are not known yet, as parameters that no model has; returns those."""
        if tensors is self._adopted:
            return []
        self._adopted = tensors
        known, index = self._tensors, self._index  # which every step asks, so without a call of _knows for each
        new = [one for one in tensors if (place := index.get(id(one))) is None or known[place]() is not one]
        for tensor in new:
            self._index[id(tensor)] = len(self.names)
            self.names.append(f"parameter_{len(self.names) - self._inside}")
            self._tensors.append(weakref.ref(tensor))
        return new

    def admit(self, models: Mapping[str, nn.Module]) -> tuple[list[Tensor], set[int]]:
        """Takes in parameters that models have got since, where they have a gradient.

        Returns:
            Those parameters, and the indices of others that were put in or taken out: of parameters that models have no
            more, and of tensors that they have by now.
        """
        named = find_owners(models)[1]
        held = {id(tensor) for tensor in named.values()}
        moved = {i for i, one in enumerate(self._tensors) if (i < self._inside) != (id(one()) in held)}
        new = {name: one for name, one in named.items() if not self._knows(one) and one.grad is not None}
        self.adopt(list(new.values()))
        for name, tensor in new.items():
            self.names[self.index(tensor)] = name
            self._admitted.add(self.index(tensor))
        return list(new.values()), moved

    def _knows(self, tensor: Tensor) -> bool:
        index = self._index.get(id(tensor))  # which may have been that of a tensor that is gone
        return index is not None and self._tensors[index]() is tensor

    def index(self, tensor: Tensor) -> int:
        """The index of a known parameter."""
        return self._index[id(tensor)]

    def roster(self, tensors: Sequence[Tensor]) -> Roster:
        """Some known parameters in order; the same object for the same ones."""
        newest, roster = self._newest
        if tensors is newest and roster is not None:  # lists that are handed about are not changed
            return roster
        key = tuple(map(self._index.__getitem__, map(id, tensors)))
        if key not in self._rosters:
            if len(self._rosters) == _SEVERAL:
                self._rosters.clear()
            names, sizes = tuple(self.names[index] for index in key), tuple(tensor.numel() for tensor in tensors)
            taken = tuple(sample_size(tensor.shape) for tensor in tensors)
            factors = tuple(math.sqrt(size / part) if part else 1.0 for size, part in zip(sizes, taken, strict=True))
            layout = Layout(sizes, [tensor.shape for tensor in tensors])
            resolutions = tuple(statistics.resolution(tensor.dtype) for tensor in tensors)
            self._rosters[key] = Roster(key, names, sizes, factors, layout, resolutions)
        self._newest = tensors, self._rosters[key]
        return self._rosters[key]

    def name(self, tensor: Tensor) -> str:
        """The name of a known parameter."""
        return self.names[self.index(tensor)]

    def known(self, tensors: Iterable[Tensor]) -> Iterator[int]:
        """The indices of those that are known."""
        return (self.index(tensor) for tensor in tensors if self._knows(tensor))

    def tensor(self, index: int) -> Tensor | None:
        """The parameter of an index, if it still lives."""
        return self._tensors[index]()

    def is_inside(self, index: int) -> bool:
        """Whether a model has the parameter."""
        return index < self._inside or index in self._admitted

    def foreign(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """Those that no model has."""
        if len(self.names) == self._inside:
            return NOBODY
        return frozenset(index for index in self.known(tensors) if not self.is_inside(index))

    def parameters_of(self, owners: Iterable[int]) -> frozenset[int]:
        """The parameters of some owners."""
        return frozenset(index for owner in owners for index in self._of_owners[owner])

    def home(self, tensors: Sequence[Tensor]) -> int | None:
        """Which model all these parameters belong to; None if there is no single one."""
        names = [self.names[self._index[id(tensor)]] for tensor in tensors if id(tensor) in self._index]
        homes = {self._homes.get(name) for name in names} if len(names) == len(tensors) else set()
        return homes.pop() if len(homes) == 1 else None

    def layers(self, watcher: Watcher, home: int | None = None) -> Table:
        """The layers in the order of their calls, and one for parameters that no model has.

        Args:
            watcher: Has seen the calls.
            home: Tell only of this model.
        """
        version = (watcher.forward.version, len(self.names))
        if version != self._version:
            self._version = version
            self._tables = {None: Table(self._entries(watcher.forward))}
        if home not in self._tables:
            every = self._tables[None]
            entries = zip(every.layers, every.calls, strict=True)
            self._tables[home] = Table([entry for entry in entries if self.owners[entry[1][0]].root == home])
        return self._tables[home]

    def _entries(self, forward: Forward) -> list[tuple[Layer, Call]]:
        every = [call for root, order in enumerate(forward.orders) for call in order.calls or self._registered(root)]
        table = layer_table(self.owners, every) if every else []
        table = [(forward.place(layer, call), call) for layer, call in table]
        outside = tuple(self.names[self._inside :])
        if outside:
            table.append((Layer(len(table), OUTSIDE, "Parameter", outside, trunk=False), (-1, 0)))
        return [entry for entry in table if self._pattern is None or self._pattern.search(entry[0].name)]

    def _registered(self, root: int) -> list[Call]:
        return [(index, 0) for index, owner in enumerate(self.owners) if owner.root == root]
