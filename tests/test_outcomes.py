"""Outcome labels and the tables that hold diagnoses against them."""

import ast
import re
from pathlib import Path

import pytest

from diagnostics import Diagnosis
from diagnostics.configs import compose_settings
from diagnostics.outcomes import agreement, labels
from diagnostics.outcomes.agreement import Healing, Judgement, agreement_page, heal, heal_each, healing_page, judge
from diagnostics.outcomes.labels import ENOUGH, Case, Label, Result, Runs, label, merge, read_table, twins, write_table

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "scripts" / "outcomes"
CASES = read_table(TABLES / "cases.csv", Case)
LABELS = read_table(TABLES / "labels.csv", Label)
DEEP = "task=digits model=mlp model.depth=6 model.width=8 model.activation=sigmoid optimizer=sgd clip=none"


# ── the committed labels ──


def test_there_are_sixty_configurations_with_three_seeds_each_over_tasks_models_optimizers_and_depths():
    assert sorted((one.overrides, one.seed) for one in LABELS) == sorted(
        (case.overrides, seed) for case in CASES for seed in range(3)
    )
    assert len({case.overrides for case in CASES}) >= 60
    words = {word for case in CASES for word in case.overrides.split()}
    assert words >= {f"task={task}" for task in ("digits", "temporal_order", "adding", "pysource")}
    assert words >= {f"model={model}" for model in ("mlp", "cnn", "rnn", "gru", "lstm", "gpt")}
    assert words >= {f"optimizer={optimizer}" for optimizer in ("sgd", "adam", "adamw")}
    assert words >= {f"model.depth={depth}" for depth in (2, 4, 12, 40)}


HELD_OUT = {"held_out": (3, 4), "second_held_out": (5, 6), "third_held_out": (7, 8)}


@pytest.mark.parametrize(("name", "seeds"), HELD_OUT.items())
def test_what_was_held_out_shares_no_configuration_and_no_seed_with_the_other_tables(name, seeds):
    held_out = read_table(TABLES / f"{name}.csv", Label)
    cases = read_table(TABLES / f"{name}_cases.csv", Case)
    assert [(one.overrides, one.seed) for one in held_out] == [(one.overrides, seed) for one in cases for seed in seeds]
    assert len(cases) >= 15
    others = [CASES, *(read_table(TABLES / f"{other}_cases.csv", Case) for other in HELD_OUT if other != name)]
    assert not {one.overrides for one in cases} & {one.overrides for table in others for one in table}


@pytest.mark.parametrize(
    ("table", "most"),
    [("agreement", 0), ("held_out_agreement", 0), ("second_held_out_agreement", 0), ("third_held_out_agreement", 1)],
)
def test_hardly_a_run_that_learns_is_called_sick_in_the_committed_tables(table, most):
    """The one is an LSTM under SGD, which learned in the last fifth of its run what its gradient had hardly told it."""
    judgements = read_table(TABLES / f"{table}.csv", Judgement)
    assert len([one for one in judgements if one.label == "well" and one.at_end != "healthy"]) <= most


def test_a_run_is_sick_where_it_ends_below_nine_tenths_of_its_twin_and_only_then_has_a_reason():
    for one in LABELS:
        near = abs(one.score - ENOUGH * one.twin_score) < 1e-4  # the table holds four digits
        assert near or (one.label == "sick") == (one.score < ENOUGH * one.twin_score), one
        assert (one.reason in {"gradient", "nonfinite", "other"}) if one.label == "sick" else one.reason == ""
        assert bool(one.healed_by) == (one.reason == "gradient")


def test_labels_are_made_without_any_diagnosis():
    nodes = list(ast.walk(ast.parse(Path(labels.__file__).read_text())))
    used = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "module", "name")}
    assert "diagnostics.monitor" in used
    assert not {
        name
        for name in used
        if name and re.search("diagnos[ei]s?|verdict|fit|threshold", name.removeprefix("diagnostics"))
    }


@pytest.mark.parametrize("overrides", sorted({twin for case in CASES for twin in twins(case.overrides)}))
def test_every_twin_is_shallow_and_sound(overrides):
    settings = compose_settings(overrides.split())
    assert settings["model"].get("depth", 1) <= 2
    assert settings["trainer"]["precision"] == "fp32"
    assert settings["clip"]["max_norm"] == 1.0
    assert settings["task"].get("lag", 4) == 4


