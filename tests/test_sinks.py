"""Sinks take what a run says: on the terminal as a table and a verdict, in a run log whole, in memory as it came."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from diagnostics import ConsoleSink, MemorySink, RunLogSink, read_run
from diagnostics.records import (
    ClipRecord,
    DepthFit,
    Diagnosis,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    Remedy,
    RunEnd,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
)
from diagnostics.sinks import Sink
from diagnostics.sinks.secrets import hide_in_arguments, hide_in_line, hide_secrets

FINISHED = RunEnd("finished", "", 1, Verdict("healthy", 0, "healthy"))


def clip(coefficient: float = 2.0, **changes: Any) -> ClipRecord:
    norm = 1 / coefficient
    return replace(ClipRecord("norm", 2.0, 1.0, norm, coefficient, coefficient < 1, min(norm, 1.0)), **changes)


def recorded(depths: int, step: int = 0, slope: float = -1.0, name: str = "{}", **changes: Any) -> StepRecord:
    """A step whose output gradient falls by ``slope`` decades per layer on the way back."""
    layers = [
        LayerRecord(
            Layer(depth, name.format(depth), "Linear"),
            GradientStats(4, 2 * 10 ** (slope * (depths - 1 - depth)), 10 ** (slope * (depths - 1 - depth))),
            GradientStats(4, 0.5, 0.25),
            1.0,
            1e-3,
        )
        for depth in range(depths)
    ]
    shares = clip(shares=(1 / depths,) * depths)
    fit = DepthFit(slope, 0.0, 0.01, depths, depths)
    return replace(StepRecord(step, shares, layers=Layers(layers), fit=fit, recorded=True), **changes)


def printed(*events: Any, width: int = 80) -> str:
    texts: list[str] = []
    sink = ConsoleSink(texts.append, width=width)
    for event in events:
        sink.write(event)
    sink.close()
    return "\n".join(texts)


def rows(text: str) -> list[list[str]]:
    """The table's rows, word by word."""
    return [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]


@pytest.mark.parametrize("sink", [ConsoleSink(), MemorySink()])
def test_every_sink_is_a_sink(sink: Any) -> None:
    assert isinstance(sink, Sink)


def test_the_memory_sink_keeps_all_events_in_order() -> None:
    events = [RunInfo("mlp"), recorded(2), Violation("no_update", 0, (), "", ""), FINISHED]
    sink = MemorySink()
    for event in events:
        sink.write(event)
    assert (sink.events, sink.info, sink.records, sink.violations, sink.end) == (
        events,
        *events[:1],
        *[[e] for e in events[1:3]],
        FINISHED,
    )


def test_the_run_log_sink_writes_what_read_run_reads(tmp_path: Path) -> None:
    sink = RunLogSink(tmp_path / "new" / "folder")
    assert isinstance(sink, Sink)
    for event in (RunInfo("mlp"), recorded(3), FINISHED):
        sink.write(event)
    sink.close()
    sink.close()
    run = read_run(tmp_path / "new" / "folder")
    assert (run.info, run.records, run.end) == (RunInfo("mlp"), (recorded(3),), FINISHED)
    with pytest.raises(FileExistsError, match="already holds a run log"):
        RunLogSink(tmp_path / "new" / "folder")


def test_the_console_is_silent_until_the_end() -> None:
    standing = Diagnosis("vanishing", 2, 0, 0, {}, "It fades.")
    assert printed(RunInfo("mlp"), recorded(3), recorded(3, step=1, diagnoses=(standing,))) == ""


def test_the_table_has_one_row_per_layer_with_the_numbers_of_the_last_recorded_step() -> None:
    between = StepRecord(20, clip(), layers=recorded(3, slope=-5).layers)
    text = printed(recorded(3, step=0, slope=-2), recorded(3, step=10), between, FINISHED)
    assert "step 10, the last recorded one:" in text
    assert rows(text) == [
        ["0", "0", "Linear", "1.00e-02", "5.00e-01", "1.00e-03", "33.3%"],
        ["1", "1", "Linear", "1.00e-01", "5.00e-01", "1.00e-03", "33.3%"],
        ["2", "2", "Linear", "1.00e+00", "5.00e-01", "1.00e-03", "33.3%"],
    ]
    assert "output gradient rms 1.0e-02 to 1.0e+00, log scale\nbackward slope -1.00 ± 0.01 decades per layer" in text
    assert "first layer ▁▅█ last layer" in text


def test_what_was_not_measured_is_a_dash_and_what_is_not_finite_is_said() -> None:
    gradient = GradientStats(4, math.nan, math.nan, nonfinite=4)
    layers = [
        LayerRecord(Layer(0, "0", "Linear"), None, None),
        LayerRecord(Layer(1, "1", "Linear"), gradient, gradient),
    ]
    text = printed(StepRecord(0, clip(), layers=Layers(layers), skipped=True), FINISHED)
    assert rows(text) == [["0", "0", "Linear", *"----"], ["1", "1", "Linear", "nan", "nan", "-", "-"]]
    assert "skipped 1 of 1 steps, whose gradients were not finite" in text


