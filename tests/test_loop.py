"""What the loop adds to a step: micro-batches, precision, a schedule, compilation; and that runs repeat exactly."""

import itertools
import math
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from diagnostics import ClipByNorm, MemorySink, Monitor
from diagnostics.trainers.loop import autocast, evaluate, train
from diagnostics.trainers.schedules import SCHEDULES, factor, make_schedule
from diagnostics.trainers.settings import PRECISIONS, TrainerSettings, make_scaler
from diagnostics.trainers.tasks import Digits

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LR = 0.05


@pytest.fixture(scope="module")
def digits():
    return Digits()


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))


def trained(task, *, model=None, optimizer=torch.optim.SGD, clip=None, device="cpu", scaler=True, **settings):
    """Trains a small network; the model, the evaluation, the monitor and the records."""
    chosen = TrainerSettings(**{"batch_size": 32, "steps": 6, **settings})
    torch.manual_seed(chosen.seed)
    model = (model or network()).to(device)
    stepping = optimizer(model.parameters(), lr=LR)
    scaler = make_scaler(chosen.precision, torch.device(device)) if scaler is True else scaler
    sink = MemorySink()
    with Monitor(
        model,
        stepping,
        clip=clip,
        accumulate=chosen.micro_batches,
        scaler=scaler,
        sinks=[sink],
        on_violation="record",
        on_diagnosis="record",
    ) as monitor:
        evaluation = train(model, task, stepping, monitor, chosen, clip=clip, scaler=scaler)
    return model, evaluation, monitor, sink.records


# ── micro-batches ──


def test_micro_batches_give_the_gradient_of_the_whole_batch(digits):
    for micro_batches in (1, 4):
        model, _, monitor, records = trained(digits, steps=1, micro_batches=micro_batches)
        torch.manual_seed(0)
        plain = network()
        inputs, targets = next(digits.batches(32, seed=0))
        loss = functional.cross_entropy(plain(inputs), targets)
        loss.backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
        assert records[0].loss == pytest.approx(loss.item(), rel=1e-6)
        assert records[0].backward_passes == micro_batches
        assert not monitor.violations


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^micro_batches must divide batch_size, 64; got 3\.$"):
        TrainerSettings(batch_size=64, micro_batches=3)


# ── precision ──


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_recorded_norms_are_those_of_the_true_gradients_whatever_the_precision(
    digits, precision, micro_batches, device
):
    *_, plain = trained(digits, device=device)
    *_, records = trained(digits, precision=precision, micro_batches=micro_batches, device=device)
    for true, found in zip(plain, records, strict=True):
        assert found.clip.total_norm == pytest.approx(true.clip.total_norm, rel=0.01)
        for layer, other in zip(true.layers, found.layers, strict=True):
            assert other.weight.norm == pytest.approx(layer.weight.norm, rel=0.02)
            # those of the micro-batches together are those of the whole batch
            assert other.output.norm == pytest.approx(layer.output.norm, rel=0.02)


def test_only_fp16_needs_a_scaler_and_the_records_tell_its_scale(digits):
    scales = {name: {record.loss_scale for record in trained(digits, precision=name)[3]} for name in PRECISIONS}
    assert scales == {"fp32": {1.0}, "bf16": {1.0}, "fp16": {2.0**16}}


def test_layers_compute_in_the_precision_asked_for_while_weights_stay_fp32(digits):
    for name, dtype in PRECISIONS.items():
        model, seen = network(), set()
        model[3].register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.add(output.dtype))
        trained(digits, model=model, precision=name)  # its evaluations run through the same layer
        assert seen == {dtype}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_evaluation_is_torch_s_own_under_autocast(digits):
    model = network()
    ((inputs, targets),) = digits.held_out()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = functional.cross_entropy(model(inputs), targets).item()
    assert evaluate(model, digits, "bf16")["eval/loss"] == pytest.approx(theirs, rel=1e-6)
    assert evaluate(model, digits)["eval/loss"] != pytest.approx(theirs, rel=1e-6)


