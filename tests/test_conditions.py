"""Every condition: found where it is, named by its depth and step, and silent on what is healthy."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from diagnostics import ClipByNorm, DiagnosticsWarning, Monitor
from diagnostics.diagnosis import State, advance, diagnose, verdict
from diagnostics.diagnosis.conditions import AT_EVERY_STEP, AT_RECORDED_STEPS, CONDITIONS
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import (
    NOTICE,
    SEVERE,
    WARNING,
    ClipRecord,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    StepRecord,
)
from diagnostics.trainers.gpt import GPT
from diagnostics.trainers.models import MLP
from diagnostics.trainers.recurrent import LSTM
from diagnostics.trainers.tasks import Inputs


def stats(rms, numel=4, **more):
    return GradientStats(numel, rms * numel**0.5, rms, **more)


def layer(depth, rms=1e-3, weight=1e-2, weight_norm=1.0, kind="Linear", **more):
    """A layer's record; rms or weight None: no gradient was seen there."""
    named = Layer(depth, f"layer{depth}", kind, (f"layer{depth}.weight",))
    output = None if rms is None else rms if isinstance(rms, GradientStats) else stats(rms)
    own = None if weight is None else weight if isinstance(weight, GradientStats) else stats(weight)
    return LayerRecord(named, output, own, weight_norm, **more)


def clip(total_norm=1.0, coefficient=None, shares=()):
    applied = coefficient is not None and coefficient < 1
    rule, limit = ("none", None) if coefficient is None else ("norm", coefficient * total_norm)
    return ClipRecord(rule, 2.0, limit, total_norm, coefficient, applied, total_norm, shares=shares)


def record(step, layers=(), ratios=None, *, recorded=True, total_norm=1.0, coefficient=None, shares=(), **more):
    held = Layers(list(layers), None if ratios is None else lambda: ratios)
    return StepRecord(step=step, clip=clip(total_norm, coefficient, shares), layers=held, recorded=recorded, **more)


def found(records, **thresholds):
    return {one.condition: one for one in diagnose(records, Thresholds(**thresholds)) if one.confirmed}


def test_every_condition_is_asked_for():
    asked = [name for names in (*AT_EVERY_STEP.values(), *AT_RECORDED_STEPS.values()) for name in names]
    assert sorted(asked) == sorted(CONDITIONS)


# ── dead ──


def chain(outputs, weights=None):
    return [layer(depth, rms, own) for depth, (rms, own) in enumerate(zip(outputs, weights or outputs, strict=True))]


def test_layers_without_any_gradient_from_the_first_step_are_born_dead_up_to_the_last_of_them():
    (dead,) = found([record(step, chain([0.0, 0.0, 0.0, 0.1, 0.2])) for step in range(3)]).values()
    assert (dead.condition, dead.severity, dead.step, dead.depth) == ("dead", SEVERE, 0, 2)
    assert dead.evidence["born"] == 1
    assert "never had one" in dead.message


def test_layers_that_lose_their_gradient_have_died_at_that_step():
    alive = [record(step, chain([0.1] * 4)) for step in range(5)]
    (dead,) = found([*alive, *(record(step, chain([0.0, 0.0, 0.1, 0.1])) for step in range(5, 9))]).values()
    assert (dead.condition, dead.step, dead.depth, dead.evidence["born"]) == ("dead", 5, 1, 0)


def test_a_dead_branch_beside_a_living_path_is_a_warning_and_not_severe():
    (dead,) = found([record(step, chain([0.1, 0.0, 0.1, 0.1])) for step in range(3)]).values()
    assert (dead.condition, dead.severity, dead.depth) == ("dead", WARNING, 1)


@pytest.mark.parametrize(
    "layers",
    [
        chain([0.0] * 4),  # converged exactly: the loss has no gradient left
        chain([0.1, 0.1, 0.0, 0.0]),  # what nothing comes behind has nothing to pass on: not used in this loss
        chain([None, None, 0.1, 0.1], [None, None, 0.1, 0.1]),  # other models' layers, or unused ones
        chain([0.0, 0.0, 0.1, 0.1], [None, None, 0.1, 0.1]),  # later steps of an unrolled cell own no parameters
        chain([0.0, 1e-43, 1e-40, 1e-30, 1e-20]),  # rounded to zero: a slope
    ],
)
def test_zeros_that_have_another_reason_are_not_dead(layers):
    layers = [replace(one, weight_norm=None) if one.weight is None else one for one in layers]
    assert "dead" not in found([record(step, layers) for step in range(5)])