@pytest.mark.parametrize("width", [70, 80, 120])
@pytest.mark.parametrize("depths", [1, 12, 40, 41, 150, 1000])
def test_the_report_keeps_to_the_width_of_the_terminal(width: int, depths: int) -> None:
    remedy = Remedy("use an activation whose derivative is not far below one", "model.activation=relu")
    one = Diagnosis("vanishing", 2, 0, 0, {}, "It fades on the way back. " * 5, (remedy,))
    broken = Violation("missing_zero_grad", 3, ("w",), "Step 3 spent gradients again. " * 5, "Call zero_grad().")
    record = recorded(depths, slope=-0.01, name="encoder.layers.{}." + "x" * 99, diagnoses=(one,), violations=(broken,))
    assert max(map(len, printed(record, FINISHED, width=width).splitlines())) <= width


def test_a_deep_table_shows_its_ends_and_an_even_choice_between_and_says_what_is_left_out() -> None:
    text = printed(recorded(150, slope=-0.01), FINISHED)
    depths = [int(row[0]) for row in rows(text)]
    assert depths[:13] == list(range(13))
    assert depths[-13:] == list(range(137, 150))
    gaps = [later - earlier for earlier, later in pairwise(depths[12:-12])]
    assert max(gaps) - min(gaps) <= 1
    assert f"{150 - len(depths)} of 150 layers are left out" in text
    assert "left out" not in printed(recorded(40, slope=-0.01), FINISHED)


def test_the_clip_summary_counts_clipped_steps_and_gives_their_median_coefficient() -> None:
    coefficients = [0.25, 0.5, 0.75, 1.5, 2.0]
    steps = [StepRecord(i, clip(coefficient)) for i, coefficient in enumerate(coefficients)]
    assert "clipped 3 of 5 steps, median coefficient 0.5, max_norm 1" in printed(*steps, FINISHED)
    assert "clipped 0 of 1 steps, largest norm 0.5, max_norm 1" in printed(steps[-1], FINISHED)
    one_norm = StepRecord(0, clip(0.5, norm_type=math.inf))
    assert "max_norm 1, norm_type inf" in printed(one_norm, FINISHED)
    quantile = replace(clip(0.5), rule="quantile", threshold=0.3)
    assert "largest norm 2, by quantile, last threshold 0.3" in printed(
        StepRecord(0, replace(quantile, applied=False)), FINISHED
    )
    value = replace(quantile, rule="value", max_norm=None)
    group = ClipRecord(
        "group", 2.0, None, 2.0, 0.5, True, 1.0, parts=(replace(value, group="0"), replace(value, group="1"))
    )
    assert "coefficient 0.5, by value, clip_value 0.3" in printed(StepRecord(0, value), FINISHED)
    assert "coefficient 0.5, by group, groups 0, 1" in printed(StepRecord(0, group), FINISHED)
    none = [
        StepRecord(i, ClipRecord("none", 2.0, None, norm, None, False, norm))
        for i, norm in enumerate([1.0, 3.0, math.nan])
    ]
    assert "no clipping in 3 steps, median norm 2, largest norm 3" in printed(*none, FINISHED)


def test_a_long_run_costs_bounded_memory_and_its_median_is_close() -> None:
    texts: list[str] = []
    sink = ConsoleSink(texts.append)
    draw = random.Random(1)
    for i in range(2_000):
        sink.write(recorded(4, step=i, clip=clip(draw.random() or 0.5)))
    tracemalloc.start()
    for i in range(20_000):
        sink.write(StepRecord(i, clip(draw.random() or 0.5)))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200_000  # the sample's old numbers are replaced by traced ones: 2 x 1,000 of them
    sink.write(FINISHED)
    told = float(texts[0].split("median coefficient ")[1].split(",")[0])
    draw = random.Random(1)
    assert told == pytest.approx(statistics.median(draw.random() for _ in range(22_000)), abs=0.06)


def test_watching_draws_no_random_number_of_the_run() -> None:
    state = random.getstate()
    printed(*[StepRecord(i, clip(0.5)) for i in range(1_100)], FINISHED)
    assert random.getstate() == state


def test_violations_are_told_once_each_with_count_and_remedy() -> None:
    first = Violation("missing_zero_grad", 3, ("w",), "Step 3 spent gradients again.", "Call optimizer.zero_grad().")
    steps = [StepRecord(3 + i, clip(), violations=(replace(first, count=i + 1),)) for i in range(3)]
    late = Violation("no_grad_flow", 9, ("b",), "b never received a gradient.", "Look for detach().")
    text = printed(*steps, late, FINISHED)
    assert (
        "violations: 2\n  missing_zero_grad (3 times): Step 3 spent gradients again.\n    try: Call optimizer" in text
    )
    assert "  no_grad_flow: b never received a gradient.\n    try: Look for detach()." in text
    assert "violations: none" in printed(StepRecord(0, clip()), FINISHED)


