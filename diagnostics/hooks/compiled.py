"""Output gradients of a model under ``torch.compile``: hooks that are traced into its graph, once and for all.

Dynamo traces the forward hooks that are there before the first compiled call. What they do then has two sides.

- While it traces: the model's calls are told to the same :class:`~diagnostics.depth.forward.Forward` as in an eager
  pass, with the fake tensors that dynamo traces with. Those carry the autograd graph, so order, trunk and residual
  streams are found as ever.
- In the graph: a tensor hook hands the gradient to an operator of ours, which the compiler cannot look into. It is
  there at every step and tests, outside of the graph, whether the step is recorded: no second graph, no guard, no graph
  break, and 2 microseconds where it is not.

The operator reads what the compiled backward computes anyway, so the training stays bit by bit what it is without.

Only a model whose forward is one graph from beginning to end. Blocks that are compiled one by one share a graph, which
could not tell whose gradient it holds, and what would tell them apart would compile each of them anew. A graph break in
the middle cuts the autograd graph too, and dynamo traces what is behind it more than once. Not while a model is
exported, whose program outlives us, and not in torch versions that break the graph at a hook.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from diagnostics.depth.forward import Forward, Point, Roles, TracedPass

Result = TypeVar("Result")
_NOT_LISTENED_TO = -1


class Listened(NamedTuple):
    """A tensor of a graph whose gradient is wanted.

    Attributes:
        within: The pass.
        roles: What its gradient is to which layers.
    """

    within: TracedPass
    roles: Roles


class Traced(Protocol):
    """Whose hooks are traced."""

    forward: Forward
    token: Tensor

    def failed(self, error: Exception) -> None:
        """Hears of an exception."""

    def is_traced(self, index: int) -> None:
        """Hears that a layer's hook is traced."""

    def arrived(self, point: Listened, gradient: Tensor) -> None:
        """A gradient arrives at one of the points."""


@dataclass(slots=True)
class _Trace:
    """The pass of a model that may be traced now, and the call at hand.

    Attributes:
        watcher: Whose model; None where none is, or what is traced is not all of it.
        root: Which of its models.
        seen: The watcher of the model whose forward is about to begin.
        graph: Dynamo's number of the graph and of its attempts at it; None as long as no call was traced.
        breaks: Graph breaks so far in the process when the first attempt began.
        whole: Whether no break was met since. Where one was, dynamo has to find the same words in its next attempt.
        points: What will be listened to once the model's forward has ended.
        given: Fake tensors that the call reads.
        made: And makes.
        plan: For each of them its point.
    """

    watcher: Traced | None = None
    root: int = 0
    seen: Traced | None = None
    graph: tuple[Any, int] | None = None
    breaks: int = 0
    whole: bool = True
    points: dict[int, Point] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    plan: list[int] = field(default_factory=list)


_trace = _Trace()
_numbers = itertools.count()
_watchers: weakref.WeakValueDictionary[int, Traced] = weakref.WeakValueDictionary()
_listened: dict[int, Listened] = {}
"""Points of all graphs: those outlive the Monitor that they were traced with, and serve later ones of equal models."""


def enrol(watcher: Traced) -> Tensor:
    """What a watcher is known by in a graph, as long as it lives: an input, so that equal models share the graph."""
    number = next(_numbers)
    _watchers[number] = watcher
    return torch.tensor(number)


def _arrives(gradient: Tensor, token: Tensor, point: int) -> None:
    watcher, listened = _watchers.get(int(token)), _listened.get(point)
    if watcher is not None and listened is not None:
        watcher.arrived(listened, gradient)


def _define() -> tuple[torch.library.Library | None, Any]:
    """The operator; None where this torch has no tensor hooks in compiled graphs, or no operators that do something."""
    if not hasattr(torch.library, "_register_effectful_op"):
        return None, None
    try:
        from torch._higher_order_ops import register_hook  # noqa: F401, PLC0415 -- since when it breaks no graph
        from torch._higher_order_ops.effects import _EffectType  # noqa: PLC0415
    except ImportError:
        return None, None
    library: Any = torch.library.Library("diagnostics", "FRAGMENT")  # type: ignore[no-untyped-call]
    tags = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None]
    library.define("gradient_arrives(Tensor gradient, Tensor token, int point) -> ()", tags=tags)
    library.impl("gradient_arrives", _arrives, "CompositeExplicitAutograd")
    name = "diagnostics::gradient_arrives"
    torch.library.register_fake(name, lambda _gradient, _token, _point: None, lib=library)
    torch.library._register_effectful_op(name, _EffectType.ORDERED, lib=library)  # noqa: SLF001 -- no public name yet
    return library, torch.ops.diagnostics.gradient_arrives.default


_library, _operator = _define()


def not_by_itself(function: Callable[..., Any]) -> None:
    """Has dynamo trace a function where it is called from what is traced, and never by itself.

    A model's hooks are called from outside of its graph where ``torch.compile`` was given the model: every function
    that they call would be a graph of its own.
    """
    try:
        from torch._C._dynamo import eval_frame  # noqa: PLC0415

        skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)  # noqa: SLF001
        eval_frame.set_code_exec_strategy(function.__code__, skip)
    except (ImportError, AttributeError):  # an older torch
        return


# What runs in Python, at every step or while dynamo traces


def begin(watcher: Traced, root: int) -> None:
    """A model's forward begins, and may be traced."""
    global _trace  # noqa: PLW0603 -- torch traces one function at a time, in one process
    if _operator is not None:
        _trace = _Trace(watcher, root)


def give_up(watcher: Traced) -> None:
    """A part of the forward is not traced: what is seen of the rest would not be its depth."""
    if _trace.watcher is watcher:
        if _trace.points:
            watcher.forward.forget()
        _trace.watcher = None


