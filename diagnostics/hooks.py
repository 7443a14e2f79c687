"""The only code that registers hooks, and takes every one of them away again.

Hooks only note. They run inside the user's forward and backward, so they never raise, never warn, never wait for the
device and return nothing: one that fails switches the Watcher off, and the Monitor says so at the next step.

Output gradients come from a forward hook that registers on the output tensor: module backward hooks break under an
in-place operation that follows, and cost six times as much. Weight gradients are read at the step, since parameter
hooks see them before all-reduce and before unscaling. What parameter hooks are for is to know which backward pass
accumulated into which parameter, and what was left in ``.grad`` when the pass began.

Inside a compiled model there are no forward hooks: output gradients are not seen, weight gradients are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diagnostics import statistics
from diagnostics.callback import Hook as _Hook
from diagnostics.callback import graph_task as _graph_task
from diagnostics.callback import has_closure
from diagnostics.depth import Call, CallOrder, Owner
from diagnostics.graph import Leaves, tensors_in
from diagnostics.marks import Look, Marks, State, is_other, state

_NO_BACKWARD = -1


@dataclass(slots=True)
class OutputGradient:
    """The gradient of a layer call's output, taken apart; several of one call merge."""

    call: Call
    numel: int
    parts: statistics.Parts


@dataclass(slots=True)
class BackwardPass:
    """One backward pass that accumulated into watched parameters; statistics still on the device.

    Attributes:
        held: Parameters that a step had spent and whose ``.grad`` was not None when the pass began.
        leftover: 1-norm of those gradients at that moment; a norm without squares, so that none is too small for it.
        replaced: Those of them whose ``.grad`` was no longer the tensor that the step had spent.
        cleared: Parameters to which an earlier pass had added what no step has spent, and whose ``.grad`` was None.
        before: A few gradients of earlier passes that no step has spent, as they were when the pass began.
        touched: Whether somebody had written to those.
        accumulated: Parameters that the pass added to.
        ends: The ones that it reached first and last.
        after: Those two when the pass ended.
        continued: Whether it is the rest of a pass in the middle of which a step was taken.
        training: Whether a model was in training mode.
        outputs: Output gradients, in the order of the backward pass.
    """

    held: tuple[int, ...] = ()
    leftover: Tensor = field(default_factory=lambda: torch.zeros(0))
    replaced: frozenset[int] = frozenset()
    cleared: frozenset[int] = frozenset()
    before: Look = field(default_factory=Look)
    touched: bool = False
    accumulated: set[int] = field(default_factory=set)
    ends: tuple[int, ...] = ()
    after: Look = field(default_factory=Look)
    continued: bool = False
    training: bool = True
    outputs: list[OutputGradient] = field(default_factory=list)


