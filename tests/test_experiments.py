"""The experiments and sweeps under conf/: what they start, and that W&B's agent can start every one of its runs."""

import dataclasses
import itertools
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from wandb_server import client, wandb_server

from diagnostics import read_run, schemas
from diagnostics.cli import assemble
from diagnostics.configs import CONF, resolve
from diagnostics.trainers.settings import OBJECTIVES

ROOT = Path(__file__).parents[1]
SWEEP = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# W&B and Hydra have meanings of their own for these.
TAKEN = {"sweep", "group", "state", "tags", "name", "user"}


def composed(*overrides, hydra=False):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["trainer.device=cpu", *overrides], return_hydra_config=hydra)


def keys(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys(item)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_what_to_expect_below_its_command(experiment):
    third = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()[2]
    assert re.match(r"# [A-Z].{40}", third)


def multirun(experiment):
    hydra = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text()).get("hydra", {})
    return hydra.get("sweeper", {}).get("params", {}) if hydra.get("mode") == "MULTIRUN" else {}


@pytest.mark.parametrize("experiment", [one for one in EXPERIMENTS if multirun(one)])
def test_every_value_of_a_sweep_makes_a_run(experiment):
    parser = OverridesParser.create()
    for key, values in multirun(experiment).items():
        override = parser.parse_override(f"{key}={values}")
        assert override.is_sweep_override()
        for value in override.sweep_string_iterator():
            assemble(resolve(composed(f"experiment={experiment}", f"{key}={value}")))


def test_a_sweep_over_seeds_runs_jobs_at_the_same_time():
    config = composed("experiment=precision_seeds", hydra=True)
    assert config.hydra.launcher._target_.endswith("JoblibLauncher")
    assert config.hydra.launcher.n_jobs == 2
    assert "trainer.seed" in config.hydra.sweeper.params


def test_no_key_of_ours_has_a_name_that_means_something_else_to_hydra_or_wandb():
    types = [OmegaConf.to_container(OmegaConf.structured(schema)) for schema in schemas.SCHEMAS.values()]
    sections = [
        OmegaConf.to_container(OmegaConf.structured(schema))
        for schema in (schemas.TrainConfig, schemas.WandbSinkConfig)
    ]
    found = {key for section in (*types, *sections) for key in keys(section)}
    assert found >= {field.name for field in dataclasses.fields(schemas.TrainerConfig)}
    assert not found & TAKEN


def test_the_agent_s_command_line_is_one_that_hydra_understands():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    first = {key: {"value": parameter["values"][0]} for key, parameter in SWEEP["parameters"].items()}
    words = utils.create_sweep_command_args({"args": first})["args_no_hyphens"]
    assert SWEEP["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert SWEEP["command"][-1] == "${args_no_hyphens}"
    own = SWEEP["command"][3:-1]
    config = resolve(composed(*own, *words))
    assert config["sink"]["wandb"]["mode"] == "online"
    assert config["model"]["depth"] == SWEEP["parameters"]["model.depth"]["values"][0]
    assert (ROOT / SWEEP["program"]).is_file()


def wandb_says(folder, url, *arguments):
    """What the command line of W&B prints in a folder, with a server on loopback."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    found = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "WANDB_ERROR_REPORTING": "false",
    }
    done = client(url, folder, "-m", "wandb", *arguments, base=settings, **found)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_wandb_s_own_agent_starts_the_runs_of_the_sweep_that_wandb_s_own_command_made(tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    values = [[(key, value) for value in one["values"]] for key, one in SWEEP["parameters"].items()]
    first, *_, last = map(dict, itertools.product(*values))
    with wandb_server() as server:
        server.arguments = [{**chosen, "trainer.steps": 3} for chosen in (first, last)]
        made = wandb_says(tmp_path, server.url, "sweep", "--project", "project", str(CONF / "wandb_sweep.yaml"))
        assert "sweep1" in made
        assert yaml.safe_load(server.sweep)["parameters"].keys() == SWEEP["parameters"].keys()
        wandb_says(tmp_path, server.url, "agent", "me/project/sweep1")
        logs = [read_run(path) for path in sorted(tmp_path.glob("outputs/*/run.jsonl"))]
        assert [log.end.status for log in logs] == ["finished"] * 2
        for log, chosen in zip(logs, (first, last), strict=True):
            expected = {f"{key}={value}" for key, value in chosen.items()}
            assert expected | {"trainer.steps=3", "sink.wandb.mode=online"} == set(log.info.overrides)
        assert len(server.runs) == 2
        for run in server.runs.values():
            assert (run.bucket["sweep"], run.exit_code) == ("sweep1", 0)
            assert run.summary["eval/loss"] > 0
            assert len(run.column("grad/total_norm")) == 3
            assert "run-log" in [one.type for one in server.artifacts_of(run)]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, one in SWEEP["parameters"].items() for value in one["values"]]
)
def test_every_value_that_wandb_may_hand_out_makes_a_run(key, value):
    settings = resolve(composed(f"{key}={value}"))
    assemble(settings)
    found = settings
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_wandb_optimises_what_a_run_reports_and_makes_as_many_runs_as_it_says():
    metric = SWEEP["metric"]["name"]
    assert metric in OBJECTIVES
    assert SWEEP["metric"]["goal"] == ("minimize" if OBJECTIVES[metric] > 0 else "maximize")
    runs = 1
    for parameter in SWEEP["parameters"].values():
        runs *= len(parameter["values"])
    assert f"Expect {runs} runs" in (CONF / "wandb_sweep.yaml").read_text()
