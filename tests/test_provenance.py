"""Where a run comes from and where it lies: all of it is kept, in the run log and in W&B, in a folder of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from test_conf import complaint, composed
from wandb_offline import offline_run

from diagnostics import read_run
from diagnostics.cli import assemble, train
from diagnostics.configs import resolve
from diagnostics.trainers import provenance

ROOT = Path(__file__).parent.parent
SMALL = ("model.depth=2", "trainer.steps=3")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Calls the entry point with a command line, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
        train()
        return sorted(tmp_path.rglob("run.jsonl"))

    return start


def git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def test_the_run_log_and_w_and_b_keep_all_that_is_known_about_a_run(start, tmp_path):
    overrides = (*SMALL, "trainer.seed=5", "sink=[runlog,wandb]")
    (log,) = start(*overrides)
    run = read_run(log)
    info = run.info
    assert info.command == shlex.join(["python", "scripts/train.py", *overrides])
    assert (info.overrides, info.seed, info.directory) == (overrides, 5, str(log.parent))
    assert info.device == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert info.config["model"]["depth"] == 2
    assert {"python", "torch", "hydra-core", "omegaconf", "wandb", "numpy"} <= info.versions.keys()
    assert info.versions["torch"] == torch.__version__
    if git("rev-parse", "HEAD"):
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        assert info.git == {"commit": git("rev-parse", "HEAD"), "dirty": changed}
    assert datetime.fromisoformat(info.started) <= datetime.fromisoformat(run.end.ended)
    assert run.end.status == "finished"
    layers = ["hidden.0.linear", "hidden.1.linear", "head"]
    assert [one.layer.name for one in run.records[0].layers] == layers

    (folder,) = tmp_path.glob("outputs/*/wandb/offline-run-*")
    config = offline_run(folder).config
    kept = config["run_info"]
    assert config["model"]["depth"] == 2
    assert kept["layers"] == layers
    assert (kept["command"], kept["overrides"]) == (info.command, list(overrides))
    assert (kept["seed"], kept["device"], kept["versions"]) == (5, info.device, dict(info.versions))
    assert kept.get("git", {}) == info.git
    assert (kept["started"], kept["ended"], kept["status"]) == (info.started, run.end.ended, "finished")


def test_a_run_that_fails_says_so_and_why_in_both_places(start, tmp_path, monkeypatch):
    def breaks(*_arguments, **_options):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr("diagnostics.trainers.loop.train", breaks)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        start(*SMALL, "sink=[runlog,wandb]")
    (log,) = tmp_path.rglob("run.jsonl")
    end = read_run(log).end
    assert (end.status, end.error) == ("failed", "RuntimeError: the disk is gone")
    (folder,) = tmp_path.glob("outputs/*/wandb/offline-run-*")
    kept = offline_run(folder).config["run_info"]
    assert (kept["status"], kept["error"]) == ("failed", "RuntimeError: the disk is gone")


def test_without_git_a_run_is_described_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(ROOT) == {}


def test_the_command_of_a_sweep_s_job_repeats_that_job_alone(start, monkeypatch, tmp_path):
    sweep = start("experiment=depth_sweep", "trainer.steps=2", "sink=[runlog]")
    first = read_run(sweep[-1])
    elsewhere = tmp_path / "again"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    start(*shlex.split(first.info.command)[2:])
    (again,) = elsewhere.rglob("run.jsonl")
    again = read_run(again)
    assert again.info.config == first.info.config
    assert [record.loss for record in again.records] == [record.loss for record in first.records]


def test_a_package_in_an_environment_inside_a_checkout_has_no_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package, code = tmp_path / ".venv" / "site-packages" / "diagnostics", tmp_path / "code"
    for folder in (package, code):
        folder.mkdir(parents=True)
        (folder / "file.py").touch()
    git("init", "--quiet")
    git("add", "code")
    git("commit", "--quiet", "-m", "first")
    assert provenance.git_state(package) == {}
    assert provenance.git_state(code)["dirty"] is False


def test_two_runs_that_start_in_one_second_have_folders_of_their_own(start):
    start(*SMALL, "sink=[runlog]")
    assert len({log.parent for log in start(*SMALL, "sink=[runlog]")}) == 2


def test_no_value_of_an_override_moves_a_job_s_folder_out_of_the_sweep_s(start, tmp_path):
    values = "../../../x", "/etc/y", "..", "a" * 300
    quoted = ",".join(f"'{value}'" for value in values)
    logs = start("-m", *SMALL, "sink=[runlog,wandb]", "sink.wandb.mode=disabled", f"sink.wandb.notes={quoted}")
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert [log.parent.parent for log in logs] == [sweep] * len(values)
    assert {log.parent.name.split("_")[0] for log in logs} == {"0", "1", "2", "3"}
    assert all(len(log.parent.name) <= 120 for log in logs)
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]


@pytest.mark.parametrize("path", ["../other.jsonl", "a/../../b", "/var/run.jsonl"])
def test_a_run_log_stays_inside_the_run_s_folder(path):
    said = f"sink.runlog.path must stay inside the run's folder, which hydra.run.dir moves; got {path!r}."
    assert complaint(f"sink.runlog.path={path}") == said


def test_another_package_s_class_is_made_only_if_that_package_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self, inputs, outputs):\n"
        "        super().__init__(64, 10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    target = ("~model", "+model._target_=their_nets.Net", "trainer.device=cpu")
    said = "model._target_ must be a class of diagnostics or torch; got 'their_nets.Net'."
    assert complaint(*target) == said
    parts = assemble(resolve(composed(*target, "trusted_packages=[their_nets]")))
    assert type(parts.model).__name__ == "Net"
