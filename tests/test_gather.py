"""The report over many runs: found wherever they lie, the sickest first, and none stops the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from diagnostics import ClipRecord, DepthFit, DiagnosticsWarning, RunEnd, RunInfo, StepRecord, Verdict, Violation
from diagnostics.records import Diagnosis, GradientStats, Layer, LayerRecord, Layers
from diagnostics.reports import gather
from diagnostics.reports.report import Report
from diagnostics.reports.request import parse
from diagnostics.reports.table import in_terminal, tabulate
from diagnostics.runlog import RunLogWriter

ROOT = Path(__file__).parent.parent


def step(number, loss=0.5, applied=False, slope=None, violations=(), rms=(), **more):
    clip = ClipRecord("norm", 2.0, 1.0, 2.0 if applied else 0.5, 0.5 if applied else 2.0, applied, 0.5)
    fit = None if slope is None else DepthFit(slope, -1.0, 0.1, depths=4, points=4)
    layers = [LayerRecord(Layer(d, str(d), "Linear"), GradientStats(1, one, one), None) for d, one in enumerate(rms)]
    return StepRecord(
        number, clip, loss=loss, fit=fit, violations=violations, recorded=True, layers=Layers(layers), **more
    )


def write(folder, name, *steps, overrides=(), verdict=None, status="finished", config=None, seed=None):
    """A run log; one that was killed if there is no verdict."""
    writer = RunLogWriter(folder)
    writer.write(RunInfo(name=name, overrides=overrides, config=config or {}, seed=seed))
    for record in steps:
        writer.write(record)
    if verdict:
        writer.write(RunEnd(status, "2026-01-01T00:00:00+00:00", len(steps), verdict))
    writer.close()


HEALTHY = Verdict("healthy", 0, "healthy")
VANISHING = Verdict("vanishing", 3, "vanishing since step 0")
BROKEN = Violation("missing_zero_grad", 1, ("weight",), "Old gradients.", "Call zero_grad().")


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "multirun" / "a=1,b=[2,3]"
    write(folder / "0_lr=0.1", "lr=0.1", step(0), step(1, 0.25, True), overrides=("lr=0.1", "s=2"), verdict=HEALTHY)
    write(folder / "1_lr=1", "lr=1", step(0, slope=-0.91), overrides=("lr=1", "s=2"), verdict=VANISHING)
    write(folder / "2_lr=2", "lr=2", step(0, violations=(BROKEN,)), overrides=("lr=2", "s=2"), verdict=HEALTHY)
    write(folder / "3_lr=3", "lr=3", step(0), overrides=("lr=3", "s=2"))
    return folder


def lines(*words):
    return list("\n".join(Report(parse([*map(str, words), "page=false"])).printed()).splitlines())


def files(*words):
    return list(Report(parse([*map(str, words)])).written())


def test_a_sweep_is_one_row_per_run_the_sickest_first_then_the_unlawful_then_the_unfinished(sweep):
    heading, *rows = [line.split() for line in lines(sweep)[:5]]
    assert heading == ["run", "verdict", "slope", "clipped", "violations", "loss", "status"]
    assert [row[0] for row in rows] == ["lr=1", "lr=2", "lr=3", "lr=0.1"]
    assert rows[0] == ["lr=1", "vanishing", "(severe)", "-0.91", "0%", "0", "0.5", "finished"]
    assert rows[1][-3:] == ["1", "0.5", "finished"]
    assert rows[2][-2:] == ["no", "end"]
    assert rows[3] == ["lr=0.1", "healthy", "–", "50%", "0", "0.25", "finished"]


def test_overrides_that_differ_have_a_column_where_the_name_does_not_tell_them(tmp_path):
    write(tmp_path / "a", "mine", overrides=("model=gpt", "lr=0.1"), verdict=HEALTHY)
    write(tmp_path / "b", "mine", overrides=("model=gpt", "lr=0.2"), verdict=HEALTHY)
    heading, first, second = lines(tmp_path)[:3]
    assert "overrides that differ" in heading
    assert [line.split()[1] for line in (first, second)] == ["lr=0.1", "lr=0.2"]
    assert "gpt" not in first


def test_runs_that_differ_only_in_their_seed_are_one_row_with_median_and_range(tmp_path):
    for seed, loss in enumerate((0.1, 0.4, 0.2)):
        sick = seed == 1
        overrides = ("model=gpt", f"trainer.seed={seed}")
        write(tmp_path / f"gpt{seed}", f"gpt{seed}", step(0, loss, slope=-0.1 * seed), overrides=overrides,
              verdict=VANISHING if sick else HEALTHY)  # fmt: skip
    write(tmp_path / "mlp", "mlp", step(0), overrides=("model=mlp", "trainer.seed=0"), verdict=HEALTHY)
    heading, gpt, mlp = lines(tmp_path)[:3]
    assert " ".join(heading.split()) == (
        "run overrides that differ verdict n sick slope clipped violations loss status"
    )
    assert " ".join(gpt.split()) == (
        "model=gpt model=gpt vanishing (severe) 3 1 -0.10 (-0.20 … -0.00) 0% 0 0.2 (0.1 … 0.4) finished"
    )
    assert mlp.split()[:5] == ["mlp", "model=mlp", "healthy", "1", "0"]


def test_runs_without_overrides_are_told_apart_by_their_configuration(tmp_path):
    for seed in range(2):
        for width in (8, 16):
            config = {"model": {"width": width}, "seed": seed}
            write(tmp_path / f"{width}-{seed}", "app", step(0), config=config, seed=seed, verdict=HEALTHY)
    rows = gather.gather([tmp_path]).fleet.rows
    assert [(row.overrides, len(row.members)) for row in rows] == [(("model.width=16",), 2), (("model.width=8",), 2)]


def test_several_runs_have_one_page_and_one_run_has_its_own_beside_its_log(sweep):
    assert files(sweep) == [str(sweep / "report.html")]
    assert files(sweep / "1_lr=1") == [str(sweep / "1_lr=1" / "page.html")]
    assert files(sweep / "1_lr=1" / "run.jsonl", f"page={sweep}/deep/own.html") == [f"{sweep}/deep/own.html"]
    for page in (sweep / "report.html", sweep / "1_lr=1" / "page.html", sweep / "deep" / "own.html"):
        assert page.read_text().startswith("<!")
    assert files(sweep, "page=false") == []


def test_figures_are_files_of_three_kinds_each(sweep):
    """Of one run all that there is to show, of several what compares them."""
    found = (Diagnosis("vanishing", 3, 0, 0, {"decades": 4.0}, "The gradient fades."),)
    faded = [step(n, rms=[1e-4, 1e-2, 1.0], slope=-2.0, diagnoses=found if n == 1 else ()) for n in range(3)]
    write(sweep / "4", "lr=4", *faded, overrides=("lr=4", "s=2"), verdict=VANISHING)
    for words, some in ((sweep / "4", "norms"), (sweep, "overlay")):
        (said,) = files(words, "page=false", f"figures={sweep / 'figures' / some}")
        written = sorted((sweep / "figures" / some).iterdir())
        assert said == f"{len(written)} files of figures: {sweep / 'figures' / some}"
        assert {path.suffix for path in written if path.stem == some} == {".pdf", ".svg", ".png"}
        assert all(path.stat().st_size > 500 for path in written)


def test_a_run_a_log_several_folders_and_the_same_twice_are_all_places(sweep):
    run = sweep / "0_lr=0.1"
    alone = ["lr=0.1"]
    assert [row.split()[0] for row in lines(run)[1:2]] == alone
    assert [row.split()[0] for row in lines(run / "run.jsonl")[1:2]] == alone
    both = lines(run, sweep / "1_lr=1", run)
    assert [row.split()[0] for row in both[1:3]] == ["lr=1", "lr=0.1"]
    assert both[3] == ""


def test_a_log_that_cannot_be_read_is_named_and_hides_no_other(sweep):
    (sweep / "3_lr=3" / "run.jsonl").write_text("no run log\n")
    report = Report(parse([str(sweep)]))
    assert len(tabulate(report.gathered.fleet).lines) == 3
    page, trouble = report.written()
    assert page.endswith("report.html")
    assert "is not a run log" in trouble


def test_a_sweep_that_goes_on_and_a_run_that_was_killed_are_judged_by_what_they_have_said_so_far(tmp_path):
    sick = Diagnosis("vanishing", 3, 0, 0, {"decades": 9.0}, "The gradient fades.")
    writer = RunLogWriter(tmp_path / "going")
    writer.write(RunInfo("going"))
    for number in range(5):
        writer.write(step(number, diagnoses=(sick,) if number == 2 else ()))
    write(tmp_path / "cleared", "cleared", *(step(number) for number in range(4)))
    rows = gather.gather([tmp_path]).fleet.rows
    assert [(row.label, row.condition, row.severity) for row in rows] == [
        ("going", "vanishing", 3),
        ("cleared", "healthy", 0),
    ]
    assert {*rows[0].statuses} == {"no end"}
    writer.close()


def test_a_name_can_neither_move_the_cursor_nor_break_the_table(tmp_path):
    write(tmp_path, "red\x1b[31m\nname\u202e", verdict=HEALTHY)
    assert lines(tmp_path)[1].startswith("red [31m name   healthy")


def test_the_table_fits_a_narrow_terminal_also_with_wide_letters(tmp_path):
    for number in range(2):
        write(tmp_path / str(number), "名" * 70 + str(number), overrides=(f"key={'x' * 70}{number}",), verdict=HEALTHY)
    text = in_terminal(tabulate(gather.gather([tmp_path]).fleet), 100)
    assert max(len(line) + line.count("名") for line in text.splitlines()) <= 100
    assert "…" in text
    assert "healthy" in text


@pytest.fixture
def report(tmp_path):
    def report(*arguments):
        command = [sys.executable, str(ROOT / "scripts" / "report.py"), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    return report


def test_the_command_takes_folders_whose_names_hold_equal_signs_and_commas_on_any_terminal(sweep, report):
    done = report(sweep.relative_to(sweep.parents[1]), "page=false")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("lr=1")


def test_another_format_is_all_that_stands_on_stdout(sweep, report):
    done = report(sweep, "format=json")
    assert [row["run"] for row in json.loads(done.stdout)["rows"]] == ["lr=1", "lr=2", "lr=3", "lr=0.1"]
    assert done.stderr.strip() == str(sweep / "report.html")


@pytest.mark.parametrize("place", ["empty", "nowhere"])
def test_a_folder_without_runs_is_one_sentence_and_an_exit_code(place, report, tmp_path):
    (tmp_path / "empty").mkdir()
    done = report(place)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"There is no {'run log (run.jsonl) in empty' if place == 'empty' else 'nowhere'}; " in done.stderr


def test_help_and_no_word_at_all_say_how_to_call_it(report):
    asked, silent = report("--help"), report()
    assert (asked.returncode, silent.returncode) == (0, 2)
    assert asked.stdout == silent.stdout
    assert "format=text|json|csv|md|latex" in asked.stdout


def test_reports_load_no_torch():
    code = "import sys, diagnostics.cli, diagnostics.reports.report; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def wandb_place(monkeypatch, tmp_path):
    """A module that stands in for what talks to W&B, which has tests of its own."""
    stub = types.ModuleType("diagnostics.reports.wandb")

    def fetch(place, folder):
        write(folder / "one", place, step(0), verdict=HEALTHY)
        warnings.warn("1 of 2 runs has left no log.", DiagnosticsWarning, stacklevel=1)

    stub.fetch = fetch
    stub.publish = lambda fleet, folder: iter([f"{len(fleet.rows)} rows: {folder}"])
    monkeypatch.setitem(sys.modules, "diagnostics.reports.wandb", stub)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("wandb_place")
def test_a_group_in_wandb_is_fetched_into_a_folder_of_its_own_and_reported():
    report = Report(parse(["wandb:me/vanish/depth sweep", "wandb=true", "page=false"]))
    assert [row.label for row in report.gathered.fleet.rows] == ["wandb:me/vanish/depth sweep"]
    assert list(report.written()) == ["1 rows: wandb-logs/me/vanish/depth sweep", "1 of 2 runs has left no log."]


@pytest.mark.usefixtures("wandb_place")
@pytest.mark.parametrize("place", ["wandb:", "wandb:me/vanish", "wandb:me/../x", "wandb:a/b/c/d", "wandb:a/ /c"])
def test_a_place_in_wandb_is_named_in_full_and_leads_nowhere_else(place):
    with pytest.raises(ValueError, match=r"^A place in W&B is wandb:entity/project/group; got '"):
        _ = Report(parse([place])).gathered


def test_many_logs_are_read_by_several_processes_and_come_back_in_order(tmp_path):
    for number in range(gather.MANY):
        write(tmp_path / f"{number:02}", f"{number:02}", step(0), overrides=(f"k={number}",), verdict=HEALTHY)
    found = gather.gather([tmp_path], page=True)
    assert [run.name for run in found.fleet.runs] == [f"{number:02}" for number in range(gather.MANY)]
    assert len(found.described) == gather.MANY


def test_a_program_that_no_process_can_start_anew_still_gets_its_rows(tmp_path):
    for number in range(gather.MANY):
        write(tmp_path / f"{number:02}", f"{number:02}", overrides=(f"k={number}",), verdict=HEALTHY)
    typed = f"from diagnostics.reports.gather import gather\nprint(len(gather([{str(tmp_path)!r}]).fleet.runs))"
    done = subprocess.run([sys.executable], input=typed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(gather.MANY)


def test_two_folders_are_compared_by_depth(tmp_path):
    """The fix lifts the first layer's gradient by two decades and leaves the last one's."""
    for seed in range(3):
        faded, sound = [10.0 ** (depth - 4) for depth in range(5)], [10.0 ** ((depth - 4) / 2) for depth in range(5)]
        name, overrides = f"{seed}", (f"seed={seed}",)
        write(tmp_path / "before" / name, name, step(0, rms=faded, slope=-1.0), overrides=overrides, verdict=VANISHING)
        write(tmp_path / "after" / name, name, step(0, rms=sound, slope=-0.5), overrides=overrides, verdict=HEALTHY)
    before, after = tmp_path / "before", tmp_path / "after"
    said = lines(before, after)
    place = next(i for i, line in enumerate(said) if line.startswith(str(before)) and "→" in line)
    assert said[place] == (
        f"{before} → {after}: 3 of 3 runs sick, then 0 of 3; backward slope -1.00, then -0.50 decades per layer."
    )
    assert said[place + 1 : place + 3] == [f"  {before}: 3 vanishing", f"  {after}: 3 healthy"]
    heading, first, second, difference = said[place + 3 : place + 7]
    assert heading.split()[-11:] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]
    assert first.split()[-11::5] == ["-4.00", "-2.00", "0.00"]
    assert second.split()[-11::5] == ["-2.00", "-1.00", "0.00"]
    assert difference.split()[-11::5] == ["+2.00", "+1.00", "+0.00"]
    rows = gather.gather([before, after]).fleet.rows
    assert [(str(row.members[0].place), len(row.members), row.sick) for row in rows] == [
        (str(before), 3, 3),
        (str(after), 3, 0),
    ]
