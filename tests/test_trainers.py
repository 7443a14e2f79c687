"""The example trainers: data that is never mixed up, models that are what their dials say, a loop that trains."""

import io
import itertools
import math
import re
import subprocess

import pytest
import torch
from torch import nn
from torch.nn import functional

from diagnostics import ClipByNorm, MemorySink, Monitor
from diagnostics.trainers import progress as progress_module
from diagnostics.trainers.loop import evaluate, train
from diagnostics.trainers.mistakes import MISTAKES, WITH_A_SCALER, WITHIN_A_WINDOW
from diagnostics.trainers.models import MLP
from diagnostics.trainers.progress import Progress, write_line
from diagnostics.trainers.provenance import describe_run, git_state
from diagnostics.trainers.settings import OBJECTIVES, TrainerSettings, choose_device, objective
from diagnostics.trainers.tasks import Digits, _load_digits


@pytest.fixture(scope="module")
def digits():
    return Digits()


def rows(*batches):
    return torch.cat([inputs.flatten(1) for inputs, _ in batches])


# ── tasks ──


def test_what_is_held_out_is_every_fifth_image_whatever_the_seed(digits):
    from sklearn.datasets import load_digits

    labels = torch.tensor(load_digits().target)
    torch.manual_seed(7)
    ((_, held_out),) = Digits().held_out()
    assert torch.equal(held_out, labels[::5])
    ((_, again),) = digits.held_out()
    assert torch.equal(again, held_out)


def test_an_epoch_shows_every_training_image_at_most_once_and_no_held_out_one(digits):
    epoch = rows(*itertools.islice(digits.batches(64, seed=0), 1437 // 64))
    ((held_out, _),) = digits.held_out()
    seen = {tuple(row) for row in epoch.tolist()}
    assert len(epoch) == len(seen) == 22 * 64
    assert seen.isdisjoint(tuple(row) for row in held_out.flatten(1).tolist())


def test_the_next_epoch_has_another_order(digits):
    first, *_, second = itertools.islice(digits.batches(1437, seed=0), 2)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0].sum(0), second[0].sum(0)) or torch.allclose(
        first[0].sum(0), second[0].sum(0), atol=1e-3
    )


def test_the_seed_decides_the_batches(digits):
    def first(seed):
        return next(digits.batches(32, seed))[0]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_training_pixels_are_centred_and_scaled(digits):
    ((images, _),) = itertools.islice(digits.batches(1437, seed=0), 1)
    assert images.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert images.std().item() == pytest.approx(1.0, abs=1e-5)


def test_more_examples_than_there_are_cannot_make_a_batch(digits):
    with pytest.raises(ValueError, match=re.escape("batch_size must be between 1 and 1437 for digits; got 1438.")):
        digits.batches(1438, seed=0)


def test_a_missing_scikit_learn_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    _load_digits.cache_clear()  # another test has read them
    with pytest.raises(ModuleNotFoundError, match=r"pip install .training-diagnostics\[data\]"):
        Digits()


# ── models ──


@pytest.mark.parametrize("depth", [1, 4, 9])
def test_depth_counts_the_hidden_layers(depth):
    model = MLP(64, 10, depth=depth, width=16)
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == depth
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == depth + 1


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("init", "activation", "deviation"),
    [
        ("default", "relu", (1 / 3 / 256) ** 0.5),
        ("kaiming", "relu", (2 / 256) ** 0.5),
        ("kaiming", "tanh", 5 / 3 / 16),
        ("kaiming", "identity", 1 / 16),
        ("xavier", "relu", (2 / 512) ** 0.5),
        ("orthogonal", "relu", 2**0.5 / 16),
    ],
)
def test_each_init_draws_weights_of_its_textbook_size(init, activation, deviation):
    torch.manual_seed(0)
    weight = linears(MLP(256, 10, depth=2, width=256, init=init, activation=activation))[1].weight
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)


def test_the_last_layer_has_no_activation_and_so_no_gain():
    torch.manual_seed(0)
    head = MLP(64, 100, depth=1, width=256, init="kaiming", activation="relu").head
    assert head.weight.std().item() == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_a_gain_of_ones_own_takes_the_place_of_the_activation_s_in_all_layers_but_the_last(init):
    torch.manual_seed(0)
    _, hidden, head = linears(MLP(256, 256, depth=2, width=256, init=init, activation="tanh", gain=3.0))
    assert hidden.weight.std().item() == pytest.approx(3 / 16, rel=0.02)
    assert head.weight.std().item() == pytest.approx(1 / 16, rel=0.02)


