"""One pass before training: what it tells is true, and nothing is changed by it."""

from __future__ import annotations

import copy
import math
import random
import re

import numpy as np
import pytest
import torch
from theory import gaussian, stack
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diagnostics import DiagnosisError, MemorySink, Monitor, RunInfo, Thresholds, assert_healthy, meanfield, preflight
from diagnostics.trainers.models import MLP


class Everything(nn.Module):
    """Buffers that a pass moves, random numbers, a shared layer, a frozen one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.shared = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("unset", None)

    def forward(self, inputs):
        self.seen = self.seen + 1
        self.unset = torch.ones(1)
        hidden = self.drop(self.norm(self.first(inputs[:, None])))
        return self.frozen(self.shared(torch.relu(self.shared(hidden)))).mean((1, 2))


def inputs_of(model):
    return torch.linspace(-1, 1, 48).reshape(8, 6)


def photograph(model):
    """Everything that must not change, as plain values and identities."""
    return (
        [(name, one.detach().clone(), one.requires_grad, id(one)) for name, one in model.named_parameters()],
        [
            (name, None if one.grad is None else one.grad.clone(), id(one.grad))
            for name, one in model.named_parameters()
        ],
        [
            (name, None if one is None else one.clone(), id(one))
            for module in model.modules()
            for name, one in module._buffers.items()
        ],
        [module.training for module in model.modules()],
        [
            {name: list(value) for name, value in vars(module).items() if name.endswith(("_hooks", "_with_kwargs"))}
            for module in model.modules()
        ],
        [(dict(one._backward_hooks or {}), dict(one._post_accumulate_grad_hooks or {})) for one in model.parameters()],
    )


def same(one, other):
    """Equality bit by bit, NaN included, in nested containers."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def everything():
    return Everything()


def test_weights_buffers_gradients_modes_and_hooks_are_what_they_were(everything):
    everything.shared.weight.grad = torch.randn(6, 6)
    everything.norm.running_mean[0] = math.nan
    everything.first.eval()
    everything.first.register_forward_hook(lambda *_: None)
    before = photograph(everything)
    found = preflight(everything, lambda: everything(inputs_of(everything)).sum())
    assert same(photograph(everything), before)
    assert everything.first.weight.grad is None
    assert {one.layer.name for one in found.layers} == {"first", "norm", "shared@0", "shared@1", "frozen"}


def test_the_photograph_sees_what_a_pass_moves(everything):
    before = photograph(everything)
    everything(inputs_of(everything)).sum().backward()
    after = photograph(everything)
    assert [same(one, two) for one, two in zip(before, after, strict=True)] == [True, False, False, True, True, True]


def test_they_are_so_too_when_the_loss_meddles_or_fails(everything):
    everything.eval()
    before = photograph(everything)

    def meddling():
        everything.train()
        everything.first.requires_grad_(False)
        everything.shared.weight.grad = torch.ones(6, 6)
        value = everything(inputs_of(everything)).sum()
        torch.set_grad_enabled(False)
        return value

    preflight(everything, meddling)
    assert same(photograph(everything), before)
    assert torch.is_grad_enabled()

    def failing():
        meddling()
        raise RuntimeError("no batch left")

    with pytest.raises(RuntimeError, match="no batch left"):
        preflight(everything, failing)
    assert same(photograph(everything), before)
    assert torch.is_grad_enabled()


def draws():
    return torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002 -- the state that old code shares


def test_random_numbers_come_as_if_nothing_had_happened(everything):
    def loss():
        draws()
        return everything(inputs_of(everything)).sum()

    def seeded():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002

    seeded()
    expected = draws()
    seeded()
    preflight(everything, loss)
    assert draws() == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu_come_as_if_nothing_had_happened():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).cuda()
    torch.manual_seed(1)
    expected = torch.rand(3, device="cuda").tolist()
    torch.manual_seed(1)
    found = preflight(model, lambda: model(torch.ones(8, 4, device="cuda")).sum())
    assert torch.rand(3, device="cuda").tolist() == expected
    assert found.record.loss is not None


def test_training_goes_on_bit_by_bit_as_without_it():
    def trained(looks):
        torch.manual_seed(0)
        model = Everything()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            if looks:
                preflight(model, lambda: model(inputs_of(model)).sum())
            optimizer.zero_grad(set_to_none=False)
            model(inputs_of(model)).square().mean().backward()
            optimizer.step()
        return photograph(model)[0]

    assert same([one[1] for one in trained(looks=True)], [one[1] for one in trained(looks=False)])


