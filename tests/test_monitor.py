"""The Monitor's promises: watching changes nothing, one copy per step, clip only below one, the loop's rules."""

from __future__ import annotations

import copy
import gc
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_ as torch_clip

from diagnostics import (
    ClipByNorm,
    ContractError,
    DiagnosisError,
    DiagnosticsWarning,
    MemorySink,
    Monitor,
    NonFiniteGradientError,
    Thresholds,
    diagnose,
    watch,
)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
}
CLIPS = {"on": 0.3, "off": None, "never reached": 1e6}


def net(width=6, depth=3):
    torch.manual_seed(0)
    blocks = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU(inplace=True))]
    return nn.Sequential(*blocks, nn.Linear(width, 3))


def batches(steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(8, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (8,), generator=generator),
        )


def train(model, optimizer, steps, act, dtype=torch.float32):
    for x, y in batches(steps, dtype):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        act(loss)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_after_200_watched_steps_are_bit_equal_to_an_unwatched_loops(name, clip, dtype):
    plain = net().to(dtype)
    optimizer = OPTIMIZERS[name](plain.parameters())
    limit = CLIPS[clip]

    def act(_):
        if limit:
            torch_clip(plain.parameters(), limit)
        optimizer.step()

    train(plain, optimizer, 200, act, dtype)
    for every in (0, 1, 10):
        watched = net().to(dtype)
        other = OPTIMIZERS[name](watched.parameters())
        rule = ClipByNorm(limit) if limit else None
        with Monitor(watched, other, clip=rule, every=every, sinks=[], on_diagnosis="record") as monitor:
            train(watched, other, 200, lambda loss, monitor=monitor: monitor.clip_and_step(loss=loss), dtype)
            assert monitor.violations == ()
        assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True)), every
        clipped = sum(record.clip.applied for record in monitor.records)
        assert clipped > 0 if clip == "on" else clipped == 0


def test_an_unchanged_loop_under_watch_is_bit_equal_and_seen():
    plain, watched = net(), net()
    first, second = OPTIMIZERS["adamw"](plain.parameters()), OPTIMIZERS["adamw"](watched.parameters())
    train(plain, first, 60, lambda _: first.step())
    monitor = watch(watched, second, sinks=[], on_diagnosis="record")
    train(watched, second, 60, lambda _: second.step())
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True))
    assert [record.step for record in monitor.records] == list(range(60))
    assert monitor.violations == ()
    replacement = watch(watched, second, sinks=[])
    with pytest.raises(RuntimeError, match="closed"):
        monitor.clip_and_step()
    replacement.close()


def test_a_watch_that_nobody_keeps_goes_on_and_closes_with_its_model():
    sink = MemorySink()
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    watch(model, optimizer, sinks=[sink], on_diagnosis="record")
    gc.collect()
    train(model, optimizer, 3, lambda _: optimizer.step())
    del model
    gc.collect()
    assert len(sink.records) == 3
    assert sink.end.status == "finished"


