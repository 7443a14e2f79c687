"""Runs that stop when they are sick: how they end, what that saved, and what is known about what it cost."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diagnostics import read_run
from diagnostics.cli import assemble, report
from diagnostics.configs import CONF, resolve
from diagnostics.jobs import ReportSweep
from diagnostics.records import ClipRecord, RunEnd, RunInfo, StepRecord, Verdict
from diagnostics.reports.stopping import tell_stopping
from diagnostics.runlog import Run

SICK = ("model.activation=sigmoid", "model.depth=8", "optimizer=sgd", "trainer.patience=20", "sink=[console,runlog]")


def test_a_sick_run_stops_when_patience_ends_and_still_finishes_cleanly(start, capsys):
    start(*SICK, "diagnostics.on_diagnosis=stop")
    output, errors = capsys.readouterr()
    (log,) = Path("outputs").glob("*/run.jsonl")
    run = read_run(log)
    assert run.end.status == "stopped"
    assert run.end.steps == len(run.records) == 21
    assert run.end.error == "vanishing (severe) has stood since step 0"
    assert run.end.verdict.condition == "vanishing"
    assert "stopped after 21 steps: vanishing (severe) has stood since step 0" in output
    assert "eval/accuracy 0." in output
    assert "after 21 steps" in output.splitlines()[-2]
    assert errors.startswith("vanishing (severe)")


def test_the_same_run_goes_on_where_it_is_only_told(start):
    start(*SICK, "trainer.steps=30")
    (log,) = Path("outputs").glob("*/run.jsonl")
    assert (read_run(log).end.status, read_run(log).end.steps) == ("finished", 30)


def test_a_run_that_recovers_in_time_is_not_stopped(start):
    start("model.depth=8", "trainer.steps=200", "trainer.patience=60", "sink=[runlog]", "diagnostics.on_diagnosis=stop")
    (log,) = Path("outputs").glob("*/run.jsonl")
    run = read_run(log)
    assert run.end.status == "finished"
    assert [one.condition for one in run.diagnoses if one.severity >= 2 and one.cleared] == ["vanishing"]


def test_the_monitor_is_told_to_warn_where_the_loop_stops():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parts = assemble(resolve(compose("train", overrides=["diagnostics.on_diagnosis=stop", "trainer.device=cpu"])))
    assert (parts.stop_when_sick, parts.monitoring["on_diagnosis"]) == (True, "warn")


def run(name, *, accuracy, reaction="stop", status="finished", steps=600, **model):
    config = {
        "trainer": {"steps": 600, "seed": 0},
        "optimizer": {"lr": 0.1},
        "model": {"name": name, **model},
        "diagnostics": {"on_diagnosis": reaction},
    }
    clip = ClipRecord("none", 2.0, None, 1.0, None, applied=False, total_norm_after=1.0)
    record = StepRecord(steps - 1, clip, metrics={"eval/accuracy": accuracy})
    sick = Verdict("vanishing", 2, "vanishing") if status == "stopped" else Verdict("healthy", 0, "healthy")
    end = RunEnd(status, "", steps, sick)
    return Run(RunInfo(name, config=config), (record,), (), end, Path(name))


SOUND = run("sound", accuracy=0.95)
STOPPED = run("deep", accuracy=0.1, status="stopped", steps=300)


def test_steps_are_saved_and_what_is_not_known_is_said():
    saved, unknown = tell_stopping([SOUND, STOPPED])
    assert saved == "Stopped when sick: 1 of 2 runs, which saved 300 of 1,200 steps."
    assert unknown.startswith("What 1 of them would have become is not known: run the same with")


def test_twins_tell_whether_a_good_run_was_stopped():
    saved, outcome = tell_stopping([SOUND, STOPPED, run("deep", accuracy=0.2, reaction="record")])
    assert "saved 300 of 1,200" in saved
    assert outcome.startswith(
        "None of them would have had a good outcome: their twins that went on reached at most 21%"
    )
    _, outcome = tell_stopping([SOUND, STOPPED, run("deep", accuracy=0.9, reaction="record")])
    assert outcome == "1 of them would have had a good outcome: deep (95%) of the best accuracy."


def test_without_a_healthy_run_nothing_tells_what_is_good():
    verdict = Verdict("vanishing", 2, "vanishing")
    twin = run("deep", accuracy=0.1, reaction="record")
    _, outcome = tell_stopping([STOPPED, replace(twin, end=replace(twin.end, verdict=verdict))])
    assert outcome.startswith("Nothing tells what a good outcome is")


def test_a_run_of_another_configuration_or_one_that_did_not_finish_is_no_twin():
    for other in (
        run("deep", accuracy=0.2, reaction="record", width=3),
        run("deep", accuracy=0.2, reaction="record", status="failed"),
    ):
        assert "is not known" in list(tell_stopping([SOUND, STOPPED, other]))[1]


def test_nothing_is_said_where_no_run_could_be_stopped_and_no_more_than_that_where_none_was():
    assert list(tell_stopping([run("a", accuracy=0.9, reaction="warn"), replace(STOPPED, info=None)])) == []
    assert list(tell_stopping([SOUND])) == ["Stopped when sick: 0 of 1 runs, which saved 0 of 600 steps."]


def test_a_sweep_says_at_its_end_what_stopping_saved_and_so_does_the_report(start, capsys, monkeypatch):
    start(
        "-m",
        *SICK[:3],
        "trainer.patience=20",
        "trainer.steps=40",
        "sink=[runlog]",
        "diagnostics.on_diagnosis=stop,record",
    )
    *_, stopped, outcome, empty, page = capsys.readouterr().out.splitlines()
    assert stopped == "Stopped when sick: 1 of 1 runs, which saved 19 of 40 steps."
    assert outcome.startswith("Nothing tells what a good outcome is")
    (sweep,) = Path("multirun").iterdir()
    assert (empty, Path(page.split(": ")[-1]).name) == ("", "report.html")
    assert [file.name for file in sweep.rglob("*.html")] == ["report.html"]
    monkeypatch.setattr(sys, "argv", ["diagnostics-report", str(sweep)])
    report()
    assert stopped in capsys.readouterr().out


def test_the_depth_sweep_has_twelve_jobs_that_stop_and_twelve_twins():
    params = OmegaConf.load(CONF / "experiment" / "depth_sweep.yaml").hydra.sweeper.params
    jobs = 1
    for values in params.values():
        jobs *= len(str(values).split(","))
    assert jobs == 24
    assert params["diagnostics.on_diagnosis"] == "stop,record"


def test_a_sweep_without_run_logs_has_nothing_to_tell(capsys):
    ReportSweep().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": "nowhere"}}}))
    assert capsys.readouterr().out == ""
