"""The only code that registers hooks, and takes every one of them away again.

Hooks only note. They run inside the user's forward and backward, so they never raise, never warn, never wait for the
device and return nothing: one that fails switches the Watcher off, and the Monitor says so at the next step.

Output gradients come from a forward hook that registers on the output tensor, and on the inputs for the local gain:
module backward hooks break under an in-place operation that follows, and cost six times as much. A tensor that several
layers made or read is listened to once. Where a residual stream is nobody's input or output the hook is the graph's.

Weight gradients are read at the step, since parameter hooks see them before all-reduce and before unscaling. What
parameter hooks are for is to know which backward pass accumulated into which parameter, and what was left in ``.grad``
when the pass began.

What a compiled model's graph is given in place of these hooks is in compiled.py. Inside a scripted one there are none:
output gradients are not seen, weight gradients are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from diagnostics import statistics
from diagnostics.depth import Owner
from diagnostics.depth.forward import Forward, Point, Role, Roles
from diagnostics.hooks import compiled
from diagnostics.hooks.callback import Hook as _Hook
from diagnostics.hooks.callback import adding, takes_hooks
from diagnostics.hooks.callback import graph_task as _graph_task
from diagnostics.hooks.graph import Leaves
from diagnostics.hooks.marks import Marks, Spent, is_other, state
from diagnostics.hooks.optimizers import Call, watch_steps
from diagnostics.hooks.passes import BackwardPass, measured

compiled.not_by_itself(_Hook.__call__)

_NO_BACKWARD = -1


class Watcher:
    """Hooks on models and parameters, and what they noted since the last step.

    Args:
        models: Name to model.
        owners: Their layers' modules.
        parameters: The tensors to watch; the place in the sequence is the parameter's index.
        outputs: Whether output gradients will be wanted at all; without them no forward hook is registered.

    Attributes:
        timeline: What happened since the last step in its order: backward passes, and whatever the Monitor adds.
        forward: What the forward passes have shown.
        overdue: Called where a pass begins and where the timeline is taken; what it returns goes onto the timeline.
        leaves: What the models' first forward passes used.
        in_range: Those gradients whose norm fp32 has held when last recorded, by the first of their roles.
        failure: The exception that switched the Watcher off.
        token: By which compiled graphs know the Watcher.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        owners: Sequence[Owner],
        parameters: Sequence[Tensor],
        *,
        outputs: bool = True,
    ) -> None:
        self._recording = outputs
        self.listening = True
        self.timeline: list[Any] = []
        self.forward = Forward(owners, len(models))
        self.overdue: Callable[[], Sequence[Any]] = tuple
        self.leaves = [Leaves() for _ in models]
        self.in_range: set[Role] = set()
        self.failure: Exception | None = None
        self.token = compiled.enrol(self)
        self._owners = owners
        self._parameters: list[weakref.ref[Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._spent = Spent(self._gradients)
        self._emptied = Spent(self._gradients)  # those of them that a pass found without a gradient
        self._added: list[int] = []  # what the running pass has added to, in order
        self._on_layers: dict[int, RemovableHandle] = {}
        self._eager: set[int] = set()  # layers whose hook has run, so that no compiled graph needs it
        self._unspent: set[int] = set()
        self._frozen: list[int] = []
        self._marks = Marks(self._gradient)
        self._arrives = self._gradient_arrives  # bound once, since there is a hook for every layer
        self._models = [weakref.ref(model) for model in models.values()]
        self._sentinels: set[int] = set()
        self._running: list[int] = []
        self._current = BackwardPass()
        self._on_leaves: list[RemovableHandle] = []
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
        """Hooks on parameters that take gradients by now; torch allows none on those that do not, or are lazy still."""
        frozen, self._frozen = self._frozen, []
        for index in frozen:
            parameter = self._parameters[index]()
            if parameter is not None and not is_lazy(parameter) and parameter.requires_grad and parameter.is_leaf:
                begins = _Hook(self, self._pass_begins, index)
                hook = adding(index, self._added, self._running, begins)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
            elif parameter is not None:
                self._frozen.append(index)

    def watch_steps(self, optimizer: torch.optim.Optimizer, before: Call, after: Call) -> None:
        """Calls two methods back at the beginning and the end of ``optimizer.step()``, while anybody listens."""
        self._handles += watch_steps(optimizer, self, before, after)

    def spend(self, indices: Sequence[int], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Notes that a step has spent these parameters' gradients: those before it, unless it has put others there."""
        self._unspent.difference_update(indices)
        self._marks.forget(indices)
        untouched = bool(gradients) and all(parameters[place].grad is gradients[place] for place in (0, -1))
        self._spent.add(indices, gradients if untouched else [parameter.grad for parameter in parameters])

    def drain(self) -> list[Any]:
        """The timeline since the last call; the next step begins a new one."""
        if _graph_task() == _NO_BACKWARD:
            self._settle()
            self._let_go_of_leaves()
        elif self._take_added():  # a step inside the backward pass spends what the pass has made so far
            self.timeline.append(self._current)
            self._current = BackwardPass(continued=True, training=self._current.training)
        self.forward.settle()
        self.timeline += self.overdue()
        timeline, self.timeline = self.timeline, []
        return timeline

    def rewritten(self, indices: Iterable[int]) -> frozenset[int]:
        """Those whose gradient, which a step has spent, was replaced or written to since."""
        spent = self._spent.states() if self._spent else {}
        known = ((index, self._gradient(index), spent[index]) for index in indices if index in spent)
        return frozenset(index for index, gradient, was in known if gradient is not None and is_other(gradient, was))

    def replaced(self) -> frozenset[int]:
        """Parameters whose ``.grad`` is another tensor than the newest pass left: of the two at its ends."""
        return self._marks.replaced()

    @contextmanager
    def writing(self, indices: Iterable[int]) -> Iterator[None]:
        """What is written to gradients inside the block is ours: what a step has spent stays spent."""
        spent = self._spent.states()
        held = [index for index in indices if index in spent]
        known = set(held) - self.rewritten(held)
        yield
        spent.update({index: state(gradient) for index in known if (gradient := self._gradient(index)) is not None})

    def cleared(self) -> frozenset[int]:
        """Parameters to which a pass has added what no step has spent, and whose ``.grad`` is None by now."""
        unspent = tuple(self._unspent)
        pairs = zip(unspent, self._gradients(unspent), strict=True)
        return frozenset(index for index, gradient in pairs if gradient is None)

    def failed(self, error: Exception) -> None:
        """Switches all hooks off; the first reason is kept."""
        self.failure = self.failure or error
        self.listening = False

    def remove(self) -> None:
        """Takes every hook away."""
        self.listening = False
        self._let_go_of_leaves()
        for handle in (*self._handles, *self._on_layers.values()):
            handle.remove()
        self._handles.clear()
        self._on_layers.clear()
        self._eager.clear()

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
        roots = [(root, model) for root, model in enumerate(models.values()) if takes_hooks(model)]
        for root, model in roots:
            begins = _Hook(self, self._root_begins, root, compiled.root_begins, str(root))
            self._handles.append(model.register_forward_pre_hook(begins, with_kwargs=True))
        for index, owner in enumerate(self._owners):
            module = owner.module()
            if module is not None and takes_hooks(module):
                self._watch_layer(index, module)
        for root, model in roots:
            ends = _Hook(self, self._root_ends, root, compiled.root_ends, str(root))
            self._handles.append(model.register_forward_hook(ends))

    def _watch_layer(self, index: int, module: nn.Module) -> None:
        after = _Hook(self, self._after_call, index, compiled.layer_called, str(index))
        self._on_layers[index] = module.register_forward_hook(after, with_kwargs=True)

    @property
    def recording(self) -> bool:
        """Whether output gradients are taken in the forward passes to come.

        A module with a hook takes a slower way through torch, so between recorded steps layers have none; except those
        whose hook has never run, since they may be inside a compiled graph that was traced with it, and whole models.
        """
        return self._recording

    @recording.setter
    def recording(self, wanted: bool) -> None:
        if wanted == self._recording or not self._on_layers:
            self._recording = wanted
            return
        self._recording = wanted
        for index in self._eager:
            module = self._owners[index].module()
            if wanted and module is not None:
                self._watch_layer(index, module)
            elif not wanted:
                self._on_layers[index].remove()

    def is_traced(self, index: int) -> None:
        """Hears that a layer's hook is being traced into a graph; it stays for the next time that this happens."""
        self._eager.discard(index)

    def _root_begins(self, root: int, _module: nn.Module, *arguments: Any) -> None:
        self.leaves[root].begins(arguments)
        compiled.begin(self, root)
        if self.recording and _graph_task() == _NO_BACKWARD:
            self._settle()
            self.forward.begin(root)

    def _after_call(self, index: int, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        compiled.give_up(self)
        if not self.recording:
            return
        if index not in self._eager and self._owners[index].path:  # a whole model's hook has to stay before _root_ends
            self._eager.add(index)
        task = _graph_task()
        if task == _NO_BACKWARD:
            self._settle()
            points = self.forward.called(index, (*args, *kwargs.values()), output)
        else:  # a checkpointed segment runs again: its calls are known, and only a reentrant one has new output tensors
            self._enter(task)
            points = self.forward.called_again(index, (*args, *kwargs.values()), output)
        for point in points:
            self._listen(point)

    def _root_ends(self, root: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self.leaves[root].ends(output)
        compiled.end(self, root)
        if self.recording and _graph_task() == _NO_BACKWARD:
            for point in self.forward.ended(root, output):
                self._listen(point)

    def _listen(self, point: Point) -> None:
        hook = _Hook(self, self._arrives, point.roles)  # not the tensor, which would then hold itself
        if not isinstance(point.place, Tensor):
            point.place.register_prehook(hook)
        elif point.place.is_leaf:  # may be the user's for many steps
            self._on_leaves.append(point.place.register_hook(hook))  # type: ignore[no-untyped-call]
        else:
            point.place.register_hook(hook)  # type: ignore[no-untyped-call]

    def _let_go_of_leaves(self) -> None:
        while self._on_leaves:
            self._on_leaves.pop().remove()

    # backward

    def arrived(self, point: compiled.Listened, gradient: Tensor) -> None:
        """A compiled backward pass has computed the gradient at one of the points."""
        if self.recording:
            _Hook(self, self._compiled_gradient_arrives, point)(gradient)

    def _compiled_gradient_arrives(self, point: compiled.Listened, gradient: Tensor) -> None:
        self.forward.adopt(point.within)
        self._gradient_arrives(point.roles, gradient)

    def _gradient_arrives(self, roles: Roles, gradient: Tensor | tuple[Tensor | None, ...] | None) -> None:
        current = self._enter(_graph_task())
        only = gradient[0] if isinstance(gradient, tuple) else gradient  # None for one of several outputs that got none
        if only is not None:
            current.gradients.append(measured(roles, only, exact=roles[0] not in self.in_range))

    def _before_accumulation(self, _index: int, _gradient: Tensor) -> None:
        self._enter(_graph_task())

    def _pass_begins(self, index: int, _parameter: Tensor) -> None:
        """A pass has added to its first parameter without having told of itself before."""
        self._spent.states().pop(index, None)  # so that what was left in here is not known
        self._enter(_graph_task())
        self._added.append(index)

    def _take_added(self) -> bool:
        """What the running pass has added to so far; whether there is any."""
        added, current = self._added, self._current
        if not added:
            return False
        current.accumulated = set(added)
        current.ends = (added[0], added[-1]) if len(added) > 1 else (added[0],)
        added.clear()
        self._unspent |= current.accumulated
        return True

    def _post_sentinel(self) -> None:
        """Has the parameter that a pass reached first tell of the next one before it accumulates.

        Passes begin at the same few parameters, so a hook on each of those is enough, where one on every parameter
        would double what watching costs.
        """
        index = self._current.ends[0]
        parameter = self._parameters[index]()
        if index not in self._sentinels and parameter is not None:
            self._sentinels.add(index)
            before = _Hook(self, self._before_accumulation, index)
            self._handles.append(parameter.register_hook(before))  # type: ignore[no-untyped-call]

    def _enter(self, task: int) -> BackwardPass:
        """The pass of a graph task; one that is begun inside a running one (reentrant checkpoint) is no new pass."""
        if task not in self._running:
            if not self._running:
                self.timeline += self.overdue()
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
        if self._take_added():  # autograd.grad accumulates into nobody, and its output gradients do not count
            self._current.after = self._marks.note(self._current.ends)
            self.timeline.append(self._current)
            self._post_sentinel()
        else:
            self._unspent |= self._current.cleared  # for the next pass to tell of
            self._spent.take(self._emptied)
        self._emptied = Spent(self._gradients)
        self._current = BackwardPass()
        self.forward.separate()

    def _look(self) -> BackwardPass:
        """What is in ``.grad`` before a pass adds to it: what a step has spent, or nothing where something was."""
        self._watch_unfrozen()
        cleared = self.cleared()
        self._unspent -= cleared
        before, touched = self._marks.check()
        found = BackwardPass(cleared=cleared, before=before, touched=touched, training=self._training())
        held, self._emptied = self._spent.held()
        if not held:
            return found
        found.held = tuple(held)
        found.leftover = statistics.parameter_norms([*held.values()], 1.0)
        spent = self._spent.states()
        found.replaced = frozenset(index for index, gradient in held.items() if spent[index][0]() is not gradient)
        return found

    def _training(self) -> bool:
        return any(model is not None and model.training for model in (one() for one in self._models))

    def _gradients(self, indices: Sequence[int]) -> list[Tensor | None]:
        known = self._parameters
        return [None if (parameter := known[index]()) is None else parameter.grad for index in indices]

    def _gradient(self, index: int) -> Tensor | None:
        parameter = self._parameters[index]()
        return None if parameter is None else parameter.grad