def test_fp32_switches_no_autocast_on():
    with autocast("fp32", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_a_step_that_overflows_is_skipped_and_the_schedule_waits_for_it(digits):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # far too large for fp16
    settings = {"precision": "fp16", "steps": 40, "schedule": "linear"}
    *_, monitor, records = trained(digits, scaler=scaler, **settings)
    assert records[0].skipped
    assert not records[-1].skipped
    taken = 0
    for record in records:
        assert record.lr == pytest.approx((LR * (1 - taken / 40),))
        taken += not record.skipped
    assert not monitor.violations


def test_clipping_too_late_is_not_offered_with_a_scaler():
    with pytest.raises(
        ValueError, match=r"^precision must be fp32 or bf16 with mistake=clip_after_step; got 'fp16'\.$"
    ):
        TrainerSettings(precision="fp16", mistake="clip_after_step")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_seed_gives_the_same_weights_and_the_same_records(digits, precision, device):
    def once(seed):
        settings = {"schedule": "cosine", "warmup_steps": 2, "micro_batches": 2, "seed": seed}
        return trained(
            digits, optimizer=torch.optim.AdamW, clip=ClipByNorm(0.5), precision=precision, device=device, **settings
        )

    (one, evaluation, _, records), (two, again, _, repeated), (other, *_) = once(1), once(1), once(2)
    weights, same, different = ([p.detach().cpu() for p in model.parameters()] for model in (one, two, other))
    assert all(map(torch.equal, weights, same))
    assert not any(map(torch.equal, weights, different))
    assert evaluation == again
    assert [numbers(record) for record in records] == [numbers(record) for record in repeated]


def numbers(record):
    """All that a record says; layers are made when somebody looks, so we look."""
    return repr(record), [repr(layer) for layer in record.layers]


# ── schedule ──


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_record_has_the_learning_rate_that_its_step_was_taken_with(digits, schedule, warmup_steps):
    *_, monitor, records = trained(digits, steps=9, schedule=schedule, warmup_steps=warmup_steps)
    rest = 9 - warmup_steps
    closed = {
        "constant": [1.0] * rest,
        "linear": [1 - i / rest for i in range(rest)],
        "cosine": [math.cos(math.pi * i / rest / 2) ** 2 for i in range(rest)],
    }[schedule]
    expected = [LR * i / warmup_steps for i in range(warmup_steps)] + [LR * one for one in closed]
    assert [record.lr[0] for record in records] == pytest.approx(expected)
    assert not monitor.violations  # though the first step of a warm-up, at rate 0, moves nothing


def test_weights_move_by_exactly_the_recorded_learning_rate(digits):
    model = network()
    positions = []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.register_step_post_hook(
        lambda *_: positions.append((model[1].bias.detach().clone(), model[1].bias.grad.clone()))
    )
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record") as monitor:
        train(model, digits, optimizer, monitor, TrainerSettings(steps=5, schedule="cosine", warmup_steps=2))
    moves = zip(itertools.pairwise(positions), list(monitor.records)[1:], strict=True)
    for ((before, _), (after, gradient)), record in moves:
        torch.testing.assert_close(before - after, record.lr[0] * gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "torchs"),
    [
        ("linear", partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=20)),
        ("cosine", partial(CosineAnnealingLR, T_max=20)),
    ],
)
def test_without_warm_up_the_schedules_are_torch_s_own(name, torchs):
    def rates(make):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR)
        schedule = make(optimizer)
        for _ in range(21):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()

    ours = rates(lambda optimizer: make_schedule(optimizer, name, steps=20, warmup_steps=0))
    assert list(ours) == pytest.approx(list(rates(torchs)), abs=1e-12)


def test_each_parameter_group_keeps_its_own_rate():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    make_schedule(optimizer, "constant", steps=4, warmup_steps=2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    optimizer = torch.optim.SGD(groups)
    schedule = make_schedule(optimizer, "constant", steps=4, warmup_steps=2)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])


def test_a_schedule_rises_to_the_whole_rate_and_falls_to_nothing_after_the_last_step():
    for name in ("linear", "cosine"):
        values = [factor(name, step, steps=50, warmup_steps=10) for step in range(51)]
        assert values[0] == 0
        assert values[10] == 1
        assert values[50] == pytest.approx(0, abs=1e-12)
        assert all(later < earlier for earlier, later in itertools.pairwise(values[10:]))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_short_trial_of_a_long_run_takes_the_first_steps_of_its_warm_up(digits, steps):
    *_, records = trained(digits, steps=steps, warmup_steps=4, schedule="cosine")
    assert [record.lr[0] for record in records] == pytest.approx([LR * step / 4 for step in range(steps)])


# ── compilation ──


def test_a_compiled_model_trains_the_same_and_tells_of_the_same_depth(digits, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced alike, built at once
    *_, plain = trained(digits)
    *_, monitor, records = trained(digits, compile=True)
    assert not monitor.violations
    for true, found in zip(plain, records, strict=True):
        assert found.loss == pytest.approx(true.loss, rel=1e-5)
        assert [layer.weight.norm for layer in found.layers] == pytest.approx(
            [layer.weight.norm for layer in true.layers], rel=1e-4
        )
        assert [layer.output.norm for layer in found.layers] == pytest.approx(
            [layer.output.norm for layer in true.layers], rel=1e-4
        )
        assert all(layer.update_ratio is not None for layer in found.layers)


# ── evaluation ──


def test_the_last_step_is_evaluated_too_so_that_a_run_log_ends_with_a_loss(digits):
    *_, records = trained(digits, steps=6, evaluate_every=4)
    assert [record.step for record in records if "eval/loss" in record.metrics] == [0, 4, 5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'."),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine; got 'step'."),
        ({"micro_batches": 0}, "micro_batches must be at least 1; got 0."),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0; got -1."),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_one_sentence(options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        TrainerSettings(**options)
