"""The training job as a person runs it: what it prints, what it leaves on disk, how it ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from wandb_offline import offline_run

from diagnostics import DiagnosticsWarning, cli, read_run
from diagnostics.cli import Job, train
from diagnostics.configs import CONF, resolve
from diagnostics.trainers import loop

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Runs leave their folders in a place of their own, and no W&B settings of the machine count."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # whatever a run makes of it is undone
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def start(monkeypatch):
    """Calls the entry point with a command line; the exit code or message, None if it returned."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
        try:
            train()
        except SystemExit as end:
            return end.code
        return None

    return start


def only(folder, pattern):
    (found,) = Path(folder).glob(pattern)
    return found


def wandb_runs(folder):
    return sorted((offline_run(one) for one in Path(folder).glob("wandb/offline-run-*")), key=lambda run: run.name)


def wandb_says(folder, *arguments):
    command = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout or done.stderr


def popen(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def settings_of(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("train", overrides=["sink=[]", *overrides]))


def run_here(*overrides):
    place = Job("here", overrides, Path.cwd(), group=None, shared=Path.cwd())
    return cli.run(settings_of(*overrides), place)


# ── one run ──


def test_the_default_run_learns_the_digits_and_says_so_everywhere():
    process = popen()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    folder = only("outputs", "*")

    lines = output.splitlines()
    assert "hidden.0.linear" in output
    assert "head" in output
    assert "violations: none" in lines
    assert any(line.startswith("verdict: healthy") for line in lines)
    assert lines[-1] == f"Page of this run: {folder.absolute() / 'page.html'}"
    assert (folder / "page.html").stat().st_size > 10_000

    log = read_run(folder / "run.jsonl")
    assert log.end.status == "finished"
    assert len(log.records) == 600
    assert (log.info.seed, log.info.command) == (0, "python scripts/train.py")
    assert log.info.config["model"]["depth"] == 4

    (run,) = wandb_runs(folder)
    assert run.exit_code == 0
    assert (run.name, run.group, run.project) == ("mlp-digits", "", "training-diagnostics")
    assert run.config["model"]["activation"] == "relu"
    assert run.config["run_info"]["layers"] == [*(f"hidden.{place}.linear" for place in range(4)), "head"]
    (last, accuracy) = run.column("eval/accuracy")[-1]
    assert accuracy >= 0.95
    assert run.rows[-1]["optim_step"] == 600
    assert last == run.rows[-1]["_step"]
    assert len(run.column("grad/total_norm")) == 600
    assert run.summary["diagnosis/verdict"].startswith("healthy")


def test_twelve_sigmoid_layers_stay_at_chance_and_are_called_vanishing(start, capsys):
    assert start("model.activation=sigmoid", "model.depth=12", "optimizer=sgd", "sink=[console,runlog]") is None
    output, errors = capsys.readouterr()
    log = read_run(only("outputs", "*/run.jsonl"))
    assert log.end.verdict.condition == "vanishing"
    assert "verdict: vanishing since step 0" in output
    assert log.end.verdict.severity >= 2
    assert max(record.metrics.get("eval/accuracy", 0) for record in log.records) < 0.15
    assert errors.startswith("vanishing")
    assert errors.count("vanishing (") == 1
    assert ".py:" not in errors


@pytest.mark.parametrize("mistake", ["missing_zero_grad", "clip_after_step"])
def test_a_mistake_on_purpose_is_said_while_it_happens_and_in_the_verdict(start, capsys, mistake):
    assert start(f"trainer.mistake={mistake}", "trainer.steps=8", "clip.max_norm=0.01", "sink=[console]") is None
    output, errors = capsys.readouterr()
    assert errors.startswith(f"{mistake}: Step ")
    assert "unlawful loop" in output
    assert "verdict: healthy\n" not in output


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_two_steps_of_one_job(start, name):
    assert start(f"experiment={name}", "hydra.mode=RUN", "trainer.steps=2", "sink=[runlog]") is None
    assert len(read_run(only("outputs", "*/run.jsonl")).records) == 2


def test_without_sinks_nothing_is_written_or_printed_but_the_result(start, capsys):
    assert start("trainer.steps=2", "sink=[]", "hydra.output_subdir=null") is None
    output, errors = capsys.readouterr()
    assert len(output.splitlines()) == 1
    assert errors == ""
    assert list(only("outputs", "*").iterdir()) == []


def test_a_run_that_is_told_to_looks_before_it_trains_and_names_its_own_overrides(start, capsys):
    said = [*("trainer.preflight=true", "trainer.steps=1", "sink=[]"), "model.activation=sigmoid", "model.depth=6"]
    assert start(*said) is None
    printed = capsys.readouterr().out
    assert printed.startswith("before training:\n")
    assert "(model.activation=" in printed


def test_runs_that_start_together_have_folders_of_their_own(start):
    for _ in range(3):
        assert start("trainer.steps=1", "sink=[]") is None
    assert len(list(Path("outputs").iterdir())) == 3


def test_a_page_that_fails_does_not_hide_the_run(start, capsys, monkeypatch):
    from diagnostics.reports import page

    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(page, "write_page", broken)
    assert start("trainer.steps=2", "sink=[runlog]") is None
    assert "could not be written (OSError: the disk is full)" in capsys.readouterr().err


def test_other_people_s_warnings_look_as_usual():
    with pytest.warns(UserWarning, match="theirs"), cli._short_warnings():
        warnings.warn("theirs", UserWarning, stacklevel=1)


def test_our_warnings_are_plain_sentences_said_as_often_as_they_come(capsys):
    with cli._short_warnings():
        for _ in range(2):
            warnings.warn("ours", DiagnosticsWarning, stacklevel=1)
    assert capsys.readouterr().err == "ours\nours\n"


# ── the objective ──


def test_the_objective_is_the_final_evaluation():
    assert 0 < run_here("trainer.steps=60") < math.log(10)
    assert 0.2 < run_here("trainer.steps=60", "trainer.objective=eval/accuracy") <= 1


def test_the_objective_of_a_run_that_turned_non_finite_is_infinite():
    options = ("trainer.steps=6", "optimizer=sgd", "optimizer.lr=1e30", "clip=none", "diagnostics.nonfinite=step")
    with pytest.warns(DiagnosticsWarning):
        assert run_here(*options) == math.inf


def test_the_same_seed_gives_the_same_run():
    assert run_here("trainer.steps=20") == run_here("trainer.steps=20")
    assert run_here("trainer.steps=20") != run_here("trainer.steps=20", "trainer.seed=1")


# ── how it ends ──


@pytest.mark.parametrize("override", ["clip.max_norm=-1", "optimizer.lr=nan", "model.depht=3", "model.activation=foo"])
def test_what_cannot_be_ends_in_one_sentence_before_any_run(start, override, capsys):
    said = start(override)
    assert isinstance(said, str)
    assert said.startswith(override.split("=")[0])
    assert said.count("\n") == 0
    assert capsys.readouterr() == ("", "")
    assert not list(Path().rglob("wandb"))
    assert not list(Path().rglob("run.jsonl"))


def test_a_sentence_goes_to_standard_error_with_a_failing_exit_code():
    process = popen("model.depht=4")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output == ""
    assert errors == "model.depht is not a key of the configuration; did you mean model.depth?\n"


def test_an_exception_fails_the_run_everywhere_and_shows_its_traceback(start, monkeypatch, capsys):
    evaluate = loop.evaluate
    answers = iter([evaluate])

    def breaks_the_second_time(*arguments):
        return next(answers)(*arguments)

    monkeypatch.setattr(loop, "evaluate", breaks_the_second_time)
    with pytest.raises(StopIteration) as caught:
        start("trainer.steps=9", "trainer.evaluate_every=5")
    assert [entry.name for entry in caught.traceback][-1] == "breaks_the_second_time"
    assert not any("hydra" in str(entry.path) for entry in caught.traceback)
    output = capsys.readouterr().out
    assert "hidden.0.linear" in output
    assert "failed after 5 steps: StopIteration" in output
    log = read_run(only("outputs", "*/run.jsonl"))
    assert (log.end.status, len(log.records)) == ("failed", 5)
    (run,) = wandb_runs(only("outputs", "*"))
    assert run.exit_code not in (0, None)
    assert len(run.column("grad/total_norm")) == 5


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_it_has(sent, code):
    process = popen("trainer.steps=1000000", "hydra.run.dir=here")
    give_up = time.monotonic() + 120
    log_file = Path("here/run.jsonl")
    while not (log_file.exists() and log_file.read_bytes().count(b"\n") > 8):
        assert time.monotonic() < give_up
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(sent)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "hidden.0.linear" in output
    assert output.splitlines()[-1].startswith("Page of this run: ")
    log = read_run(log_file)
    assert log.end.status == "interrupted"
    assert len(log.records) > 10
    assert abs(log.end.steps - len(log.records)) <= 1  # the signal may come between the sinks of one step
    (run,) = wandb_runs("here")
    assert run.exit_code not in (0, None)
    assert abs(len(run.column("grad/total_norm")) - len(log.records)) <= 1


# ── multirun ──


def finished(sweep):
    return sorted(
        path.parent.name for path in Path(sweep).glob("*/run.jsonl") if read_run(path).end.status == "finished"
    )


def test_a_multirun_is_one_group_of_runs_with_their_own_names_and_configs(start):
    assert start("-m", "model.depth=2,3", "trainer.steps=3") is None
    sweep = only("multirun", "*")
    first, second = wandb_runs(sweep)
    assert (first.name, second.name) == ("model.depth=2", "model.depth=3")
    assert first.group == second.group == sweep.name
    assert (first.config["model"]["depth"], second.config["model"]["depth"]) == (2, 3)
    assert {key for row in first.rows for key in row} == {key for row in second.rows for key in row}
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert finished(sweep) == ["0_model.depth=2_trainer.steps=3", "1_model.depth=3_trainer.steps=3"]
    commands = [read_run(path).info.command for path in sorted(sweep.glob("*/run.jsonl"))]
    assert commands == [f"python scripts/train.py model.depth={depth} trainer.steps=3" for depth in (2, 3)]


def test_a_job_that_fails_stops_no_other_and_leaks_nothing_into_the_next(start, capsys, monkeypatch):
    evaluate = loop.evaluate

    def breaks_for_one_depth(model, task, precision):
        assert len(model.hidden) != 3, "depth 3 breaks"
        return evaluate(model, task, precision)

    monkeypatch.setattr(loop, "evaluate", breaks_for_one_depth)
    said = start("-m", "model.depth=2,3,4", "optimizer.lr=0.1,-1", "optimizer=sgd", "trainer.steps=2")
    assert said == "optimizer.lr must be a finite number of at least 0; got -1.0."  # the first failure
    sweep = only("multirun", "*")
    runs = wandb_runs(sweep)
    assert [run.name for run in runs] == [f"model.depth={depth} optimizer.lr=0.1" for depth in (2, 3, 4)]
    assert [run.config["model"]["depth"] for run in runs] == [2, 3, 4]
    assert [run.exit_code == 0 for run in runs] == [True, False, True]
    assert [len(run.column("grad/total_norm")) for run in runs] == [2, 0, 2]
    errors = capsys.readouterr().err
    assert "Job 1 (model.depth=2 optimizer.lr=-1) failed: optimizer.lr must be" in errors
    assert "Job 2 (model.depth=3 optimizer.lr=0.1) failed: depth 3 breaks" in errors


def test_an_override_that_cannot_compose_stops_a_sweep_before_its_first_job(start, capsys):
    assert start("-m", "model.depth=2,abc", "trainer.steps=2") == "model.depth must be a whole number; got 'abc'."
    assert capsys.readouterr().err == ""
    assert [path.name for path in only("multirun", "*").iterdir()] == ["multirun.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_six_jobs_make_six_comparable_runs_in_one_folder(launcher):
    swept = ("model.depth=4,8,16", "model.activation=sigmoid,relu")
    process = popen("-m", *swept, "trainer.steps=60", f"hydra/launcher={launcher}")
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    sweep = only("multirun", "*")
    runs = wandb_runs(sweep)
    expected = {(depth, name) for depth in (4, 8, 16) for name in ("sigmoid", "relu")}
    assert {(run.config["model"]["depth"], run.config["model"]["activation"]) for run in runs} == expected
    for run in runs:
        model = run.config["model"]
        assert run.name == f"model.depth={model['depth']} model.activation={model['activation']}"
        assert (run.group, run.exit_code) == (sweep.name, 0)
        assert len(run.column("grad/total_norm")) == 60
    assert len({frozenset(key for row in run.rows for key in row) for run in runs}) == 1
    assert len(finished(sweep)) == 6
    assert output.splitlines()[-1] == str(sweep / "report.html")  # one page for all
    ours = [page.name for page in sweep.rglob("*.html") if "wandb" not in page.relative_to(sweep).parts]
    assert ours == ["report.html"]
    assert "Would sync 6 run(s)" in wandb_says(sweep, "sync", "--dry-run")
    inspected = wandb_says(sweep, "leet", "inspect", "--summary", "--json", "wandb/latest-run")
    assert json.loads(inspected)["state"] == "finished"


@pytest.mark.slow
def test_a_gpt_of_six_blocks_learns_from_python_s_own_sources_and_its_record_is_complete():
    process = popen("experiment=pysource_gpt")
    _, errors = process.communicate(timeout=290)
    assert process.returncode == 0, errors
    log = read_run(only("outputs", "*/run.jsonl"))
    losses = [record.metrics["eval/loss"] for record in log.records if "eval/loss" in record.metrics]
    assert losses[0] > 5.3  # ln 256 is 5.5: every byte as likely as any other
    assert losses[-1] < 2.2
    assert [record.step for record in log.records] == list(range(1200))
    recorded = [record for record in log.records if record.recorded]
    assert {record.step for record in recorded} >= {*range(50), *range(50, 1200, 10)}
    kinds = [layer.layer.kind for layer in recorded[0].layers]
    assert (kinds.count("Linear"), kinds.count("LayerNorm"), kinds.count("Embedding")) == (4 * 6 + 1, 2 * 6 + 1, 2)
    assert all(layer.output is not None for record in recorded for layer in record.layers)
    assert all(layer.weight is not None for record in log.records for layer in record.layers if layer.layer.parameters)
    assert log.end.verdict.condition == "healthy"
    (run,) = wandb_runs(only("outputs", "*"))
    assert len(run.column("grad/total_norm")) == 1200
    assert run.rows[-1]["eval/loss"] == pytest.approx(losses[-1], abs=0.2)