@pytest.mark.parametrize("held", [True, False])
def test_gradients_of_parameters_outside_the_model_are_left_alone(held):
    generator, critic = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    latent = torch.randn(5, 2, requires_grad=True)
    outside = [*critic.parameters(), latent]
    for one in outside:
        one.grad = torch.randn_like(one) if held else None
    before = [(one.grad, None if one.grad is None else one.grad.clone()) for one in outside]
    found = preflight(generator, lambda: critic(generator(latent)).mean())
    assert [one.layer.name for one in found.layers] == ["Linear"]
    for one, (gradient, values) in zip(outside, before, strict=True):
        assert one.grad is gradient
        assert values is None or torch.equal(gradient, values)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_runs_under_any_grad_mode_and_under_autocast_and_leaves_them_on(mlp, mode):
    inputs = torch.ones(2, 4)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert preflight(mlp, lambda: mlp(inputs).float().square().mean()).fit is not None
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before


def test_a_paused_monitor_does_not_notice(mlp):
    def trained(looks):
        model = copy.deepcopy(mlp)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, every=1, sinks=[], on_violation="raise") as monitor:
            for _ in range(3):
                if looks:
                    with monitor.paused():
                        preflight(model, lambda: model(torch.ones(2, 4)).sum())
                optimizer.zero_grad()
                model(torch.ones(2, 4)).square().mean().backward()
                monitor.clip_and_step()
            return [(record.clip, list(record.layers), record.backward_passes) for record in monitor.records]

    assert trained(looks=True) == trained(looks=False)


# what it tells


def test_the_numbers_are_those_of_autograd(mlp):
    inputs = torch.randn(5, 4)
    found = preflight(mlp, lambda: mlp(inputs).square().mean())
    hidden = mlp[2](functional.relu(mlp[0](inputs)))
    value = mlp[4](torch.tanh(hidden)).square().mean()
    weight, bias, output = torch.autograd.grad(value, [mlp[2].weight, mlp[2].bias, hidden])
    assert found.layers[1].weight.norm == pytest.approx(math.hypot(weight.norm(), bias.norm()), rel=1e-6)
    assert found.layers[1].output.rms == pytest.approx(output.square().mean().sqrt().item(), rel=1e-6)
    assert found.record.loss == pytest.approx(value.item(), rel=1e-6)
    assert found.record.clip.total_norm > 0
    assert not found.record.clip.applied
    assert sum(found.record.clip.shares) == pytest.approx(1)


def test_an_orthogonal_net_has_its_slope_and_depth_scale():
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(30)))
    for layer in model:
        nn.init.orthogonal_(layer.weight, 0.8)
    found = preflight(model, lambda: model(torch.ones(2, 16)).sum())
    assert found.backward_slope == pytest.approx(math.log10(0.8), abs=1e-6)
    assert (found.chi, found.chi_source) == (pytest.approx(0.64, rel=1e-5), "theory")
    assert found.trainable_depth == pytest.approx(6 / -math.log(0.64), rel=1e-4)
    assert (found.verdict.condition, [one.condition for one in found.diagnoses]) == ("vanishing", ["vanishing"])


def test_a_slope_within_its_uncertainty_trains_at_any_depth():
    torch.manual_seed(0)
    model = nn.Sequential(*(module for _ in range(10) for module in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())))
    found = preflight(model, lambda: model(torch.randn(32, 64)).square().mean())
    assert found.chi_source == "measured"
    assert found.chi == 10 ** (2 * found.backward_slope)
    assert abs(found.backward_slope) > found.fit.uncertainty or found.trainable_depth == math.inf


NETS = {
    "relu": (nn.ReLU, "relu"),
    "tanh": (nn.Tanh, "tanh"),
    "sigmoid": (nn.Sigmoid, "sigmoid"),
    "gelu": (nn.GELU, "gelu"),
    "none": (nn.Identity, "identity"),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shape", [(16, 256), (4, 4, 256)])
def test_theory_and_measurement_agree_on_plain_stacks_of_every_activation(net, shape):
    torch.manual_seed(0)
    activation, name = NETS[net]
    model = stack(10, 256, activation, nn.Linear)
    inputs = torch.randn(shape)
    found = preflight(model, lambda: model(inputs).square().mean())
    assert found.chi_source == "theory"
    assert 10 ** (2 * found.backward_slope) == pytest.approx(found.chi, rel=0.12)
    assert meanfield.plain_stack(model(inputs).mean().grad_fn).activation == name


def test_theory_reads_convolutions_and_nets_written_with_functions():
    torch.manual_seed(0)

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(8)])
            self.head = nn.Linear(32 * 64, 10)
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

        def forward(self, inputs):
            for layer in self.layers:
                inputs = functional.relu(layer(inputs))
            return self.head(inputs.flatten(1))

    model = Written()
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))
    found = preflight(model, lambda: functional.cross_entropy(model(images), labels))
    assert (found.chi, found.chi_source) == (pytest.approx(1, rel=0.05), "theory")


