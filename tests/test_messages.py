"""Every error that a person can cause says in one sentence what was expected, what came and, if need be, what to do."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnostics import (
    ClipByGroup,
    ClipByNorm,
    ClipByQuantile,
    ClipByValue,
    ClipByZScore,
    MemorySink,
    Monitor,
    NonFiniteGradientError,
    Thresholds,
    WandbSink,
    clip_grad_norm_,
    clip_gradients,
    preflight,
    watch,
)
from diagnostics.records import DiagnosticsWarning
from diagnostics.reports.wandb import fetch

PACKAGE = Path(__file__).parent.parent / "diagnostics"
PINNED_MODULES = (
    "monitor/asynchronous",
    "monitor/options",
    "clipping/__init__",
    "clipping/rules",
    "clipping/groups",
    "diagnosis/thresholds",
    "monitor/schedule",
    "monitor/__init__",
    "monitor/resuming",
    "monitor/guarding",
    "first_pass",
    "sinks/fanout",
    "sinks/wandb/__init__",
    "sinks/wandb/opening",
    "reports/wandb/__init__",
)
ELSEWHERE = {
    "W&B could not start": "takes a server that refuses",
    "WANDB_MODE=": "test_reports_wandb.py sets it; likewise for the next five",
    "W&B knows no account here": "takes a machine without one",
    "W&B did not answer": "takes a server that does not",
    "There is no ": "takes a server that knows no such project",
    "No run of group": "takes a server that knows no such group",
    "W&B did not take it": "takes a server that refuses a Report",
    "The model is not healthy before training": "says what a diagnosis says; test_preflight.py reads it",
}
"""Sentences of these modules that cannot be had here."""


def model() -> nn.Linear:
    return nn.Linear(2, 1, bias=False)


def sgd(of: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(of.parameters(), lr=0.1)


def monitor(**options: Any) -> Monitor:
    watched = model()
    return Monitor(watched, sgd(watched), **{"sinks": [], **options})


def of_model(watched: Any) -> Monitor:
    return Monitor(watched, sgd(model()), sinks=[])


def of_optimizers(optimizers: Any) -> Monitor:
    return Monitor(model(), optimizers, sinks=[])


def weight(gradient: Tensor | None = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2) if gradient is None else gradient
    return parameter


def used_up() -> Any:
    parameters = model().parameters()
    list(parameters)
    return parameters


def step_after_close() -> None:
    closed = monitor()
    closed.close()
    closed.clip_and_step()


def step_of_a_stranger() -> None:
    with monitor() as watching:
        watching.clip_and_step(torch.optim.Adam(model().parameters()))


def step_with_closure_and_scaler() -> None:
    with monitor(scaler=torch.amp.GradScaler("cpu")) as watching:
        watching.clip_and_step(closure=lambda: 0.0)


def step_that_is_not_finite() -> None:
    watched = model()
    with Monitor(watched, sgd(watched), sinks=[], nonfinite="raise", on_diagnosis="record") as watching:
        watched(torch.ones(1, 2)).sum().backward()
        watched.weight.grad[0, 0] = math.nan
        watching.clip_and_step()


watched_once = nn.Linear(2, 1, bias=False)


def loss_that_runs_backward() -> Tensor:
    loss = watched_once(torch.ones(1, 2)).sum()
    loss.backward(retain_graph=True)
    return loss


Case = tuple[Callable[[], object], type[Exception], str]

RULE = "must be a rule such as ClipByNorm(max_norm=1.0), or None; got"
DECADES = "notice_decades, warning_decades and severe_decades must be positive and in this order; got"
TENSORS = "parameters must be tensors; got {}: pass model.parameters()."

CASES: dict[str, Case] = {
    # clip rules and functions
    **{
        f"{name}={value!r}": (partial(ClipByNorm, **{"max_norm": 1.0, name: value}), ValueError, f"{name} {said}")
        for name in ("max_norm", "norm_type")
        for value, said in {
            -1.0: "must be a positive number; got -1.0.",
            0: "must be a positive number; got 0.",
            math.nan: "must be a positive number; got nan.",
            True: "must be a positive number; got True.",
            "1": "must be a positive number; got '1'.",
            None: "must be a positive number; got None.",
        }.items()
    },
    "clip_grad_norm_ max_norm": (
        lambda: clip_grad_norm_([weight()], -1.0),
        ValueError,
        "max_norm must be a positive number; got -1.0.",
    ),
    "clip_grad_norm_ norm_type": (
        lambda: clip_grad_norm_([weight()], 1.0, "two"),
        ValueError,
        "norm_type must be a positive number; got 'two'.",
    ),
    "clip_grad_norm_ model": (lambda: clip_grad_norm_(model(), 1.0), TypeError, TENSORS.format("Linear")),
    "clip_grad_norm_ modules": (
        lambda: clip_grad_norm_(nn.Sequential(model()), 1.0),
        TypeError,
        TENSORS.format("Linear"),
    ),
    "clip_grad_norm_ None": (lambda: clip_grad_norm_(None, 1.0), TypeError, TENSORS.format("NoneType")),
    "clip_grad_norm_ named": (
        lambda: clip_grad_norm_(model().named_parameters(), 1.0),
        TypeError,
        TENSORS.format("tuple"),
    ),
    "clip_gradients groups": (
        lambda: clip_gradients(sgd(model()).param_groups, None),
        TypeError,
        TENSORS.format("dict"),
    ),
    "clip_grad_norm_ used up": (
        lambda: clip_grad_norm_(used_up(), 1.0),
        ValueError,
        "parameters must yield tensors; got a generator with nothing left in it: pass a list, which can be read again.",
    ),
    "clip_gradients rule": (lambda: clip_gradients([weight()], 1.0), TypeError, f"rule {RULE} 1.0."),
    "clip_grad_norm_ not finite": (
        lambda: clip_grad_norm_([weight(torch.tensor([math.nan, 1.0]))], 1.0, error_if_nonfinite=True),
        NonFiniteGradientError,
        (
            "The total norm of order 2 is nan, so gradients cannot be clipped; look for the first non-finite layer, or "
            "pass error_if_nonfinite=False to leave them as they are."
        ),
    ),
    # the other rules
    "clip_value": (lambda: ClipByValue(0), ValueError, "clip_value must be a positive number; got 0."),
    "quantile in percent": (
        lambda: ClipByQuantile(10),
        ValueError,
        "quantile must be at most 1, as 0.1 for the tenth percentile; got 10.0.",
    ),
    "window": (
        lambda: ClipByQuantile(0.5, window=0),
        ValueError,
        "window must be a number of steps, at least 1; got 0.",
    ),
    "warmup": (
        lambda: ClipByZScore(warmup=1),
        ValueError,
        "warmup must be a number of steps, at least 2; got 1.",
    ),
    "warmup beyond the window": (
        lambda: ClipByQuantile(0.5, window=10),
        ValueError,
        "warmup must be at most the window, 10 steps; got 25.",
    ),
    "alpha": (lambda: ClipByZScore(alpha=1), ValueError, "alpha must be below 1; got 1.0."),
    "z": (lambda: ClipByZScore(z=-1), ValueError, "z must be a positive number; got -1."),
    "target": (
        lambda: ClipByZScore(target="median"),
        ValueError,
        "target must be one of reciprocal, threshold, mean; got 'median'.",
    ),
    "by": (
        lambda: ClipByGroup(None, by="layer"),
        ValueError,
        "by must be one of group, optimizer, name; got 'layer'.",
    ),
    "a group's rule": (lambda: ClipByGroup(1.0), TypeError, f"rule {RULE} 1.0."),
    "a named group's rule": (
        lambda: ClipByGroup(None, rules={"0": 1.0}),
        TypeError,
        f"rules['0'] {RULE} 1.0.",
    ),
    "groups in groups": (
        lambda: ClipByGroup(ClipByGroup(None)),
        TypeError,
        "rule must clip a group as a whole; got a ClipByGroup inside a ClipByGroup.",
    ),
    "no patterns": (
        lambda: ClipByGroup(None, by="name"),
        ValueError,
        "rules must hold patterns of names with by='name'; got none.",
    ),
    "a bad pattern": (
        lambda: ClipByGroup(None, by="name", rules={"(": None}),
        ValueError,
        "rules must be by regular expressions; got '(' (missing ), unterminated subpattern at position 0).",
    ),
    "names that are not given": (
        lambda: clip_gradients([weight()], ClipByGroup(None, by="name", rules={"a": None})),
        ValueError,
        "parameters must have names for a rule by name; got tensors: pass model.named_parameters().",
    ),
    "optimizers that are not given": (
        lambda: clip_gradients([weight()], ClipByGroup(None, by="optimizer")),
        ValueError,
        "rule must not clip by optimizer in clip_gradients, which knows none; got one: pass it to a Monitor.",
    ),
    "an optimizer that is not there": (
        lambda: monitor(clip={"critic": ClipByNorm(1.0)}),
        ValueError,
        "clip must name optimizers that the Monitor was given, or give them: optimizer; got 'critic'.",
    ),
    "an optimizer's rule": (lambda: monitor(clip={"optimizer": 1.0}), TypeError, f"clip['optimizer'] {RULE} 1.0."),
    "a state of another version": (
        lambda: monitor().load_state_dict({}),
        ValueError,
        "state must be what Monitor.state_dict() returned; got version None.",
    ),
    "a state of another rule": (
        lambda: monitor().load_state_dict(monitor(clip=ClipByNorm(1.0)).state_dict()),
        ValueError,
        (
            "state must be of a Monitor with the same optimizers and clip rules, {'optimizer': 'none'}; "
            "got {'optimizer': 'norm'}."
        ),
    ),
    # thresholds
    "order of thresholds": (lambda: Thresholds(notice_decades=9), ValueError, f"{DECADES} 9, 2.5, 5.0."),
    "negative threshold": (lambda: Thresholds(notice_decades=-1), ValueError, f"{DECADES} -1, 2.5, 5.0."),
    "nan threshold": (lambda: Thresholds(severe_decades=math.nan), ValueError, f"{DECADES} 1.5, 2.5, nan."),
    "confirm": (lambda: Thresholds(confirm=0), ValueError, "confirm must be at least 1 recorded step; got 0."),
    "clear": (lambda: Thresholds(clear=-2), ValueError, "clear must be at least 1 recorded step; got -2."),
    "a share": (
        lambda: Thresholds(dead_units=1.5),
        ValueError,
        "dead_units must be a share above 0 and at most 1; got 1.5.",
    ),
    "a positive threshold": (
        lambda: Thresholds(spike_decades=math.nan),
        ValueError,
        "spike_decades must be a positive number; got nan.",
    ),
    "hysteresis": (
        lambda: Thresholds(hysteresis=1.0),
        ValueError,
        "hysteresis must be at least 0 and below 1; got 1.0.",
    ),
    "history": (lambda: Thresholds(history=3), ValueError, "history must be at least 10 steps; got 3."),
    # a Monitor's options
    "clip": (lambda: monitor(clip=1.0), TypeError, f"clip {RULE} 1.0."),
    "accumulate": (
        lambda: monitor(accumulate=0),
        ValueError,
        "accumulate must be a number of backward passes, at least 1; got 0.",
    ),
    "accumulate fraction": (
        lambda: monitor(accumulate=1.5),
        ValueError,
        "accumulate must be a number of backward passes, at least 1; got 1.5.",
    ),
    "every": (lambda: monitor(every=-1), ValueError, "every must be 0 (never) or a number of steps; got -1."),
    "asynchronous": (
        lambda: monitor(asynchronous="yes"),
        ValueError,
        "asynchronous must be True or False; got 'yes'.",
    ),
    "asynchronous, raise": (
        lambda: monitor(asynchronous=True, nonfinite="raise"),
        ValueError,
        (
            "nonfinite must not be 'raise' with asynchronous=True, which learns of a step when it is over; got "
            "'raise': use skip or step."
        ),
    ),
    "asynchronous, clip": (
        lambda: monitor(asynchronous=True, clip=ClipByValue(1.0)),
        ValueError,
        (
            "clip must be a ClipByNorm or None with asynchronous=True, which knows a threshold before the norm; got a "
            "rule of the kind 'value'."
        ),
    ),
    "asynchronous, skip": (
        lambda: monitor(asynchronous=True),
        ValueError,
        (
            "nonfinite='skip' needs fused optimizers with asynchronous=True (AdamW(fused=True); SGD without momentum), "
            "which can be told on the device; got another: use nonfinite='step'."
        ),
    ),
    "asynchronous, closure": (
        lambda: monitor(asynchronous=True, nonfinite="step").clip_and_step(closure=lambda: None),
        ValueError,
        "closure must be None with asynchronous=True, which does not wait for it; got a closure.",
    ),
    "asynchronous, clip_grad_norm_": (
        lambda: monitor(asynchronous=True, nonfinite="step").clip_grad_norm_(weight(), 1.0),
        RuntimeError,
        (
            "clip_grad_norm_ needs a Monitor that waits for the norm; got one with asynchronous=True: use "
            "clip_and_step, or torch's own function."
        ),
    ),
    "nonfinite": (
        lambda: monitor(nonfinite="ignore"),
        ValueError,
        "nonfinite must be one of skip, raise, step; got 'ignore'.",
    ),
    "on_violation": (
        lambda: monitor(on_violation="error"),
        ValueError,
        "on_violation must be one of warn, raise, record; got 'error'.",
    ),
    "on_diagnosis": (
        lambda: monitor(on_diagnosis=None),
        ValueError,
        "on_diagnosis must be one of warn, raise, record; got None.",
    ),
    "layers": (
        lambda: monitor(layers="("),
        ValueError,
        "layers must be a regular expression; got '(' (missing ), unterminated subpattern at position 0).",
    ),
    "model sharded": (
        lambda: Monitor(type("FullyShardedDataParallel", (nn.Linear,), {})(2, 1), sgd(model())),
        TypeError,
        (
            "model must hold whole parameters on every rank; got one that is sharded (FSDP or DTensor), which no rank "
            "could measure alone."
        ),
    ),
    "process_group": (
        lambda: monitor(process_group=3),
        TypeError,
        "process_group must be None (find it), False (never communicate) or a torch.distributed.ProcessGroup; got 3.",
    ),
    "sinks by name": (
        lambda: monitor(sinks="console"),
        TypeError,
        "sinks must be 'auto' or a list of objects with write and close; got 'console'.",
    ),
    "sinks": (
        lambda: monitor(sinks=[MemorySink(), 1]),
        TypeError,
        "sinks must be 'auto' or a list of objects with write and close; got 1.",
    ),
    "wandb without a run": (
        WandbSink,
        ValueError,
        "WandbSink found no active W&B run; call wandb.init() before it, or pass run=.",
    ),
    "wandb every": (
        lambda: WandbSink(object(), every=0),
        ValueError,
        "every must be at least 1 and profile_every at least 0; got 0 and 10.",
    ),
    "a place in W&B": (
        lambda: fetch("wandb:me/digits", "."),
        ValueError,
        "A place in W&B is wandb:entity/project/group; got 'wandb:me/digits'.",
    ),
    # models and optimizers
    "model": (
        lambda: of_model(5),
        TypeError,
        "model must be a torch.nn.Module or a mapping of names to modules; got 5.",
    ),
    "one of the models": (
        lambda: of_model({"critic": model(), "generator": "gan"}),
        TypeError,
        "model must be a torch.nn.Module or a mapping of names to modules; got 'gan'.",
    ),
    "no model": (lambda: of_model({}), ValueError, "model must hold at least one module; got an empty mapping."),
    "optimizer": (
        lambda: of_optimizers(["adam"]),
        TypeError,
        "optimizers must be torch.optim.Optimizer objects; got a str.",
    ),
    "an optimizer's class": (
        lambda: of_optimizers(torch.optim.Adam),
        TypeError,
        "optimizers must be torch.optim.Optimizer objects; got the class Adam.",
    ),
    "parameters for an optimizer": (
        lambda: of_optimizers(model().parameters()),
        TypeError,
        "optimizers must be torch.optim.Optimizer objects; got a Parameter.",
    ),
    "one optimizer twice": (
        lambda: of_optimizers([sgd(model())] * 2),
        ValueError,
        "optimizers must be different objects; got the same one twice.",
    ),
    "a loss of two": (
        lambda: monitor().clip_and_step(loss=torch.ones(2)),
        ValueError,
        "loss must be a number or a tensor of one element; got a tensor of shape (2,).",
    ),
    "a metric that is text": (
        lambda: monitor().clip_and_step(metrics={"a": "b"}),
        ValueError,
        "metrics['a'] must be a number or a tensor of one element; got 'b'.",
    ),
    "a scaler that is none": (
        lambda: monitor(scaler=5),
        TypeError,
        "scaler must be a GradScaler or None; got 5.",
    ),
    "the Monitor's clip with a generator that was used up": (
        lambda: monitor().clip_grad_norm_(iter([]), 1.0),
        ValueError,
        (
            "parameters must yield tensors; got a list_iterator with nothing left in it: pass a list, which can be "
            "read again."
        ),
    ),
    "no optimizer": (
        lambda: of_optimizers([]),
        ValueError,
        "optimizers must hold at least one optimizer; got none.",
    ),
    "watch": (
        lambda: watch(model(), ["adam"], sinks=[]),
        TypeError,
        "optimizers must be torch.optim.Optimizer objects; got a str.",
    ),
    # the step
    "step after close": (
        step_after_close,
        RuntimeError,
        "clip_and_step needs an open Monitor; this one is closed: make a new one.",
    ),
    "step of a stranger": (
        step_of_a_stranger,
        ValueError,
        "optimizer must be one that the Monitor was given; got another Adam: pass it to Monitor(model, [...]) as well.",
    ),
    "closure and scaler": (
        step_with_closure_and_scaler,
        ValueError,
        "closure must be None with a GradScaler, which torch does not support; got a closure.",
    ),
    "a step that is not finite": (
        step_that_is_not_finite,
        NonFiniteGradientError,
        (
            "Step 0 was not taken, since its gradients are not finite (total norm nan); look at the first non-finite "
            "layer, or pass nonfinite='skip'."
        ),
    ),
    # preflight
    "a loss that is no function": (
        lambda: preflight(model(), torch.ones(())),
        TypeError,
        "loss must be a function that runs the forward pass and returns the loss; got a Tensor.",
    ),
    "a loss that returns nothing": (
        lambda: preflight(model(), lambda: None),
        TypeError,
        "loss must return a tensor of one element; got None.",
    ),
    "a loss by example": (
        lambda: preflight(watched_once, lambda: watched_once(torch.ones(4, 2))),
        ValueError,
        "loss must return a tensor of one element; got one of shape (4, 1).",
    ),
    "a loss without grad": (
        lambda: preflight(watched_once, lambda: watched_once(torch.ones(4, 2)).sum().detach()),
        ValueError,
        "loss must return a tensor that requires grad; got one without: look for detach or no_grad.",
    ),
    "a loss of another model": (
        lambda: preflight(model(), lambda: watched_once(torch.ones(4, 2)).sum()),
        ValueError,
        (
            "loss must depend on a trainable parameter of the model; got one that reaches none: call the model that "
            "preflight was given."
        ),
    ),
    "a loss that runs backward": (
        lambda: preflight(watched_once, loss_that_runs_backward),
        ValueError,
        "loss must leave the backward pass to preflight; got one that has run it.",
    ),
    "a lazy model": (
        lambda: preflight(nn.LazyLinear(2), lambda: torch.ones(())),
        ValueError,
        "model must have parameters of known shape; got a lazy one: pass it one batch before.",
    ),
    "a frozen model": (
        lambda: preflight(model().requires_grad_(False), lambda: torch.ones(())),
        ValueError,
        "model must have a trainable parameter; got none.",
    ),
    "the Monitor's clip": (
        lambda: monitor().clip_grad_norm_([weight()], 0.0),
        ValueError,
        "max_norm must be a positive number; got 0.0.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_its_sentence(case: str) -> None:
    mistake, kind, sentence = CASES[case]
    with pytest.raises(kind, match=f"^{re.escape(sentence)}$") as caught:
        mistake()
    assert type(caught.value) is kind


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_says_what_came_or_what_to_do(case: str) -> None:
    sentence = CASES[case][2]
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert re.search(r"; got |; call |; look at |; look for |: make a new one|: pass ", sentence)


def patterns(source: str) -> list[str]:
    """One regular expression for each sentence that a module raises, with its values left open."""
    raised = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    arguments = [call.args[0] for call in raised if isinstance(call, ast.Call) and call.args]
    return [pattern(argument) for argument in arguments if isinstance(argument, (ast.Constant, ast.JoinedStr))]


def pattern(argument: ast.Constant | ast.JoinedStr) -> str:
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    return "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in parts)


@pytest.mark.parametrize("module", PINNED_MODULES)
def test_every_sentence_is_pinned(module: str) -> None:
    pinned = [sentence for _, _, sentence in CASES.values()]
    for wanted in patterns((PACKAGE / f"{module}.py").read_text(encoding="utf-8")):
        elsewhere = any(wanted.startswith(re.escape(start)) for start in ELSEWHERE)
        assert elsewhere or any(re.fullmatch(wanted, sentence) for sentence in pinned), wanted


def test_a_sentence_that_is_not_pinned_is_found() -> None:
    (wanted,) = patterns("def f(x):\n    if x:\n        raise ValueError(f'{x} is odd; ' f'got {x!r}.') from None")
    assert re.fullmatch(wanted, "3 is odd; got 3.")
    assert not any(re.fullmatch(wanted, sentence) for _, _, sentence in CASES.values())


def test_a_mistake_leaves_no_hook_behind() -> None:
    watched = model()
    optimizer = sgd(watched)
    for options in ({"every": -1}, {"sinks": [1]}, {"clip": 1.0}, {"nonfinite": "ignore"}):
        with pytest.raises((ValueError, TypeError)):
            Monitor(watched, optimizer, **{"sinks": [], **options})
    assert not watched._forward_hooks
    assert not watched._forward_pre_hooks
    assert not watched.weight._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_warnings_have_a_category_of_their_own() -> None:
    assert issubclass(DiagnosticsWarning, UserWarning)
    watched = model()
    optimizer = sgd(watched)
    watching = Monitor(watched, optimizer, sinks=[])
    with pytest.warns(
        DiagnosticsWarning,
        match=r"^step_without_grads: Step 0 had nothing to spend: .+\. Call .+\. More: diagnostics-explain \w+\.$",
    ):
        watching.clip_and_step()
    watching.close()
