"""Somebody else's Hydra app: two lines and a default bring the Monitor in, and nothing of theirs changes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from torch import nn
from wandb_offline import offline_run

from diagnostics import read_run
from diagnostics.configs import ConfigurationError, register
from diagnostics.reports.gather import gather
from diagnostics.reports.table import in_terminal, tabulate

ROOT = Path(__file__).parents[1]

# Groups that have the names of ours, with other options and other keys.
CONF = {
    "app.yaml": """
        defaults:
          - model: small
          - clip: theirs
          - sink: theirs
          - optimizer: sgd
          - trainer: short
          - diagnostics: default
          - _self_
        seed: 3
        width: 4
        wandb: false
        database: {password: "${oc.env:HOME}"}
    """,
    "model/small.yaml": "width: ${width}\n",
    "clip/theirs.yaml": "boundary: 7\n",
    "sink/theirs.yaml": "kitchen: 1\n",
    "optimizer/sgd.yaml": "lr: 0.1\n",
    "optimizer/adam.yaml": "lr: 0.001\n",
    "trainer/short.yaml": "steps: 4\n",
    "other.yaml": "defaults: [app, _self_]\nseed: 8\n",
}

APP = '''
"""A training program as people write them."""
import json
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diagnostics.configs import register

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    import torch
    from torch import nn

    folder = Path(HydraConfig.get().runtime.output_dir)
    torch.manual_seed(cfg.seed)
    model = nn.Sequential(nn.Linear(3, cfg.model.width), nn.Tanh(), nn.Linear(cfg.model.width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optimizer.lr)
    if cfg.wandb:
        import wandb
    with wandb.init(mode="offline", dir=folder) if cfg.wandb else nullcontext() as run:
        with instantiate(cfg.diagnostics)(model, optimizer) as monitor:
            for step in range(cfg.trainer.steps):
                optimizer.zero_grad()
                loss = model(torch.randn(8, 3)).square().mean()
                loss.backward()
                record = monitor.clip_and_step(loss=loss)
                if run:
                    run.log({"theirs": step})
    (folder / "theirs.json").write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True), default=str))
    return record.loss


if __name__ == "__main__":
    main()
'''


class App:
    """The program in a folder of its own under git."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("train.py", APP)
        for name, text in CONF.items():
            self.write(f"conf/{name}", text)
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "theirs")
        self.commit = self.git("rev-parse", "HEAD")

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def git(self, *arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def run(self, *arguments, program=("train.py",), code=0, cwd=None):
        """Runs the program as a person does; standard output and standard error."""
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HYDRA_"))}
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=cwd or self.folder,
            env={**settings, "PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def logs(self):
        return [read_run(path) for path in sorted(self.folder.rglob("run.jsonl"))]


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "their app"
    folder.mkdir()
    return App(folder)


def theirs(log):
    return json.loads((log.path.parent / "theirs.json").read_text())


def test_by_default_a_run_is_measured_and_its_log_says_what_was_run(app):
    output, errors = app.run()
    assert "verdict: healthy" in output  # the console
    assert errors == ""
    (log,) = app.logs()
    assert (log.end.status, len(log.records)) == ("finished", 4)
    assert all(record.clip.rule == "none" for record in log.records)
    info = log.info
    assert (info.name, info.command, info.overrides) == ("small", "python train.py", ())
    assert (info.seed, info.device, info.directory) == (3, "cpu", str(log.path.parent))
    assert info.git == {"commit": app.commit, "dirty": False}
    assert {"python", "torch", "hydra-core", "wandb"} <= info.versions.keys()
    assert info.config["model"] == {"width": 4}  # resolved
    assert info.config["seed"] == 3
    assert os.environ["HOME"] not in info.config["database"]["password"]
    assert info.config["diagnostics"]["every"] == 10


def test_overrides_reach_the_monitor_and_the_groups_of_their_own_names_stay_theirs(app):
    overrides = (
        "diagnostics/clip=norm",
        "diagnostics.clip.max_norm=0.01",
        "diagnostics/sink=[console,runlog,wandb]",
        "diagnostics.every=1",
        "wandb=true",
        "optimizer=adam",
        "width=5",
    )
    app.run(*overrides)
    (log,) = app.logs()
    assert {(record.clip.rule, record.clip.max_norm, record.clip.applied) for record in log.records} == {
        ("norm", 0.01, True)
    }
    assert log.info.command == shlex.join(["python", "train.py", *overrides])
    assert log.info.overrides == overrides
    found = theirs(log)
    assert (found["clip"], found["sink"]) == ({"boundary": 7}, {"kitchen": 1})
    assert (found["model"], found["optimizer"]) == ({"width": 5}, {"lr": 0.001})
    (folder,) = log.path.parent.glob("wandb/offline-run-*")
    run = offline_run(folder)
    assert [value for _, value in run.column("theirs")] == [0, 1, 2, 3]
    assert len(run.column("grad/total_norm")) == 4
    assert run.config["run_info"]["overrides"] == list(overrides)
    assert run.config["run_info"]["git"] == {"commit": app.commit, "dirty": False}


COMPOSED = {
    "diagnostics.evry=1": "Key 'evry' not in 'MonitorConfig'",
    "diagnostics.every=often": "Value 'often' of type 'str' could not be converted to Integer",
    "diagnostics.on_violation=shout": "Invalid value 'shout', expected one of [warn, raise, record]",
    "diagnostics.clip.max_norm=1": "Key 'max_norm' not in 'NoClipConfig'",  # of the rule `none`
    "diagnostics/clip=nrm": "Could not find 'diagnostics/clip/nrm'",
}


@pytest.mark.parametrize(("override", "said"), COMPOSED.items())
def test_a_wrong_key_type_or_option_is_refused_while_hydra_composes(app, override, said):
    output, errors = app.run(override, code=1)
    assert said in errors
    assert "Traceback" not in errors
    assert output == ""
    assert not app.logs()


BUILT = {
    "diagnostics.clip.max_norm=-1": "diagnostics.clip.max_norm must be a positive number; got -1.0.",
    "diagnostics.every=-1": "diagnostics.every must be 0 (never) or a number of steps; got -1.",
    "diagnostics.layers='('": "diagnostics.layers must be a regular expression; got '(' (",
    "diagnostics/sink=[runlog,wandb]": "diagnostics.sink.wandb: WandbSink found no active W&B run; "
    "call wandb.init() before it, or pass run=.",
}


@pytest.mark.parametrize(("override", "said"), BUILT.items())
def test_a_value_that_cannot_be_is_refused_in_one_sentence(tmp_path, monkeypatch, override, said):
    monkeypatch.chdir(tmp_path)
    register()
    with initialize(None, version_base="1.3"):
        config = compose(overrides=["+diagnostics=default", "diagnostics/clip=norm", *override.split()])
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigurationError) as refusal:
        instantiate(config.diagnostics)(model, torch.optim.SGD(model.parameters()))
    assert str(refusal.value).startswith(said)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_a_refused_value_ends_a_run_before_its_first_step_with_the_sentence_as_the_last_words(app):
    _, errors = app.run("diagnostics/clip=norm", "diagnostics.clip.max_norm=-1", code=1)
    said = "diagnostics.configs.ConfigurationError: diagnostics.clip.max_norm must be a positive number; got -1.0."
    assert said in errors.splitlines()
    assert app.logs() == []


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_each_job_of_a_multirun_has_its_run_log_in_its_folder_and_its_own_command(app, launcher):
    app.run("-m", "width=4,6", "seed=5", "diagnostics/clip=norm", f"hydra/launcher={launcher}")
    logs = app.logs()
    assert [log.path.parent.name for log in logs] == ["0", "1"]
    for log, width in zip(logs, (4, 6), strict=True):
        info = log.info
        assert (log.end.status, len(log.records), log.records[0].clip.rule) == ("finished", 4, "norm")
        assert (info.name, info.seed, info.config["width"]) == (f"width={width}", 5, width)
        assert info.command == f"python train.py width={width} seed=5 diagnostics/clip=norm"
        assert info.directory == str(log.path.parent)
        assert info.git == {"commit": app.commit, "dirty": False}
        assert theirs(log)["width"] == width
    table = in_terminal(tabulate(gather([app.folder]).fleet))
    assert "width=4" in table
    assert "width=6" in table


@pytest.mark.slow
def test_the_command_of_a_run_repeats_it(app):
    """From another folder, with another configuration file, and where Hydra changes into the job's folder."""
    elsewhere = app.folder.parent
    words = ("--config-name", "other", "width=2", "hydra.job.chdir=true")
    app.run(*words, program=("their app/train.py",), cwd=elsewhere)
    (log,) = (read_run(path) for path in elsewhere.glob("outputs/**/run.jsonl"))
    assert log.info.command == "python 'their app/train.py' --config-name=other width=2"
    assert log.info.git == {"commit": app.commit, "dirty": False}  # of the program, not of where it was started
    program, *arguments = shlex.split(log.info.command)[1:]
    app.run(*arguments, program=(program,), cwd=elsewhere)
    first, second = (read_run(path) for path in sorted(elsewhere.glob("outputs/**/run.jsonl")))
    assert first.info.seed == second.info.seed == 8
    assert [record.loss for record in first.records] == [record.loss for record in second.records]


@pytest.mark.slow
def test_a_module_is_started_as_a_module_and_a_changed_file_of_theirs_is_admitted(app):
    app.write("theirs/train.py", APP.replace('config_path="conf"', 'config_path="../conf"'))
    app.git("add", ".")
    app.run("width=2", program=("-m", "theirs.train"))
    (log,) = app.logs()
    assert log.info.command == "python -m theirs.train width=2"
    assert log.info.git == {"commit": app.commit, "dirty": True}


FOLDS = """
import hydra, torch
from hydra.utils import instantiate
from diagnostics import MemorySink
from diagnostics.configs import register

register()

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    for fold in range(3):
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler, memory = torch.amp.GradScaler("cpu"), MemorySink()
        options = {"scaler": scaler, "accumulate": 2, "sinks": [memory]}
        with instantiate(cfg.diagnostics)(model, optimizer, **options) as monitor:
            for _ in range(2):
                with torch.autocast("cpu", torch.float16):
                    loss = model(torch.ones(4, 3)).mean() / 2
                scaler.scale(loss).backward()
            monitor.clip_and_step()
        assert [record.backward_passes for record in memory.records] == [2]
        assert not monitor.violations

main()
"""


@pytest.mark.slow
def test_a_job_may_make_several_monitors_with_options_and_sinks_of_the_program_s_own(app):
    app.write("folds.py", FOLDS)
    app.run("diagnostics/sink=[runlog]", program=("folds.py",))
    (folder,) = app.folder.glob("outputs/*/*")
    logs = [read_run(folder / place / "run.jsonl") for place in (".", "run_2", "run_3")]
    assert [(log.end.status, len(log.records)) for log in logs] == [("finished", 1)] * 3


NOTEBOOK = """
from hydra import compose, initialize
from hydra.utils import instantiate
import torch
from diagnostics.configs import register

register()
for _ in range(2):  # a cell that is run again
    with initialize(version_base="1.3", config_path="conf"):
        cfg = compose("app", overrides=["diagnostics/clip=norm", "diagnostics.clip.max_norm=0.5"])
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with instantiate(cfg.diagnostics)(model, optimizer) as monitor:
        model(torch.ones(4, 3)).mean().backward()
        monitor.clip_and_step()
        print(monitor.records[0].clip.max_norm)
"""


def test_a_notebook_that_composes_without_hydra_s_main_is_measured_too(app):
    app.write("notebook.py", NOTEBOOK)
    output, errors = app.run(program=("notebook.py",))
    assert output.splitlines().count("0.5") == 2
    assert errors == ""
    logs = [read_run(app.folder / name) for name in ("run.jsonl", "run_2/run.jsonl")]
    for log in logs:
        assert (log.info.name, log.info.seed, log.info.device) == ("Linear", 1, "cpu")
        assert log.info.git == {"commit": app.commit, "dirty": False}
        assert log.info.directory == str(app.folder)
        assert "torch" in log.info.versions


TYPED = """
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING

from diagnostics.configs import register


@dataclass
class Settings:
    defaults: Any = ({"diagnostics": "mine"}, "_self_")
    lr: float = 0.1
    diagnostics: Any = MISSING


register()
ConfigStore.instance().store("settings", Settings)


@hydra.main(version_base="1.3", config_path="conf", config_name="settings")
def main(cfg):
    import torch

    model = torch.nn.Linear(3, 1)
    instantiate(cfg.diagnostics)(model, torch.optim.SGD(model.parameters(), lr=cfg.lr)).close()
    print(cfg.diagnostics.every, cfg.diagnostics.clip.max_norm, cfg.diagnostics.on_violation.name)


main()
"""


def test_an_app_with_a_typed_configuration_may_have_its_own_option_on_top_of_ours(app):
    app.write("typed.py", TYPED)
    app.write("conf/diagnostics/mine.yaml", "defaults: [default, override clip: norm]\nevery: 3\non_violation: raise\n")
    output, _ = app.run("diagnostics.clip.max_norm=0.25", "diagnostics/sink=[]", program=("typed.py",))
    assert output == "3 0.25 raise\n"
    _, errors = app.run("diagnostics.every=often", program=("typed.py",), code=1)
    assert "Value 'often' of type 'str' could not be converted to Integer" in errors


def test_hydra_s_own_section_without_a_running_job_is_no_job(tmp_path, monkeypatch):
    """As people set it to resolve ``${hydra:...}`` in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    register()
    with initialize(None, version_base="1.3"):
        config = compose(overrides=["+diagnostics=default"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    model = nn.Linear(2, 1)
    instantiate(config.diagnostics)(model, torch.optim.SGD(model.parameters())).close()
    assert read_run(tmp_path / "run.jsonl").info.directory == str(tmp_path)


def test_registering_loads_nothing_heavy():
    code = (
        "import sys\nfrom diagnostics.configs import register\nregister()\nregister()\n"
        "print({'torch', 'wandb', 'numpy', 'sklearn', 'vl_convert'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