def count_copies(monkeypatch):
    """Counts every way in which a value can leave a tensor for Python."""
    counts = {"copies": 0}
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, **kwargs):
            counts["copies"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return counts


@pytest.mark.parametrize("limit", [None, 1e6, 1e-3])
@pytest.mark.parametrize("every", [0, 1, 10])
def test_a_step_takes_one_copy_to_the_host_whether_recorded_or_clipped(monkeypatch, limit, every):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = ClipByNorm(limit) if limit else None
    with Monitor(model, optimizer, clip=rule, every=every, sinks=[MemorySink()], on_diagnosis="record") as monitor:
        for x, y in batches(60):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            counts = count_copies(monkeypatch)
            loss.backward()
            monitor.clip_and_step(loss=loss)
            monkeypatch.undo()
            assert counts["copies"] == 1


def test_looking_at_update_ratios_gives_what_the_weights_did():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    with Monitor(model, optimizer, sinks=[]) as monitor:
        model(torch.ones(1, 3)).sum().backward()
        record = monitor.clip_and_step()
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        expected = ((after - before).norm() / before.norm()).item()
        assert record.layers[0].update_ratio == pytest.approx(expected, rel=1e-5)
        assert record.layers[0].weight_norm == pytest.approx(before.norm().item(), rel=1e-5)


def test_gradients_are_untouched_when_the_coefficient_is_one_or_more():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, clip=ClipByNorm(1e6), sinks=[]) as monitor:
        model(torch.randn(4, 6)).sum().backward()
        before = [(parameter.grad.clone(), parameter.grad._version) for parameter in model.parameters()]
        record = monitor.clip_and_step()
    assert record.clip.clip_coef > 1
    assert not record.clip.applied
    for parameter, (gradient, version) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.grad._version == version


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_the_step_and_wipes_nothing(bad):
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with Monitor(model, optimizer, clip=ClipByNorm(1.0), sinks=[], on_diagnosis="record") as monitor:
        train(model, optimizer, 1, lambda _: monitor.clip_and_step())
        before, state = weights(model), copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        model(torch.randn(4, 6)).sum().backward()
        model[0].weight.grad[0, 0] = bad
        kept = [parameter.grad.clone() for parameter in model.parameters()]
        record = monitor.clip_and_step()
        assert record.skipped
        assert record.nonfinite == 1
        assert record.layers[0].weight.nonfinite == 1
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert str(state) == str(optimizer.state_dict())
        for gradient, parameter in zip(kept, model.parameters(), strict=True):
            assert torch.equal(gradient.nan_to_num(7.0), parameter.grad.nan_to_num(7.0))
        train(model, optimizer, 1, lambda _: monitor.clip_and_step())
        assert monitor.violations == ()
        assert not monitor.records[-1].skipped
        assert math.isfinite(monitor.records[-1].clip.total_norm)
    assert monitor.verdict().condition == "nonfinite"


def test_nonfinite_raise_leaves_the_weights_and_step_takes_the_step():
    for policy in ("raise", "step"):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = Monitor(model, optimizer, clip=ClipByNorm(1.0), nonfinite=policy, sinks=[], on_diagnosis="record")
        model(torch.ones(1, 2)).sum().backward()
        model.bias.grad.fill_(math.inf)
        before = model.weight.detach().clone()
        if policy == "raise":
            with pytest.raises(NonFiniteGradientError, match="Step 0 was not taken"):
                monitor.clip_and_step()
            assert torch.equal(model.weight, before)
        else:
            assert not monitor.clip_and_step().skipped
            assert torch.equal(model.weight, before - 0.1)
        monitor.close()


def test_amp_norms_are_unscaled_and_an_overflow_is_a_skip():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Monitor(model, optimizer, clip=ClipByNorm(1.0), scaler=scaler, sinks=[]) as monitor:
        scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum()).backward()
        record = monitor.clip_and_step()
        assert record.clip.total_norm == pytest.approx(5.0)
        assert record.layers[0].output.norm == pytest.approx(1.0)
        assert record.loss_scale == 1024.0
        assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([[3.0, math.inf]])).sum()).backward()
        before = model.weight.detach().clone()
        assert monitor.clip_and_step().skipped
        assert torch.equal(before, model.weight)
        assert scaler.get_scale() == 512.0
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        assert monitor.clip_and_step().clip.total_norm == pytest.approx(2**0.5)
    assert monitor.diagnoses == ()


def test_a_closure_is_clipped_at_every_evaluation_and_recorded_at_the_first():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    norms = []

    def closure():
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item())
        return loss

    with Monitor(model, optimizer, clip=ClipByNorm(0.1), sinks=[], on_diagnosis="record") as monitor:
        first = monitor.clip_and_step(closure=closure)
        monitor.clip_and_step(closure=closure)
    assert first.clip.total_norm == pytest.approx(norms[0])
    assert len(norms) > 2
    assert monitor.violations == ()


CLEARINGS = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "grad = None": lambda model, optimizer: [setattr(parameter, "grad", None) for parameter in model.parameters()],
    "grad.zero_": lambda model, optimizer: [
        parameter.grad.zero_() for parameter in model.parameters() if parameter.grad is not None
    ],
    "data.zero_": lambda model, optimizer: [
        parameter.grad.data.zero_() for parameter in model.parameters() if parameter.grad is not None
    ],
    "foreach_zero_": lambda model, optimizer: torch._foreach_zero_(
        [p.grad for p in model.parameters() if p.grad is not None] or [torch.zeros(1)]
    ),
}