def test_orthogonal_weights_keep_lengths_but_for_the_gain():
    weight = linears(MLP(32, 10, depth=2, width=32, init="orthogonal", activation="identity"))[1].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(32), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["kaiming", "xavier", "orthogonal"])
def test_an_init_of_ours_begins_without_biases(init):
    assert all(not layer.bias.any() for layer in linears(MLP(8, 3, depth=2, width=8, init=init)))


def test_the_default_init_is_pytorch_s_own():
    torch.manual_seed(0)
    ours = linears(MLP(8, 3, depth=1, width=4))
    torch.manual_seed(0)
    torchs = [nn.Linear(8, 4), nn.Linear(4, 3)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", functional.relu),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("gelu", functional.gelu),
        ("identity", lambda x: x),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_the_network_computes_what_its_dials_say(activation, function, residual):
    model = MLP(8, 3, depth=3, width=8, activation=activation, norm="layer", residual=residual)
    hidden = inputs = torch.randn(5, 8)
    *blocks, head = linears(model)
    for number, layer in enumerate(blocks):
        result = function(functional.layer_norm(layer(hidden), (8,)))
        hidden = hidden + result if residual and number > 0 else result
    torch.testing.assert_close(model(inputs), head(hidden))


def test_batch_normalisation_is_there_when_asked_for():
    model = MLP(8, 3, depth=2, width=4, norm="batch")
    assert sum(isinstance(module, nn.BatchNorm1d) for module in model.modules()) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 0}, "depth must be at least 1; got 0."),
        ({"width": -3}, "width must be at least 1; got -3."),
        ({"activation": "swish"}, "activation must be one of relu, tanh, sigmoid, gelu, identity; got 'swish'."),
        ({"init": "he"}, "init must be one of default, kaiming, xavier, orthogonal; got 'he'."),
        ({"norm": "group"}, "norm must be one of none, layer, batch; got 'group'."),
        ({"init": "kaiming", "gain": 0.0}, "gain must be a positive number; got 0.0."),
        ({"init": "xavier", "gain": 2.0}, "gain needs init=kaiming or orthogonal; got init=xavier."),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_sentence(options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        MLP(8, 3, **options)


# ── the loop ──


def trained(digits, settings, clip=None, optimizer=torch.optim.SGD, **options):
    """Trains a small network; the model, the evaluation, the monitor and what its sink got."""
    torch.manual_seed(settings.seed)
    model = MLP(64, 10, depth=2, width=16)
    chosen = optimizer(model.parameters(), lr=0.05)
    sink = MemorySink()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if settings.precision == "fp16" else None
    options |= {"scaler": scaler, "accumulate": settings.micro_batches}
    with Monitor(
        model, chosen, clip=clip, sinks=[sink], on_violation="record", on_diagnosis="record", **options
    ) as one:
        evaluation = train(model, digits, chosen, one, settings, clip=clip, scaler=scaler)
    return model, evaluation, one, sink


def test_the_loop_trains_as_a_plain_loop_with_torch_s_own_clip_does(digits):
    settings = TrainerSettings(steps=30, evaluate_every=7, seed=5)
    ours, *_ = trained(digits, settings, clip=ClipByNorm(max_norm=0.5))

    torch.manual_seed(5)
    plain = MLP(64, 10, depth=2, width=16)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for inputs, targets in itertools.islice(digits.batches(64, seed=5), 30):
        optimizer.zero_grad()
        functional.cross_entropy(plain(inputs), targets).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_the_same_seed_gives_the_same_weights_and_another_one_others(digits):
    first, second, third = (
        trained(digits, TrainerSettings(steps=5, seed=seed), optimizer=torch.optim.AdamW)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, third.head.weight)


def test_evaluations_reach_the_records_at_the_steps_asked_for(digits):
    *_, sink = trained(digits, TrainerSettings(steps=7, evaluate_every=3))
    assert [record.step for record in sink.records if "eval/loss" in record.metrics] == [0, 3, 6]
    assert all(set(record.metrics) >= {"eval/loss", "eval/accuracy"} for record in sink.records[::3])


def test_a_lawful_run_has_no_violations(digits):
    _, _, monitor, _ = trained(digits, TrainerSettings(steps=6), clip=ClipByNorm(max_norm=0.5))
    assert list(monitor.violations) == []


FIRST_STEP = dict.fromkeys(MISTAKES[1:], 0) | {"missing_zero_grad": 1, "dropped_window": 5}


@pytest.mark.parametrize("mistake", FIRST_STEP)
def test_a_mistake_on_purpose_is_committed_and_nothing_else_is_reported(digits, mistake):
    windowed, scaled = mistake in WITHIN_A_WINDOW, mistake == WITH_A_SCALER
    settings = TrainerSettings(
        steps=6, mistake=mistake, micro_batches=1 + windowed, precision="fp16" if scaled else "fp32"
    )
    clip = None if mistake in {"no_update", "window_size", "dropped_window"} else ClipByNorm(max_norm=0.01)
    _, evaluation, monitor, sink = trained(digits, settings, clip=clip)
    assert [(one.rule, one.step) for one in monitor.violations] == [(mistake, FIRST_STEP[mistake])]
    assert len(sink.records) == 6
    assert math.isfinite(evaluation["eval/loss"])


def test_evaluation_counts_right_answers_and_changes_nothing(digits):
    model = MLP(64, 10, depth=1, width=8, norm="batch")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ((inputs, targets),) = digits.held_out()
    found = evaluate(model, digits)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    outputs = model.eval()(inputs)
    assert found["eval/accuracy"] == (outputs.argmax(1) == targets).double().mean().item()
    assert found["eval/loss"] == pytest.approx(functional.cross_entropy(outputs, targets).item(), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_broke_is_the_worst_there_is_and_no_other(name):
    fine = {"eval/loss": 0.25, "eval/accuracy": 0.75}
    assert objective(name, fine, "vanishing") == fine[name]
    assert objective(name, fine, "nonfinite") == OBJECTIVES[name]
    assert objective(name, {name: math.nan}, "healthy") == OBJECTIVES[name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0."),
        ({"seed": -1}, "seed must be at least 0; got -1."),
        ({"mistake": "sleep"}, f"mistake must be one of {', '.join(MISTAKES)}; got 'sleep'."),
        ({"mistake": "clip_scaled_grads"}, "precision must be fp16 with mistake=clip_scaled_grads; got 'fp32'."),
        ({"mistake": "window_size"}, "micro_batches must be at least 2 with mistake=window_size; got 1."),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        TrainerSettings(**options)


def test_the_device_is_the_one_asked_for_or_refused():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "meta", "toaster"):
        with pytest.raises(ValueError, match=f"device must be auto, cpu or one that this machine has; got '{name}'"):
            choose_device(name)


# ── progress ──


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_one_line_comes_every_half_minute():
    log, seconds = io.StringIO(), itertools.count(step=10)
    with Progress(100, log, clock=lambda: next(seconds)) as progress:
        for _ in range(7):
            progress.advance(loss=1.5)
    assert log.getvalue().splitlines() == [
        "step 3 of 100, loss 1.5, 0.1 steps per second",
        "step 6 of 100, loss 1.5, 0.1 steps per second",
    ]


def test_a_step_without_a_loss_says_none():
    log, seconds = io.StringIO(), itertools.count(step=40)
    with Progress(2, log, clock=lambda: next(seconds)) as progress:
        progress.advance(loss=None)
    assert log.getvalue() == "step 1 of 2, 0.0 steps per second\n"


def test_on_a_terminal_a_bar_shows_the_loss_and_is_cleared_at_the_end():
    terminal = Terminal()
    with Progress(3, terminal) as progress:
        for _ in range(3):
            progress.advance(loss=0.125)
    assert "3/3" in terminal.getvalue() or "0/3" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_a_line_on_a_terminal_does_not_tear_the_bar():
    terminal = Terminal()
    with Progress(3, terminal) as progress:
        progress.advance(loss=0.5)
        write_line("vanishing since step 0", terminal)
        progress.advance(loss=0.25)
    assert re.search(r"(^|\r)vanishing since step 0\n", terminal.getvalue())


def test_jobs_of_a_parallel_sweep_draw_no_bars_over_each_other(monkeypatch):
    class Worker:
        name = "LokyProcess-1"

    monkeypatch.setattr(progress_module.multiprocessing, "current_process", Worker)
    terminal = Terminal()
    with Progress(3, terminal) as progress:
        progress.advance(loss=0.5)
    assert terminal.getvalue() == ""


# ── provenance ──


def test_the_commit_is_named_and_changed_files_are_admitted(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    assert git_state(tmp_path) == {}
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path)["dirty"] is True


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {}


def test_a_run_says_where_it_comes_from(tmp_path):
    info = describe_run(
        name="a", directory=tmp_path, command="python a", overrides=("b=1",), config={"b": 1}, seed=3, device="cpu"
    )
    assert (info.name, info.command, info.overrides, info.seed, info.device) == ("a", "python a", ("b=1",), 3, "cpu")
    assert info.directory == str(tmp_path)
    assert info.versions["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", info.started)
