"""Slopes measured through the Monitor against closed forms and published theory, over several seeds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from theory import along, gaussian, measure, rms, sized, stack, watch_steps
from torch import nn
from torch.nn import functional

SEEDS = range(3)
MANY_SEEDS = range(3, 20)
seeds = pytest.mark.parametrize("seed", SEEDS)
POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(101)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@pytest.fixture(autouse=True)
def _drawn(request):
    """Every net of a test is drawn from the test's own seed."""
    case = getattr(request.node, "callspec", None)
    torch.manual_seed(case.params.get("seed", 0) if case else 0)


# Exact: every layer multiplies the gradient by one known number


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.25])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@seeds
def test_an_orthogonal_linear_net_multiplies_the_gradient_by_its_gain(gain, dtype, tolerance, seed):
    """Saxe, McClelland and Ganguli 2014: the Jacobian of a product of orthogonal matrices is orthogonal."""
    depth, width = 50, 32
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(depth)))
    for layer in model:
        nn.init.orthogonal_(layer.weight, gain)
    direction = torch.randn(8, width, dtype=dtype)
    record = measure(model, lambda: torch.sum(model(torch.ones_like(direction)) * direction))
    last = direction.norm().item() / math.sqrt(direction.numel())
    assert rms(record) == pytest.approx([gain ** (depth - 1 - k) * last for k in range(depth)], rel=tolerance)
    assert record.fit.slope == pytest.approx(math.log10(gain), abs=tolerance)
    assert record.fit.decades == pytest.approx(49 * abs(math.log10(gain)), abs=50 * tolerance)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_layer_that_halves_or_doubles_has_a_slope_of_log_two(factor):
    model = stack(20, 4, nn.Identity, lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(factor * torch.eye(4))
    record = measure(model, lambda: model(torch.ones(1, 4)).sum())
    assert rms(record) == [factor ** (19 - depth) for depth in range(20)]
    assert record.fit.slope == math.log10(factor)


class LinearRecurrence(nn.Module):
    """h ← W h + x, unrolled: the depth axis is time. The module itself owns W, so each of its calls is a layer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden, inputs):
        return hidden @ self.weight.T + inputs


class Unrolled(nn.Module):
    """A cell over a sequence ``(batch, time, features)``; the loss sees the last state."""

    def __init__(self, cell, width):
        super().__init__()
        self.cell = cell
        self.width = width

    def forward(self, sequence):
        hidden = sequence.new_zeros(len(sequence), self.width)
        for inputs in sequence.unbind(1):
            hidden = self.cell(hidden, inputs)
        return hidden


@pytest.mark.parametrize("radius", [0.7, 1.0, 1.1])
@pytest.mark.parametrize("kind", ["diagonal", "orthogonal"])
@seeds
def test_a_linear_recurrence_multiplies_the_gradient_by_its_spectral_radius_in_each_step_of_time(radius, kind, seed):
    steps, width = 40, 16
    identity = torch.eye(width, dtype=torch.float64)
    weight = radius * (identity if kind == "diagonal" else nn.init.orthogonal_(identity.clone()))
    model = Unrolled(LinearRecurrence(weight), width)
    sequence = torch.randn(4, steps, width, dtype=torch.float64)
    record = measure(model, lambda: model(sequence).sum())
    assert [one.layer.name for one in record.layers] == [f"cell@{step}" for step in range(steps)]
    assert rms(record) == pytest.approx([radius ** (steps - 1 - step) for step in range(steps)], rel=1e-12)
    assert record.fit.slope == pytest.approx(math.log10(radius), abs=1e-12)


@pytest.mark.parametrize("norm", [0.5, 0.9, 1.0])
@seeds
def test_a_tanh_recurrence_stays_below_the_bound(norm, seed):
    """Pascanu, Mikolov and Bengio 2013: a step back multiplies the gradient by at most ‖W‖ times tanh's slope of 1."""

    class Tanh(LinearRecurrence):
        def forward(self, hidden, inputs):
            return torch.tanh(super().forward(hidden, inputs))

    steps, width = 30, 16
    weight = torch.randn(width, width, dtype=torch.float64)
    model = Unrolled(Tanh(norm * weight / torch.linalg.matrix_norm(weight, 2)), width)
    sequence = torch.randn(8, steps, width, dtype=torch.float64)
    record = measure(model, lambda: model(sequence).square().sum())
    sizes = rms(record)
    assert len(sizes) == steps
    assert all(before <= norm * after * (1 + 1e-12) for before, after in pairwise(sizes))
    assert record.fit.slope < math.log10(norm)


# Mean field: wide random nets


def fixed_point(phi, weight, bias):
    """Variance q* of pre-activations that a layer hands on unchanged; Poole et al. 2016, equation 3."""
    variance = 1.0
    for _ in range(5000):
        variance = weight**2 * WEIGHTS @ phi(math.sqrt(variance) * POINTS) ** 2 + bias**2
    return float(variance)


def chi(slope_of_phi, weight, variance):
    """χ₁, by which the squared gradient shrinks or grows per layer; Schoenholz et al. 2017, equation 5."""
    return float(weight**2 * WEIGHTS @ slope_of_phi(math.sqrt(variance) * POINTS) ** 2)


PHASES = {"ordered": (0.9, 0.1), "near critical": (1.3, 0.1**0.5), "chaotic": (1.5, 0.05), "very chaotic": (2.5, 0.3)}


def measured_against_chi(weight, bias, width, depth):
    """10^(2·slope)/χ₁ for a tanh net whose inputs have the length at which the first layer's variance is q*."""
    variance = fixed_point(np.tanh, weight, bias)
    model = stack(depth, width, nn.Tanh, lambda inputs, outputs: gaussian(inputs, outputs, weight, bias))
    inputs = torch.randn(16, width)
    length = math.sqrt((variance - bias**2) * width) / weight
    inputs = length * inputs / inputs.norm(dim=1, keepdim=True)
    record = measure(model, sized(model, inputs))
    return 10 ** (2 * record.fit.slope) / chi(lambda x: np.cosh(x) ** -2.0, weight, variance)


@pytest.mark.parametrize("phase", PHASES)
@seeds
def test_a_wide_tanh_net_follows_mean_field_theory(phase, seed):
    """Poole et al. 2016, Schoenholz et al. 2017."""
    weight, bias = PHASES[phase]
    assert (chi(lambda x: np.cosh(x) ** -2.0, weight, fixed_point(np.tanh, weight, bias)) > 1) == ("chaotic" in phase)
    assert measured_against_chi(weight, bias, width=256, depth=30) == pytest.approx(1, abs=0.05)


def test_the_critical_tanh_net_keeps_its_gradient():
    """σ_w = 1, σ_b = 0: χ₁ is 1 at q* = 0, which small inputs are near to."""
    model = stack(30, 256, nn.Tanh, lambda inputs, outputs: gaussian(inputs, outputs, 1.0))
    inputs = 0.01 * torch.randn(16, 256)
    assert 10 ** (2 * measure(model, sized(model, inputs)).fit.slope) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_very_wide_tanh_nets_follow_mean_field_theory_with_every_seed(phase):
    found = []
    for seed in MANY_SEEDS:
        torch.manual_seed(seed)
        found.append(measured_against_chi(*PHASES[phase], width=768, depth=40))
    assert found == pytest.approx([1] * len(found), abs=0.02)
    assert np.mean(found) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize(("gain", "slope"), [(2**0.5, 0.0), (1.0, -0.1505), (1.2, math.log10(1.2**2 / 2) / 2)])
@seeds
def test_a_relu_net_loses_half_the_variance_of_its_weights_per_layer(gain, slope, seed):
    """χ₁ = σ_w²/2: He et al. 2015 keep the gradient, Glorot and Bengio 2010 halve its square."""
    model = stack(30, 256, nn.ReLU, lambda inputs, outputs: gaussian(inputs, outputs, gain))
    record = measure(model, sized(model, torch.randn(64, 256)))
    assert record.fit.slope == pytest.approx(slope, abs=0.025)
    assert 10 ** (2 * record.fit.slope) == pytest.approx(gain**2 / 2, rel=0.12)


@pytest.mark.parametrize(
    ("activation", "depth", "slope"), [(nn.ReLU, 20, -0.389), (nn.Tanh, 12, -0.2415), (nn.Sigmoid, 8, -0.850)]
)
@seeds
def test_the_default_initialisation_has_its_known_slope(activation, depth, slope, seed):
    """Weights of variance 1/(3 · fan in): χ₁ is 1/6 for ReLU, just below 1/3 for tanh, about 1/48 for sigmoid."""
    model = stack(depth, 256, activation, nn.Linear)
    record = measure(model, sized(model, torch.randn(64, 256)))
    assert record.fit.slope == pytest.approx(slope, rel=0.03)


# Residual and highway nets


class Residual(nn.Module):
    """x + W x / √L, with an orthogonal W: the squared gradient grows by 1 + 1/L on average over W."""

    def __init__(self, width, depth):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))
        self.scale = depth**-0.5

    def forward(self, stream):
        return stream + self.scale * stream @ self.weight.T


