"""Mistakes as people make them in larger loops: each found at its step, and nothing else said."""

from __future__ import annotations

import copy

import pytest
import torch
from test_research_loops import adam, mlp
from test_rules import found, loss_of, net, watching
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from diagnostics import ClipByNorm

STEPS = 6


def rules(monitor):
    return [(rule, step) for rule, step, _ in found(monitor)]


def adversarial(*, clear_d=True, clear_g=True, set_to_none=True):
    g, d = mlp(4, 16, 6), mlp(6, 16, 1)
    optimizer_g, optimizer_d = adam(g), adam(d)
    with watching({"g": g, "d": d}, [optimizer_g, optimizer_d]) as monitor:
        for _ in range(STEPS):
            if clear_d:
                optimizer_d.zero_grad(set_to_none=set_to_none)
            functional.softplus(-d(torch.randn(8, 6))).mean().backward()
            fake = g(torch.randn(8, 4))
            functional.softplus(d(fake.detach())).mean().backward()
            optimizer_d.step()
            if clear_g:
                optimizer_g.zero_grad(set_to_none=set_to_none)
            functional.softplus(-d(fake)).mean().backward()
            optimizer_g.step()
    return monitor


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("net_name", ["g", "d"])
def test_one_of_two_networks_that_is_never_cleared_is_named(net_name, set_to_none):
    monitor = adversarial(clear_d=net_name != "d", clear_g=net_name != "g", set_to_none=set_to_none)
    ((rule, step, names),) = found(monitor)
    assert (rule, step) == ("missing_zero_grad", 1)
    assert {name.split(".")[0] for name in names} == {net_name}
    assert monitor.violations[0].message.startswith(f"Step 1 of {net_name} spent gradients")


def test_clearing_only_at_the_start_of_an_epoch_is_found_at_the_second_step():
    model = net()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                loss_of(model).backward()
                optimizer.step()
    assert rules(monitor) == [("missing_zero_grad", 1)]
    assert monitor.violations[0].count == 4


def test_clearing_another_optimizers_parameters_is_found():
    model, target = net(), net()
    optimizer = adam(model)
    stale = torch.optim.SGD(target.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            stale.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert rules(monitor) == [("missing_zero_grad", 1)]


def test_a_meta_learner_that_lets_its_inner_loop_step_the_shared_gradients_again_is_found():
    model = mlp(3, 8, 1)
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.Adam(model.parameters())
    with watching(model, [inner, outer]) as monitor:
        for _ in range(STEPS):
            outer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            inner.step()
            model(torch.randn(8, 3)).square().mean().backward()  # on top of what the inner step has spent
            outer.step()
    assert rules(monitor)[0] == ("missing_zero_grad", 0)


def test_a_loop_over_micro_batches_that_clears_before_its_step_is_found():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with watching(model, optimizer, accumulate=4) as monitor:
        for batch in range(16):
            (loss_of(model) / 4).backward()
            if (batch + 1) % 4 == 0:
                optimizer.zero_grad()
                optimizer.step()
    assert rules(monitor) == [("zero_grad_before_step", 0)]


def test_accumulation_whose_step_condition_is_off_by_one_makes_windows_too_large():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with watching(model, optimizer, accumulate=4) as monitor:
        for batch in range(20):
            (loss_of(model) / 4).backward()
            if batch % 4 == 0 and batch > 0:
                optimizer.step()
                optimizer.zero_grad()
    assert rules(monitor) == [("window_size", 0), ("dropped_window", 3)]


def test_actor_and_critic_clipped_one_without_the_other():
    actor, critic = mlp(4, 8, 2), mlp(4, 8, 1)
    agent = nn.ModuleDict({"actor": actor, "critic": critic})
    optimizer = adam(agent)
    with watching(agent, optimizer, clip=ClipByNorm(1e-3)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (actor(torch.randn(8, 4)).square().mean() + critic(torch.randn(8, 4)).square().mean()).backward()
            monitor.clip_grad_norm_(actor.parameters(), 1e-3)
            optimizer.step()
    ((rule, step, names),) = found(monitor)
    assert (rule, step) == ("clip_subset", 0)
    assert {name.split(".")[0] for name in names} == {"critic"}


def test_a_backbone_that_was_meant_to_train_is_found_outside_the_optimizer():
    backbone, head = mlp(6, 8, 8), nn.Linear(8, 3)
    model = nn.Sequential(backbone, head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            model.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    ((rule, step, names),) = found(monitor)
    assert (rule, step) == ("param_not_in_optimizer", 0)
    assert set(names) == {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"}


def test_an_encoder_cut_off_by_a_detach_is_found():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = mlp(6, 8, 2), mlp(2, 8, 6)

        def forward(self, x):
            return self.decoder(self.encoder(x).detach())

    model = Autoencoder()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            x = torch.randn(8, 6)
            optimizer.zero_grad()
            functional.mse_loss(model(x), x).backward()
            optimizer.step()
    ((rule, step, names),) = found(monitor)
    assert (rule, step) == ("no_grad_flow", 0)
    assert {name.split(".")[0] for name in names} == {"encoder"}
    assert "2 modules of the optimizer do not learn" in monitor.violations[0].message


def test_an_optimizer_of_the_model_before_it_was_copied_to_its_average_is_found():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = copy.deepcopy(model)
    with watching(trained, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(trained).backward()
            optimizer.step()
    assert sorted(rules(monitor)) == [("optimizer_param_not_in_model", 0), ("param_not_in_optimizer", 0)]


def test_a_recurrent_loop_that_clips_with_torch_after_its_step_is_found():
    model = nn.GRU(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, clip=ClipByNorm(1e-3)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(5, 2, 3))[0].square().mean().backward()
            optimizer.step()
            clip_grad_norm_(model.parameters(), 1e-3)
    assert rules(monitor) == [("clip_ineffective", 0)]
