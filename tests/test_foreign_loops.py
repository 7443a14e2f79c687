"""Loops after well-known code bases; each runs unchanged, unwatched, watched, and held to its own clip.

A loop is given ``watched(model, optimizers, clip, **options)`` to call where its authors would, and returns what it has
trained.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_research_loops import adam, mlp
from test_rules import found, loss_of, net, watching
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from diagnostics import ClipByNorm

STEPS = 8


def optimizer_that_clips_in_its_step(watched):
    """Detectron2's full-model clipping: a subclass made at run time, whose step clips and hands on."""

    def step(self, closure=None):
        clip_grad_norm_([one for group in self.param_groups for one in group["params"]], 0.1)
        torch.optim.SGD.step(self, closure)

    model = net()
    clipping = type("SGDWithGradientClip", (torch.optim.SGD,), {"step": step})
    optimizer = clipping(model.parameters(), lr=0.1, momentum=0.9)
    watched(model, optimizer, 0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (loss_of(model) + loss_of(model)).backward()
        optimizer.step()
    return [*model.parameters()]


def entropy_coefficient_before_the_networks(watched):
    """Stable-Baselines3's SAC: the first step of all is that of a tensor outside the models."""
    actor, critic = mlp(4, 16, 4), mlp(6, 16, 1)
    target = copy.deepcopy(critic).requires_grad_(False)
    log_alpha = torch.zeros(1, requires_grad=True)
    of_alpha, of_actor, of_critic = torch.optim.Adam([log_alpha]), adam(actor), adam(critic)
    watched({"actor": actor, "critic": critic, "target": target}, [of_alpha, of_actor, of_critic])
    for _ in range(STEPS):
        state, action, reward = torch.randn(8, 4), torch.rand(8, 2), torch.randn(8, 1)
        mean, log_std = actor(state).chunk(2, 1)
        policy = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        chosen = policy.rsample()
        log_probability = policy.log_prob(chosen).sum(1, keepdim=True)
        of_alpha.zero_grad()
        (-(log_alpha * (log_probability - 2).detach()).mean()).backward()
        of_alpha.step()
        alpha = log_alpha.detach().exp()
        of_critic.zero_grad()
        with torch.no_grad():
            wanted = reward + 0.99 * target(torch.cat([state, chosen], 1))
        functional.mse_loss(critic(torch.cat([state, action], 1)), wanted).backward()
        of_critic.step()
        of_actor.zero_grad()
        (alpha * log_probability - critic(torch.cat([state, chosen], 1))).mean().backward()
        of_actor.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.lerp_(new, 0.005)
    return [*actor.parameters(), *critic.parameters(), log_alpha]


class Quantizer(nn.Module):
    """A codebook that is a moving average, kept in parameters that every forward pass replaces."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.average = nn.Parameter(torch.randn(12, 8))

    def forward(self, z):
        chosen = functional.one_hot(torch.cdist(z.detach(), self.embedding.weight).argmin(1), 12).float()
        quantized = chosen @ self.embedding.weight
        self.average = nn.Parameter(0.99 * self.average + 0.01 * (chosen.t() @ z))
        self.embedding.weight = nn.Parameter(self.average / 0.99)
        return z + (quantized - z).detach(), functional.mse_loss(quantized.detach(), z)


def codebook_that_is_a_moving_average(watched):
    """The VQ-VAE notebook from Zalando Research: its optimizer holds a codebook that only the forward pass moves."""
    model = nn.ModuleDict({"encoder": mlp(6, 16, 8), "quantizer": Quantizer(), "decoder": mlp(8, 16, 6)})
    optimizer = adam(model)
    watched(model, optimizer)
    for _ in range(STEPS):
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        quantized, commitment = model["quantizer"](model["encoder"](x))
        (functional.mse_loss(model["decoder"](quantized), x) + 0.25 * commitment).backward()
        optimizer.step()
    return [*model.parameters()]


def momentum_encoder_in_the_optimizer(watched):
    """MoCo written in haste: the key encoder is nowhere frozen, only moved under no_grad."""
    query, key = mlp(6, 16, 8), mlp(6, 16, 8)
    model = nn.ModuleDict({"query": query, "key": key})
    optimizer = adam(model)
    watched(model, optimizer)
    for _ in range(STEPS):
        with torch.no_grad():
            for new, old in zip(query.parameters(), key.parameters(), strict=True):
                old.data = old.data * 0.9 + new.data * 0.1
            wanted = key(torch.randn(8, 6))
        optimizer.zero_grad()
        functional.mse_loss(query(torch.randn(8, 6)), wanted + 1).backward()
        optimizer.step()
    return [*model.parameters()]


def task_weights_of_gradnorm(watched):
    """GradNorm: the task weights' own gradient is put in by hand, over what the weighted loss has left there."""
    model, weights = net(), nn.Parameter(torch.ones(3))
    of_model, of_weights = adam(model), torch.optim.Adam([weights], lr=0.025)
    watched(model, [of_model, of_weights])
    for _ in range(STEPS):
        losses = (model(torch.randn(8, 6)) + 1).square().mean(0)
        of_model.zero_grad()
        (weights * losses).sum().backward(retain_graph=True)
        norms = [
            torch.autograd.grad(weight * loss, model[2].weight, retain_graph=True, create_graph=True)[0].norm()
            for weight, loss in zip(weights, losses, strict=True)
        ]
        spread = (torch.stack(norms) - torch.stack(norms).mean().detach()).abs().sum()
        weights.grad = torch.autograd.grad(spread, weights)[0]
        of_model.step()
        of_weights.step()
    return [*model.parameters(), weights]


def gradients_per_example(watched):
    """Opacus's way with torch.func: gradients are made without a backward pass and put in by hand."""

    def loss_of_one(parameters, x, y):
        return functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched(model, optimizer, 1.0)
    each = vmap(grad(loss_of_one), in_dims=(None, 0, 0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}
        gradients = each(values, torch.randn(8, 6), torch.randint(0, 3, (8,)))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].mean(0)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [*model.parameters()]


def noise_on_summed_micro_batches(watched):
    """Private SGD: each micro-batch's gradient is taken away and summed elsewhere; the sum is put in at the end."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched(model, optimizer, accumulate=4)
    for _ in range(STEPS):
        sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for _ in range(4):
            model.zero_grad()
            loss_of(model).backward()
            for total, parameter in zip(sums, model.parameters(), strict=True):
                total.add_(parameter.grad)
        for total, parameter in zip(sums, model.parameters(), strict=True):
            parameter.grad = total / 4
        optimizer.step()
    return [*model.parameters()]


def gradients_summed_elsewhere_by_a_hook(watched):
    """Megatron's main_grad: a hook moves every gradient away while the backward pass runs."""

    def move(parameter):
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(move)
    watched(model, optimizer, 1.0, accumulate=2)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.main_grad.zero_()
        for _ in range(2):
            (loss_of(model) / 2).backward()
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters()]


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.place, self.colour = nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.rand(10, 3))

    def forward(self, x):
        return torch.exp(-torch.cdist(x, self.place)) @ self.colour


