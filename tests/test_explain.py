"""The explanations: one for everything that a message may name, and examples that are what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from diagnostics import Monitor, contract
from diagnostics.diagnosis.conditions import CONDITIONS
from diagnostics.explain import AROUND, HEALTHY, LOOP, SECTIONS, contents, explain, main, names, page
from diagnostics.records import WARNING

RULES = (
    "missing_zero_grad",
    "zero_grad_before_step",
    "clip_before_backward",
    "clip_after_step",
    "clip_mid_accumulation",
    "clip_scaled_grads",
    "clip_subset",
    "clip_ineffective",
    "param_not_in_optimizer",
    "optimizer_param_not_in_model",
    "param_not_registered",
    "no_grad_flow",
    "step_without_grads",
    "no_update",
    "window_size",
    "dropped_window",
    "rank_divergence",
)
"""All that a loop can be told of."""
ROOT = Path(__file__).parents[1]
TWO_PROCESSES = {"rank_divergence"}
NAMES = [one for some in names() for one in some]


def test_everything_that_a_message_may_name_has_a_page():
    conditions, rules = names()
    assert conditions == [*CONDITIONS, HEALTHY]
    assert rules == sorted(RULES)
    assert set(contract.REMEDIES) <= set(rules)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_all_its_parts_and_fits_a_terminal(name):
    found = page(name)
    assert found.name == name
    assert len(found.what) > 60
    assert tuple(found.sections) == tuple(one for one in SECTIONS if name != HEALTHY or one != "Bad")
    assert all(found.sections.values())
    assert max(map(len, explain(name).splitlines())) <= 124
    for example in ("Bad", "Good"):
        assert len(found.sections.get(example, "").splitlines()) <= 12
    assert "```" not in explain(name)


def run(example):
    """Runs an example in the loop that the page shows, with nothing but the Monitor's voice changed."""
    torch.manual_seed(0)
    space = {}
    exec(AROUND, space)
    space["Monitor"] = partial(Monitor, sinks=[], on_violation="record", on_diagnosis="record")
    exec(example, space)
    if "monitor" not in space:
        exec(LOOP, space)
    return space["monitor"]


def shown_by(monitor):
    conditions = {one.condition for one in monitor.diagnoses if one.confirmed}
    return conditions | {violation.rule for violation in monitor.violations}


EXECUTED = [name for name in NAMES if name not in TWO_PROCESSES]


@pytest.mark.parametrize("name", [name for name in EXECUTED if name != HEALTHY])
def test_a_bad_example_shows_what_its_page_is_about(name):
    if name in RULES and name not in contract.REMEDIES:
        pytest.skip("this rule is not judged yet")
    assert name in shown_by(run(page(name).sections["Bad"]))


@pytest.mark.parametrize("name", EXECUTED)
def test_a_good_example_is_lawful_and_healthy(name):
    monitor = run(page(name).sections["Good"])
    assert monitor.violations == ()
    assert [one for one in monitor.diagnoses if one.confirmed and one.severity >= WARNING and not one.cleared] == []
    assert name not in {one.condition for one in monitor.diagnoses if one.confirmed and not one.cleared}


def said(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["diagnostics-explain", *arguments])
    main()
    return capsys.readouterr().out


def test_the_command_prints_a_page_and_without_a_name_the_contents(monkeypatch, capsys):
    assert said(monkeypatch, capsys, "vanishing") == explain("vanishing") + "\n"
    assert said(monkeypatch, capsys, "Missing", "zero-grad").startswith("missing_zero_grad\n====")
    everything = said(monkeypatch, capsys)
    assert everything == contents() + "\n"
    assert all(re.search(rf"^  {name} ", everything, flags=re.MULTILINE) for name in NAMES)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("vanish", "There is no condition or rule 'vanish'; did you mean vanishing?"),
        ("xyzzy", "There is no condition or rule 'xyzzy'; diagnostics-explain lists all."),
    ],
)
def test_an_unknown_name_gets_one_sentence(monkeypatch, capsys, wrong, sentence):
    with pytest.raises(SystemExit) as end:
        said(monkeypatch, capsys, wrong)
    assert end.value.code == sentence


def test_the_command_is_installed_and_also_a_module():
    assert 'diagnostics-explain = "diagnostics.explain:main"' in (ROOT / "pyproject.toml").read_text()
    command = [sys.executable, "-m", "diagnostics.explain", "dead"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dead\n====")