def test_a_diagnosis_that_stands_is_told_at_the_end_and_one_that_clears_when_it_clears() -> None:
    one = Diagnosis("vanishing", 2, 0, 0, {}, "It fades.", (Remedy("use ReLU", "model.activation=relu"),))
    begin = StepRecord(5, clip(), diagnoses=(one,))
    end = StepRecord(40, clip(), diagnoses=(replace(one, cleared=40),))
    assert printed(begin, end) == "step 40: vanishing has cleared; it stood since step 0."
    standing = printed(begin, FINISHED)
    assert "vanishing (warning) since step 0: It fades.\n    try: use ReLU (model.activation=relu)" in standing
    assert "It fades" not in printed(begin, end, FINISHED)
    doubtful = StepRecord(5, clip(), diagnoses=(replace(one, confirmed=False),))
    assert "It fades. (unconfirmed)" in printed(doubtful, FINISHED)
    assert printed(doubtful, replace(end, diagnoses=(replace(one, confirmed=False, cleared=40),))) == ""


def test_a_run_that_broke_off_says_so_above_the_verdict() -> None:
    failed = replace(FINISHED, status="failed", steps=7, error="RuntimeError: out of memory")
    assert printed(failed).splitlines()[-2:] == [
        "failed after 7 steps: RuntimeError: out of memory",
        "verdict: healthy",
    ]
    assert "interrupted after 7 steps\n" in printed(replace(failed, status="interrupted", error=None))


def test_each_of_several_optimizers_has_its_own_table() -> None:
    both = [recorded(2, optimizer="generator"), recorded(3, optimizer="critic")]
    text = printed(*both, FINISHED)
    assert len(rows(text)) == 5
    assert text.index("optimizer generator") < text.index("optimizer critic")
    assert "optimizer" not in printed(recorded(2), FINISHED)


def test_names_from_other_peoples_code_cannot_move_the_cursor() -> None:
    evil = "a\x1b[2J\r\n\u202e\x07"
    record = recorded(2, name=evil + "{}", optimizer=evil, violations=(Violation(evil, 0, (evil,), evil, evil),))
    text = printed(record, replace(FINISHED, status="failed", error=evil, verdict=Verdict(evil, 2, evil)))
    assert all(one.isprintable() for one in text.replace("\n", ""))


def test_a_terminal_that_takes_ascii_only_gets_the_same_report() -> None:
    program = """
from test_sinks import FINISHED, recorded
from diagnostics import ConsoleSink
sink = ConsoleSink(width=80)
sink.write(recorded(12, name="encoder.layers." + "x" * 80 + "{}"))
sink.write(FINISHED)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, cwd=Path(__file__).parent,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    text = done.stdout.decode("ascii")
    assert len(rows(text)) == 12
    assert "first layer _..-" in text
    assert "~x" in text
    assert text.endswith("verdict: healthy\n")


def test_a_write_that_fails_is_not_hidden() -> None:
    def broken(_: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ConsoleSink(broken).write(FINISHED)


@pytest.mark.parametrize(
    "key", ["api_key", "API_KEY", "apiKey", "token", "hf_token", "db.password", "secret_name", "credentials", "key_id"]
)
def test_a_text_under_a_key_that_looks_like_a_secret_is_hidden(key: str) -> None:
    assert hide_secrets({"a": [{key: "hunter2"}]}) == {"a": [{key: "(hidden)"}]}
    assert "hunter2" not in " ".join(hide_in_arguments([f"task.{key}=hunter2", f"--{key}", "hunter2"]))
    assert "hunter2" not in hide_in_line(f"+db={{user:me,{key}:hunter2}} task.{key}='a hunter2'")


@pytest.mark.parametrize("key", ["key_size", "num_key_value_heads", "tokenizer", "monkey", "pad_token", "keyboard"])
def test_an_innocent_key_keeps_its_value(key: str) -> None:
    assert hide_secrets({key: "text"}) == {key: "text"}
    assert hide_in_arguments([f"{key}=text", "max_tokens=512"]) == [f"{key}=text", "max_tokens=512"]


def test_a_password_hides_whatever_stands_under_it_and_a_url_loses_its_login() -> None:
    given = {"password": 1234, "secrets": {"user": "me"}, "max_tokens": 512, "token": None, "use_secret": True}
    kept = {"max_tokens": 512, "token": None, "use_secret": True}
    assert hide_secrets(given) == {"password": "(hidden)", "secrets": {"user": "(hidden)"}, **kept}
    assert hide_secrets({"storage": "sql://me:pw@host/db"}) == {"storage": "sql://(hidden)@host/db"}
