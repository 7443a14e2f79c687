"""Random loops against a slow reference that tracks every contribution exactly.

Each backward pass adds to a coordinate of its own in the gradient of every parameter that it reaches, so the gradients
themselves say which passes they hold. The reference reads them before each step and knows nothing of hooks, versions,
norms or the order of calls.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from diagnostics import ClipByNorm, Monitor

PARAMETERS = 3
LONGEST = 40
MAX_NORM = 0.5


class Ledger(nn.Module):
    """A parameter's gradient from pass k is the k-th unit vector."""

    def __init__(self):
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(torch.zeros(LONGEST + PARAMETERS)) for _ in range(PARAMETERS))

    def forward(self, number, reached):
        return sum(self.held[place][number] for place in reached)


class Reference:
    """What each step should be told, from the gradients alone."""

    def __init__(self, model, accumulate, clipped):
        self.model, self.accumulate, self.clipped = model, accumulate, clipped
        self.spent = [set() for _ in range(PARAMETERS)]  # passes that a step has spent, by parameter
        self.since = [set() for _ in range(PARAMETERS)]  # passes into a parameter since its last step
        self.blind = set()  # spent gradients that torch's own clip has written to, which nobody can tell from new ones
        self.found = []
        self.steps = 0

    def holds(self, place):
        gradient = self.model.held[place].grad
        return set() if gradient is None else set(gradient.nonzero().flatten().tolist())

    def backward(self, number, reached):
        for place in reached:
            self.since[place].add(number)

    def clip(self):
        self.blind |= {place for place in range(PARAMETERS) if not self.since[place]}

    def step(self):
        held = [self.holds(place) for place in range(PARAMETERS)]
        gradients = [parameter.grad for parameter in self.model.held]
        step = self.steps
        self.steps += 1
        blind = {place for place in self.blind if not self.since[place]}
        self.blind = set()
        stale = tuple(f"held.{p}" for p in range(PARAMETERS) if p not in blind and held[p] & self.spent[p])
        if stale:
            self.found.append(("missing_zero_grad", step, stale))
        if not any(held):
            passes = any(self.since)
            if passes:
                self.found.append(("zero_grad_before_step", step))
            elif all(gradient is None for gradient in gradients):
                self.found.append(("step_without_grads", step))
        fresh = [held[place] & self.since[place] for place in range(PARAMETERS)]
        if self.accumulate > 1 and max(map(len, fresh)) > self.accumulate:
            self.found.append(("window_size", step))
        norm = torch.cat([gradient for gradient in gradients if gradient is not None] or [torch.zeros(1)]).norm()
        if self.clipped and norm > MAX_NORM * 1.001:
            self.found.append(("excess", step))
        for place in range(PARAMETERS):
            self.spent[place] |= held[place]
            self.since[place] = set()


REACHED = st.sets(st.integers(0, PARAMETERS - 1), min_size=1).map(sorted)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("backward"), REACHED),
        st.tuples(st.just("backward"), st.just(list(range(PARAMETERS)))),
        st.sampled_from(
            [("zero", True), ("zero", False), ("by hand", None), ("step", "own"), ("step", "ours"), ("step", "own")]
        ),
        st.sampled_from([("clip", "own"), ("clip", "torch"), ("look", None)]),
    ),
    max_size=LONGEST,
)
EXCESSES = {"clip_after_step", "clip_before_backward", "clip_mid_accumulation", "clip_subset", "clip_ineffective"}


def replay(acts, accumulate, clipped):
    """Runs the loop; what the Monitor said and what the reference says."""
    model = Ledger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, accumulate, clipped)
    rule = ClipByNorm(MAX_NORM) if clipped else None
    options = {"sinks": [], "on_violation": "record", "on_diagnosis": "record", "every": 0}
    with Monitor(model, optimizer, clip=rule, accumulate=accumulate, **options) as monitor:
        for place in range(PARAMETERS):  # the first pass to begin at a parameter is not heard of before it accumulates
            model(LONGEST + place, [place]).backward()
            reference.backward(LONGEST + place, [place])
        optimizer.zero_grad()
        for number, (act, how) in enumerate(acts):
            if act == "backward":
                model(number, how).backward()
                reference.backward(number, how)
            elif act == "zero":
                optimizer.zero_grad(set_to_none=how)
            elif act == "by hand":
                for parameter in model.parameters():
                    parameter.grad = None
            elif act == "look":
                torch.autograd.grad(model(number, [0, 1]), list(model.parameters()), allow_unused=True)
            elif act == "clip":
                clip = monitor.clip_grad_norm_ if how == "own" else nn.utils.clip_grad_norm_
                clip(model.parameters(), MAX_NORM)
                if how == "torch":
                    reference.clip()
            elif how == "own" or clipped:
                reference.step()
                optimizer.step()
            else:
                reference.step()
                monitor.clip_and_step()
        failure = monitor._watcher.failure
    assert failure is None
    return monitor, reference


def by_step(monitor):
    """Rules by the step that they are dated to; an excess whatever its cause."""
    found = []
    for record in monitor.records:
        for one in record.violations:
            if one.rule not in EXCESSES and not one.rule.startswith(("no_", "param_", "optimizer_")):
                step = record.step
                found.append((one.rule, step, one.parameters) if one.rule == "missing_zero_grad" else (one.rule, step))
    return found


def compare(acts, accumulate, clipped):
    monitor, reference = replay(acts, accumulate, clipped)
    expected = [one for one in reference.found if one[0] != "excess"]
    found = [one for one in by_step(monitor) if one[0] != "zero_grad_before_step" or one in expected or accumulate == 1]
    assert sorted(found) == sorted(expected)
    if clipped:
        excesses = sum(one.count for one in monitor.violations if one.rule in EXCESSES)
        assert excesses == sum(one[0] == "excess" for one in reference.found)


EVERYWHERE = ("backward", [0, 1, 2])
ZEROED_BETWEEN_TWO_HISTORIES = [
    EVERYWHERE,
    ("step", "own"),
    ("backward", [0, 2]),
    EVERYWHERE,
    EVERYWHERE,
    ("zero", False),
    EVERYWHERE,
    ("step", "own"),
]
STILL_ZERO_AT_LATER_PASSES = [
    EVERYWHERE,
    ("zero", False),
    ("backward", [0]),
    ("backward", [0]),
    ("backward", [0]),
    ("step", "own"),
]


@example(STILL_ZERO_AT_LATER_PASSES, 2, False)
@example(ZEROED_BETWEEN_TWO_HISTORIES, 2, False)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(ACTS, st.sampled_from([1, 2]), st.booleans())
def test_random_loops_are_judged_as_by_the_reference(acts, accumulate, clipped):
    compare(acts, accumulate, clipped)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(ACTS, st.sampled_from([1, 2]), st.booleans())
def test_many_random_loops_are_judged_as_by_the_reference(acts, accumulate, clipped):
    compare(acts, accumulate, clipped)
