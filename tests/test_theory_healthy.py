"""Nets that train well are called healthy and nothing is said about them: at initialisation, in training, converged."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from theory import along, gaussian, measure, rms, sized, stack, watch_steps
from torch import nn
from torch.nn import functional

from diagnostics.records import WARNING
from diagnostics.trainers.cnn import CNN
from diagnostics.trainers.gpt import GPT
from diagnostics.trainers.models import MLP
from diagnostics.trainers.tasks import Inputs

SEEDS = range(3)
seeds = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(autouse=True)
def _drawn(request):
    """Every net of a test is drawn from the test's own seed."""
    case = getattr(request.node, "callspec", None)
    torch.manual_seed(case.params.get("seed", 0) if case else 0)


def assert_silent(model, loss, *, steps=3, optimizer=None):
    """Watches some steps and asserts that no record said anything at warning or above; returns the last record."""
    records, verdict = watch_steps(model, loss, steps=steps, optimizer=optimizer)
    said = [one for record in records for one in record.diagnoses if one.severity >= WARNING]
    assert said == []
    assert (verdict.condition, verdict.severity) == ("healthy", 0)
    return records[-1]


def classified(model, width=64, scale=1.0, batch=64):
    """Cross-entropy of a net on random inputs and labels."""
    inputs, labels = torch.randn(batch, width), torch.randint(0, 10, (batch,))
    return lambda: scale * functional.cross_entropy(model(inputs), labels)


def predicted(model, scale=1.0):
    """Cross-entropy of a GPT on random tokens."""
    tokens, following = torch.randint(0, 64, (2, 8, 32))
    return lambda: scale * functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def gpt(depth, position, **options):
    return GPT(Inputs("tokens", (32,)), 64, depth=depth, width=64, heads=4, norm_position=position, **options)


def he(depth, width=256, dropout=0.0):
    model = MLP(64, 10, depth=depth, width=width, init="kaiming")
    for block in model.hidden:
        block.activation = nn.Sequential(block.activation, nn.Dropout(dropout))
    return model


class Scaled(nn.Module):
    """Adds a branch divided by the root of the depth, which keeps a residual net of any depth near the identity."""

    def __init__(self, width, depth):
        super().__init__()
        self.branch = nn.Sequential(gaussian(width, width, 2**0.5), nn.ReLU(), gaussian(width, width, 1.0))
        self.scale = depth**-0.5

    def forward(self, stream):
        return stream + self.scale * self.branch(stream)


def scaled_residual(depth, width=64):
    return nn.Sequential(*(Scaled(width, depth) for _ in range(depth)), nn.Linear(width, 10))


class PreNorm(nn.Module):
    """Adds a branch whose input is normalised."""

    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, stream):
        return stream + self.branch(stream)


# at initialisation


@pytest.mark.parametrize("depth", [2, 3, 10, 30])
@seeds
def test_he_initialised_relu_nets(depth, seed):
    model = he(depth)
    assert_silent(model, classified(model))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@seeds
def test_default_nets_of_two_to_four_layers(activation, depth, seed):
    model = MLP(64, 10, depth=depth, width=128, activation=activation)
    assert_silent(model, classified(model))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("depth", [2, 6, 12])
@seeds
def test_gpts_with_either_norm(position, depth, seed):
    model = gpt(depth, position)
    assert_silent(model, predicted(model))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("depth", [3, 10, 30])
@seeds
def test_layer_norm_nets(activation, depth, seed):
    model = MLP(64, 10, depth=depth, width=128, activation=activation, norm="layer")
    assert_silent(model, classified(model))


@pytest.mark.parametrize("depth", [2, 3, 30])
@seeds
def test_residual_nets(depth, seed):
    model = scaled_residual(depth)
    assert_silent(model, classified(model))
    model = nn.Sequential(*(PreNorm(64) for _ in range(depth)), nn.LayerNorm(64), nn.Linear(64, 10))
    assert_silent(model, classified(model))


@pytest.mark.parametrize("kind", ["scaled", "pre-norm"])
def test_residual_nets_of_three_hundred_layers(kind):
    model = scaled_residual(300) if kind == "scaled" else nn.Sequential(*(PreNorm(32) for _ in range(150)))
    assert_silent(model, classified(model, width=64 if kind == "scaled" else 32))


@pytest.mark.parametrize("residual", [True, False])
@seeds
def test_batch_norm_convolutional_nets(residual, seed):
    model = CNN(Inputs("images", (1, 8, 8)), 10, depth=8 if residual else 4, residual=residual, norm="batch")
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    assert_silent(model, lambda: functional.cross_entropy(model(images), labels))