@pytest.mark.parametrize("depth", [3, 10, 100, 300])
@seeds
def test_a_residual_net_grows_by_one_and_its_share_of_the_depth(depth, seed):
    """y = x + f(x)/√L: E‖(∂y/∂x)ᵀ δ‖² = (1 + 1/L)‖δ‖², so the whole net stays below √e however deep it is."""
    model = nn.Sequential(*(Residual(128, depth) for _ in range(depth)))
    record = measure(model, along(model, torch.randn(64, 128)))
    assert 10 ** (2 * record.fit.slope * depth) == pytest.approx((1 + 1 / depth) ** depth, rel=0.12)
    assert record.fit.decades < math.log10(math.e) / 2 + 0.05


class Highway(nn.Module):
    """(1 − T) x + T W x, a highway layer whose gate T is open by a bias alone (Srivastava et al. 2015)."""

    def __init__(self, width, gate):
        super().__init__()
        self.transform = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.gate = nn.Parameter(torch.full((width,), math.log(gate / (1 - gate))))

    def forward(self, stream):
        gate = torch.sigmoid(self.gate)
        return (1 - gate) * stream + gate * (stream @ self.transform.T)


@pytest.mark.parametrize("gate", [0.1, 0.3, 0.5, 0.8])
@seeds
def test_a_highway_net_weighs_the_carried_and_the_transformed_gradient(gate, seed):
    """δ_in = (1 − T) δ + T Wᵀ δ. W is random with E[W Wᵀ] = 1 and independent of δ, so the product of the two terms
    vanishes on average and E‖δ_in‖² = ((1 − T)² + T²)‖δ‖².
    """
    model = nn.Sequential(*(Highway(256, gate) for _ in range(20)))
    record = measure(model, sized(model, torch.randn(32, 256)))
    assert 10 ** (2 * record.fit.slope) == pytest.approx((1 - gate) ** 2 + gate**2, rel=0.04)


