"""Every rule of the loop in real loops: broken in differently built ones, kept in their healthy twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from diagnostics import Monitor

STEPS = 5
EVERYTHING = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model):
    return functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,)))


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def watching(model, optimizer, **options):
    return Monitor(model, optimizer, sinks=[], on_diagnosis="record", on_violation="record", **options)


def found(monitor):
    assert monitor._watcher.failure is None
    return [(one.rule, one.step, one.parameters) for one in monitor.violations]


# zero_grad_before_step


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mine", [True, False], ids=["own step", "clip_and_step"])
def test_gradients_cleared_between_backward_and_step_are_found_at_that_step(mine, set_to_none):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for number in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model).backward()
            if number >= 2:
                model.zero_grad(set_to_none=set_to_none)
            optimizer.step() if mine else monitor.clip_and_step()
    assert found(monitor) == [("zero_grad_before_step", 2, EVERYTHING)]
    assert monitor.violations[0].count == STEPS - 2
    assert "found nothing to spend, although 1 backward pass had made" in monitor.violations[0].message


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_at_every_micro_batch_are_found_inside_a_declared_window_only(set_to_none):
    for accumulate in (4, 1):
        model = net()
        optimizer = sgd(model.parameters())
        with watching(model, optimizer, accumulate=accumulate) as monitor:
            for batch in range(12):
                optimizer.zero_grad(set_to_none=set_to_none)
                loss_of(model).backward()
                if batch % 4 == 3:
                    optimizer.step()
        rules = [(one.rule, one.step) for one in monitor.violations]
        assert rules == ([("zero_grad_before_step", 0)] if accumulate == 4 else [])


def test_gradients_cleared_by_hand_in_the_middle_of_a_window_are_found():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, accumulate=3) as monitor:
        for window in range(3):
            optimizer.zero_grad()
            for micro in range(3):
                loss_of(model).backward()
                if window == 1 and micro == 0:
                    for parameter in model.parameters():
                        parameter.grad = None
            monitor.clip_and_step()
    assert found(monitor) == [("zero_grad_before_step", 1, EVERYTHING)]
    assert "those of 1 backward pass into 6 parameters of 3 modules" in monitor.violations[0].message


def test_a_loop_that_clears_what_is_not_finite_and_steps_all_the_same_is_silent():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for number in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model) * (math.nan if number == 2 else 1)).backward()
            if not all(parameter.grad.isfinite().all() for parameter in model.parameters()):
                optimizer.zero_grad()
            optimizer.step()
    assert found(monitor) == []


def test_cancelling_the_gradients_of_one_layer_is_lawful():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for number in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            if number < 3:
                for parameter in model[4].parameters():
                    parameter.grad = None
            monitor.clip_and_step()
    assert found(monitor) == []


# window_size and dropped_window


def accumulating(model, batches, *, step_on_last, clear_at_epoch=False, epochs=2, accumulate=4):
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, accumulate=accumulate) as monitor:
        for _ in range(epochs):
            if clear_at_epoch:
                optimizer.zero_grad()
            for batch in range(batches):
                loss_of(model).backward()
                if (batch + 1) % accumulate == 0 or (step_on_last and batch == batches - 1):
                    monitor.clip_and_step()
                    optimizer.zero_grad()
    return monitor


def test_a_short_last_window_that_is_stepped_on_is_lawful():
    assert found(accumulating(net(), 10, step_on_last=True)) == []
    assert found(accumulating(net(), 8, step_on_last=False)) == []


def test_a_short_last_window_that_leaks_into_the_next_epoch_makes_a_step_too_large_and_is_lost_at_the_end():
    assert found(accumulating(net(), 10, step_on_last=False, epochs=1)) == [("dropped_window", 1, EVERYTHING)]
    leaked = accumulating(net(), 11, step_on_last=False, epochs=2)
    assert found(leaked) == [("window_size", 2, EVERYTHING), ("dropped_window", 3, EVERYTHING)]
    assert "7 backward passes where accumulate=4" in leaked.violations[0].message
    assert "1.75 × the gradient" in leaked.violations[0].message


def test_a_short_last_window_that_is_cleared_at_every_epoch_is_dropped_once_it_is_the_last():
    assert found(accumulating(net(), 10, step_on_last=False, clear_at_epoch=True)) == [
        ("dropped_window", 3, EVERYTHING)
    ]


def test_a_run_that_fails_inside_a_window_has_dropped_nothing_on_purpose():
    model = net()
    with (
        pytest.raises(ZeroDivisionError),
        watching(model, optimizer := sgd(model.parameters()), accumulate=2) as monitor,
    ):
        for batch in range(5):
            loss_of(model).backward()
            if batch % 2:
                monitor.clip_and_step()
                optimizer.zero_grad()
        raise ZeroDivisionError
    assert found(monitor) == []


def test_a_step_every_three_passes_where_two_are_declared_is_found_at_the_first_step():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, accumulate=2) as monitor:
        for batch in range(9):
            loss_of(model).backward()
            if batch % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    assert found(monitor) == [("window_size", 0, EVERYTHING)]
    assert monitor.violations[0].count == 3


def test_a_closure_may_run_as_many_passes_as_it_likes():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    torch.manual_seed(1)
    for mine in (True, False):
        with watching(model, optimizer, accumulate=2) as monitor:
            for _ in range(3):
                optimizer.step(closure) if mine else monitor.clip_and_step(closure=closure)
        assert found(monitor) == []
        assert len(monitor.records) == 3


def test_a_closure_that_forgets_to_clear_is_found():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    with watching(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.step(closure)
    assert found(monitor) == [("missing_zero_grad", 1, EVERYTHING)]


# missing_zero_grad and step_without_grads


def test_the_message_says_how_much_larger_the_gradient_is_than_the_fresh_one():
    model = nn.Linear(3, 1, bias=False)
    optimizer = sgd(model.parameters(), lr=0.0)
    with watching(model, optimizer) as monitor:
        for _ in range(3):
            model(torch.ones(2, 3)).mean().backward()  # the same gradient each time
            monitor.clip_and_step()
    assert found(monitor) == [("missing_zero_grad", 1, ("weight",))]
    assert "the gradient is 2 × the fresh one of step 0" in monitor.violations[0].message
    assert str(monitor.violations[0]).endswith("More: diagnostics-explain missing_zero_grad.")


def test_one_layer_that_zero_grad_does_not_reach_is_named():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            model[:4].zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert found(monitor) == [("missing_zero_grad", 1, ("4.weight", "4.bias"))]


def test_a_step_in_front_of_the_first_backward_pass_has_nothing_to_spend():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
            loss_of(model).backward()
    assert found(monitor) == [("step_without_grads", 0, ())]


def test_a_detached_loss_leaves_the_step_without_gradients():
    model = net()
    optimizer = sgd(model.parameters())
    other = nn.Parameter(torch.ones(()))
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model).detach() * other).backward()
            optimizer.step()
    assert ("step_without_grads", 0, ()) in found(monitor)


def test_a_look_by_autograd_grad_between_clearing_and_the_window_changes_nothing():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, accumulate=2) as monitor:
        for _ in range(STEPS):
            loss_of(model).backward()  # for a picture
            optimizer.zero_grad()
            torch.autograd.grad(loss_of(model), list(model.parameters()))
            for _ in range(2):
                loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert found(monitor) == []