# sizes that say nothing about depth


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
@seeds
def test_gradients_that_are_very_small_or_very_large_but_flat(scale, seed):
    model = he(10)
    assert_silent(model, classified(model, scale=scale))
    model = gpt(4, "pre")
    assert_silent(model, predicted(model, scale=scale))


@seeds
def test_one_example_at_a_time(seed):
    model = he(20)
    assert_silent(model, classified(model, batch=1))


# dropout


@pytest.mark.parametrize("share", [0.1, 0.2])
@seeds
def test_nets_with_dropout(share, seed):
    model = he(10, dropout=share)
    assert_silent(model, classified(model))
    model = gpt(4, "pre", dropout=share)
    assert_silent(model, predicted(model))


@pytest.mark.parametrize("share", [0.2, 0.5])
@seeds
def test_dropout_lets_the_gradient_grow_by_what_it_keeps_so_that_much_of_it_at_depth_is_no_false_alarm(share, seed):
    """Inverted dropout multiplies what it keeps by 1/(1 − p), hence the mean square by the same: χ = σ_w²/2/(1 − p)."""
    layers = [(gaussian(256, 256, 2**0.5), nn.ReLU(), nn.Dropout(share)) for _ in range(30)]
    model = nn.Sequential(*(module for layer in layers for module in layer))
    records, _ = watch_steps(model, along(model, torch.randn(64, 256)))
    assert 10 ** (2 * records[0].fit.slope) == pytest.approx(1 / (1 - share), rel=0.1)


# in training, and converged


def adam(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_small_net_from_its_first_step_to_a_tiny_loss(activation):
    model = MLP(16, 10, depth=2, width=32, activation=activation)
    last = assert_silent(model, classified(model, width=16, batch=16), steps=300, optimizer=adam(model, 3e-2))
    assert last.loss < 1e-3
    assert max(one.output.rms for one in last.layers) < 1e-4


LONG = {
    "default relu, SGD": (lambda: MLP(64, 10, depth=3, width=64), "sgd", 300),
    "default tanh, AdamW": (lambda: MLP(64, 10, depth=3, width=64, activation="tanh"), "adam", 300),
    "He relu of 12 layers, AdamW": (lambda: he(12), "adam", 100),
    "He relu of 12 layers with dropout, AdamW": (lambda: he(12, dropout=0.1), "adam", 100),
    "LayerNorm, SGD": (lambda: MLP(64, 10, depth=10, width=64, norm="layer"), "sgd", 200),
    "LayerNorm with residuals, AdamW": (
        lambda: MLP(64, 10, depth=30, width=64, norm="layer", residual=True),
        "adam",
        60,
    ),
    "BatchNorm, AdamW": (lambda: MLP(64, 10, depth=8, width=64, norm="batch"), "adam", 150),
    "scaled residuals, SGD": (lambda: scaled_residual(30), "sgd", 100),
}


@pytest.mark.slow
@pytest.mark.parametrize("net", LONG)
@seeds
def test_nets_in_training(net, seed):
    make, kind, steps = LONG[net]
    model = make()
    optimizer = adam(model) if kind == "adam" else torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = classified(model)
    before = loss().item()
    assert assert_silent(model, loss, steps=steps, optimizer=optimizer).loss < 0.7 * before


@pytest.mark.slow
@pytest.mark.parametrize("position", ["pre", "post"])
@seeds
def test_gpts_in_training(position, seed):
    model = gpt(4, position)
    assert assert_silent(model, predicted(model), steps=100, optimizer=adam(model)).loss < 2


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@seeds
def test_default_nets_converged_to_a_loss_that_fp32_hardly_holds(activation, seed):
    model = MLP(64, 10, depth=3, width=64, activation=activation)
    last = assert_silent(model, classified(model), steps=1500, optimizer=adam(model, 1e-2))
    assert last.loss < 1e-5


def test_the_assertion_can_fail():
    model = stack(8, 64, nn.Sigmoid, nn.Linear)
    with pytest.raises(AssertionError, match="vanishing"):
        assert_silent(model, sized(model, torch.randn(16, 64)))


def test_a_slope_that_is_the_same_everywhere_hides_no_single_layer():
    """The profile of a healthy net is flat from layer to layer, not only on the whole."""
    model = he(20)
    sizes = rms(measure(model, classified(model)))[:-1]
    assert max(abs(math.log10(one / two)) for one, two in pairwise(sizes)) < 0.2