# Normalisation


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_norm_net_explodes_by_a_fifth_per_layer_so_that_ten_layers_are_healthy_and_a_hundred_are_not(seed):
    """Yang et al. 2019: with ReLU and large batches the squared gradient grows by π/(π − 1) per layer."""
    predicted = math.sqrt(math.pi / (math.pi - 1))
    assert predicted == pytest.approx(1.21, abs=0.005)
    for depth, condition in [(10, "healthy"), (100, "exploding")]:
        blocks = [(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(depth)]
        model = nn.Sequential(*(module for block in blocks for module in block), nn.Linear(128, 10))
        records, verdict = watch_steps(model, sized(model, torch.randn(128, 128)))
        assert 10 ** records[0].fit.slope == pytest.approx(predicted, rel=0.02)
        assert verdict.condition == condition


def last_feed_forward(depth, norm_first, width=128):
    """Gradient norm of the last block's second feed-forward matrix, with the weights that the theorem assumes.

    Those are normal with variance 1/width, queries and keys zero, so that attention takes the mean.
    """
    block = nn.TransformerEncoderLayer(width, 1, width, dropout=0.0, batch_first=True, norm_first=norm_first)
    final = nn.LayerNorm(width) if norm_first else None
    model = nn.TransformerEncoder(block, depth, norm=final, enable_nested_tensor=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=width**-0.5)
        if name.endswith("in_proj_weight"):
            nn.init.zeros_(parameter[: 2 * width].data)
    record = measure(model, along(model, torch.randn(16, 24, width)))
    (norm,) = (one.weight.norm for one in record.layers if one.layer.name == f"layers.{depth - 1}.linear2")
    return norm


def test_the_last_layers_gradient_shrinks_with_depth_under_pre_norm_and_not_under_post_norm():
    """Xiong et al. 2020, theorem 1: O(d √ln d) whatever the depth with Post-LN, O(d √(ln d / L)) with Pre-LN."""
    depths = (2, 4, 8, 16)
    found = {True: [], False: []}
    for seed in range(4):
        for norm_first, norms in found.items():
            torch.manual_seed(seed)
            norms.append([last_feed_forward(depth, norm_first) for depth in depths])
    pre, post = (np.mean(found[norm_first], axis=0) for norm_first in (True, False))
    assert post / post[0] == pytest.approx([1, 1, 1, 1], rel=0.12)
    assert pre / pre[0] == pytest.approx([math.sqrt(2 / depth) for depth in depths], rel=0.12)
    assert all(pre < post)


# What weight gradients do not tell


@pytest.mark.parametrize("seed", SEEDS)
def test_weight_gradients_are_flat_where_output_gradients_fall_and_the_verdict_follows_those(seed):
    """Glorot and Bengio 2010, figures 7 and 8: what fades on the way back cancels with what faded on the way forward.

    For one example the gradient of W is δ hᵀ; with Xavier and ReLU both factors fall by √2 per layer, in opposite
    directions.
    """
    model = stack(30, 256, nn.ReLU, lambda inputs, outputs: gaussian(inputs, outputs, 1.0))
    records, verdict = watch_steps(model, along(model, torch.randn(1, 256)))
    weights = np.log10([one.weight.norm for one in records[0].layers])
    assert np.polyfit(range(29), weights[:-1], 1)[0] == pytest.approx(0, abs=0.01)
    assert records[0].fit.slope == pytest.approx(-0.1505, abs=0.025)
    assert verdict.condition == "vanishing"


# Born dead


@pytest.mark.parametrize(("width", "depth"), [(1, 3), (2, 5), (3, 10)])
def test_narrow_relu_nets_are_born_dead_as_often_as_theory_says_and_are_not_called_vanishing(width, depth):
    """Lu et al. 2019: with symmetric weights and no bias each unit is off for one direction of its input with
    probability one half, so a net dies with probability 1 − (1 − 2^−width)^depth. All its hidden layers then have a
    gradient of exactly zero.
    """
    draws = 200
    dead = 0
    for _ in range(draws):
        layers = [gaussian(1 if place == 0 else width, width, 2**0.5) for place in range(depth)]
        model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())), nn.Linear(width, 1))
        inputs = torch.rand(8, 1) + 0.5  # positive, so that every layer's input keeps to one direction
        records, verdict = watch_steps(model, lambda: model(inputs).square().mean())  # noqa: B023 -- called at once
        first = records[0].layers[0].output
        if first.rms == 0:
            dead += 1
            assert first.zero_fraction == 1
            assert rms(records[0])[:-1] == [0.0] * depth
            assert records[0].fit is None
            assert verdict.condition != "vanishing"
    expected = 1 - (1 - 2.0**-width) ** depth
    assert dead / draws == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))