@pytest.mark.parametrize("own", [False, True], ids=["clip_and_step", "optimizer.step"])
@pytest.mark.parametrize("place", ["before the backward", "between forward and backward", "after the step"])
@pytest.mark.parametrize("name", CLEARINGS)
def test_every_lawful_way_to_clear_is_silent(name, place, own):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record") as monitor:
        for x, y in batches(4):
            if place == "before the backward":
                CLEARINGS[name](model, optimizer)
            loss = functional.cross_entropy(model(x), y)
            if place == "between forward and backward":
                CLEARINGS[name](model, optimizer)
            loss.backward()
            if own:
                optimizer.step()
            else:
                monitor.clip_and_step()
            if place == "after the step":
                CLEARINGS[name](model, optimizer)
    assert monitor.violations == ()
    assert len(monitor.records) == 4


@pytest.mark.parametrize("every", [0, 10], ids=["no output hooks", "output hooks"])
@pytest.mark.parametrize("own", [False, True], ids=["clip_and_step", "optimizer.step"])
def test_a_loop_that_never_clears_is_reported_at_step_1_with_its_parameters(own, every):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Monitor(model, optimizer, sinks=[], every=every, on_violation="record", on_diagnosis="record") as monitor:
        for x, y in batches(4):
            functional.cross_entropy(model(x), y).backward()
            if own:
                optimizer.step()
            else:
                monitor.clip_and_step()
    (violation,) = monitor.violations
    assert (violation.rule, violation.step, violation.count) == ("missing_zero_grad", 1, 3)
    assert set(violation.parameters) == {name for name, _ in model.named_parameters()}
    assert "optimizer.zero_grad()" in violation.remedy
    assert "unlawful loop" in monitor.verdict().text


def test_a_pass_that_begins_elsewhere_than_the_ones_before_it_does_not_hide_the_rest():
    trunk, heads = nn.Linear(4, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
    model = nn.ModuleList([trunk, *heads])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, sinks=[], every=0, on_violation="record") as monitor:
        for step in range(4):
            heads[step // 2](torch.tanh(trunk(torch.ones(2, 4)))).sum().backward()
            monitor.clip_and_step()
    found = {name for violation in monitor.violations for name in violation.parameters}
    assert found == {name for name, _ in model.named_parameters()}


def test_one_layer_that_is_left_out_of_clearing_is_named_alone():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Monitor(model, optimizer, sinks=[], on_violation="record", on_diagnosis="record") as monitor:
        for x, y in batches(3):
            model[0].zero_grad()
            model[2].zero_grad()
            model[4].zero_grad()
            functional.cross_entropy(model(x), y).backward()
            monitor.clip_and_step()
    assert monitor.violations[0].parameters == ("6.weight", "6.bias")


def test_declared_accumulation_is_silent():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Monitor(model, optimizer, accumulate=3, sinks=[], on_diagnosis="record") as monitor:
        for place, (x, y) in enumerate(batches(9)):
            functional.cross_entropy(model(x), y).backward()
            if place % 3 == 2:
                monitor.clip_and_step()
                optimizer.zero_grad(set_to_none=False)
    assert monitor.violations == ()
    assert [record.backward_passes for record in monitor.records] == [3, 3, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["backward", "backward", "step", "zero", "none", "forward"]), max_size=24),
    st.sampled_from([0, 10]),
)
def test_random_loops_agree_with_a_reference_that_tracks_every_contribution(acts, every):
    """A linear model whose input is one coordinate per pass, so that contributions can be read off the gradient."""
    size = len(acts) + 1
    model = nn.Linear(size, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spent, number, step = set(), 0, 0
    expected = []
    with Monitor(model, optimizer, sinks=[], every=every, on_violation="record", on_diagnosis="record") as monitor:
        for act in acts:
            if act == "backward":
                x = torch.zeros(1, size)
                x[0, number] = 1.0
                number += 1
                model(x).sum().backward()
            elif act == "forward":
                model(torch.zeros(1, size))
            elif act == "step":
                gradient = model.weight.grad
                inside = set() if gradient is None else set(gradient[0].nonzero().flatten().tolist())
                if inside & spent:
                    expected.append(step)
                spent |= inside
                monitor.clip_and_step()
                step += 1
            else:
                optimizer.zero_grad(set_to_none=act == "none")
    found = [
        one.step for one in monitor.records for violation in one.violations if violation.rule == "missing_zero_grad"
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("order", "rule"),
    [
        ("step clip zero", "clip_after_step"),
        ("step zero clip", "clip_before_backward"),
        ("step zero", "clip_ineffective"),
    ],
)
def test_clipping_outside_the_window_is_one_violation_named_by_its_place(order, rule):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, clip=ClipByNorm(1e-2), sinks=[], on_violation="record", on_diagnosis="record")
    acts = {
        "step": optimizer.step,
        "clip": lambda: monitor.clip_grad_norm_(model.parameters(), 1e-2),
        "zero": optimizer.zero_grad,
    }
    for x, y in batches(3):
        functional.cross_entropy(model(x), y).backward()
        for act in order.split():
            acts[act]()
    monitor.close()
    (violation,) = monitor.violations
    assert (violation.rule, violation.step, violation.count) == (rule, 0, 3)


