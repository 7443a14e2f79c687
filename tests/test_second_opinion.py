"""A sick run asked again: what each remedy makes of it, by outcome and by verdict."""

from __future__ import annotations

from diagnostics.configs import register_trainers, resolve
from diagnostics.jobs import recompose
from diagnostics.records import Remedy, Verdict
from diagnostics.reports.view import describe
from diagnostics.runlog import read_run
from diagnostics.second_opinion import Outcome, read_second_opinion, second_opinion

HEALTHY, VANISHING = Verdict("healthy", 0, ""), Verdict("vanishing", 3, "")
REMEDIES = [Remedy("one", "a=1"), Remedy("words"), Remedy("two", "b=2 c=3"), Remedy("three", "d=4")]


def told(outcomes, accuracy=0.1):
    lines = []
    second_opinion("vanishing", REMEDIES, outcomes.__getitem__, accuracy=accuracy, steps=200, say=lines.append)
    return lines


def test_what_heals_is_told_and_the_best_of_it():
    lines = told({"a=1": Outcome(0.7, HEALTHY), "b=2 c=3": Outcome(0.9, HEALTHY), "d=4": Outcome(0.2, VANISHING)})
    assert lines == [
        "second opinion on vanishing, 200 steps each; without a remedy: accuracy 0.10",
        "  a=1: healed: accuracy 0.70, healthy",
        "  b=2 c=3: healed: accuracy 0.90, healthy",
        "  d=4: not healed: accuracy 0.20, vanishing",
        "  best: b=2 c=3",
    ]


def test_a_good_verdict_without_a_good_outcome_heals_nothing_nor_the_other_way_round():
    lines = told({"a=1": Outcome(0.11, HEALTHY), "b=2 c=3": Outcome(0.9, VANISHING), "d=4": Outcome(0.5, HEALTHY)})
    assert [line.split(": ")[1] for line in lines[1:4]] == ["not healed"] * 3
    assert lines[-1] == "  none of them heals in so few steps."


def test_without_overrides_there_is_nothing_to_try():
    lines = []
    opinion = second_opinion("dead", [Remedy("words")], {}.__getitem__, accuracy=0.1, steps=50, say=lines.append)
    assert (opinion.trials, opinion.best) == ((), None)
    (line,) = lines
    assert line.endswith("no remedy has an override that could be tried.")


def test_overrides_of_a_group_that_is_chosen_anew_are_left_behind():
    register_trainers()
    overrides = ["model=rnn", "task=temporal_order", "model.activation=relu", "trainer.seed=3", "trainer.steps=900"]
    config = resolve(recompose(overrides, ["model=lstm", "trainer.steps=50"]))
    assert config["model"]["_target_"].endswith("LSTM")
    assert (config["trainer"]["seed"], config["trainer"]["steps"]) == (3, 50)
    assert config["task"]["lag"] == 10


SHORT = ("trainer.steps=600", "model.width=32", "optimizer=sgd", "sink=[]", "diagnostics.second_opinion=true")


def test_a_sick_run_is_asked_again_and_the_first_remedy_heals_it(start, capsys):
    start("model.activation=sigmoid", "model.depth=8", *SHORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("second opinion on vanishing, 200 steps each; without a remedy: accuracy 0.")
    assert lines[2].startswith("  model.norm=layer model.residual=true: healed: ")
    assert len(lines) >= 5


def test_the_run_log_keeps_what_healed(start, capsys, tmp_path):
    start("model.activation=sigmoid", "model.depth=8", *(one for one in SHORT if one != "sink=[]"), "sink=[runlog]")
    log = next(tmp_path.rglob("run.jsonl"))
    run, opinion = read_run(log), read_second_opinion(log)
    assert (opinion.condition, opinion.steps, run.end.verdict.condition) == ("vanishing", 200, "vanishing")
    told = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for trial in opinion.trials:
        word = "healed" if trial.healed else "not healed"
        assert f"{trial.override}: {word}: accuracy {trial.accuracy:.2f}, {trial.condition}" in told
    assert opinion.trials[0].healed
    assert f"best: {opinion.best}" in told
    (shown,) = (one for one in describe(run)["troubles"] if one["title"].startswith("vanishing"))
    by_override = {one["override"]: one["tried"] for one in shown["remedies"]}
    assert by_override[opinion.trials[0].override] == f"{opinion.trials[0]} after 200 steps"


def test_a_healthy_run_is_not_asked_again(start, capsys):
    start("model.depth=3", *SHORT, "trainer.steps=20")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_log_without_a_second_opinion_has_none(start, tmp_path):
    start("model.depth=2", "trainer.steps=3", "sink=[runlog]")
    assert read_second_opinion(next(tmp_path.rglob("run.jsonl"))) is None