def test_exact_zeros_are_left_out_of_the_fit():
    """A layer that is cut off has no logarithm; the line goes through the others."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.rest = stack(10, 8, nn.Identity, lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False))
            for layer in self.rest[::2]:
                nn.init.orthogonal_(layer.weight, 0.5)

        def forward(self, inputs):
            return self.rest(inputs + 0 * self.stem(inputs))

    model = Cut()
    record = measure(model, lambda: model(torch.ones(2, 8)).sum())
    assert record.layers[0].output.rms == 0
    assert (record.fit.depths, record.fit.points) == (11, 10)
    assert record.fit.slope == pytest.approx(math.log10(0.5), abs=1e-6)


# Gated cells


class LstmOverTime(Unrolled):
    """An LSTM cell whose forget gate has a bias of 1 (Jozefowicz et al. 2015), read at the last step."""

    def __init__(self, features, width):
        super().__init__(nn.LSTMCell(features, width), width)
        self.head = nn.Linear(width, 2)
        with torch.no_grad():
            self.cell.bias_ih[width : 2 * width] = 1.0
            self.cell.bias_hh[width : 2 * width] = 0.0

    def forward(self, sequence):
        state = None
        for inputs in sequence.unbind(1):
            state = self.cell(inputs, state)
        return self.head(state[0])


@pytest.mark.parametrize(
    ("steps", "condition"), [(10, "healthy"), (15, "healthy"), (50, "vanishing"), (80, "vanishing")]
)
@seeds
def test_an_lstm_read_at_its_end_is_healthy_over_fifteen_steps_and_vanishes_over_fifty(steps, condition, seed):
    model = LstmOverTime(8, 64)
    sequence, targets = torch.randn(32, steps, 8), torch.randint(0, 2, (32,))
    _, verdict = watch_steps(model, lambda: functional.cross_entropy(model(sequence), targets))
    assert verdict.condition == condition