def test_a_twin_keeps_task_optimizer_and_steps_and_tries_the_default_rate_too():
    own, default = twins(f"{DEEP} optimizer.lr=5.0 optimizer.momentum=0.5 trainer.steps=7 trainer.precision=fp16")
    assert {"task=digits", "optimizer=sgd", "optimizer.momentum=0.5", "trainer.steps=7"} <= set(default.split())
    assert set(own.split()) - set(default.split()) == {"optimizer.lr=5.0"}


def test_another_model_or_optimizer_comes_without_the_old_one_s_keys():
    assert merge("model=rnn model.width=8 optimizer=sgd optimizer.lr=0.1", "optimizer=adamw") == (
        "model=rnn model.width=8 optimizer=adamw"
    )
    assert merge("model=rnn model.width=8", "model=rnn") == "model=rnn model.width=8"


# ── labelling ──


class Known:
    """Runs whose scores are given by the overrides that they contain."""

    def __init__(self, scores, **sick):
        self.scores, self.sick, self.asked = scores, sick, []

    def result(self, overrides, seed, *, logged=False):
        self.asked.append(overrides)
        if overrides == DEEP:
            return Result(overrides, seed, **{"score": 0.1, "best": 0.1, "skipped": 0.0, "finite": True, **self.sick})
        score = next((score for words, score in self.scores.items() if words in overrides), 0.1)
        return Result(overrides, seed, score, score, 0.0, finite=True)


TWIN = {"model.depth=2": 0.95}


@pytest.mark.parametrize(
    ("scores", "sick", "expected"),
    [
        (TWIN, {"score": 0.94}, ("well", "")),
        (TWIN, {}, ("sick", "other")),
        ({**TWIN, "norm=layer": 0.9}, {}, ("sick", "gradient")),
        ({**TWIN, "init=orthogonal": 0.9}, {}, ("sick", "gradient")),
        ({**TWIN, "norm=layer": 0.8}, {}, ("sick", "other")),
        ({**TWIN, "norm=layer": 0.9}, {"finite": False, "score": 0.0}, ("sick", "nonfinite")),
        ({**TWIN, "norm=layer": 0.9}, {"skipped": 0.6}, ("sick", "nonfinite")),
        ({"model.depth=2": 0.1}, {}, ("well", "")),
    ],
)
def test_a_run_is_labelled_by_its_twin_and_its_reason_found_by_repairs(scores, sick, expected):
    found = label(Known(scores, **sick), Case("any", DEEP), seed=0)
    assert (found.label, found.reason) == expected


def test_a_well_run_costs_no_repairs():
    known = Known(TWIN, score=0.95)
    label(known, Case("any", DEEP), seed=0)
    assert known.asked == [DEEP, *twins(DEEP)]


def test_runs_that_were_interrupted_go_on_where_they_stopped(tmp_path, monkeypatch):
    trained = []

    def train(overrides, seed, log=None):
        trained.append((overrides, seed))
        if log:
            log.touch()
        return Result(overrides, seed, 0.5, 0.6, 0.0, finite=True)

    monkeypatch.setattr(labels, "train", train)
    first = Runs(tmp_path).result("a=1", 0, logged=True)
    again = Runs(tmp_path)
    assert again.result("a=1", 0, logged=True) == again.result("a=1", 0) == first
    assert trained == [("a=1", 0)]
    again.result("a=1", 1)
    again.log("a=1", 0).unlink()
    again.result("a=1", 0, logged=True)
    assert trained == [("a=1", 0), ("a=1", 1), ("a=1", 0)]


def test_a_run_that_is_watched_ends_where_an_unwatched_one_does(tmp_path):
    overrides = f"{DEEP} trainer.steps=6"
    assert labels.train(overrides, 0, tmp_path / "run.jsonl") == labels.train(overrides, 0)


def test_tables_come_back_as_they_were_written(tmp_path):
    rows = [Result("a=1 b=2", 0, 0.25, 0.5, 0.0, finite=False), Result("c=3", 1, 1.0, 1.0, 0.1, finite=True)]
    write_table(tmp_path / "rows.csv", rows)
    assert read_table(tmp_path / "rows.csv", Result) == rows


# ── diagnoses against labels ──


