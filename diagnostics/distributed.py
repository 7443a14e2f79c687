"""Several ranks: which group a model's replicas form, what they tell each other, which rank speaks.

One rule for everything that is sent: every rank takes part in the same reductions in the same order, or in none. So
ranks agree once, through the group's key-value store and without a collective, on whether to take part at all; after
that what is done depends on the step's number and on reduced values, which are the same everywhere. A rank that takes
part no more says so in the store; one that is waiting by then is not left waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from diagnostics import statistics

PATIENCE = timedelta(seconds=60)
"""How long a rank waits, once, for the others to have a Monitor too."""


def speaks() -> bool:
    """Whether this process is the one that speaks for all: rank 0, or the only one.

    Example:
        >>> speaks()
        True
    """
    return not _several() or distributed.get_rank() == 0


def find_group(choice: Any, models: Iterable[nn.Module]) -> Any:
    """The process group whose ranks hold replicas of the models; None where nothing is to be compared.

    Args:
        choice: None for the group of DistributedDataParallel, or else the default group; False for none; or a group.
        models: The models.

    Returns:
        A group of more than one rank to which this one belongs, or None.

    Example:
        >>> find_group(None, [nn.Linear(1, 1)]) is None
        True
    """
    if choice is False or not _several():
        return None
    inside = [module for model in models for module in model.modules()]
    wrappers = [module for module in inside if isinstance(module, nn.parallel.DistributedDataParallel)]
    group = choice or (wrappers[0].process_group if wrappers else distributed.group.WORLD)
    belongs = distributed.get_rank(group) >= 0
    return group if belongs and distributed.get_world_size(group) > 1 else None


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only a part of the model's parameters, or of some: FSDP, or parameters that are DTensors.

    Example:
        >>> is_sharded(nn.Linear(1, 1))
        False
    """
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return wrapped or any(hasattr(parameter, "placements") for parameter in model.parameters())


def is_choice(value: Any) -> bool:
    """Whether a value may be given as ``process_group``.

    Example:
        >>> is_choice(None), is_choice(False), is_choice(0)
        (True, True, False)
    """
    if value is None or value is False:
        return True
    if not distributed.is_available():
        return False
    return isinstance(value, distributed.ProcessGroup) or value == distributed.GroupMember.NON_GROUP_MEMBER


class Ranks:
    """The ranks of a process group, as seen from one of them.

    Args:
        group: The group.
        parameters: Name to parameter; names and shapes must be alike on all ranks for these to be replicas.

    Attributes:
        number: How many ranks there are.
    """

    def __init__(self, group: Any, parameters: Mapping[str, Tensor]) -> None:
        self._group = group
        sizes = {name: "?" if is_lazy(tensor) else list(tensor.shape) for name, tensor in parameters.items()}
        self._signature = sha256(str(sizes).encode()).hexdigest()
        self.number = distributed.get_world_size(group)
        rank = distributed.get_rank(group)
        self._store = distributed.distributed_c10d._world.pg_map[group][1]  # noqa: SLF001 -- torch has no public way
        self._key = f"diagnostics/{self._store.add(f'diagnostics/{rank}', 1)}"  # each rank's n-th belong together
        self._store.set(f"{self._key}/{rank}", self._signature)
        self._first = rank == 0
        self._turn = 0

    def agree(self) -> bool:
        """Whether every rank has a Monitor on the same parameters; all ranks that ask are told the same."""
        keys = [f"{self._key}/{rank}" for rank in range(self.number)]
        try:
            self._store.wait(keys, PATIENCE)
            alike = {self._store.get(key).decode() for key in keys} == {self._signature}
        except RuntimeError:  # the time is over
            alike = False
        decision = f"{self._key}/decision"
        self._store.compare_set(decision, "", "yes" if alike else "no")  # the first word stands
        return bool(self._store.get(decision) == b"yes")

    def goes_on(self) -> bool:
        """Whether the next reduction takes place; all ranks that ask are told the same."""
        return self._first_word("go")

    def extremes(self, header: Sequence[float], numbers: Sequence[Tensor]) -> Tensor:
        """The largest and the smallest value over the ranks, by one reduction.

        Args:
            header: Plain numbers.
            numbers: 0-dim tensors, behind them; as many on each rank. NaN counts as infinite.

        Returns:
            Shape ``[2 * (len(header) + len(numbers))]``: the largest values, then the smallest ones negated.
        """
        measured = statistics.pack(numbers)
        return self._reduce(torch.cat([*(measured.new_full((1,), one) for one in header), measured]))

    def leave(self, header: Sequence[float], numbers: int) -> None:
        """This rank takes part no more: the next reduction does not take place, or is joined where a rank has begun it.

        Args:
            header: What the others are told then.
            numbers: How many numbers stand behind it.
        """
        if not self._first_word("stop"):
            self._reduce(torch.tensor([*header, *([0.0] * numbers)], dtype=torch.float64))

    def _reduce(self, vector: Tensor) -> Tensor:
        vector = torch.nan_to_num(vector, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        both = torch.cat([vector, -vector])
        if distributed.get_backend(self._group) == "nccl":
            both = both.cuda()  # it takes nothing else
        distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=self._group)
        if self._first:
            with suppress(RuntimeError, NotImplementedError):  # not every store lets go of a key
                self._store.delete_key(self._decision())
        self._turn += 1
        return both

    def _first_word(self, word: str) -> bool:
        """Whether this is what the first rank to speak of the next reduction has said."""
        self._store.compare_set(self._decision(), "", word)
        return bool(self._store.get(self._decision()) == word.encode())

    def _decision(self) -> str:
        return f"{self._key}/turn/{self._turn}"


def relative_difference(largest: float, smallest: float) -> float:
    """By how much norms differ over the ranks: 0.0 if not at all, 1.0 where one is zero, inf where one is not finite.

    Example:
        >>> relative_difference(4.0, 3.0), relative_difference(float("inf"), 3.0)
        (0.25, inf)
    """
    if largest == smallest:
        return 0.0
    return largest if largest == float("inf") else (largest - smallest) / largest


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
