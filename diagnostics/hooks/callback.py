"""What torch is given to call: a function of ours that can fail, be copied and be traced without harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Listener(Protocol):
    """Who notes what a hook sees."""

    listening: bool

    def failed(self, error: Exception) -> None:
        """Hears of an exception in one of its notes."""


class Hook:
    """A callable for torch to hold. A copy of a model (``deepcopy``, ``pickle``) carries a hook that does nothing.

    Args:
        watcher: Who notes.
        note: Its method.
        key: The method's first argument.
        traced: What ``torch.compile`` is given to trace in the method's place.
        name: The key in the words of that.
    """

    __slots__ = ("key", "name", "note", "traced", "watcher")

    def __init__(
        self,
        watcher: Listener | None = None,
        note: Callable[..., None] | None = None,
        key: Any = 0,
        traced: Callable[..., None] | None = None,
        name: str = "",
    ) -> None:
        self.watcher = watcher
        self.note = note
        self.key = key
        self.traced = traced
        self.name = name

    def __call__(self, *args: Any) -> None:
        """Notes what torch hands over, if anybody listens."""
        if torch.compiler.is_compiling():  # the note itself would break the graph at every layer
            if self.traced is not None:
                self.traced(self, *args)
            return
        watcher, note = self.watcher, self.note
        if watcher is None or note is None or not watcher.listening:
            return
        try:
            note(self.key, *args)
        except Exception as error:  # noqa: BLE001 -- an exception here would end the user's backward, or hang other ranks
            watcher.failed(error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return (Hook, ())


def adding(index: int, added: list[int], running: Sequence[int], begins: Hook) -> Callable[[Tensor], None]:
    """A hook that notes a parameter's index. It runs for each of them in every pass, so it does nothing else.

    Args:
        index: The parameter's.
        added: Where it is noted.
        running: The passes that are known to run; empty if this is the first that is heard of one.
        begins: Is called instead then.
    """

    def hook(parameter: Tensor) -> None:
        if running:
            added.append(index)
        else:
            begins(parameter)

    return hook


def graph_task() -> int:
    """Number of the backward pass that runs now, -1 outside any."""
    return int(torch._C._current_graph_task_id())  # noqa: SLF001 -- torch has no public name for it


def takes_hooks(module: nn.Module) -> bool:
    """Whether torch lets forward hooks be registered: not on what ``torch.jit`` has scripted or traced."""
    return not isinstance(module, torch.jit.ScriptModule)
