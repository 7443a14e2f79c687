"""README is true: its commands and code run as they stand, its tables name what there is, its tree is the tree."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from diagnostics import ClipByNorm, Monitor
from diagnostics.configs import CONF, register_trainers, resolve
from diagnostics.contract.rules import REMEDIES
from diagnostics.diagnosis.conditions import AT_RECORDED_STEPS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
FILES = {FILE.match(text)[1]: text for _, text in FENCED if FILE.match(text)}
BLOCKS = [text for language, text in FENCED if language == "python" and not FILE.match(text)]
SHELL = [text for language, text in FENCED if language == "sh"]


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """The cells of the tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not set(line) <= set("|- ")]


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_first_commands_are_make_run_and_make_test():
    assert [line.split("#")[0].strip() for line in SHELL[0].strip().splitlines()] == ["make run", "make test"]


@pytest.fixture
def _nothing_added():
    """What a block adds to the lists of rules and conditions is taken away again."""
    known = [(one, dict(one)) for one in (REMEDIES, AT_RECORDED_STEPS)]
    yield
    for one, before in known:
        one.clear()
        one.update(before)


@pytest.mark.usefixtures("_nothing_added")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_python_blocks_run_without_a_warning(number, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        namespace = {}
        exec(compile(BLOCKS[number], f"README block {number}", "exec"), namespace)
        with contextlib.suppress(KeyError):
            namespace["monitor"].close()
    assert capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1])
def test_the_loops_to_copy_are_healthy_and_at_most_twelve_lines(number, capsys):
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), namespace := {})
    namespace["monitor"].close()
    assert "healthy" in capsys.readouterr().out
    assert len(BLOCKS[number].strip().splitlines()) <= 12


def test_the_notebook_s_chain_is_called_vanishing(capsys):
    (block,) = [text for text in BLOCKS if "monitor.plot()" in text]
    exec(compile(block, "the notebook", "exec"), namespace := {})
    namespace["monitor"].close()
    assert "vanishing" in capsys.readouterr().out
    assert len(namespace["figure"].specification["hconcat"]) == 3


@pytest.fixture
def shown_files(tmp_path, monkeypatch):
    """The files that README shows, in a folder of their own that is the current one."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line, more=""):
    """Runs a command line as README shows it, with this interpreter's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names = [name for name in os.environ if not name.startswith(("WANDB_", "HYDRA_"))]
    found = {name: os.environ[name] for name in names} | {"PATH": path}
    line = line.replace("PYTHONPATH=.", f"PYTHONPATH=.{os.pathsep}{ROOT}")
    command = f"{line} {more}"
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, env=found, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def commands(title):
    return [line for text in SHELL if text in section(title) for line in text.strip().splitlines()]


def test_the_app_of_one_s_own_runs_alone_and_as_a_sweep(shown_files):
    alone, sweep, report = commands("In your own Hydra app")
    assert "max_norm 0.5" in shell(alone)
    shell(sweep)
    said = shell(report)
    assert "width=16" in said
    assert "width=64" in said
    assert len(list(shown_files.glob("multirun/*/*/*/run.jsonl"))) == 2


def test_a_model_and_a_task_of_one_s_own_train(shown_files):
    (line,) = commands("How to add …")
    assert "after 20 steps" in shell(line, "trainer.steps=20 sink=[console,runlog]")
    assert len(list(shown_files.glob("outputs/*/run.jsonl"))) == 1


@pytest.mark.usefixtures("_nothing_added")
@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("A statistic", "weights/kurtosis"),
        ("A rule of the loop", "scale_collapsed: Step 0 ran at loss scale 0.5."),
        ("A condition", "one_layer_rules (notice) since step 0: "),
        ("A sink", "smallest gradient at 0"),
    ],
)
def test_what_is_added_in_ten_minutes_works(capsys, title, said):
    text = section("How to add …").split(f"**{title}**")[1].split("```python\n")[1].split("```")[0]
    exec(compile(text, title, "exec"), {})
    assert said in capsys.readouterr().out


def test_every_override_that_matters_composes():
    table = section("Configuration and sweeps").split("The overrides that matter:")[1].split("\n\n")[1]
    lines = [line for row in rows(table)[1:] for line in code(row[0])]
    assert len(lines) >= 10
    register_trainers()
    for line in lines:
        words = [word for word in shlex.split(line.removeprefix("-m ")) if not word.startswith("hydra")]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            found = [word for word in words if "range(" not in word]
            resolve(compose("train", overrides=found))


def test_the_options_of_the_groups_are_those_there_are():
    table = section("Configuration and sweeps").split("| group | options |")[1].split("\n\n")[0]
    named = {name for row in rows(table) for cell in row for name in code(cell)}
    for group in ("task", "model", "optimizer", "clip"):
        options = {path.stem for path in (CONF / group).glob("*.yaml")} - {"seed_chain", "sigmoid_chain"}
        assert group in named
        assert options <= named, (group, options - named)


def keys_of_a_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, clip=ClipByNorm(max_norm=1.0), sinks=[]) as monitor:
        model(torch.ones(2, 4)).sum().backward()
        return set(monitor.clip_and_step().flat())


def test_the_keys_in_wandb_are_those_that_readme_lists():
    listed = {
        key for row in rows(section("Configuration and sweeps").split("### Keys in W&B")[1]) for key in code(row[0])
    }
    for key in keys_of_a_run():
        stem = re.sub(r"_\d{3}$", "", key)
        assert any(one == key or one.startswith(f"{stem}_") for one in listed), key
    for key in ("grad/total_norm", "depth/backward_slope", "loop/violations"):
        assert key in keys_of_a_run()


def tree():
    """Every path that README's tree shows, with the half line that stands behind it."""
    (text,) = [text for _, text in FENCED if text.startswith("diagnostics/\n")]
    stack, found = [], {}
    for line in text.splitlines():
        name, *words = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [name]
        found["".join(stack)] = " ".join(words)
    return found


def test_the_tree_is_the_tree():
    package = [
        path.relative_to(ROOT)
        for path in (ROOT / "diagnostics").rglob("*")
        if path.suffix in {".py", ".html", ".css", ".js"}
    ]
    conf = [path.relative_to(ROOT) for path in CONF.iterdir()]
    there = {str(path) for path in package} | {f"{path}/" if (ROOT / path).is_dir() else str(path) for path in conf}
    there |= {f"{folder}/" for path in package for folder in path.parents[:-1]} | {"diagnostics/explain/pages/"}
    there |= {f"scripts/{path.name}/" for path in (ROOT / "scripts").iterdir() if path.is_dir() and path.name[0] != "_"}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.py")} | {"scripts/", "conf/", "tests/"}
    there |= {"pyproject.toml", "constraints.txt", "Makefile"}
    assert set(tree()) == there


def test_every_file_of_the_tree_says_in_half_a_line_what_it_is():
    assert [path for path, words in tree().items() if len(words) < 15 and not path.endswith("/")] == []