def test_theory_is_about_the_hidden_layers():
    torch.manual_seed(0)
    layers = iter([gaussian(64, 64, gain) for gain in (3.0, 1.2, 1.2, 1.2, 3.0)])
    model = stack(5, 64, nn.ReLU, lambda *_: next(layers))
    found = preflight(model, lambda: model(torch.randn(8, 64)).square().mean())
    assert (found.chi, found.chi_source) == (pytest.approx(0.72, rel=0.05), "theory")


def unequal(width):
    layers = iter([gaussian(width, width, gain) for gain in (1, 1, 2, 1)])
    return stack(4, width, nn.ReLU, lambda *_: next(layers))


@pytest.mark.parametrize(
    "model",
    [
        lambda: MLP(16, 2, depth=4, width=16, residual=True),
        lambda: MLP(16, 2, depth=4, width=16, norm="layer"),
        lambda: MLP(16, 2, depth=4, width=16, norm="batch"),
        lambda: stack(4, 16, lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.Linear),
        lambda: stack(4, 16, lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Linear),
        lambda: stack(4, 16, lambda: nn.LeakyReLU(0.2), nn.Linear),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 16)), *(nn.Conv1d(1, 1, 3, 2, padding=2) for _ in range(4))),
        lambda: nn.Sequential(stack(3, 16, nn.ReLU, nn.Linear), nn.Tanh(), stack(3, 16, nn.ReLU, nn.Linear)),
        lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)),
        lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)),
        lambda: nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)) for _ in range(4))),
        lambda: unequal(16),
    ],
)
def test_what_is_no_plain_stack_drawn_alike_is_measured(model):
    built = model()
    found = preflight(built, lambda: built(torch.randn(8, 16)).square().mean())
    assert found.chi_source == "measured"


@pytest.mark.parametrize("name", meanfield.ACTIVATIONS)
@pytest.mark.parametrize("variance", [1e-4, 0.1, 1.0, 4.0, 30.0])
def test_expectations_under_a_normal_density_are_right(name, variance):
    z = np.linspace(-12, 12, 20_000)  # an even number: none lies on the kink of ReLU
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    value, slope = meanfield.ACTIVATIONS[name]
    for function in (value, slope):
        expected = sum(p * function(math.sqrt(variance) * x) ** 2 for x, p in zip(z, density, strict=True))
        assert meanfield._mean_square(function, variance) == pytest.approx(expected, rel=1e-4)
    h = 1e-6
    for x in (-2.0, -0.3, 0.4, 3.0):
        assert slope(x) == pytest.approx((value(x + h) - value(x - h)) / (2 * h), abs=1e-8)


@pytest.mark.parametrize(("weight", "bias"), [(0.81, 0.01), (1.69, 0.1), (2.25, 0.0025), (6.25, 0.09)])
def test_chi_of_tanh_is_that_of_gauss_hermite_quadrature(weight, bias):
    points, weights = np.polynomial.hermite_e.hermegauss(101)
    weights = weights / weights.sum()
    variance = 1.0
    for _ in range(2000):
        variance = weight * weights @ np.tanh(math.sqrt(variance) * points) ** 2 + bias
    expected = weight * weights @ np.cosh(math.sqrt(variance) * points) ** -4.0
    assert meanfield.chi("tanh", weight, bias) == pytest.approx(expected, rel=1e-3)


def test_dead_units_are_counted_by_layer():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias[:3] = -1e6
        model[2].weight.abs_()
        model[4].weight.fill_(1.0)
    found = preflight(model, lambda: model(torch.rand(16, 4)).sum())
    assert found.dead_units == (pytest.approx(3 / 8), 0.0, 0.0)
    assert "38% of the units of 0 have no gradient" in str(found)


def test_units_are_counted_once_for_a_layer_that_is_called_twice_and_never_for_other_kinds():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.shared = nn.Linear(4, 4)

        def forward(self, tokens):
            return self.shared(self.shared(self.embedding(tokens)))

    model = Twice()
    found = preflight(model, lambda: model(torch.tensor([1, 2])).sum())
    assert [one.layer.name for one in found.layers] == ["embedding", "shared@0", "shared@1"]
    assert found.dead_units == (None, 0.0, None)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments_work(reentrant):
    first, second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model = nn.ModuleList([first, second])
    inputs = torch.ones(2, 4)

    def loss():
        return checkpoint(second, first(inputs), use_reentrant=reentrant).sum()

    found = preflight(model, loss)
    assert [one.layer.name for one in found.layers] == ["0", "1.0", "1.2"]
    assert all(one.weight is not None for one in found.layers)
    assert all(one.grad is None for one in model.parameters())