def points_that_multiply(watched):
    """3D Gaussian Splatting: between backward and step all parameters are replaced by larger ones, which then step
    without a gradient."""
    model = Points()
    groups = [{"params": [model.place], "name": "place"}, {"params": [model.colour], "name": "colour"}]
    optimizer = torch.optim.Adam(groups, lr=0.01, eps=1e-15)
    watched(model, optimizer)
    for number in range(1, 3 * STEPS + 1):
        functional.mse_loss(model(torch.randn(16, 3)), torch.ones(16, 3)).backward()
        for group in optimizer.param_groups if number % STEPS == 0 else ():
            (old,) = group["params"]
            state = optimizer.state.pop(old)
            new = nn.Parameter(torch.cat([old.detach(), old.detach()[:2] + 0.01]))
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.cat([state[name], torch.zeros_like(state[name][:2])])
            optimizer.state[new] = state
            group["params"][0] = new
            setattr(model, group["name"], new)
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters()]


SILENT = [
    points_that_multiply,
    task_weights_of_gradnorm,
    gradients_per_example,
    noise_on_summed_micro_batches,
    gradients_summed_elsewhere_by_a_hook,
    codebook_that_is_a_moving_average,
    momentum_encoder_in_the_optimizer,
    optimizer_that_clips_in_its_step,
    entropy_coefficient_before_the_networks,
]


def run(loop, *, clip=False, **options):
    """What a loop has trained, and its Monitors."""
    monitors = []

    def watched(model, optimizers, max_norm=None, **more):
        declared = ClipByNorm(max_norm) if clip and max_norm else None
        monitors.append(watching(model, optimizers, clip=declared, **{**options, **more}))

    torch.manual_seed(0)
    trained = loop(watched)
    for monitor in monitors:
        monitor.close()
    return [tensor.detach().clone() for tensor in trained], monitors


@pytest.mark.parametrize("loop", SILENT, ids=lambda loop: loop.__name__)
def test_a_lawful_loop_is_silent_and_trains_as_it_would_unwatched(loop):
    torch.manual_seed(0)
    alone = [tensor.detach().clone() for tensor in loop(lambda *_, **__: None)]
    for options in ({}, {"clip": True}, {"clip": True, "every": 1}):
        trained, monitors = run(loop, **options)
        assert [found(monitor) for monitor in monitors] == [[] for _ in monitors]
        assert any(monitor.records for monitor in monitors)
        assert all(map(torch.equal, trained, alone))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("replace", ["head", "weight norm"])
def test_parameters_that_the_model_gets_in_the_middle_and_no_optimizer_has_are_found(replace, set_to_none):
    def loop(watched):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watched(model, optimizer)
        for step in range(STEPS):
            if step == 3:
                new = nn.Linear(8, 3)
                model[4] = new if replace == "head" else nn.utils.parametrizations.weight_norm(new)
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model).backward()
            optimizer.step()
        return [*model.parameters()]

    _, (monitor,) = run(loop)
    ((rule, step, names),) = found(monitor)
    assert (rule, step) == ("param_not_in_optimizer", 3)
    assert {name.split(".")[0] for name in names} == {"4"}
    assert len(names) == (2 if replace == "head" else 3)


def test_gradients_divided_out_of_place_are_still_those_that_nobody_cleared():
    def loop(watched):
        model = net()
        optimizer = adam(model)
        watched(model, optimizer)
        for _ in range(STEPS):
            loss_of(model).backward()
            for parameter in model.parameters():
                parameter.grad = parameter.grad / 8
            optimizer.step()
        return []

    _, (monitor,) = run(loop)
    assert [(rule, step) for rule, step, _ in found(monitor)] == [("missing_zero_grad", 1)]
    assert len(monitor.violations[0].parameters) == len(list(net().parameters()))