class Watcher:
    """Hooks on models and parameters, and what they noted since the last step.

    Args:
        models: Name to model.
        owners: Their layers' modules.
        parameters: The tensors to watch; the place in the sequence is the parameter's index.
        outputs: Whether output gradients will be wanted at all; without them no forward hook is registered.

    Attributes:
        recording: Whether output gradients are taken in the forward passes to come.
        timeline: What happened since the last step in its order: backward passes, and whatever the Monitor adds.
        orders: Order of calls by model.
        ran: Owners that were called with gradients enabled since somebody emptied the set; looked at while recording.
        leaves: What the models' first forward passes used.
        failure: The exception that switched the Watcher off.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        owners: Sequence[Owner],
        parameters: Sequence[Tensor],
        *,
        outputs: bool = True,
    ) -> None:
        self.recording = outputs
        self.listening = True
        self.timeline: list[Any] = []
        self.orders = [CallOrder() for _ in models]
        self.ran: set[int] = set()
        self.leaves = [Leaves() for _ in models]
        self.failure: Exception | None = None
        self._owners = owners
        self._parameters: list[weakref.ref[Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._spent: dict[int, State] = {}
        self._unspent: set[int] = set()
        self._frozen: list[int] = []
        self._marks = Marks(self._gradient)
        self._models = [weakref.ref(model) for model in models.values()]
        self._sentinels: set[int] = set()
        self._first: int | None = None
        self._running: list[int] = []
        self._current = BackwardPass()
        self._ranks: dict[int, int] = {}
        self._traces: list[list[Call]] = [[] for _ in models]
        self._attached: set[Call] = set()
        self._begun = [False for _ in models]
        self._counts = [False for _ in models]
        if outputs:
            self._watch_forward(models)
        self.adopt(parameters)

    def adopt(self, parameters: Sequence[Tensor]) -> None:
        """Watches more parameters; they take the next indices."""
        for parameter in parameters:
            self._frozen.append(len(self._parameters))
            self._parameters.append(weakref.ref(parameter))
        self._watch_unfrozen()

    def _watch_unfrozen(self) -> None:
        """Hooks on parameters that take gradients by now; torch allows none on those that do not."""
        frozen, self._frozen = self._frozen, []
        for index in frozen:
            parameter = self._parameters[index]()
            if parameter is not None and parameter.requires_grad and parameter.is_leaf:
                after = _Hook(self, self._after_accumulation, index)
                handle = parameter.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
            elif parameter is not None:
                self._frozen.append(index)

    def watch_steps(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[torch.optim.Optimizer, bool], None],
        after: Callable[[torch.optim.Optimizer, bool], None],
    ) -> None:
        """Calls two methods back at the beginning and the end of ``optimizer.step()``, as long as their object lives.

        They are told whether the step was given a closure. A nested ``super().step()`` is one step.
        """
        depth = 0
        weakly_before, weakly_after = weakref.WeakMethod(before), weakref.WeakMethod(after)

        def begins(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal depth
            depth += 1
            call = weakly_before()
            if depth == 1 and self.listening and call is not None:
                call(stepping, has_closure(args, kwargs))

        def ends(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal depth
            depth = max(0, depth - 1)
            call = weakly_after()
            if depth == 0 and self.listening and call is not None:
                call(stepping, has_closure(args, kwargs))

        self._handles.append(optimizer.register_step_pre_hook(begins))
        self._handles.append(optimizer.register_step_post_hook(ends))

    def spend(self, indices: Sequence[int]) -> None:
        """Notes that a step has spent the gradients of these parameters, as they are now."""
        for index in indices:
            self._unspent.discard(index)
            self._marks.forget(index)
            if (gradient := self._gradient(index)) is not None:
                self._spent[index] = state(gradient)

    def drain(self) -> list[Any]:
        """The timeline since the last call; the next step begins a new one."""
        if _graph_task() == _NO_BACKWARD:
            self._settle()
        elif self._current.accumulated:  # a step inside the backward pass spends what the pass has made so far
            self.timeline.append(self._current)
            self._unspent |= self._current.accumulated
            self._current = BackwardPass(continued=True, training=self._current.training)
        self._end_traces()
        timeline, self.timeline = self.timeline, []
        return timeline

    def rewritten(self, index: int) -> bool:
        """Whether a gradient that a step has spent was replaced or written to since."""
        spent, gradient = self._spent.get(index), self._gradient(index)
        return spent is not None and gradient is not None and is_other(gradient, spent)

    @contextmanager
    def writing(self, indices: Iterable[int]) -> Iterator[None]:
        """What is written to gradients inside the block is ours: what a step has spent stays spent."""
        known = [index for index in indices if index in self._spent and not self.rewritten(index)]
        yield
        self._spent.update(
            {index: state(gradient) for index in known if (gradient := self._gradient(index)) is not None}
        )

    def cleared(self) -> frozenset[int]:
        """Parameters to which a pass has added what no step has spent, and whose ``.grad`` is None by now."""
        return frozenset(index for index in self._unspent if self._gradient(index) is None)

    def failed(self, error: Exception) -> None:
        """Switches all hooks off; the first reason is kept."""
        self.failure = self.failure or error
        self.listening = False

    def remove(self) -> None:
        """Takes every hook away."""
        self.listening = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Notes nothing inside the block."""
        listening, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = listening and self.failure is None

    # forward

    def _watch_forward(self, models: Mapping[str, nn.Module]) -> None:
        for root, model in enumerate(models.values()):
            self._handles.append(
                model.register_forward_pre_hook(_Hook(self, self._root_begins, root), with_kwargs=True)
            )
            self._handles.append(model.register_forward_hook(_Hook(self, self._root_ends, root)))
        for index, owner in enumerate(self._owners):
            module = owner.module()
            if module is not None:
                self._handles.append(module.register_forward_hook(_Hook(self, self._after_call, index)))

    def _root_begins(self, root: int, _module: nn.Module, *arguments: Any) -> None:
        self.leaves[root].begins(arguments)
        if self.recording and _graph_task() == _NO_BACKWARD:
            self._settle()
            self._begin_trace(root)

    def _root_ends(self, root: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self.leaves[root].ends(output)

    def _after_call(self, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        if not self.recording:
            return
        root = self._owners[index].root
        task = _graph_task()
        if task == _NO_BACKWARD:
            self._settle()
            if not self._begun[root] or (not self._counts[root] and torch.is_grad_enabled()):
                self._begin_trace(root)
            if not self._counts[root]:
                return
        else:  # a checkpointed segment runs again: its calls are known, and only a reentrant one has new output tensors
            self._enter(task)
        call = (index, self._ranks.get(index, 0))
        if task == _NO_BACKWARD:
            self._ranks[index] = call[1] + 1
            self._traces[root].append(call)
        else:
            call = (index, 0)
            if call in self._attached:
                return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                self._attached.add(call)
                tensor.register_hook(_Hook(self, self._output_gradient, call))  # type: ignore[no-untyped-call]

    def _begin_trace(self, root: int) -> None:
        self._end_trace(root)
        self._begun[root] = True
        self._counts[root] = torch.is_grad_enabled()
        for index, owner in enumerate(self._owners):
            if owner.root == root:
                self._ranks.pop(index, None)

    def _end_trace(self, root: int) -> None:
        self.orders[root].extend(self._traces[root])
        self.ran.update(index for index, _ in self._traces[root])
        self._traces[root] = []
        self._attached = {call for call in self._attached if self._owners[call[0]].root != root}

    def _end_traces(self) -> None:
        for root in range(len(self._traces)):
            self._end_trace(root)
            self._begun[root] = False

    # backward

    def _output_gradient(self, call: Call, gradient: Tensor) -> None:
        current = self._enter(_graph_task())
        current.outputs.append(OutputGradient(call, gradient.numel(), statistics.take_apart(gradient)))

    def _before_accumulation(self, _index: int, _gradient: Tensor) -> None:
        self._enter(_graph_task())

    def _after_accumulation(self, index: int, _parameter: Tensor) -> None:
        task = _graph_task()
        if task not in self._running:
            self._spent.pop(index, None)  # nothing told of the pass in time: what was left in here is not known
        current = self._enter(task)
        if not current.accumulated and index not in self._sentinels:
            self._first = index
        current.accumulated.add(index)
        current.ends = (*current.ends[:1], index)

    def _post_sentinel(self) -> None:
        """Has the parameter that a pass reached first tell of the next one before it accumulates.

        Passes begin at the same few parameters, so a hook on each of those is enough, where one on every parameter
        would double what watching costs.
        """
        index, self._first = self._first, None
        parameter = None if index is None else self._parameters[index]()
        if index is not None and parameter is not None:
            self._sentinels.add(index)
            before = _Hook(self, self._before_accumulation, index)
            self._handles.append(parameter.register_hook(before))  # type: ignore[no-untyped-call]

    def _enter(self, task: int) -> BackwardPass:
        """The pass of a graph task; one that is begun inside a running one (reentrant checkpoint) is no new pass."""
        if task not in self._running:
            if not self._running:
                self._current = self._look()
            self._running.append(task)
            engine = torch.autograd.Variable._execution_engine  # noqa: SLF001 -- the only way to hear of a pass's end
            engine.queue_callback(lambda: self._leave(task))
        return self._current

    def _leave(self, task: int) -> None:
        if task in self._running:
            self._running.remove(task)
            if not self._running:
                self._finish_pass()

    def _settle(self) -> None:
        """Outside any backward pass: one that never told its end has failed, and what it did stays done."""
        if self._running:
            self._running.clear()
            self._finish_pass()

    def _finish_pass(self) -> None:
        if self._current.accumulated:  # autograd.grad accumulates into nobody, and its output gradients do not count
            self._current.after = self._marks.note(self._current.ends)
            self.timeline.append(self._current)
            self._unspent |= self._current.accumulated
            self._post_sentinel()
        else:
            self._unspent |= self._current.cleared  # for the next pass to tell of
        self._current = BackwardPass()
        self._begun = [False for _ in self._begun]

    def _look(self) -> BackwardPass:
        """What is in ``.grad`` before a pass adds to it: what a step has spent, or nothing where something was."""
        self._watch_unfrozen()
        cleared = self.cleared()
        self._unspent -= cleared
        before, touched = self._marks.check()
        found = BackwardPass(cleared=cleared, before=before, touched=touched, training=self._training())
        held: dict[int, Tensor] = {}
        for index in list(self._spent):
            gradient = self._gradient(index)
            if gradient is None:
                del self._spent[index]
            else:
                held[index] = gradient
        if not held:
            return found
        found.held = tuple(held)
        found.leftover = statistics.parameter_norms([*held.values()], 1.0)
        found.replaced = frozenset(index for index, gradient in held.items() if self._spent[index][0]() is not gradient)
        return found

    def _training(self) -> bool:
        return any(model is not None and model.training for model in (one() for one in self._models))

    def _gradient(self, index: int) -> Tensor | None:
        parameter = self._parameters[index]()
        return None if parameter is None else parameter.grad