def labelled(overrides=DEEP, seed=0, score=0.1, verdict="sick", reason="gradient"):
    return Label("vanishing", overrides, seed, score, score, 0.95, verdict, reason, "", "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("logs"))


@pytest.mark.parametrize(
    ("verdict", "reason", "agrees"), [("sick", "gradient", "yes"), ("sick", "other", ""), ("well", "", "no")]
)
def test_a_vanishing_run_is_judged_from_its_log(runs, verdict, reason, agrees):
    found = judge(runs, labelled(f"{DEEP} trainer.steps=4", verdict=verdict, reason=reason))
    assert (found.at_init, found.at_end, found.agrees) == ("vanishing", "vanishing", agrees)


def test_a_remedy_is_tried_and_judged_by_its_score(runs, monkeypatch):
    sick = labelled(f"{DEEP} trainer.steps=4")
    found = heal(runs, sick)
    assert found.condition == "vanishing"
    key, _, value = found.remedy.partition("=")
    assert found.healed_score == round(labels.train(merge(sick.overrides, f"{key}={value}"), 0).score, 4)
    assert not found.healed  # four steps teach nothing
    monkeypatch.setattr(agreement, "worst", lambda _diagnoses: None)
    assert heal(runs, sick) is None


def test_a_notice_an_unconfirmed_and_a_cleared_diagnosis_are_no_verdict():
    serious = Diagnosis("vanishing", 2, 0, 0, {}, "It fades.")
    severe = Diagnosis("exploding", 3, 5, 0, {}, "It grows.")
    unsure = Diagnosis("exploding", 4, 0, 0, {}, "It grows.", confirmed=False)
    past = Diagnosis("exploding", 4, 0, 0, {}, "It grew.", cleared=9)
    assert agreement.worst([serious, unsure, past]) == serious
    assert agreement.worst([serious, severe]) == severe
    assert agreement.worst([unsure, past]) is None


def test_each_configuration_is_healed_once_where_its_gradient_made_it_sick_and_that_was_seen(monkeypatch):
    rows = [
        labelled("a=1", 0, verdict="well", reason=""),
        labelled("a=1", 1),
        labelled("a=1", 2),
        labelled("a=1", 3),
        labelled("b=1", 0, reason="other"),
        labelled("c=1", 0, reason="nonfinite"),
    ]
    unseen = rows[1]
    monkeypatch.setattr(agreement, "heal", lambda _runs, one: None if one is unseen else one)
    assert heal_each(None, rows) == [rows[2], rows[5]]


def test_the_page_counts_what_disagrees_and_has_two_rows_for_each_condition():
    page = agreement_page(
        [
            Judgement("k", "a=1", 0, "sick", "gradient", "vanishing", "vanishing", "yes"),
            Judgement("k", "a=1", 1, "sick", "gradient", "vanishing", "healthy", "no"),
            Judgement("k", "a=1", 2, "sick", "other", "healthy", "healthy", ""),
            Judgement("k", "b=1", 0, "well", "", "healthy", "exploding", "no"),
            Judgement("k", "b=1", 1, "well", "", "healthy", "healthy", "yes"),
        ]
    )
    assert "called healthy at the end: **1** of 2" in page
    assert "called sick at the end: **1** of 2" in page
    for line in (
        "| healthy | at init | 3 | 0 | 0 | 1 | 2 |",
        "| healthy | at the end | 3 | 1 | 0 | 1 | 1 |",
        "| vanishing | at init | 2 | 2 | 0 | 0 | 0 |",
        "| vanishing | at the end | 1 | 1 | 0 | 0 | 0 |",
        "| sick | vanishing | healthy | 1 | `a=1` |",
        "| well | healthy | exploding | 0 | `b=1` |",
        "| k | `b=1` | well | healthy | 1 exploding, 1 healthy | 1 no, 1 yes |",
    ):
        assert line in page


def test_the_healing_page_counts_by_condition():
    page = healing_page(
        [
            Healing("k", "a=1", 0, "vanishing", "model.init=kaiming", 0.1, 0.9, 0.95, healed=True),
            Healing("k", "b=1", 0, "vanishing", "lower the rate", 0.1, 0.0, 0.95, healed=False),
        ]
    )
    assert "healed **1** of 2 sick runs" in page
    assert "| vanishing | 2 | 1 |" in page
