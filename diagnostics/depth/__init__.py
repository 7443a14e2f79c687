"""Model → layers in the order of the forward pass.

Depth means the same everywhere. A layer is one call of a module that owns parameters directly. The order is that of the
calls, seen in recorded forward passes; a module called several times in one pass is several layers, ``name@0 …
name@k``, the parameters standing at the first. A parameter whose owner is never called
(``MultiheadAttention.out_proj``) belongs to the nearest called ancestor.

- Branches, experts, layers dropped at random: what some pass has ordered keeps that order, the rest stands as it was
  registered.
- A cell that is unrolled in time is one layer per step: the depth axis of a recurrent net is time.
- A fused ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` is one layer, since the gradient between its steps stays inside of one
  kernel. What autograd shows is the loss's own gradient at every step's result; statistics are over the results that
  have any, so that a loss at the last step alone does not look like a layer that is nearly dead. There is no profile
  over time on purpose: with a loss at every step it would be flat for every recurrence, one that vanishes included.
- A checkpointed segment is what it is without; one with ``use_reentrant=True`` hides its graph, so no layer of such a
  model is taken for a branch, and inside it only the first call of a module that is called several times is seen.
- Several forwards in one step (micro-batches, a GAN) merge call by call.
- ``autograd.grad``, passes without grad and passes of a copy of the model do not count.
- A compiled model is what it is without, if the Monitor came before its first call and its whole forward is one graph
  (hooks/compiled.py). Else output gradients are not seen, and where there are none at all the Monitor says so once.
- Which layers the fit over depth follows, and where layers stand that run side by side, is trunk.py's to say.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from diagnostics.records import Layer

Call: TypeAlias = tuple[int, int]
"""Which owner, and which of its calls in one forward pass, both counted from 0."""

NORMALISATION = re.compile(r"norm(\dd)?$", re.IGNORECASE)
"""Class names of normalisation layers: BatchNorm2d, LayerNorm, RMSNorm and everybody's own RMSNorm."""

