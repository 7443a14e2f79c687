"""Verdicts that theory asks for beyond the slope."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from theory import gaussian, measure, watch_steps
from torch import nn
from torch.nn import functional

from diagnostics.records import WARNING

seeds = pytest.mark.parametrize("seed", range(3))


@pytest.fixture(autouse=True)
def _drawn(request):
    """Every net of a test is drawn from the test's own seed."""
    case = getattr(request.node, "callspec", None)
    torch.manual_seed(case.params.get("seed", 0) if case else 0)


# The condition `dead`


@pytest.mark.parametrize(("width", "depth"), [(1, 3), (2, 5), (3, 10)])
def test_nets_that_are_born_dead_are_dead_and_not_vanishing(width, depth):
    """Lu et al. 2019; test_theory.py holds how many of them there are. A living net of one unit has no dead one."""
    found = set()
    for _ in range(60):
        layers = [gaussian(1 if place == 0 else width, width, 2**0.5) for place in range(depth)]
        model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())), nn.Linear(width, 1))
        inputs = torch.rand(8, 1) + 0.5
        records, verdict = watch_steps(model, lambda: model(inputs).square().mean(), steps=5)  # noqa: B023 -- called at once
        is_dead = records[0].layers[0].output.rms == 0
        found.add(is_dead)
        if width == 1 or is_dead:
            assert (verdict.condition == "dead") == is_dead
        if is_dead:
            assert "vanishing" not in {one.condition for record in records for one in record.diagnoses}
    assert found == {True, False}


# A slope that layers of different widths leave alone: the norm of the gradient is what a layer keeps, not its rms


@pytest.mark.parametrize("widths", [(1024, 256, 64, 16, 4), (512, 256, 128, 64, 32, 16), (784, 1024, 512, 256, 10)])
@seeds
def test_he_initialised_nets_that_narrow_keep_their_gradient(widths, seed):
    """E‖δ_l‖² = σ_w² E[φ'²] ‖δ_{l+1}‖² whatever the widths, if weights have the variance σ_w²/fan_in."""
    layers = [gaussian(one, two, 2**0.5) for one, two in pairwise(widths)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]
    inputs, direction = torch.randn(64, widths[0]), torch.randn(64, widths[-1])
    record = measure(model, lambda: torch.sum(model(inputs) * direction))
    assert record.fit.decades < 0.35


@seeds
def test_a_default_net_that_narrows_over_six_layers_and_learns_is_not_sick(seed):
    widths = (1024, 512, 256, 128, 64, 32, 10)
    layers = [nn.Linear(one, two) for one, two in pairwise(widths)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]
    inputs, labels = torch.randn(64, 1024), torch.randint(0, 10, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    records, verdict = watch_steps(
        model, lambda: functional.cross_entropy(model(inputs), labels), steps=60, optimizer=optimizer
    )
    assert records[-1].loss < 0.1
    assert [one for record in records for one in record.diagnoses if one.severity >= WARNING] == []
    assert verdict.condition == "healthy"


class Classifier(nn.Module):
    """Tokens, a fused LSTM of two layers, its last state, two classes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.recurrent = nn.LSTM(32, 64, 2, batch_first=True)
        self.head = nn.Linear(64, 2)

    def forward(self, tokens):
        return self.head(self.recurrent(self.embedding(tokens))[0][:, -1])


@pytest.mark.parametrize("length", [2, 5, 10])
@seeds
def test_a_fused_lstm_that_classifies_short_sequences_is_not_sick(length, seed):
    """Its outputs have a gradient at the last step alone, which says nothing about depth."""
    model = Classifier()
    tokens, labels = torch.randint(0, 50, (16, length)), torch.randint(0, 2, (16,))
    _, verdict = watch_steps(model, lambda: functional.cross_entropy(model(tokens), labels))
    assert verdict.condition == "healthy"
