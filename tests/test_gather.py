"""The report over many runs: found wherever they lie, the sickest first, and none stops the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics import ClipRecord, DepthFit, RunEnd, RunInfo, StepRecord, Verdict, Violation
from diagnostics.reports import gather
from diagnostics.runlog import RunLogWriter

ROOT = Path(__file__).parent.parent


def step(number, loss=0.5, applied=False, slope=None, violations=()):
    clip = ClipRecord("norm", 2.0, 1.0, 2.0 if applied else 0.5, 0.5 if applied else 2.0, applied, 0.5)
    fit = None if slope is None else DepthFit(slope, -1.0, 0.1, depths=4, points=4)
    return StepRecord(number, clip, loss=loss, fit=fit, violations=violations, recorded=True)


def write(folder, name, *steps, overrides=(), verdict=None, status="finished"):
    """A run log; one that was killed if there is no verdict."""
    writer = RunLogWriter(folder)
    writer.write(RunInfo(name=name, overrides=overrides))
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


def lines(*places):
    return "\n".join(gather.report(places)).splitlines()


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


def test_every_run_has_a_page_beside_its_log_whose_path_is_printed(sweep):
    printed = lines(sweep)[6:]
    assert printed == [str(sweep / name / "page.html") for name in ("1_lr=1", "2_lr=2", "3_lr=3", "0_lr=0.1")]
    assert all(Path(page).read_text().startswith("<!") for page in printed)


def test_a_page_is_made_again_only_when_the_log_has_grown(sweep):
    page, log = sweep / "3_lr=3" / "page.html", sweep / "3_lr=3" / "run.jsonl"
    lines(sweep)
    page.write_text("kept")
    lines(sweep)
    assert page.read_text() == "kept"
    later = page.stat().st_mtime + 5
    os.utime(log, (later, later))
    lines(sweep)
    assert page.read_text() != "kept"


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
    said = lines(sweep)
    assert len([line for line in said if line.endswith("page.html")]) == 3
    assert "is not a run log" in said[-1]


def test_a_name_can_neither_move_the_cursor_nor_break_the_table(tmp_path):
    write(tmp_path, "red\x1b[31m\nname", verdict=HEALTHY)
    assert lines(tmp_path)[1].startswith("red [31m name  healthy")


def test_the_table_fits_a_narrow_terminal(tmp_path):
    for number in range(2):
        write(tmp_path / str(number), "n" * 70 + str(number), overrides=(f"key={'x' * 70}{number}",), verdict=HEALTHY)
    summaries = [gather.summarize(gather.read_run(log)) for log in gather.find_logs([tmp_path])]
    text = gather.table(summaries, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" in text


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
    done = report(sweep.relative_to(sweep.parents[1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("lr=1")


@pytest.mark.parametrize("place", ["empty", "nowhere"])
def test_a_folder_without_runs_is_one_sentence_and_an_exit_code(place, report, tmp_path):
    (tmp_path / "empty").mkdir()
    done = report(place)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"There is no {'run log (run.jsonl) in empty' if place == 'empty' else 'nowhere'}; " in done.stderr


def test_reports_load_no_torch():
    code = "import sys, diagnostics.cli, diagnostics.reports.gather; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