def test_several_models_are_looked_at_under_their_names():
    models = {"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)}
    found = preflight(models, lambda: models["decoder"](models["encoder"](torch.ones(1, 3))).sum())
    assert [one.layer.name for one in found.layers] == ["encoder", "decoder"]


def test_a_loss_that_is_not_finite_is_said():
    model = nn.Linear(2, 1)
    found = preflight(model, lambda: model(torch.full((1, 2), math.inf)).sum())
    assert found.verdict.condition == "nonfinite"


def test_it_prints_a_table_what_it_means_and_the_verdict():
    model = MLP(16, 2, depth=8, width=64, activation="sigmoid")
    text = str(preflight(model, lambda: model(torch.randn(8, 16)).square().mean()))
    assert text.startswith("before training:\n")
    assert "hidden.3.linear" in text
    assert re.search(r"χ₁ 0\.0(19|20)\d? per layer \(theory\): trains up to about 2 layers", text)
    assert "try: add residual connections" in text
    assert "unconfirmed (1 record)" in text.replace("\n  ", " ")


# assert_healthy


def test_a_sound_net_is_healthy_and_what_was_seen_comes_back():
    model = MLP(16, 2, depth=3, width=64)
    assert assert_healthy(model, lambda: model(torch.randn(8, 16)).square().mean()).layers[0].layer.kind == "Linear"


def test_a_sick_net_is_an_error_that_says_what_was_seen_and_what_to_try():
    model = MLP(16, 2, depth=8, width=64, activation="sigmoid")
    with pytest.raises(DiagnosisError) as caught:
        assert_healthy(model, lambda: model(torch.randn(8, 16)).square().mean())
    said = str(caught.value)
    assert said.startswith("The model is not healthy before training. vanishing: the gradient fades by 0.8")
    assert "Try: add residual connections and normalise between the layers" in said
    assert said.endswith(".")
    assert "model.activation" not in said


def test_remedies_name_the_overrides_of_the_run_that_is_given():
    model = MLP(16, 2, depth=8, width=64, activation="sigmoid")
    options = {"_target_": "diagnostics.trainers.models.MLP", "activation": "sigmoid", "init": "default"}
    options |= {"residual": False, "norm": "none"}
    with pytest.raises(DiagnosisError, match=r"\(model\.norm=layer model\.residual=true\)"):
        assert_healthy(
            model, lambda: model(torch.randn(8, 16)).square().mean(), run=RunInfo("x", config={"model": options})
        )


def test_thresholds_are_heeded():
    model = MLP(16, 2, depth=8, width=64, activation="sigmoid")
    assert_healthy(model, lambda: model(torch.randn(8, 16)).sum(), thresholds=Thresholds(20, 30, 40))


def test_where_no_output_gradient_is_seen_health_is_not_asserted():
    model = nn.Linear(2, 2)
    with pytest.raises(DiagnosisError, match="unknown: no output gradient was seen"):
        assert_healthy(model, lambda: functional.linear(torch.ones(1, 2), model.weight).sum())


# in our trainers


def test_a_run_that_looks_before_it_trains_has_the_weights_and_records_of_one_that_does_not():
    from diagnostics.trainers.loop import look, train
    from diagnostics.trainers.settings import TrainerSettings
    from diagnostics.trainers.tasks import Digits

    task, settings = Digits(), TrainerSettings(steps=3, batch_size=16)

    def run(looks):
        torch.manual_seed(0)
        model = he_dropout()
        if looks:
            assert look(model, task, settings).record.loss > 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sink = MemorySink()
        with Monitor(model, optimizer, sinks=[sink]) as monitor:
            train(model, task, optimizer, monitor, settings)
        return photograph(model)[0], [(record.loss, record.clip.total_norm) for record in sink.records]

    (weights, records), (expected, expected_records) = run(looks=True), run(looks=False)
    assert same([one[1] for one in weights], [one[1] for one in expected])
    assert records == expected_records


def he_dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))


def test_the_name_is_the_function_whatever_is_imported_first():
    import diagnostics

    assert callable(diagnostics.preflight)
    assert preflight is diagnostics.preflight