def test_a_loop_that_clips_inside_the_window_is_silent_and_its_record_says_what_was_clipped():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, clip=ClipByNorm(1e-2), sinks=[], on_diagnosis="record") as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            norm = monitor.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
            record = monitor.records[-1]
            assert record.clip.applied
            assert record.clip.total_norm == pytest.approx(norm.item())
            assert record.clip.total_norm_after == pytest.approx(1e-2, rel=1e-4)
            squares = sum(one.weight.norm**2 for one in record.layers)
            assert math.sqrt(squares) == pytest.approx(norm.item(), rel=1e-4)
    assert monitor.violations == ()


def test_torchs_own_clip_inside_the_window_is_lawful_too():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, clip=ClipByNorm(1e-2), sinks=[], on_diagnosis="record") as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            torch_clip(model.parameters(), 1e-2)
            optimizer.step()
    assert monitor.violations == ()


def test_a_gan_with_two_optimizers_is_silent_and_counts_steps_by_optimizer():
    generator, discriminator = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    models = {"generator": generator, "discriminator": discriminator}
    first = torch.optim.Adam(generator.parameters())
    second = torch.optim.Adam(discriminator.parameters())
    with Monitor(models, [first, second], sinks=[], on_diagnosis="record") as monitor:
        for _ in range(4):
            second.zero_grad()
            discriminator(torch.randn(3, 2)).mean().backward()
            discriminator(generator(torch.randn(3, 2)).detach()).mean().backward()
            one = monitor.clip_and_step(second)
            first.zero_grad()
            discriminator(generator(torch.randn(3, 2))).mean().backward()
            other = monitor.clip_and_step(first)
    assert monitor.violations == ()
    assert (one.optimizer, one.step, one.backward_passes) == ("discriminator", 3, 2)
    assert (other.optimizer, other.step, other.backward_passes) == ("generator", 3, 1)
    assert [layer.layer.name for layer in other.layers] == ["generator"]
    assert [layer.output.numel for layer in one.layers] == [24, 6]
    assert "grad/generator/total_norm" in other.flat()


def test_two_optimizers_stepped_together_share_one_norm():
    model = net()
    pair = [torch.optim.SGD(model[:2].parameters(), lr=0.1), torch.optim.Adam(model[2:].parameters())]
    with Monitor(model, pair, clip=ClipByNorm(1e-2), sinks=[]) as monitor:
        model(torch.randn(4, 6)).sum().backward()
        total = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        record = monitor.clip_and_step()
    assert record.clip.total_norm == total.item()
    assert record.optimizer == "optimizer"
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert after.item() == pytest.approx(1e-2, rel=1e-4)