def end(watcher: Traced, root: int) -> None:
    """The model's forward has ended; what was traced of it counts from now on."""
    if _trace.watcher is not watcher or not _trace.points:
        return
    if not _trace.whole:
        give_up(watcher)
        return
    within = watcher.forward.traced(root, _trace.made)
    _listened.update({number: Listened(within, point.roles) for number, point in _trace.points.items()})
    _trace.watcher = None


def _at_tracing(function: Callable[..., Result]) -> Callable[..., Result]:
    """Runs while dynamo traces, its result a constant. One that fails ends the listening, never the compilation."""

    @wraps(function)
    def safely(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:  # noqa: BLE001
            watcher, _trace.watcher = _trace.watcher, None
            if watcher is not None:
                watcher.failed(error)
            return _NOT_LISTENED_TO

    constant: Callable[..., Result] = torch.compiler.assume_constant_result(safely)  # type: ignore[no-untyped-call]
    return constant


@_at_tracing
def _begins(root: str) -> bool:
    if _trace.seen is not None:
        begin(_trace.seen, int(root))
    return True


@_at_tracing
def _is_whole() -> bool:
    """Whether all calls of the model's pass so far are traced into one graph, in this attempt at it."""
    watcher, now = _trace.watcher, torch._guards.CompileContext.current_trace_id()  # noqa: SLF001
    if watcher is None or now is None or torch.compiler.is_exporting():
        return False
    graph, attempt = now
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())  # noqa: SLF001
    if _trace.graph is None:
        _trace.breaks = breaks
    elif _trace.graph[0] != graph:  # what is behind a break, or a block that is compiled by itself
        give_up(watcher)
        return False
    _trace.whole = breaks == _trace.breaks
    if _trace.graph != (graph, attempt):
        _trace.graph, _trace.points = (graph, attempt), {}
        watcher.forward.begin(_trace.root)
    _trace.given, _trace.made = [], []
    return True


@_at_tracing
def _called(index: str) -> int:
    assert _trace.watcher is not None
    _trace.watcher.is_traced(int(index))
    return _plan(_trace.watcher.forward.called(int(index), _trace.given, _trace.made))


@_at_tracing
def _ends(root: str) -> bool:
    if _trace.watcher is not None:
        end(_trace.watcher, int(root))
    return True


def _plan(points: Sequence[Point]) -> int:
    """Which of the tensors at hand are listened to; a point that is at none of them is not."""
    tensors = [*_trace.given, *_trace.made]
    plan = [_NOT_LISTENED_TO] * len(tensors)
    for point in points:
        place = next((place for place, tensor in enumerate(tensors) if _is_at(point, tensor)), None)
        if place is not None and not tensors[place].is_leaf:  # a leaf may be the user's, for many steps
            plan[place] = next(_numbers)
            _trace.points[plan[place]] = point._replace(place=None)  # no tensor outlives the trace
    _trace.given, _trace.made, _trace.plan = [], [], plan[::-1]
    return len(plan)


def _is_at(point: Point, tensor: Tensor) -> bool:
    return point.place is tensor or (not isinstance(point.place, Tensor) and point.place is tensor.grad_fn)


@_at_tracing
def _next_point() -> int:
    return _trace.plan.pop() if _trace.plan else _NOT_LISTENED_TO


def _note_watcher(context: Any) -> None:
    try:
        hook = context.get_local("value")._i_will_not_complain_if_bc_breaks_VariableTracker()  # noqa: SLF001
        _trace.seen = hook.value.watcher
    except Exception:  # noqa: BLE001
        _trace.seen = None


def _note(context: Any, tensors: list[Tensor]) -> None:
    try:
        tensors.append(context.get_local("value").as_fake())
    except Exception:  # noqa: BLE001 -- not a tensor that dynamo knows of: nobody's place
        tensors.append(torch.empty(0))


def _note_given(context: Any) -> None:
    _note(context, _trace.given)


def _note_made(context: Any) -> None:
    _note(context, _trace.made)


# What dynamo traces


# Names are text: a number that was another in an earlier trace would be a variable to dynamo, and no constant.


def root_begins(hook: Any, *_arguments: Any) -> None:
    """Traced in place of what an eager pass does where a model's forward begins."""
    _show(hook, _note_watcher)
    _begins(hook.name)


def layer_called(hook: Any, _module: Any, args: Any, kwargs: Any, output: Any) -> None:
    """The same for the call of a layer."""
    if _is_whole():
        given, made = _tensors((args, kwargs)), _tensors(output)
        for tensor in given:
            _show(tensor, _note_given)
        for tensor in made:
            _show(tensor, _note_made)
        _called(hook.name)
        _listen(given + made, hook.watcher.token)


def root_ends(hook: Any, _module: Any, _args: Any, output: Any) -> None:
    """The same where a model's forward ends."""
    if _is_whole():
        for tensor in _tensors(output):
            _show(tensor, _note_made)
        _ends(hook.name)


def _listen(tensors: list[Tensor], token: Tensor) -> None:
    for tensor in tensors:
        point = _next_point()
        if point != _NOT_LISTENED_TO:
            tensor.register_hook(_listener(token, point))  # type: ignore[no-untyped-call]


def _listener(token: Tensor, point: int) -> Callable[[Tensor], None]:
    def listen(gradient: Tensor) -> None:
        _operator(gradient, token, point)

    return listen


def _show(value: Any, to: Callable[[Any], None]) -> None:  # noqa: ARG001 -- dynamo's words for it are looked up by name
    torch._dynamo.comptime.comptime(to)  # noqa: SLF001


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings, in plain words that dynamo follows."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (tuple, list)):
        for part in value:
            found += _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            found += _tensors(part)
    return found
