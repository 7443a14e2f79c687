"""Lawful loops of many kinds, each of which must stay silent."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diagnostics import ClipByNorm, Monitor

STEPS = 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch():
    return torch.randn(8, 6), torch.randint(0, 3, (8,))


def loss_of(model):
    x, y = batch()
    return functional.cross_entropy(model(x), y)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def watching(model, optimizer, **options):
    return Monitor(model, optimizer, sinks=[], on_diagnosis="record", on_violation="record", **options)


def two_losses_one_step(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            loss_of(model).backward()
            monitor.clip_and_step()
    return monitor


def gradient_penalty(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            x, y = batch()
            x.requires_grad_()
            loss = functional.cross_entropy(model(x), y)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.square().sum()).backward()
            monitor.clip_and_step()
    return monitor


def double_backward_with_create_graph(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            model.zero_grad()
            gradients = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
            sum(gradient.square().sum() for gradient in gradients).backward()
            monitor.clip_and_step()
    return monitor


def sharpness_aware_minimisation(model):
    """Foret et al. 2021: a step up by hand, a second gradient there, the step from the old weights."""
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            with torch.no_grad():
                moves = [0.05 * parameter.grad for parameter in model.parameters()]
                for parameter, move in zip(model.parameters(), moves, strict=True):
                    parameter.add_(move)
            optimizer.zero_grad()
            loss_of(model).backward()
            with torch.no_grad():
                for parameter, move in zip(model.parameters(), moves, strict=True):
                    parameter.sub_(move)
            monitor.clip_and_step()
    return monitor


def manual_steps_on_other_parameters(model):
    optimizer = sgd(model)
    scale = nn.Parameter(torch.ones(()))
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model) * scale).backward()
            with torch.no_grad():
                scale -= 0.01 * scale.grad
            scale.grad = None
            monitor.clip_and_step()
    return monitor


def frozen_backbone_with_low_rank_adapters(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = model
            self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    adapted = Adapted()
    optimizer = torch.optim.AdamW([*adapted.down.parameters(), *adapted.up.parameters()])
    with watching(adapted, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(adapted).backward()
            monitor.clip_and_step()
    return monitor


def gradual_unfreezing_in_a_new_group(model):
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for step in range(2 * STEPS):
            if step == STEPS:
                for parameter in model[0].parameters():
                    parameter.requires_grad_(True)
                optimizer.add_param_group({"params": list(model[0].parameters())})
            optimizer.zero_grad()
            loss_of(model).backward()
            monitor.clip_and_step()
    assert monitor.records[-1].layers[0].weight is not None
    return monitor


def target_network_and_exponential_average(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        target = copy.deepcopy(model).requires_grad_(False)
        for _ in range(STEPS):
            optimizer.zero_grad()
            x, _ = batch()
            functional.mse_loss(model(x), target(x) + 1).backward()
            monitor.clip_and_step()
            with torch.no_grad():
                for old, new in zip(target.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 0.1)
    return monitor


def tied_weights(model):
    model[2].weight = nn.Parameter(torch.randn(8, 8) / 3)
    tied = nn.Sequential(model[0], nn.Tanh(), model[2], nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), model[4])
    tied[4].weight = model[2].weight
    optimizer = sgd(tied)
    with watching(tied, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(tied).backward()
            record = monitor.clip_and_step()
    assert sum(record.clip.shares) == pytest.approx(1.0)
    return monitor


def sometimes_unused_branch(model):
    other = nn.Linear(6, 3)

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.other, self.calls = model, other, 0

        def forward(self, x):
            self.calls += 1
            return self.main(x) + (self.other(x) if self.calls % 2 else 0)

    branching = Branching()
    optimizer = torch.optim.SGD(branching.parameters(), lr=0.1)
    with watching(branching, optimizer) as monitor:
        for _ in range(2 * STEPS):
            optimizer.zero_grad()
            loss_of(branching).backward()
            monitor.clip_and_step()
    return monitor


def saliency_between_steps(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            x, _ = batch()
            x.requires_grad_()
            model(x).sum().backward()  # pollutes the weights' gradients, which zero_grad clears
            optimizer.zero_grad()
            loss_of(model).backward()
            monitor.clip_and_step()
    return monitor


def skip_by_hand_when_not_finite(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for step in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model) * (float("nan") if step == 1 else 1.0)).backward()
            if all(parameter.grad.isfinite().all() for parameter in model.parameters()):
                optimizer.step()
    assert len(monitor.records) == STEPS - 1
    return monitor


def learning_rate_zero(model):
    optimizer = sgd(model, lr=0.0)
    with watching(model, optimizer, clip=ClipByNorm(1.0)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            monitor.clip_and_step()
    return monitor


def call_by_functional_call(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            x, y = batch()
            functional.cross_entropy(functional_call(model, dict(model.named_parameters()), (x,)), y).backward()
            monitor.clip_and_step()
    return monitor


def checkpointed_and_accumulated(model):
    optimizer = sgd(model)
    with watching(model, optimizer, accumulate=2) as monitor:
        for _ in range(STEPS):
            for _ in range(2):
                x, y = batch()
                functional.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
            monitor.clip_and_step()
            optimizer.zero_grad(set_to_none=False)
    return monitor


def gradients_assigned_by_hand(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            monitor.clip_and_step()
    return monitor


def gradients_copied_into_place(model):
    optimizer = sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad.copy_(gradient)
            monitor.clip_and_step()
    return monitor


def a_subclass_that_calls_super(model):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    optimizer = Twice(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert len(monitor.records) == STEPS
    return monitor


def a_compiled_model(model):
    optimizer = sgd(model)
    with watching(model, optimizer) as monitor:
        compiled = torch.compile(model, backend="eager")
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(compiled).backward()
            record = monitor.clip_and_step()
    assert all(layer.weight.norm > 0 and layer.output.norm > 0 for layer in record.layers)
    return monitor


LOOPS = [
    two_losses_one_step,
    gradient_penalty,
    double_backward_with_create_graph,
    sharpness_aware_minimisation,
    manual_steps_on_other_parameters,
    frozen_backbone_with_low_rank_adapters,
    gradual_unfreezing_in_a_new_group,
    target_network_and_exponential_average,
    tied_weights,
    sometimes_unused_branch,
    saliency_between_steps,
    skip_by_hand_when_not_finite,
    learning_rate_zero,
    call_by_functional_call,
    checkpointed_and_accumulated,
    gradients_assigned_by_hand,
    gradients_copied_into_place,
    a_subclass_that_calls_super,
    a_compiled_model,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_lawful_loop_is_silent(loop):
    monitor = loop(net())
    assert monitor.violations == ()
    assert monitor._watcher.failure is None
    assert monitor.records


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adadelta": torch.optim.Adadelta,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
}
VARIANTS = {"for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_variant_of_every_optimizer_is_silent_and_a_forgotten_zero_grad_is_not(name, variant):
    for lawful in (True, False):
        model = net()
        try:
            optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3, **VARIANTS[variant])
        except (TypeError, RuntimeError, NotImplementedError):
            pytest.skip(f"torch has no {variant} {name} here")
        with watching(model, optimizer) as monitor:
            for _ in range(3):
                if lawful:
                    optimizer.zero_grad(set_to_none=False)
                loss_of(model).backward()
                monitor.clip_and_step()
        assert [(one.rule, one.step) for one in monitor.violations] == ([] if lawful else [("missing_zero_grad", 1)])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon here")
@pytest.mark.parametrize("lawful", [True, False])
def test_muon_beside_adamw_is_silent_and_a_forgotten_zero_grad_is_not(lawful):
    model = net()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others)]
    with watching(model, optimizers) as monitor:
        for _ in range(3):
            loss_of(model).backward()
            for optimizer in optimizers:
                optimizer.step()
                if lawful:
                    optimizer.zero_grad()
    assert [(one.rule, one.step) for one in monitor.violations] == ([] if lawful else [("missing_zero_grad", 1)] * 2)