def test_violations_and_diagnoses_warn_once_or_raise_or_are_only_recorded():
    def unlawful(**options):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with Monitor(model, optimizer, sinks=[], **options) as monitor:
            for x, y in batches(4):
                functional.cross_entropy(model(x), y).backward()
                monitor.clip_and_step()

    with pytest.warns(DiagnosticsWarning, match="missing_zero_grad") as caught:
        unlawful()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.raises(ContractError, match="missing_zero_grad"):
        unlawful(on_violation="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlawful(on_violation="record")


def sick_chain():
    chain = nn.Sequential(*[module for _ in range(8) for module in (nn.Linear(1, 1), nn.Sigmoid())])
    return chain, torch.optim.SGD(chain.parameters(), lr=0.0)


def run_chain(monitor, model, optimizer, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        monitor.clip_and_step()


def test_a_confirmed_diagnosis_warns_once_or_raises():
    model, optimizer = sick_chain()
    with Monitor(model, optimizer, sinks=[]) as monitor, pytest.warns(DiagnosticsWarning, match="vanishing") as caught:
        run_chain(monitor, model, optimizer)
    assert len(caught) == 1
    model, optimizer = sick_chain()
    monitor = Monitor(model, optimizer, sinks=[], on_diagnosis="raise")
    with monitor, pytest.raises(DiagnosisError, match="vanishing"):
        run_chain(monitor, model, optimizer)
    assert len(monitor.records) == 3


def test_records_read_later_give_the_diagnoses_that_the_run_gave():
    model, optimizer = sick_chain()
    sink = MemorySink()
    with Monitor(model, optimizer, sinks=[sink], on_diagnosis="record", thresholds=Thresholds(confirm=2)) as monitor:
        run_chain(monitor, model, optimizer)
    assert diagnose(sink.records, Thresholds(confirm=2), monitor.run) == monitor.diagnoses


def test_sinks_are_given_info_first_every_record_in_order_and_the_end_last():
    sink = MemorySink()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, sinks=[sink], every=1) as monitor:
        train(model, optimizer, 5, lambda loss: monitor.clip_and_step(loss=loss, metrics={"train/x": 1.0}))
    kinds = [type(event).__name__ for event in sink.events]
    assert kinds == ["RunInfo", *["StepRecord"] * 5, "RunEnd"]
    assert [record.step for record in sink.records] == [0, 1, 2, 3, 4]
    assert all(layer.update_ratio > 0 for record in sink.records for layer in record.layers)
    assert sink.records[0].metrics == {"train/x": 1.0}
    assert sink.end.summary["verdict"] == "healthy"


def test_a_failing_sink_is_switched_off_with_one_warning_and_the_others_go_on():
    class Full:
        def write(self, event):
            raise OSError("No space left on device")

        def close(self):
            raise AssertionError("a sink that was switched off is left alone")

    memory = MemorySink()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(DiagnosticsWarning, match="Full failed and was switched off") as caught:
        with Monitor(model, optimizer, sinks=[Full(), memory]) as monitor:
            train(model, optimizer, 3, lambda _: monitor.clip_and_step())
    assert len(caught) == 1
    assert len(memory.records) == 3


def test_an_exception_ends_the_run_as_failed_and_ctrl_c_as_interrupted():
    for error, status in ((ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted")):
        sink = MemorySink()
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(type(error)), Monitor(model, optimizer, sinks=[sink]) as monitor:
            train(model, optimizer, 2, lambda _, monitor=monitor: monitor.clip_and_step())
            raise error
        assert sink.end.status == status
        assert len(sink.records) == 2


def test_parameters_that_no_model_has_count_in_the_norm_and_stand_in_a_layer_of_their_own():
    model, extra = nn.Linear(2, 1, bias=False), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    with Monitor(model, optimizer, sinks=[]) as monitor:
        (model(torch.tensor([[3.0, 0.0]])) + 4 * extra).sum().backward()
        record = monitor.clip_and_step()
    assert record.clip.total_norm == 5.0
    assert record.layers[1].layer.parameters == ("parameter_0",)
    assert record.clip.shares == pytest.approx((9 / 25, 16 / 25))


def test_layers_are_chosen_by_a_regular_expression():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, layers="^[24]$", sinks=[]) as monitor:
        model(torch.randn(2, 6)).sum().backward()
        record = monitor.clip_and_step()
    assert [one.layer.name for one in record.layers] == ["2", "4"]


def test_recording_thins_out_after_fifty_steps():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record") as monitor:
        train(model, optimizer, 75, lambda _: monitor.clip_and_step())
    assert [record.step for record in monitor.records if record.recorded] == [*range(50), 50, 60, 70]
    assert all(one.weight.norm > 0 and one.output is None for one in monitor.records[55].layers)
