"""The configuration: every file works, every key says what it means, every mistake ends in one sentence."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from diagnostics import configs, schemas
from diagnostics.cli import assemble, build
from diagnostics.configs import CONF, ConfigurationError, resolve, sentence

ROOT = Path(__file__).parents[1]
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
OPTIONS = [
    f"{group}={path.stem}"
    for group in GROUPS
    if group not in {"sink", "experiment"}
    for path in sorted((CONF / group).glob("*.yaml"))
]


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def complaint(*overrides):
    """The sentence that a person gets for these overrides."""
    try:
        assemble(resolve(composed(*overrides)))
    except HydraException as error:
        return sentence(error)
    except ConfigurationError as error:
        return str(error)
    return None


def relative(path):
    return str(path.relative_to(CONF))


# What an option needs beside it, where the defaults do not fit.
COMPANIONS = {
    "model=gpt": "task=pysource",
    "model=sigmoid_chain": "task=seed_chain",
    "task=adding": "model=lstm",
    "task=pysource": "model=gpt",
    "task=temporal_order": "model=lstm",
}
DOWNLOADED = {"task=mnist", "task=cifar10"}  # built in test_tasks.py, without the network


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_can_be_built(option):
    settings = resolve(composed(option, *([COMPANIONS[option]] if option in COMPANIONS else []), "trainer.device=cpu"))
    if option in DOWNLOADED:
        return
    parts = assemble(settings)
    assert next(parts.model.parameters()).device.type == "cpu"


def test_every_sink_alone_and_all_together_compose(tmp_path):
    names = sorted(path.stem for path in (CONF / "sink").glob("*.yaml"))
    for chosen in (*([name] for name in names), names):
        sinks = resolve(composed(f"sink=[{','.join(chosen)}]"))["sink"]
        assert sorted(name for name, section in sinks.items() if section) == chosen
    sinks = resolve(composed())["sink"]
    assert build(sinks["console"], "sink.console") is not None
    build({**sinks["runlog"], "path": str(tmp_path)}, "sink.runlog").close()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_every_experiment_composes_and_begins_with_the_command_that_runs_it(path):
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    assert second == f"# python scripts/train.py experiment={path.stem}"
    assert resolve(composed(f"experiment={path.stem}"))["trainer"]["steps"] >= 1


def keys_with_comments(text):
    """Each line that sets a key, and whether a comment stands on it or right above it."""
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if re.match(r" *[A-Za-z_][\w.]*:", line) and not line.lstrip().startswith("defaults:"):
            yield line, "#" in line or above.lstrip().startswith("#")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_key_has_a_comment(path):
    silent = [line for line, spoken in keys_with_comments(path.read_text()) if not spoken]
    allowed = {
        "hydra:",
        "  job:",
        "  run:",
        "  sweep:",
        "  sweeper:",
        "  thresholds:",
        "model:",
        "optimizer:",
        "trainer:",
    }
    text_of_help = relative(path) == "hydra/help/train.yaml"
    assert [line for line in silent if line.rstrip() not in allowed and not text_of_help] == []


def test_a_key_without_a_comment_would_be_seen():
    assert list(keys_with_comments("lr: 0.1\nsteps: 3 # steps")) == [("lr: 0.1", False), ("steps: 3 # steps", True)]


def test_every_yaml_file_begins_with_what_it_is():
    assert [relative(path) for path in FILES if not path.read_text().startswith("#")] == []


def test_every_file_has_the_keys_of_its_schema():
    for name, schema in schemas.SCHEMAS.items():
        group, option = name.split("_", maxsplit=1)
        content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
        filled = {key.split("@")[1] for one in content["defaults"] if isinstance(one, dict) for key in one}
        assert {*content, *filled} - {"defaults"} == set(OmegaConf.structured(schema)) - {"_target_"}, name


def test_the_schema_offers_what_the_code_offers():
    from diagnostics.clip_schemas import ClipGrouping, ClipTarget
    from diagnostics.clipping.groups import GROUPINGS
    from diagnostics.clipping.rules import TARGETS
    from diagnostics.monitor.options import NONFINITE_POLICIES, REACTIONS
    from diagnostics.trainers.mistakes import MISTAKES
    from diagnostics.trainers.models import ACTIVATIONS, GAINS, INITS, NORMS
    from diagnostics.trainers.schedules import SCHEDULES
    from diagnostics.trainers.settings import PRECISIONS

    pairs = {
        schemas.Activation: ACTIVATIONS,
        schemas.Init: INITS,
        schemas.Norm: NORMS,
        schemas.Mistake: MISTAKES,
        schemas.Precision: PRECISIONS,
        schemas.LearningRateSchedule: SCHEDULES,
        ClipTarget: TARGETS,
        ClipGrouping: GROUPINGS,
        schemas.NonFinite: NONFINITE_POLICIES,
        schemas.Reaction: REACTIONS,
        schemas.TrainerReaction: ("warn", "stop", "raise", "record"),
    }
    for options, known in pairs.items():
        assert list(options.__members__) == list(known)
    assert list(GAINS) == list(ACTIVATIONS)


def test_defaults_of_the_thresholds_are_the_library_s_own():
    from diagnostics import Thresholds

    section = resolve(composed())["diagnostics"]["thresholds"]
    assert build(section, "diagnostics.diagnosis.thresholds") == Thresholds()


def test_our_trainer_and_the_group_for_other_people_s_apps_live_in_one_process():
    from hydra.core.config_store import ConfigStore

    configs.register()
    assert composed("diagnostics.every=3").diagnostics.every == 3
    configs.register_trainers()
    with initialize(None, version_base="1.3"):
        theirs = compose(overrides=["+diagnostics=default", "diagnostics/clip=norm"])
    assert theirs.diagnostics.clip.max_norm == 1.0
    rules = {Path(name).stem for name in ConfigStore.instance().list("diagnostics/clip")}
    assert rules == {path.stem for path in (CONF / "clip").glob("*.yaml")}
    offered = {Path(name).stem for name in ConfigStore.instance().list("diagnostics")}
    # Hydra refuses to compose where a file and a stored configuration have one name.
    assert offered.isdisjoint(path.stem for path in (CONF / "diagnostics").glob("*.yaml"))


def test_help_names_every_group_and_option():
    text = (CONF / "hydra" / "help" / "train.yaml").read_text()
    for group in GROUPS:
        (line,) = re.findall(rf"^    {group} +(.*)$", text, flags=re.MULTILINE)
        for path in sorted((CONF / group).glob("*.yaml")):
            assert re.search(rf"\b{path.stem}\b", line), (group, path.stem)


COMPOSITION = {
    "model.depht=4": "model.depht is not a key of the configuration; did you mean model.depth?",
    "+model.depht=4": "model.depht is not a key of the configuration; did you mean model.depth?",
    "sink.wandb.typo=1": "sink.wandb.typo is not a key of the configuration; "
    "sink.wandb has project, mode, wandb_group, notes, profile_every, per_layer, media, upload_run_log, alerts.",
    "trainer.steps=abc": "trainer.steps must be a whole number; got 'abc'.",
    "trainer.steps=1.5": "trainer.steps must be a whole number; got 1.5.",
    "clip.max_norm=abc": "clip.max_norm must be a number; got 'abc'.",
    "model.residual=7.5": "model.residual must be true or false; got 7.5.",
    "model.depth=null": "model.depth must be a whole number; got null.",
    "model.activation=foo": "model.activation must be one of relu, tanh, sigmoid, gelu, identity; got 'foo'.",
    "trainer.mistake=foo": f"trainer.mistake must be one of {', '.join(schemas.Mistake.__members__)}; got 'foo'.",
    "optimizer=adma": "optimizer must be one of adam, adamw, sgd; got 'adma'.",
    "sink=[consol]": "sink must be one of console, runlog, wandb; got 'consol'.",
    "trainer=x": "trainer must be one of default; got 'x'.",
    "model": "An override must have the form key=value, with quotes around special characters; got model.",
    "trainer.steps=1,2": "trainer.steps=1,2 has several values; add -m to run them all, or put brackets around a list.",
    "~model": "model must have a value; got none.",
    "model.depth=???": "model.depth must have a value; got none.",
    "model.depth=${nowhere}": "model.depth: Interpolation key 'nowhere' not found.",
    "optimizer.betas=3": "optimizer.betas: Invalid value assigned: int is not a ListConfig, list or tuple.",
}
CONSTRUCTION = {
    "clip.max_norm=-1": "clip.max_norm must be a positive number; got -1.0.",
    "clip.max_norm=nan": "clip.max_norm must be a number; got nan.",
    "optimizer.lr=nan": "optimizer.lr must be a finite number of at least 0; got nan.",
    "optimizer.lr=inf": "optimizer.lr must be a finite number of at least 0; got inf.",
    "optimizer.lr=-1": "optimizer.lr must be a finite number of at least 0; got -1.0.",
    "optimizer.betas=[0.9,1.5]": "optimizer: Invalid beta parameter at index 1: 1.5.",
    "model.depth=0": "model.depth must be at least 1; got 0.",
    "trainer.steps=0": "trainer.steps must be at least 1; got 0.",
    "trainer.batch_size=5000": "trainer.batch_size must be between 1 and 1437 for digits; got 5000.",
    "trainer.objective=accuracy": "trainer.objective must be one of eval/loss, eval/accuracy; got 'accuracy'.",
    "clip=quantile clip.quantile=10": "clip.quantile must be at most 1, as 0.1 for the tenth percentile; got 10.0.",
    "clip=zscore clip.alpha=1": "clip.alpha must be below 1; got 1.0.",
    "clip=group clip.rule.max_norm=-1": "clip.rule.max_norm must be a positive number; got -1.0.",
    "clip=group clip.by=name": "clip.rules must hold patterns of names with by='name'; got none.",
    "diagnostics.every=-1": "diagnostics.every must be 0 (never) or a number of steps; got -1.",
    "optimizer._target_=os.system": "optimizer._target_ must be a class of diagnostics or torch; got 'os.system'.",
    "optimizer._target_=torch.load": "optimizer._target_ must be a class of diagnostics or torch; got 'torch.load'.",
    "model._target_=diagnostics.trainers.loop.math.floor": "model._target_ must be a class of diagnostics or torch; "
    "got 'diagnostics.trainers.loop.math.floor'.",
    "model._target_=diagnostics.cli.Path": "model._target_ must be a class of diagnostics or torch; "
    "got 'diagnostics.cli.Path'.",
    "model._target_=torch.optim.Nothing": "model._target_ must be a class of diagnostics or torch; "
    "got 'torch.optim.Nothing'.",
}


@pytest.mark.parametrize(("override", "said"), COMPOSITION.items())
def test_what_cannot_compose_is_said_in_one_sentence(override, said):
    assert complaint(override) == said


@pytest.mark.parametrize(("override", "said"), CONSTRUCTION.items())
def test_what_only_a_constructor_can_refuse_is_said_in_one_sentence(override, said):
    assert complaint(*override.split()) == said


def test_a_group_s_rule_is_chosen_like_the_rule_itself_and_a_name_may_have_its_own():
    from diagnostics import ClipByGroup, ClipByNorm, ClipByQuantile

    own = "clip.rules={weight:{_target_:diagnostics.ClipByNorm,max_norm:0.5},bias:null}"
    settings = resolve(composed("clip=group", "clip@clip.rule=quantile", "clip.by=name", own))
    rule = build(settings["clip"], "clip")
    assert rule == ClipByGroup(ClipByQuantile(0.1), by="name", rules={"weight": ClipByNorm(0.5), "bias": None})


def test_a_device_that_is_not_there_is_said_in_one_sentence():
    said = complaint("trainer.device=cuda:99")
    assert said.startswith("trainer.device must be auto, cpu or one that this machine has; got 'cuda:99' (")
    assert "\n" not in said


def test_clipping_too_late_needs_something_to_clip_with():
    for option in ("none", "quantile"):
        assert complaint("trainer.mistake=clip_after_step", f"clip={option}").endswith("add clip=norm.")


def test_max_norm_may_be_infinite_to_only_measure():
    assert complaint("clip.max_norm=inf", "clip.norm_type=inf") is None


def test_a_job_s_folder_has_a_safe_name_of_bounded_length():
    configs.register_trainers()
    name = OmegaConf.create({"folder": "${folder_name:7,'a=../../x y,b=[1,2]'}"}).folder
    assert name == "7_a=.._.._x_y_b=_1_2"
    assert len(OmegaConf.create({"folder": f"${{folder_name:7,'{'a' * 999}'}}"}).folder) <= 120


@pytest.mark.parametrize("question", ["--help", "--cfg job"])
def test_questions_are_answered_without_loading_torch_or_wandb(question, tmp_path):
    code = (
        "import sys, diagnostics.cli\n"
        "try:\n    diagnostics.cli.train()\n"
        "finally:\n    print('loaded', {'torch', 'wandb', 'sklearn', 'vl_convert'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, *shlex.split(question)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("loaded set()")
    assert "max_norm: 1.0" in done.stdout
    assert list(tmp_path.iterdir()) == []
