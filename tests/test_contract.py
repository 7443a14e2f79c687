"""The contract as a state machine: facts in, violations out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diagnostics.contract import Contract
from diagnostics.contract.acts import Backward, Clip, Step
from diagnostics.contract.rules import describe

NAMES = ["a", "b"]


def backward(leftover=None, replaced=(), accumulated=(0, 1)):
    return Backward(frozenset(accumulated), leftover or {}, frozenset(replaced))


def step(number, norms=None, **more):
    return Step("optimizer", number, {0: 1.0, 1: 1.0} if norms is None else norms, **more)


def rules(violations):
    return [violation.rule for violation in violations]


def test_a_lawful_loop_is_silent():
    contract = Contract(NAMES)
    for number in range(5):
        contract.backward(backward())
        assert contract.step(step(number)) == ()
    assert contract.close() == ()


def test_a_spent_gradient_under_a_new_one_is_reported_at_the_step_that_spends_it():
    contract = Contract(NAMES)
    contract.backward(backward())
    contract.step(step(0))
    contract.backward(backward(leftover={1: 0.5}))
    (violation,) = contract.step(step(1))
    assert (violation.rule, violation.step, violation.parameters) == ("missing_zero_grad", 1, ("b",))
    assert "step 0" in violation.message
    assert "2 steps instead of 1" in violation.message


def test_repeats_are_counted_not_repeated():
    contract = Contract(NAMES)
    for number in range(4):
        contract.backward(backward(leftover={0: 1.0, 1: 1.0} if number else {}))
        contract.step(step(number))
    (violation,) = contract.violations
    assert (violation.step, violation.count) == (1, 3)


def test_stepping_twice_on_one_backward_spends_the_same_gradient_twice():
    contract = Contract(NAMES)
    contract.backward(backward())
    contract.step(step(0))
    assert rules(contract.step(step(1))) == ["missing_zero_grad"]


def test_a_consumed_gradient_that_is_cleared_before_anyone_spends_it_is_lawful():
    contract = Contract(NAMES)
    contract.backward(backward())
    contract.step(step(0))
    contract.backward(backward(leftover={0: 1.0, 1: 1.0}))  # a generator's pass pollutes the discriminator
    contract.backward(backward(leftover={0: 0.0, 1: 0.0}))  # and zero_grad cleans it
    assert contract.step(step(1)) == ()


def test_a_gradient_put_in_by_hand_is_lawful():
    contract = Contract(NAMES)
    contract.step(step(0))
    assert contract.step(step(1, rewritten=frozenset({0, 1}))) == ()


def test_a_skipped_step_spends_nothing():
    contract = Contract(NAMES)
    contract.backward(backward())
    contract.step(step(0, skipped=True))
    contract.backward(backward())
    assert contract.step(step(1)) == ()


def test_a_step_without_any_gradient_is_reported():
    contract = Contract(NAMES)
    assert rules(contract.step(step(0, norms={}))) == ["step_without_grads"]


def test_gradients_that_are_exactly_zero_are_no_fault_of_the_loop():
    contract = Contract(NAMES)
    contract.backward(backward())
    assert contract.step(step(0, norms={0: 0.0, 1: 0.0})) == ()


def exceeding(contract, number):
    contract.backward(backward())
    return contract.step(step(number, total_norm=5.0, max_norm=1.0))


def test_clipping_after_the_step_is_one_violation_dated_to_the_step():
    contract = Contract(NAMES)
    assert exceeding(contract, 0) == ()
    (violation,) = contract.clip(Clip({0: 3.0, 1: 4.0}))
    assert (violation.rule, violation.step) == ("clip_after_step", 0)
    assert "5 times" in violation.message


def test_clipping_before_the_backward_pass_is_named_as_such():
    contract = Contract(NAMES)
    exceeding(contract, 0)
    assert rules(contract.clip(Clip({}))) == ["clip_before_backward"]


def test_an_excess_that_nobody_explains_is_clip_ineffective():
    contract = Contract(NAMES)
    exceeding(contract, 0)
    assert rules(exceeding(contract, 1)) == ["clip_ineffective"]
    assert rules(contract.close()) == ["clip_ineffective"]
    assert contract.violations[0].count == 2


def test_rounding_and_an_infinite_threshold_are_lawful():
    contract = Contract(NAMES)
    contract.step(step(0, total_norm=1.0005, max_norm=1.0))
    contract.step(step(1, rewritten=frozenset({0, 1}), total_norm=1e9, max_norm=float("inf")))
    assert contract.close() == ()


def test_a_clip_inside_the_window_does_not_explain_another_optimizers_excess():
    contract = Contract(NAMES)
    contract.backward(backward(accumulated=(0,)))
    contract.step(Step("d", 0, {0: 5.0}, total_norm=5.0, max_norm=1.0))
    contract.backward(backward(accumulated=(1,)))
    assert contract.clip(Clip({1: 9.0})) == ()


class SlowReference:
    """Every contribution by its number; a parameter's gradient is the list of those inside it."""

    def __init__(self):
        self.inside = {0: [], 1: []}
        self.spent = set()
        self.next = 0

    def backward(self):
        for held in self.inside.values():
            held.append(self.next)
            self.next += 1

    def clear(self):
        self.inside = {0: [], 1: []}

    def step(self):
        contributions = [number for held in self.inside.values() for number in held]
        broken = any(number in self.spent for number in contributions)
        self.spent.update(contributions)
        return broken


@given(st.lists(st.sampled_from(["backward", "step", "zero", "none"]), max_size=40))
def test_missing_zero_grad_is_reported_exactly_when_a_spent_contribution_is_spent_again(acts):
    contract, reference, number = Contract(NAMES), SlowReference(), 0
    kind = "none"
    for act in acts:
        if act == "backward":
            filled = any(reference.inside.values())
            size = 1.0 if filled else 0.0
            contract.backward(backward(leftover={0: size, 1: size} if filled or kind == "zero" else {}))
            reference.backward()
        elif act == "step":
            filled = any(reference.inside.values())
            norms = {0: 1.0, 1: 1.0} if filled else ({0: 0.0, 1: 0.0} if kind == "zero" else {})
            found = rules(contract.step(step(number, norms=norms)))
            assert ("missing_zero_grad" in found) == reference.step()
            number += 1
        else:
            reference.clear()
            kind = act


def test_names_are_told_in_few_words():
    assert describe([f"layer.{i}.weight" for i in range(6)]).startswith("6 parameters (layer.0.weight, ")
