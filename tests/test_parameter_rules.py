"""The rules about which parameters a step reaches, broken and kept in real loops."""

from __future__ import annotations

import copy

import pytest
import torch
from test_rules import EVERYTHING, found, loss_of, net, sgd, watching
from torch import nn
from torch.nn import functional

from diagnostics import Monitor

STEPS = 6


def train(model, optimizer, *, loss=loss_of, steps=STEPS, clear=None, **options):
    with watching(model, optimizer, **options) as monitor:
        for _ in range(steps):
            (clear or model).zero_grad()
            loss(model).backward()
            monitor.clip_and_step()
    return monitor


# param_not_in_optimizer


def test_a_layer_that_the_optimizer_was_not_given_is_named_and_dated_to_the_first_step():
    model = net()
    monitor = train(model, sgd(model[:4].parameters()))
    assert found(monitor) == [("param_not_in_optimizer", 0, ("4.weight", "4.bias"))]
    assert "2 trainable parameters do not move" in monitor.violations[0].message


def test_a_layer_that_was_replaced_after_the_optimizer_was_made_is_found_on_both_sides():
    model = net()
    optimizer = sgd(model.parameters())
    model[4] = nn.Linear(8, 3)
    monitor = train(model, optimizer, clear=optimizer)
    assert sorted(found(monitor)) == [
        ("optimizer_param_not_in_model", 0, ("parameter_0", "parameter_1")),
        ("param_not_in_optimizer", 0, ("4.weight", "4.bias")),
    ]


def test_a_run_too_short_to_be_sure_says_it_at_close():
    model = net()
    assert found(train(model, sgd(model[2:].parameters()), steps=2)) == [
        ("param_not_in_optimizer", 0, ("0.weight", "0.bias"))
    ]


def test_a_layer_unfrozen_but_never_added_is_dated_to_the_step_that_unfroze_it():
    model = net()
    model[0].requires_grad_(False)
    optimizer = sgd(model[2:].parameters())
    with watching(model, optimizer) as monitor:
        for step in range(10):
            if step == 3:
                model[0].requires_grad_(True)
            model.zero_grad()
            loss_of(model).backward()
            monitor.clip_and_step()
    assert found(monitor) == [("param_not_in_optimizer", 3, ("0.weight", "0.bias"))]