def test_units_without_a_gradient_are_dead_but_not_where_the_loss_has_none():
    def share(*fractions):
        return [layer(depth, dead_fraction=one) for depth, one in enumerate(fractions)]

    (dead,) = found([record(step, share(0.2, 0.95, 0.0)) for step in range(3)]).values()
    assert (dead.condition, dead.severity, dead.depth) == ("dead", WARNING, 1)
    assert not found([record(step, share(0.5, 0.8, 0.0)) for step in range(3)])
    assert not found([record(step, share(0.95, 0.95, 0.95)) for step in range(3)])


def watch_steps(model, steps, inputs, targets=None, loss=None, lr=0.01, **options):
    """Trains on one batch under a Monitor that records."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = loss or nn.functional.cross_entropy
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record", **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            result = loss(model(inputs), targets)
            result.backward()
            monitor.clip_and_step(loss=result)
    return monitor


def digits(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 64, generator=generator), torch.randint(10, (count,), generator=generator)


def test_a_relu_net_whose_units_are_all_off_is_dead_and_not_vanishing():
    torch.manual_seed(0)
    model = MLP(64, 10, depth=4, width=16)
    with torch.no_grad():
        model.hidden[2].linear.bias.fill_(-1e3)
    monitor = watch_steps(model, 4, *digits())
    assert monitor.verdict().condition == "dead"
    assert [(one.condition, one.depth, one.evidence["born"]) for one in monitor.diagnoses] == [("dead", 2, 1)]


def test_a_fused_lstm_whose_last_step_alone_has_a_loss_is_not_dead():
    torch.manual_seed(0)
    model = LSTM(Inputs("images", (1, 8, 8)), 10, width=16, fused=True)
    inputs, targets = digits()
    monitor = watch_steps(model, 4, inputs.reshape(-1, 1, 8, 8), targets)
    assert monitor.verdict().condition == "healthy"
    assert monitor.diagnoses == ()


# ── broken_at ──


class Cut(nn.Module):
    """Four layers, with something in the middle."""

    def __init__(self, between):
        super().__init__()
        self.below = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.above = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
        self.between = between

    def forward(self, inputs):
        return self.above(self.between(self.below(inputs)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_detached_graph_is_broken_at_the_last_layer_before_it(set_to_none):
    model = Cut(torch.Tensor.detach)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = digits()
    with Monitor(model, optimizer, sinks=[], on_violation="record", on_diagnosis="record") as monitor:
        for _ in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            nn.functional.cross_entropy(model(inputs), targets).backward()
            monitor.clip_and_step()
    assert [(one.condition, one.severity, one.depth) for one in monitor.diagnoses] == [("broken_at", SEVERE, 1)]
    assert "below.2" in monitor.diagnoses[0].message


def test_frozen_layers_are_no_broken_graph_though_the_optimizer_has_them():
    model = Cut(nn.Identity())
    model.below.requires_grad_(False)
    monitor = watch_steps(model, 4, *digits(), on_violation="record")
    assert monitor.diagnoses == ()


def test_layers_that_had_a_gradient_once_are_only_unused_now():
    used = [record(step, chain([0.1] * 4)) for step in range(3)]
    unused = [record(step, chain([None, None, 0.1, 0.1])) for step in range(3, 9)]
    assert found([*used, *unused]) == {}
    assert set(found(unused)) == {"broken_at"}


def profile(values, numel=4):
    return [layer(depth, stats(10.0**value, numel)) for depth, value in enumerate(values)]


def test_a_jump_between_two_layers_is_named_and_is_not_called_a_slope():
    values = [-7.0] * 5 + [-3.0] * 5
    (broken,) = found([record(step, profile(values)) for step in range(3)]).values()
    assert (broken.condition, broken.severity, broken.depth) == ("broken_at", WARNING, 4)
    assert "loses 4.0 decades" in broken.message
    (broken,) = found([record(step, profile(values[::-1])) for step in range(3)]).values()
    assert (broken.condition, broken.depth) == ("broken_at", 4)
    assert "gains 4.0 decades" in broken.message


@pytest.mark.parametrize(
    "layers",
    [
        profile([-6.0] * 9 + [-2.0]),  # the head's output is the loss's business
        profile([-3.0] * 5 + [-7.0] + [-3.0] * 5),  # one layer with a small gradient beside a path that keeps it
        profile([-3.0, -7.0] * 6),  # branches and trunk in turn
        [
            *profile([-5.0] * 6, 10**6),
            *[replace(one, layer=replace(one.layer, depth=6)) for one in profile([-2.0] * 6, 1)],
        ],
    ],
    ids=["head", "dip", "zigzag", "pooling"],
)
def test_a_jump_that_has_another_reason_is_not_broken(layers):
    layers = [replace(one, layer=replace(one.layer, depth=depth)) for depth, one in enumerate(layers)]
    assert "broken_at" not in found([record(step, layers) for step in range(4)])


# ── slopes and what stands still ──

NOTICED = [-3.0 - 0.25 * (8 - depth) for depth in range(9)]


def test_layers_that_stand_still_raise_a_notice_of_vanishing_to_a_warning():
    sgd = [10.0 ** (-2.0 - 0.35 * (8 - depth)) for depth in range(9)]
    adam = [1e-3] * 9
    moving = found([record(step, profile(NOTICED), adam) for step in range(5)])
    still = found([record(step, profile(NOTICED), sgd) for step in range(5)])
    assert {name: one.severity for name, one in moving.items()} == {"vanishing": NOTICE}
    assert {name: one.severity for name, one in still.items()} == {"vanishing": WARNING, "stalled_layers": NOTICE}
    assert still["stalled_layers"].depth == 0
    assert still["vanishing"].step == 0


def test_weights_that_fp32_rounds_back_to_where_they_were_stand_still():
    layers = profile([-3.0] * 6)
    (stalled,) = found([record(step, layers, [0.0, 0.0, 1e-3, 1e-3, 1e-3, 1e-3]) for step in range(5)]).values()
    assert (stalled.condition, stalled.severity, stalled.depth) == ("stalled_layers", NOTICE, 0)


def test_frozen_layers_do_not_stand_still():
    layers = [replace(one, weight=None) if depth < 2 else one for depth, one in enumerate(profile([-3.0] * 6))]
    assert found([record(step, layers, [0.0, 0.0, 1e-3, 1e-3, 1e-3, 1e-3]) for step in range(5)]) == {}


# ── numbers ──


def broken_numbers(loss):
    layers = [layer(0, math.nan, stats(math.nan, nonfinite=4)), layer(1, math.nan, stats(math.nan, nonfinite=4))]
    layers += [layer(2, 0.1, 0.1)]
    fine = record(0, [layer(0, 0.1, 0.1), layer(1, 0.1, 50.0), layer(2, 0.1, 0.1)])
    return [fine, record(1, layers, total_norm=math.nan, loss=loss)]


@pytest.mark.parametrize(
    ("loss", "origin", "forward"),
    [
        (math.nan, "they come from the forward pass, for the loss itself is nan", 1.0),
        (0.5, "the loss is finite, so they arose in the backward pass, first at depth 1 (layer1)", 0.0),
        (None, "the backward pass met them first at depth 1 (layer1)", None),
    ],
)
def test_what_is_not_finite_is_traced_to_a_pass_a_depth_and_what_was_largest_before(loss, origin, forward):
    (diagnosis,) = diagnose(broken_numbers(loss))
    assert (diagnosis.condition, diagnosis.step, diagnosis.depth, diagnosis.confirmed) == ("nonfinite", 1, 1, True)
    assert origin in diagnosis.message
    assert diagnosis.evidence.get("forward") == forward
    assert "at step 0, the largest gradient was that of depth 1 (layer1), of norm 100" in diagnosis.message


def test_subnormal_numbers_are_underflow_in_a_half_type_and_denormal_in_fp32():
    def small(rms, share):
        lost = stats(rms, underflow_fraction=share)
        return [layer(0, lost), layer(1, lost), layer(2, stats(rms))]

    assert set(found([record(step, small(1e-6, 0.7)) for step in range(3)])) == {"underflow"}
    assert set(found([record(step, small(1e-39, 0.7)) for step in range(3)])) == {"denormal"}
    assert found([record(step, small(1e-6, 0.2)) for step in range(3)]) == {}


def test_gradients_of_a_model_whose_numbers_are_subnormal_are_called_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    small = watch_steps(model, 4, *digits(), loss=lambda scores, y: 1e-38 * nn.functional.cross_entropy(scores, y))
    assert small.verdict().condition == "denormal"


def test_fp16_gradients_that_underflow_are_called_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    inputs, targets = digits()

    def loss(scores, targets):
        return 1e-3 * nn.functional.cross_entropy(scores.float(), targets)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, inputs):
            with torch.autocast("cpu", dtype=torch.float16):
                return self.inner(inputs)

    assert watch_steps(Half(), 4, inputs, targets, loss=loss).verdict().condition == "underflow"


# ── over time ──


def steps(norms, start=0, **more):
    return [record(start + step, recorded=False, total_norm=norm, **more) for step, norm in enumerate(norms)]


USUAL = [1.0 + 0.1 * math.sin(step) for step in range(40)]


def test_a_jump_of_the_norm_is_a_spike_at_once_and_clears():
    layers = [layer(0), layer(1)]
    jump = record(40, layers, recorded=False, total_norm=300.0, shares=(0.1, 0.9))
    (spike,) = diagnose([*steps(USUAL), jump])
    assert (spike.condition, spike.severity, spike.step, spike.depth) == ("spike", WARNING, 40, 1)
    assert spike.confirmed
    (spike,) = diagnose([*steps(USUAL), jump, *steps(USUAL, 41)])
    assert spike.cleared == 43


def test_a_smaller_jump_is_a_notice():
    assert [one.severity for one in diagnose(steps([*USUAL, 20.0]))] == [NOTICE]


def test_neither_a_spike_nor_what_is_not_finite_blinds_for_the_next_spike():
    history = [*USUAL, 500.0, math.nan, math.inf, *USUAL[:10], 500.0]
    assert [one.step for one in diagnose(steps(history)) if one.condition == "spike"] == [40, 53]


def test_norms_that_scatter_over_decades_and_norms_that_fall_or_rise_slowly_are_no_spikes():
    generator = torch.Generator().manual_seed(0)
    scatter = (10 ** torch.randn(400, generator=generator)).tolist()
    assert diagnose(steps(scatter)) == ()
    assert diagnose(steps([10 ** (-step / 40) for step in range(400)])) == ()
    assert diagnose(steps([10 ** (step / 40) for step in range(400)])) == ()


def test_many_spikes_are_one_phrase_of_the_verdict():
    state = State()
    for one in steps([*USUAL, 500.0, *USUAL[:10], 500.0, *USUAL[:10]]):
        state, _ = advance(state, one, Thresholds())
    assert verdict(replace(state, records=9)).text == "healthy; spike 2 times, the last at steps 51–54, cleared"


def clipped(coefficient, ratio, count=60):
    layers = profile([-3.0] * 3)
    return [record(step, layers, [ratio] * 3, coefficient=coefficient) for step in range(count)]


def test_clipping_at_every_step_is_a_notice_and_a_warning_where_the_weights_stand_still():
    assert found(clipped(0.5, 1e-3)) == {}
    (notice,) = found(clipped(0.01, 1e-3)).values()
    assert (notice.condition, notice.severity) == ("clipped_always", NOTICE)
    (warning,) = found(clipped(0.0001, 1e-7)).values()
    assert (warning.condition, warning.severity) == ("clipped_always", WARNING)
    assert found(clipped(0.01, 1e-3, count=40)) == {}


def test_clipping_now_and_then_is_what_it_is_for():
    records = [record(step, profile([-3.0] * 3), coefficient=0.01 if step % 4 == 0 else 2.0) for step in range(100)]
    assert found(records) == {}


# ── streaming ──


def test_the_state_does_not_grow_and_can_be_pickled():
    def size(count):
        state = State()
        for step in range(count):
            one = record(step, profile([-3.0] * 4), [1e-3] * 4, total_norm=1.0 + step % 7, coefficient=0.5)
            state, _ = advance(state, one, Thresholds())
        return len(pickle.dumps(state))

    assert size(1000) < 1.02 * size(200)


def test_optimizers_are_followed_each_for_itself():
    sick, well = profile([-3.0 - 0.5 * (8 - depth) for depth in range(9)]), profile([-3.0] * 9)
    records = [
        replace(record(step, layers), optimizer=name)
        for step in range(4)
        for name, layers in (("generator", sick), ("critic", well))
    ]
    (diagnosis,) = found(records).values()
    assert diagnosis.condition == "vanishing"
    assert diagnosis.message.startswith("generator: ")


def test_the_records_read_later_give_what_the_run_said():
    torch.manual_seed(0)
    monitor = watch_steps(MLP(64, 10, depth=8, activation="sigmoid"), 12, *digits(), clip=ClipByNorm(max_norm=1.0))
    assert monitor.diagnoses
    assert diagnose(monitor.records, run=monitor.run) == monitor.diagnoses


def test_every_warning_ends_by_naming_the_command_that_explains_it():
    torch.manual_seed(0)
    model = MLP(64, 10, depth=8, activation="sigmoid")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = digits()
    with Monitor(model, optimizer, sinks=[]) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            monitor.clip_and_step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        with pytest.warns(DiagnosticsWarning, match=r"More: diagnostics-explain vanishing\.$"):
            monitor.clip_and_step()
        optimizer.zero_grad()
        with pytest.warns(DiagnosticsWarning, match=r"More: diagnostics-explain step_without_grads\.$"):
            monitor.clip_and_step()


# ── healthy and silent ──

VECTORS, TOKENS = Inputs("vectors", (64,)), Inputs("tokens", (16,))
SOUND = {
    "he relu, 30 layers of 256": lambda: MLP(64, 10, depth=30, width=256, init="kaiming"),
    "residual, 60 layers": lambda: MLP(64, 10, depth=60, width=64, residual=True, norm="layer"),
    "layer norm, 4 layers": lambda: MLP(64, 10, depth=4, norm="layer"),
    "batch norm, 9 layers": lambda: MLP(64, 10, depth=9, norm="batch"),
    **{
        f"default {activation}, {depth} layers": lambda depth=depth, activation=activation: MLP(
            64, 10, depth=depth, activation=activation
        )
        for activation in ("relu", "tanh")
        for depth in (1, 2, 3)
    },
    "dropout": lambda: nn.Sequential(nn.Linear(64, 99), nn.ReLU(), nn.Dropout(0.5), nn.Linear(99, 10)),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_sound_nets_are_healthy_and_nothing_is_said(name, scale):
    torch.manual_seed(0)
    monitor = watch_steps(
        SOUND[name](),
        5,
        *digits(),
        loss=lambda scores, targets: scale * nn.functional.cross_entropy(scores, targets),
        lr=1e-3 / scale,
    )
    assert monitor.verdict().text.startswith("healthy")
    assert [one for one in monitor.diagnoses if one.severity >= WARNING] == []


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("depth", [2, 12])
def test_transformers_are_healthy_and_nothing_is_said(position, depth):
    torch.manual_seed(0)
    model = GPT(TOKENS, 50, depth=depth, width=32, norm_position=position)
    tokens = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
    monitor = watch_steps(
        model, 5, tokens, tokens, loss=lambda scores, y: nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
    )
    assert monitor.verdict().condition == "healthy"
    assert [one for one in monitor.diagnoses if one.severity >= WARNING] == []


def test_a_net_that_has_converged_to_a_tiny_loss_is_healthy_and_nothing_was_said():
    torch.manual_seed(0)
    monitor = watch_steps(MLP(64, 10, depth=3, width=64), 400, *digits(), lr=0.3, every=1)
    assert monitor.records[-1].loss < 1e-3
    assert monitor.verdict().text == "healthy"
