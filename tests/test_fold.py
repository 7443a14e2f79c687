"""With ``fold=True`` a fused optimizer multiplies by the clip coefficient: the same step but for the last bit."""

from __future__ import annotations

import pytest
import torch
from operations import Operations
from torch import nn

from diagnostics import ClipByGroup, ClipByNorm, ClipByQuantile, ClipByValue, Monitor


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def trained(clip, *, make=adamw, steps=12, scale=1.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    optimizer = make(model.parameters())
    names = []
    options = {"sinks": [], "on_violation": "record", "on_diagnosis": "record"} | options
    with Monitor(model, optimizer, clip=clip, **options) as monitor:
        for number in range(steps):
            optimizer.zero_grad()
            (scale * model(torch.full((4, 8), 1.0 + number % 3)).square().mean()).backward()
            with Operations() as writes:
                monitor.clip_and_step()
            names += writes.names
    return monitor, torch.nn.utils.parameters_to_vector(model.parameters()), names, optimizer


FUSED = {
    "adamw": adamw,
    "adam": lambda held: torch.optim.Adam(held, lr=1e-3, fused=True),
    "sgd": lambda held: torch.optim.SGD(held, lr=1e-3, fused=True),
    "momentum": lambda held: torch.optim.SGD(held, lr=1e-2, momentum=0.9, dampening=0.5, fused=True),
    "adagrad": lambda held: torch.optim.Adagrad(held, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_folded_step_is_the_clipped_step(name, asynchronous):
    options = {"asynchronous": asynchronous, "nonfinite": "step"}
    plain, expected, writes, _ = trained(ClipByNorm(0.01), make=FUSED[name], **options)
    folded, weights, fewer, optimizer = trained(ClipByNorm(0.01), make=FUSED[name], fold=True, **options)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    assert all(record.clip.applied for record in folded.records)
    for one, other in zip(folded.records, plain.records, strict=True):
        assert one.clip.total_norm == pytest.approx(other.clip.total_norm, rel=1e-5)
        assert one.clip.total_norm_after == pytest.approx(0.01, rel=1e-3)
    assert "_foreach_mul_" in writes
    assert "_foreach_mul_" not in fewer
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_steps_that_are_not_clipped_are_the_same_bit_for_bit(asynchronous):
    _, expected, _, _ = trained(ClipByNorm(1e9))
    _, weights, _, _ = trained(ClipByNorm(1e9), fold=True, asynchronous=asynchronous)
    assert torch.equal(weights, expected)


@pytest.mark.parametrize(
    ("clip", "make"),
    [
        (ClipByValue(0.01), adamw),
        (ClipByGroup(ClipByNorm(0.01)), adamw),
        (ClipByNorm(0.1), lambda held: torch.optim.SGD(held, lr=1e-2)),
    ],
    ids=["by value", "by group", "an optimizer that is not fused"],
)
def test_what_a_fused_step_cannot_do_is_done_before_it(clip, make):
    _, expected, _, _ = trained(clip, make=make)
    monitor, weights, _, _ = trained(clip, make=make, fold=True)
    assert any(record.clip.applied for record in monitor.records)
    torch.testing.assert_close(weights, expected)


def test_a_threshold_that_adapts_is_folded_as_well():
    clip = ClipByQuantile(0.1, warmup=3)
    _, expected, _, _ = trained(clip)
    monitor, weights, names, _ = trained(clip, fold=True)
    assert any(record.clip.applied for record in monitor.records)
    assert "_foreach_mul_" not in names
    torch.testing.assert_close(weights, expected)


def test_gradients_that_fp32_cannot_hold_are_clipped_in_float64_before_the_step():
    monitor, weights, _, _ = trained(ClipByNorm(1.0), scale=1e25, fold=True, steps=3)
    assert all(record.clip.applied for record in monitor.records)
    assert weights.isfinite().all()


def test_a_gradient_that_lies_otherwise_in_memory_than_its_parameter_is_written_to():
    model = nn.Linear(3, 3, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    with Monitor(model, optimizer, clip=ClipByNorm(1.0), fold=True, sinks=[]) as monitor:
        model.weight.grad = torch.arange(9.0).reshape(3, 3).T
        with Operations() as writes:
            record = monitor.clip_and_step()
    assert record.clip.applied
    assert "_foreach_mul_" in writes.names
    assert not torch.equal(model.weight, before)


def test_both_attributes_are_taken_away_even_if_the_step_fails():
    model = nn.Linear(3, 3)
    optimizer = adamw(model.parameters())
    with Monitor(model, optimizer, clip=ClipByNorm(1e-3), fold=True, sinks=[]) as monitor:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.param_groups[0]["betas"] = None
        with pytest.raises(TypeError):
            monitor.clip_and_step()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