_PARAMETRIZATIONS = ".parametrizations."
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # hold a model as ``module``
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Under which names torch.compile, FSDP and checkpoint wrappers hold one."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A module that owns parameters directly.

    Attributes:
        path: Qualified name in its model, ``""`` for the model itself; the model's own name stands in front where there
            are several models.
        kind: Its class.
        module: Weak reference: watching must not keep a model alive.
        parameters: Qualified names of the parameters whose first owner it is.
        trunk: Whether it counts in the fit: everything does but normalisation.
        root: Which model it belongs to.
    """

    path: str
    kind: str
    module: weakref.ref[nn.Module]
    parameters: tuple[str, ...]
    trunk: bool
    root: int

    @property
    def name(self) -> str:
        """The path, or the class of a model that owns parameters itself."""
        return self.path or self.kind

    def above(self, other: Owner) -> bool:
        """Whether the other module is inside this one."""
        return other.root == self.root and (not self.path or other.path.startswith(f"{self.path}."))


def find_owners(models: Mapping[str, nn.Module]) -> tuple[list[Owner], dict[str, Tensor]]:
    """The modules of some models that own parameters directly, and the parameters by name.

    Args:
        models: Name to model; a single model has the name ``""``.

    Returns:
        Owners in the order of registration, and every parameter once under its first name.

    Example:
        >>> owners, parameters = find_owners({"": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))})
        >>> [(owner.name, owner.kind) for owner in owners], list(parameters)
        ([('0', 'Linear'), ('2', 'Linear')], ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    owners: list[Owner] = []
    parameters: dict[str, Tensor] = {}
    seen: set[int] = set()
    for root, (prefix, model) in enumerate(models.items()):
        wrappers: set[str] = set()
        for module_name, module in model.named_modules():
            if isinstance(module, _WRAPPERS):
                wrappers.add(module_name)
            if _PARAMETRIZATIONS in f".{module_name}.":
                continue
            held = _own_parameters(module)
            if not held:
                continue
            name = _join(prefix, _unwrapped(module_name, wrappers))
            new = {_join(name, key): value for key, value in held.items() if id(value) not in seen}
            seen.update(id(value) for value in new.values())
            parameters.update(new)
            trunk = not NORMALISATION.search(type(module).__name__)
            owners.append(Owner(name, type(module).__name__, weakref.ref(module), tuple(new), trunk, root))
    return owners, parameters


def unit_weights(owners: Sequence[Owner], parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """The weights whose rows are units of a layer: the first of each layer with two dimensions or more.

    Args:
        owners: As :func:`find_owners` returns them.
        parameters: Likewise.

    Returns:
        Name of the parameter to the dimension that counts units: 0, but 1 for transposed convolutions. Not those of
        embeddings, whose rows are tokens, and not those of lazy modules, whose shape is not known yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(5, 3))
        >>> unit_weights(*find_owners({"": model}))
        {'0.weight': 0}
    """
    found = {}
    for owner in owners:
        module = owner.module()
        weights = [name for name in owner.parameters if not is_lazy(parameters[name]) and parameters[name].dim() > 1]
        if weights and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found[weights[0]] = int(isinstance(module, nn.modules.conv._ConvTransposeNd))  # noqa: SLF001
    return found


class CallOrder:
    """The order of calls over all forward passes seen so far.

    It keeps the order of every pass, so long as passes do not contradict each other: a branch that is taken for the
    first time, a longer sequence, layers that are dropped at random. What no pass orders stands as it was registered,
    and of two passes that contradict each other the earlier one counts.

    Attributes:
        calls: All calls, in order.
        version: Grows whenever they change.

    Example:
        >>> order = CallOrder()
        >>> order.extend([(0, 0), (1, 0)])
        True
        >>> order.extend([(0, 0), (2, 0), (1, 0)])
        True
        >>> order.calls
        [(0, 0), (2, 0), (1, 0)]
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.version = 0
        self._next: dict[Call, set[Call]] = {}  # what some pass called right behind a call

    def extend(self, trace: Sequence[Call]) -> bool:
        """Takes the calls of one forward pass in their order; returns whether that changed the order."""
        before, news = self.calls, False
        for call in trace:
            news |= call not in self._next
            self._next.setdefault(call, set())
        for call, following in pairwise(trace):
            if following not in self._next[call] and not self._leads(following, call):
                self._next[call].add(following)
                news = True
        if news:
            self.calls = self._sorted()
        self.version += self.calls != before
        return self.calls != before

    def _leads(self, start: Call, goal: Call) -> bool:
        """Whether the goal is known to come behind the start, or is the start."""
        seen, waiting = {start}, [start]
        while waiting:
            call = waiting.pop()
            if call == goal:
                return True
            waiting += self._next[call] - seen
            seen |= self._next[call]
        return False

    def _sorted(self) -> list[Call]:
        sorter: TopologicalSorter[Call] = TopologicalSorter()
        for call, following in self._next.items():
            sorter.add(call)
            for one in following:
                sorter.add(one, call)
        sorter.prepare()
        calls: list[Call] = []
        ready: list[Call] = []
        while sorter.is_active():
            for call in sorter.get_ready():
                heappush(ready, call)
            calls.append(heappop(ready))
            sorter.done(calls[-1])
        return calls


def layer_table(owners: Sequence[Owner], calls: Sequence[Call]) -> list[tuple[Layer, Call]]:
    """Layers in the order of their calls, with the parameters of owners that are never called given to an ancestor.

    Args:
        owners: As :func:`find_owners` returns them.
        calls: The order of calls; empty if no forward pass was seen, then the order of registration stands in.

    Returns:
        Layers, each with the call that it is.

    Example:
        >>> owners, _ = find_owners({"": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
        >>> [layer.name for layer, _ in layer_table(owners, [(1, 0), (0, 0), (0, 1)])]
        ['1', '0@0', '0@1']
    """
    order = list(calls) or [(index, 0) for index in range(len(owners))]
    called = {owner for owner, _ in order}
    parameters = {index: list(owners[index].parameters) for index in called}
    for index, owner in enumerate(owners):
        if index not in called and owner.parameters:
            parameters[_heir(owners, called, index)].extend(owner.parameters)
    repeated = {owner for owner, rank in order if rank > 0}
    table = []
    for depth, (index, rank) in enumerate(order):
        owner = owners[index]
        name = f"{owner.name}@{rank}" if index in repeated else owner.name
        own = tuple(parameters.pop(index, ()))
        table.append((Layer(depth, name, owner.kind, own, owner.trunk), (index, rank)))
    return table


def _heir(owners: Sequence[Owner], called: set[int], index: int) -> int:
    """The nearest called ancestor of an owner that is never called, else the one of its model registered before it."""
    ancestors = [i for i in called if owners[i].above(owners[index])]
    if ancestors:
        return max(ancestors, key=lambda i: len(owners[i].path))
    near = [i for i in called if owners[i].root == owners[index].root] or list(called)
    return max((i for i in near if i < index), default=min(near))


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    held: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        held |= {f"parametrizations.{name}": value for name, value in parametrized.named_parameters()}
    return held


def _unwrapped(name: str, wrappers: set[str]) -> str:
    """A module's name without those of the wrappers around it, which stand in ``wrappers``."""
    parts = name.split(".")
    held = {".".join(filter(None, [wrapper, "module"])) for wrapper in wrappers}
    return ".".join(
        part for place, part in enumerate(parts) if part not in _WRAPPED and ".".join(parts[: place + 1]) not in held
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
