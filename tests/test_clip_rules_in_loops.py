"""The rules about clipping in real loops, with our clip and with torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from test_rules import found, loss_of, net, sgd, watching
from torch import nn
from torch.nn.utils import clip_grad_norm_

from diagnostics import ClipByNorm

MAX_NORM = 1e-2
STEPS = 4


def clips(monitor, own):
    """The loop's clip: ours, which is seen, or torch's, which is not."""
    return monitor.clip_grad_norm_ if own else clip_grad_norm_


def rules(monitor):
    return [(rule, step) for rule, step, _ in found(monitor)]


@pytest.mark.parametrize("own", [True, False])
def test_clipping_where_it_belongs_is_silent(own):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            clips(monitor, own)(model.parameters(), MAX_NORM)
            optimizer.step()
    assert found(monitor) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_own_clip_of_half_types_rounds_and_is_silent(dtype):
    model = nn.Linear(5, 1).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watching(model, optimizer, clip=ClipByNorm(0.3)) as monitor:
        for _ in range(60):
            optimizer.zero_grad()
            (model(torch.randn(3, 5).to(dtype)) - 7).square().mean().backward()
            clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
    assert max(one.clip.total_norm for one in monitor.records) > 0.3 * 1.001 or dtype == torch.float16
    assert [rule for rule, _ in rules(monitor) if rule.startswith("clip_")] == []


@pytest.mark.parametrize("declared", [True, False])
def test_clipping_after_the_step_is_found_at_the_first_step(declared):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM) if declared else None) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            monitor.clip_grad_norm_(model.parameters(), MAX_NORM)
    assert rules(monitor) == [("clip_after_step", 0)]
    assert monitor.violations[0].count == STEPS


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("declared", [True, False])
def test_clipping_before_the_backward_pass_is_found_and_is_one_violation(declared, set_to_none):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM) if declared else None) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            monitor.clip_grad_norm_(model.parameters(), MAX_NORM)
            loss_of(model).backward()
            optimizer.step()
    assert rules(monitor) == [("clip_before_backward", 0)]
    assert monitor.violations[0].count == (STEPS if declared else STEPS - 1)


@pytest.mark.parametrize("own", [True, False])
def test_clipping_every_micro_batch_but_the_last_is_clipping_in_the_middle(own):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM), accumulate=2) as monitor:
        for _ in range(STEPS):
            loss_of(model).backward()
            clips(monitor, own)(model.parameters(), MAX_NORM)
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert rules(monitor) == [("clip_mid_accumulation", 0)]
    assert "before the last backward pass" in monitor.violations[0].message


@pytest.mark.parametrize("own", [True, False])
def test_clipping_every_micro_batch_the_last_included_spends_what_was_declared(own):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM), accumulate=2) as monitor:
        for _ in range(STEPS):
            for _ in range(2):
                loss_of(model).backward()
                clips(monitor, own)(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    assert found(monitor) == []


@pytest.mark.parametrize("part", ["all layers", "a layer in the middle"])
def test_two_losses_with_the_clip_between_them_are_found(part):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM)) as monitor:
        for number in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            clipped = model if part == "all layers" or number != 1 else model[2]
            monitor.clip_grad_norm_(clipped.parameters(), MAX_NORM)
            if number == 1:
                loss_of(model).backward()
            optimizer.step()
    assert rules(monitor) == [("clip_mid_accumulation", 1)]


def test_clipping_only_a_part_names_what_was_left_out():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            monitor.clip_grad_norm_(model[:4].parameters(), MAX_NORM)
            optimizer.step()
    assert found(monitor) == [("clip_subset", 0, ("4.weight", "4.bias"))]
    assert monitor.violations[0].count == STEPS
    assert "left out 2 parameters (4.weight, 4.bias), whose gradients have norm" in monitor.violations[0].message


def test_clipping_parameter_by_parameter_is_clipping_in_pieces():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            for parameter in model.parameters():
                monitor.clip_grad_norm_(parameter, MAX_NORM)
            optimizer.step()
    assert found(monitor) == [("clip_subset", 0, ())]
    assert "clipped in 6 parts" in monitor.violations[0].message


@pytest.mark.parametrize("how", ["never", "wider", "undone", "torch after the step"])
def test_a_step_that_spends_more_than_declared_is_found_whatever_the_cause(how):
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            if how == "wider":
                monitor.clip_grad_norm_(model.parameters(), 10 * MAX_NORM)
            if how == "undone":
                monitor.clip_grad_norm_(model.parameters(), MAX_NORM)
                for parameter in model.parameters():
                    parameter.grad.mul_(8)
            optimizer.step()
            if how == "torch after the step":
                clip_grad_norm_(model.parameters(), MAX_NORM)
    assert rules(monitor) == [("clip_ineffective", 0)]
    assert monitor.violations[0].count == STEPS


def test_measuring_with_an_infinite_threshold_explains_nothing_and_breaks_nothing():
    for declared in (math.inf, None):
        model = net()
        optimizer = sgd(model.parameters())
        with watching(model, optimizer, clip=declared and ClipByNorm(declared)) as monitor:
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
                monitor.clip_grad_norm_(model.parameters(), math.inf)
        assert found(monitor) == []


def test_a_loop_that_declares_nothing_may_clip_models_one_by_one():
    model = net()
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            for part in model:
                if list(part.parameters()):
                    monitor.clip_grad_norm_(part.parameters(), MAX_NORM)
            optimizer.step()
    assert found(monitor) == []


# automatic mixed precision


def scaled_loop(model, optimizer, monitor, scaler, clip, *, unscale, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        clip(model.parameters(), scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()


VARIANTS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: next(iter(variant)))
@pytest.mark.parametrize("known", [True, False], ids=["scaler known", "scaler unknown"])
def test_clipping_scaled_gradients_is_found_by_the_norm_that_is_left_of_them(known, variant):
    for unscale in (True, False):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **variant)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        options = {"scaler": scaler} if known else {}
        with watching(model, optimizer, clip=ClipByNorm(MAX_NORM), **options) as monitor:
            scaled_loop(
                model,
                optimizer,
                monitor,
                scaler,
                lambda parameters, _: monitor.clip_grad_norm_(parameters, MAX_NORM),
                unscale=unscale,
            )
        assert rules(monitor) == ([] if unscale else [("clip_scaled_grads", 0)])
    assert monitor.violations[0].count == STEPS
    assert "loss scale 4096" in monitor.violations[0].message
    assert monitor.records[0].clip.total_norm_after == pytest.approx(MAX_NORM / 4096, rel=1e-3)


def test_torchs_own_clip_of_scaled_gradients_is_found_where_the_scaler_is_known():
    model = net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM), scaler=scaler) as monitor:
        scaled_loop(
            model,
            optimizer,
            monitor,
            scaler,
            lambda parameters, _: clip_grad_norm_(parameters, MAX_NORM),
            unscale=False,
        )
    assert rules(monitor) == [("clip_scaled_grads", 0)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("declared", [True, False])
def test_a_threshold_that_is_scaled_with_the_losses_is_lawful(declared, own):
    model = net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with watching(model, optimizer, clip=ClipByNorm(MAX_NORM) if declared else None, scaler=scaler) as monitor:
        scaled_loop(
            model,
            optimizer,
            monitor,
            scaler,
            lambda parameters, scale: clips(monitor, own)(parameters, MAX_NORM * scale),
            unscale=False,
        )
    assert found(monitor) == []


def test_undeclared_clipping_of_scaled_gradients_is_found_too():
    model = net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with watching(model, optimizer) as monitor:
        scaled_loop(
            model,
            optimizer,
            monitor,
            scaler,
            lambda parameters, _: monitor.clip_grad_norm_(parameters, 1.0),
            unscale=False,
        )
    assert rules(monitor) == [("clip_scaled_grads", 0)]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: next(iter(variant)))
def test_a_step_that_the_scaler_skips_spends_nothing(variant):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **variant)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with watching(model, optimizer, scaler=scaler) as monitor:
        for number in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * (math.inf if number == 1 else 1.0)).backward()
            before = model[0].weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model[0].weight) == (number == 1)
    assert found(monitor) == []
    assert [one.skipped for one in monitor.records] == [False, True, False, False]


def test_clip_of_one_optimizer_does_not_explain_another():
    one, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = [sgd(one.parameters()), sgd(other.parameters())]
    with watching({"one": one, "other": other}, optimizers, clip=ClipByNorm(MAX_NORM)) as monitor:
        for _ in range(STEPS):
            for model, optimizer in zip((one, other), optimizers, strict=True):
                optimizer.zero_grad()
                model(torch.ones(3, 4)).mean().backward()
                if model is one:
                    monitor.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
    assert rules(monitor) == [("clip_ineffective", 0)]
    assert monitor.violations[0].message.startswith("Step 0 of other spent")
