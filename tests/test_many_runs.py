"""Five hundred run logs: one table, one page, and memory that does not grow with their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from diagnostics.columns import Column
from diagnostics.diagnosis import fit_depth
from diagnostics.records import ClipRecord, Layer, Layers, RunEnd, RunInfo, StepRecord, Verdict
from diagnostics.runlog import RunLogWriter, read_run
from diagnostics.runlog.plain import plain

ROOT = Path(__file__).parent.parent
RUNS, STEPS, DEPTHS, EVERY = 500, 500, 60, 10
PROGRAM = """
import resource, sys
from diagnostics.reports.report import make
status = make(sys.argv[1:])
kilobytes = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("memory", *kilobytes)
sys.exit(status)
"""


def records(slope: float):
    """Steps of a network whose gradient changes by so many decades per layer."""
    noise, table = Random(0), tuple(Layer(depth, f"blocks.{depth}", "Linear") for depth in range(DEPTHS))
    clip = ClipRecord("norm", 2.0, 1.0, 1.0, 1.0, applied=False, total_norm_after=1.0, threshold=1.0)
    numel = Column(array("q", [64] * DEPTHS))
    for number in range(STEPS):
        norms = [10.0 ** (slope * (DEPTHS - depth) + noise.gauss(0, 0.1)) for depth in range(DEPTHS)]
        columns = {"weight.numel": numel, "weight.norm": Column(array("d", norms))}
        if number % EVERY == 0:
            columns |= {"output.numel": numel, "output.norm": Column(array("d", norms))}
        layers = Layers.from_columns(table, columns)
        fit = fit_depth(layers.before_step) if number % EVERY == 0 else None
        shares = tuple(noise.random() for _ in range(DEPTHS))
        yield StepRecord(
            number, replace(clip, shares=shares), loss=noise.random(), layers=layers, fit=fit, recorded=fit is not None
        )


def write(folder: Path) -> None:
    """Runs at a healthy and at a sick slope; the bodies of their logs are written once each."""
    bodies = {}
    for slope in (-0.2, 0.0):
        writer = RunLogWriter(folder / f"template{slope}")
        for record in records(slope):
            writer.write(record)
        writer.close()
        bodies[slope] = writer.path.read_bytes().split(b"\n", 1)
        writer.path.unlink()
    for number in range(RUNS):
        slope = (-0.2, 0.0)[number % 2]
        overrides = (
            f"model.init={'default' if slope else 'he'}",
            f"lr={10.0 ** -(number // 2 % 5)}",
            f"seed={number // 10}",
        )
        verdict = Verdict("vanishing", 3, "vanishing") if slope else Verdict("healthy", 0, "healthy")
        head, body = bodies[slope]
        info = json.dumps({"info": plain(RunInfo(f"run {number}", overrides=overrides))}).encode()
        end = json.dumps({"end": plain(RunEnd("finished", "", STEPS, verdict))}).encode()
        place = folder / f"{number}_{','.join(overrides)}"
        place.mkdir()
        (place / "run.jsonl").write_bytes(b"\n".join([head, info, body + end, b""]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource usage there")
def test_five_hundred_runs_are_one_table_and_one_page_in_less_than_two_gigabytes(tmp_path: Path) -> None:
    write(tmp_path)
    one = next(tmp_path.rglob("run.jsonl"))
    assert len(read_run(one).records) == STEPS
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True, timeout=280)
    heading, *rows = done.stdout.splitlines()
    assert heading.split()[:5] == ["run", "verdict", "n", "sick", "slope"]
    assert ["init=default" in row for row in rows[:10]] == [True] * 5 + [False] * 5  # the sickest first
    assert all("50    50" in row for row in rows[:5])
    assert all("50     0" in row for row in rows[5:10])
    assert "model.init tells 500 of 500 runs right" in done.stdout
    page = tmp_path / "report.html"
    assert str(page) in done.stdout
    assert page.stat().st_size < 60e6
    own, child = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert own + 2 * child < 2e6  # kilobytes; as many processes as there are processors, of the largest one's size