def test_parameters_that_the_loop_moves_by_hand_are_spent():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = net(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.net(x) * self.scale

    for every in (1, 3):
        model = Scaled()
        optimizer = sgd(model.net.parameters())
        with watching(model, optimizer) as monitor:
            for step in range(12):
                model.zero_grad()
                loss_of(model).backward()
                monitor.clip_and_step()
                if step % every == 0:
                    model.scale.data -= 0.1 * model.scale.grad
        assert found(monitor) == []


def test_a_second_optimizer_that_the_monitor_does_not_know_moves_its_part():
    model = net()
    known, unknown = sgd(model[:2].parameters()), torch.optim.Adam(model[2:].parameters())
    with watching(model, known) as monitor:
        for _ in range(STEPS):
            known.zero_grad()
            unknown.zero_grad()
            loss_of(model).backward()
            known.step()
            unknown.step()
    assert found(monitor) == []


def test_frozen_parameters_outside_the_optimizer_are_lawful():
    model = net()
    model[0].requires_grad_(False)
    assert found(train(model, sgd(model[2:].parameters()))) == []


# optimizer_param_not_in_model


def test_an_optimizer_of_another_model_is_found_at_its_first_step():
    model, old = net(), net()
    optimizer = sgd(old.parameters())
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    names = tuple(f"parameter_{place}" for place in range(6))
    assert ("optimizer_param_not_in_model", 0, names) in found(monitor)
    assert {rule for rule, _, _ in found(monitor)} == {"optimizer_param_not_in_model", "param_not_in_optimizer"}


def test_an_optimizer_made_before_a_copy_is_found():
    model = net()
    optimizer = sgd(model.parameters())
    model = copy.deepcopy(model)
    rules = {rule for rule, _, _ in found(train(model, optimizer))}
    assert "optimizer_param_not_in_model" in rules


def test_a_loss_with_parameters_of_its_own_is_lawful():
    model, weight = net(), nn.Parameter(torch.zeros(()))

    def loss(model):
        return loss_of(model) * torch.exp(-weight) + weight

    optimizer = sgd([*model.parameters(), weight])
    assert found(train(model, optimizer, loss=loss, clear=optimizer)) == []


# param_not_registered


class InAList(nn.Module):
    def __init__(self, registered):
        super().__init__()
        blocks = [nn.Linear(6, 6) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks) if registered else blocks
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


class InAMapping(nn.Module):
    def __init__(self, registered):
        super().__init__()
        parameters = {"scale": nn.Parameter(torch.ones(6))}
        self.held = nn.ParameterDict(parameters) if registered else parameters
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return {"logits": self.head(x * self.held["scale"])}


NAMES = {
    InAList: ("blocks[1].weight", "blocks[1].bias", "blocks[0].weight", "blocks[0].bias"),
    InAMapping: ("held['scale']",),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("registered", [True, False])
def test_modules_and_parameters_in_plain_containers_are_found_and_named_as_they_are_reached(kind, registered):
    def loss(model):
        output = model(torch.randn(8, 6))
        output = output["logits"] if isinstance(output, dict) else output
        return functional.cross_entropy(output, torch.randint(0, 3, (8,)))

    model = kind(registered)
    monitor = train(model, sgd(model.parameters()), loss=loss)
    ((rule, step, names),) = found(monitor) or ((None, None, ()),)
    if registered:
        assert rule is None
    else:
        assert (rule, step, set(names)) == ("param_not_registered", 0, set(NAMES[kind]))


def test_what_a_model_was_given_is_not_its_own():
    generator, discriminator = nn.Linear(2, 6), net()
    optimizer = sgd(discriminator.parameters())

    def loss(model):
        return functional.cross_entropy(model(generator(torch.randn(8, 2)).relu_()), torch.randint(0, 3, (8,)))

    assert found(train(discriminator, optimizer, loss=loss)) == []


def test_a_learnable_input_and_an_input_by_keyword_are_not_the_models_own():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, *, prompt, x):
            return self.net(x + prompt)

    prompt = nn.Parameter(torch.zeros(6))

    def loss(model):
        return functional.cross_entropy(model(prompt=prompt, x=torch.randn(8, 6)), torch.randint(0, 3, (8,)))

    model = Keyed()
    assert found(train(model, sgd(model.parameters()), loss=loss)) == []


# no_grad_flow


class Cut(nn.Module):
    """Two branches; the second one is cut off where it joins, or is not called at all."""

    def __init__(self, how):
        super().__init__()
        self.main, self.side, self.how = net(), nn.Linear(6, 3), how

    def forward(self, x):
        if self.how == "skipped":
            return self.main(x)
        side = self.side(x)
        return self.main(x) + {"detached": side.detach(), "data": side.data, "whole": side}[self.how]


@pytest.mark.parametrize("how", ["detached", "data", "whole"])
def test_a_branch_that_runs_and_is_cut_off_is_found_after_three_steps(how):
    model = Cut(how)
    optimizer = sgd(model.parameters())
    with watching(model, optimizer) as monitor:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            monitor.clip_and_step()
            assert len(monitor.violations) == (how != "whole" and step >= 2)
    assert found(monitor) == ([] if how == "whole" else [("no_grad_flow", 0, ("side.weight", "side.bias"))])
    assert (
        how == "whole" or "although the module ran: 1 module of the optimizer does not" in monitor.violations[0].message
    )


@pytest.mark.parametrize("every", [10, 0])
def test_a_branch_that_never_runs_is_found_at_step_100_or_at_close(every):
    for steps in (8, 103):
        model = Cut("skipped")
        optimizer = sgd(model.parameters())
        seen = []
        with watching(model, optimizer, every=every) as monitor:
            for step in range(steps):
                optimizer.zero_grad()
                loss_of(model).backward()
                monitor.clip_and_step()
                seen += [step] * bool(monitor.violations)
        assert found(monitor) == [("no_grad_flow", 0, ("side.weight", "side.bias"))]
        assert seen == ([] if steps == 8 else [100, 101, 102])


def test_a_bias_that_the_forward_pass_forgets_is_found_alone():
    class Forgetful(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight)

    model = nn.Sequential(Forgetful(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert found(train(model, sgd(model.parameters()))) == [("no_grad_flow", 0, ("0.bias",))]


def test_frozen_modules_and_averages_inside_the_model_are_silent():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.head = net(), nn.Linear(3, 3)
            self.target = copy.deepcopy(self.online)
            self.frozen = nn.Linear(6, 3).requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                target = self.target(x) + self.frozen(x)
            return functional.mse_loss(self.head(self.online(x)), target)

    model = Student()
    mine = [*model.online.parameters(), *model.head.parameters(), *model.frozen.parameters()]
    assert found(train(model, sgd(mine), loss=lambda model: model(torch.randn(8, 6)))) == []


def test_a_generator_that_waits_for_its_turn_is_silent():
    generator, critic = nn.Linear(2, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = [torch.optim.RMSprop(generator.parameters()), torch.optim.RMSprop(critic.parameters())]
    with watching({"g": generator, "c": critic}, optimizers) as monitor:
        for step in range(12):
            fake = generator(torch.randn(8, 2))  # runs with gradients enabled, and is detached
            optimizers[1].zero_grad()
            (critic(fake.detach()).mean() - critic(torch.randn(8, 6)).mean()).backward()
            optimizers[1].step()
            if step % 5 == 4:
                optimizers[0].zero_grad()
                (-critic(generator(torch.randn(8, 2))).mean()).backward()
                optimizers[0].step()
    assert found(monitor) == []


# no_update


def test_weights_too_coarse_for_their_learning_rate_are_named_as_such():
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def loss(model):
        return functional.cross_entropy(model(torch.randn(8, 6).bfloat16()).float(), torch.randint(0, 3, (8,)))

    monitor = train(model, optimizer, loss=loss)
    ((rule, step, names),) = found(monitor)
    assert (rule, step) == ("no_update", 0)
    assert set(names) == set(EVERYTHING)
    assert "smaller than the resolution of the parameter's dtype" in monitor.violations[0].message


def test_a_learning_rate_far_below_the_resolution_of_float32_is_found_in_a_scheduled_loop():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 1e-12)
    with watching(model, optimizer) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            schedule.step()
    assert [(rule, step) for rule, step, _ in found(monitor)] == [("no_update", 4)]


def test_rows_of_a_sparse_embedding_that_no_token_asked_for_may_stay_as_they_were():
    """The sample of the weights sees other rows than a sparse gradient holds."""
    model = nn.Sequential(nn.Embedding(20_000, 16, sparse=True), nn.Flatten(), nn.Linear(48, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = train(model, optimizer, loss=lambda model: model(torch.randint(0, 20_000, (8, 3))).square().sum())
    assert found(monitor) == []


def test_an_optimizer_that_does_nothing_is_found_and_one_that_works_is_not():
    class Lazy(torch.optim.SGD):
        def step(self, closure=None):
            del closure

    for kind, rules in ((Lazy, ["no_update"]), (torch.optim.SGD, [])):
        model = net()
        monitor = train(model, kind(model.parameters(), lr=0.1))
        assert [rule for rule, _, _ in found(monitor)] == rules
    model = net()
    with watching(model, optimizer := Lazy(model.parameters(), lr=0.1)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert [(rule, step) for rule, step, _ in found(monitor)] == [("no_update", 0)]
    assert "its learning rate and gradient are not zero" in monitor.violations[0].message


def test_warm_up_from_zero_a_group_at_rate_zero_and_zero_gradients_are_known():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[:2].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}], lr=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, max(0, step - 4) / 4))
    with watching(model, optimizer) as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            (loss_of(model) * 0).backward()
            optimizer.step()
            schedule.step()
    assert found(monitor) == []


def test_a_run_that_has_converged_is_silent():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x = torch.randn(16, 3)
    y = x @ torch.tensor([[1.0], [2.0], [3.0]])
    with watching(model, optimizer) as monitor:
        for _ in range(200):
            optimizer.zero_grad()
            functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert found(monitor) == []


def test_a_vanished_gradient_is_no_fault_of_the_loop():
    layers = [module for _ in range(10) for module in (nn.Linear(4, 4), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(4, 3))

    def loss(model):
        return functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))

    assert found(train(model, sgd(model.parameters(), lr=1e-3), loss=loss, steps=20)) == []


def test_embeddings_of_which_few_rows_are_used_are_silent():
    model = nn.Sequential(nn.Embedding(5000, 4), nn.Linear(4, 3))

    def loss(model):
        return functional.cross_entropy(model(torch.randint(0, 9, (8,))), torch.randint(0, 3, (8,)))

    for sparse in (False, True):
        model[0].sparse = sparse
        assert found(train(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)) == []


def test_watching_for_all_this_writes_nothing_and_waits_no_more_often():
    model = net()
    optimizer = sgd(model.parameters())
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record") as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            before = monitor._reader.copies
            monitor.clip_and_step()
            assert monitor._reader.copies == before + 1
