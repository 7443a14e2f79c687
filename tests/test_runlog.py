"""A run log gives back what was written, whatever became of the process that wrote it."""

from __future__ import annotations

import base64
import json
import math
import signal
import struct
import subprocess
import sys
import time
from array import array
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from diagnostics.runlog import SCHEMA, RunLogWriter, read_run
from diagnostics.runlog.packing import decode, encode

CLIP = ClipRecord("norm", 2.0, 1.0, 4.0, 0.25, applied=True, total_norm_after=1.0)
VERDICT = Verdict("healthy", 0, "healthy")
END = RunEnd("finished", "2026-01-01T00:00:00+00:00", 1, VERDICT)

numbers = st.floats()  # NaN and the infinities too
maybe = st.none() | numbers
names = st.text(max_size=8)
tuples_of = lambda one: st.lists(one, max_size=3).map(tuple)  # noqa: E731
numels = st.integers(0, 2**40)
counts = st.integers(0, 2**53)  # float64 holds no more exactly, and a report is made of that
statistics = st.builds(
    GradientStats, numels, numbers, numbers, maybe, maybe, maybe, st.integers(0, 2**40), maybe
) | st.builds(lambda numel, norm: GradientStats(numel, norm, norm / math.sqrt(numel or 1)), numels, numbers)
layers = st.builds(
    Layer, st.integers(0, 999), names, names, tuples_of(names), st.booleans(), st.none() | st.integers(0, 999)
)
layer_records = st.builds(
    LayerRecord, layers, st.none() | statistics, st.none() | statistics, maybe, maybe, maybe, maybe, maybe
)
clips = st.builds(
    ClipRecord, names, numbers, maybe, numbers, maybe, st.booleans(), numbers, maybe, tuples_of(numbers),
    tuples_of(st.just(CLIP)), maybe, tuples_of(numbers), names,
)  # fmt: skip
remedies = st.builds(Remedy, names, st.none() | names)
violations = st.builds(Violation, names, st.integers(0), tuples_of(names), names, names, st.integers(1))
diagnoses = st.builds(
    Diagnosis, names, st.integers(0, 4), st.integers(0), st.none() | st.integers(0), st.dictionaries(names, numbers),
    names, tuples_of(remedies), st.booleans(), st.none() | st.integers(0),
)  # fmt: skip
fits = st.builds(DepthFit, numbers, numbers, numbers, counts, counts)
steps = st.builds(
    StepRecord, counts, clips, names, maybe, tuples_of(numbers), st.integers(0), numbers,
    st.lists(layer_records, max_size=4).map(Layers), st.booleans(), tuples_of(violations), tuples_of(diagnoses),
    st.dictionaries(names, numbers), st.none() | fits, st.booleans(),
)  # fmt: skip
words = st.dictionaries(names, st.none() | st.booleans() | names | numbers | st.lists(counts))
infos = st.builds(
    RunInfo, names, names, names, tuples_of(names), words, st.none() | st.integers(), names,
    st.dictionaries(names, names), words, names,
)  # fmt: skip
ends = st.builds(
    RunEnd, names, names, st.integers(0), st.builds(Verdict, names, st.integers(0, 4), names), words, maybe
)


def write(path: Path, *events: Any) -> Path:
    writer = RunLogWriter(path)
    for event in events:
        writer.write(event)
    writer.close()
    return writer.path


def step(number: int, **changes: Any) -> StepRecord:
    return replace(StepRecord(number, CLIP), **changes)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.none() | infos, st.lists(steps, max_size=4), st.none() | ends)
def test_everything_that_was_written_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, info: RunInfo | None, records: list[StepRecord], end: RunEnd | None
) -> None:
    """`repr` is the measure, because it also tells NaN, -0.0 and 1 from 1.0."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, *([info] if info else []), *records, *([end] if end else []))
    run = read_run(folder)
    assert repr(run.info) == repr(info)
    assert repr(run.records) == repr(tuple(records))
    assert repr(run.end) == repr(end)


def test_the_strategies_above_fill_every_field_of_every_record() -> None:
    """A field that is added to a record must be added here, or the round trip is not tested for it."""
    given_fields = {
        GradientStats: 8, Layer: 6, LayerRecord: 8, ClipRecord: 13, Remedy: 2, Violation: 6, Diagnosis: 9, DepthFit: 5,
        StepRecord: 14, RunInfo: 10, RunEnd: 6, Verdict: 3,
    }  # fmt: skip
    assert {cls: len(fields(cls)) for cls in given_fields} == given_fields
    assert all(is_dataclass(cls) for cls in given_fields)


def test_records_of_finite_numbers_are_equal_by_comparison(tmp_path: Path) -> None:
    layer = Layer(0, "0", "Linear", ("0.weight",))
    gradient = GradientStats(4, 2.0, 1.0, 1.5, 0.0, 0.0)
    record = step(0, layers=Layers([LayerRecord(layer, gradient, gradient, 3.0, 1e-3)]), recorded=True)
    write(tmp_path, record)
    assert read_run(tmp_path).records == (record,)


def test_path_may_be_the_file_or_its_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "a" / "b", RunInfo(name="mlp"))
    assert file == tmp_path / "a" / "b" / "run.jsonl"
    assert read_run(file) == read_run(tmp_path / "a" / "b")


def test_an_existing_log_is_not_overwritten(tmp_path: Path) -> None:
    file = write(tmp_path, RunInfo(name="first"))
    with pytest.raises(FileExistsError, match=r"run\.jsonl already holds a run log and is not overwritten; choose"):
        RunLogWriter(tmp_path)
    assert read_run(file).info == RunInfo(name="first")


def small(tmp_path: Path) -> tuple[Path, list[Any]]:
    """A log with every kind of line, and what was written, in order."""
    layer = LayerRecord(Layer(0, "0", "Linear"), GradientStats(4, 2.0, 1.0), GradientStats(4, 2.0, 1.0))
    broken = Violation("missing_zero_grad", 2, ("0.weight",), "At step 2 …", "call zero_grad()")
    events = [
        RunInfo(name="mlp"), step(0), step(1, layers=Layers([layer])), step(2, violations=(broken,)),
        Violation("no_grad_flow", 9, ("2.weight",), "Never received a gradient.", "check detach()"), step(3), END,
    ]  # fmt: skip
    return write(tmp_path, *events), events


def test_a_log_cut_at_any_byte_is_read_up_to_its_last_whole_block(tmp_path: Path) -> None:
    """Nothing is made up, nothing is read twice, and whole lines are never lost."""
    file, events = small(tmp_path)
    whole = file.read_bytes()
    records = [event for event in events if isinstance(event, StepRecord)]
    violations = read_run(file).violations
    cut, before = tmp_path / "cut.jsonl", 0
    for size in range(whole.index(b"\n") + 1, len(whole) + 1):
        cut.write_bytes(whole[:size])
        run = read_run(cut)
        found = len(run.records)
        assert tuple(run.records) == tuple(records[:found])
        assert run.violations == violations[: len(run.violations)]
        assert run.info == (events[0] if b'{"info"' in whole[:size].rpartition(b"\n")[0] else None)
        assert (run.end is not None) == (size == len(whole))
        assert found >= before
        assert found >= sum(len(json.loads(line)["steps"]) for line in written(whole[:size]))
        before = found
    assert before == len(records)


def test_a_block_that_is_cut_short_but_not_at_the_end_is_damage_and_no_tail(tmp_path: Path) -> None:
    layers = Layers([LayerRecord(Layer(d, str(d), "Linear"), None, GradientStats(4, 0.1, 0.05)) for d in range(90)])
    file = write(tmp_path, step(0, layers=layers), END)
    lines = file.read_text().splitlines()
    lines[-2] = lines[-2][:5]
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=r"does not fit the schema"):
        read_run(file)


def written(content: bytes) -> list[bytes]:
    """The first lines of the blocks whose second line is whole, too."""
    lines = content.split(b"\n")[:-1]
    return [line for line, data in pairwise(lines) if line.startswith(b'{"steps"') and data]


def test_damage_before_the_last_line_is_not_passed_over(tmp_path: Path) -> None:
    file, _ = small(tmp_path)
    lines = file.read_text().splitlines()
    block = next(place for place, line in enumerate(lines) if line.startswith('{"steps"'))

    def damage(place: int, text: str) -> None:
        file.write_text("".join(f"{line}\n" for line in [*lines[:place], text, *lines[place + 1 :]]))

    damage(1, lines[1][:20])
    with pytest.raises(ValueError, match=r"Line 2 of .* is damaged; remove it to read the others"):
        read_run(file)
    damage(1, '{"info": {}}')
    with pytest.raises(ValueError, match=r"Line 2 of .* does not fit the schema"):
        read_run(file)
    for text in (lines[block + 1][:-3], lines[block + 1][:-3] + '"', ""):
        damage(block + 1, text)
        with pytest.raises(ValueError, match=rf"Line {block + 1} of .* does not fit the schema"):
            read_run(file)
    damage(block + 1, lines[block + 1].replace("A", "!"))
    with pytest.raises(ValueError, match=r"is damaged: the numbers of \d+ steps? cannot be read"):
        tuple(read_run(file).records)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"step,loss\n0,1\n", b"[]\n", b'{"schema": "other"}\n'])
def test_a_file_that_is_no_run_log_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.jsonl is not a run log: its first line does not name the schema '"):
        read_run(tmp_path)


def test_a_newer_version_and_a_missing_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"There is no run log at .*run\.jsonl; give a run\.jsonl or the folder"
    ):
        read_run(tmp_path)
    (tmp_path / "run.jsonl").write_text(json.dumps({"schema": SCHEMA, "version": 3}))
    with pytest.raises(ValueError, match="has schema version 3, above 2; update training-diagnostics"):
        read_run(tmp_path)
    (tmp_path / "run.jsonl").write_text(json.dumps({"schema": SCHEMA, "version": 1}))
    with pytest.raises(ValueError, match="has schema version 1, from before the format was settled; only 2 is read"):
        read_run(tmp_path)


def test_what_a_later_version_added_is_ignored(tmp_path: Path) -> None:
    layer = LayerRecord(Layer(0, "0", "Linear"), GradientStats(4, 2.0, 1.0), GradientStats(4, 2.0, 1.0))
    file = write(tmp_path, RunInfo(name="mlp"), step(0, layers=Layers([layer])), END)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    info, table, form = (next(iter(line.values())) for line in lines[1:4])
    steps, data, end = lines[4], lines[5], lines[6]["end"]
    for part in (info, end, end["verdict"]):
        part["added_later"] = 1
    table["added_later"] = [1]
    form["constants"] |= {"clip.added_later": "x", "weight.added_later": [1], "added_later": None}
    form["fields"] += [["added_later", "float", None], ["output.added_later", "float", 1]]
    steps["types"][0] += "dd"
    lines[5] = data + encode("float", array("d", [0.1]))[1] * 2
    lines.insert(2, {"later": {"kind": "of line"}})
    file.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    run = read_run(file)
    assert run.info == RunInfo(name="mlp")
    assert run.records == (step(0, layers=Layers([layer])),)
    assert run.end == END


def test_a_table_of_layers_is_written_once_however_the_optimizers_alternate(tmp_path: Path) -> None:
    def of(name: str) -> Layers:
        return Layers([LayerRecord(Layer(0, name, "Linear"), None, GradientStats(4, 2.0, 1.0))])

    records = [step(i // 2, optimizer="ab"[i % 2], layers=of("ab"[i % 2])) for i in range(6)]
    file = write(tmp_path, *records)
    assert file.read_text().count('"layers":{') == 2
    assert read_run(file).records == tuple(records)


def test_numbers_take_the_smallest_type_that_loses_nothing_and_zeros_take_none(tmp_path: Path) -> None:
    """Bytes per step are a promise, so they are counted; what follows from others (`rms`) is not written at all."""
    floats = [(0.0, 0), (0.5, 4), (0.1, 8), (math.nan, 4), (math.inf, 4), (-0.0, 4), (1e300, 8)]
    for value, size in floats:
        code, text = encode("float", array("d", [value] * 3))
        assert len(base64.b64decode(text)) == 3 * size
        assert repr(decode("float", code, text.encode(), 3).tolist()) == repr([value] * 3)
    for number, size in {0: 0, 127: 1, -128: 1, 128: 2, 2**15: 4, -(2**31): 4, 2**31: 8, 2**63 - 1: 8}.items():
        code, text = encode("integer", array("q", [number] * 3))
        assert len(base64.b64decode(text)) == 3 * size
        assert decode("integer", code, text.encode(), 3).tolist() == [number] * 3


def test_sixty_layers_take_less_than_half_of_what_plain_json_took(tmp_path: Path) -> None:
    """The same steps as JSON numbers, one column per quantity, took 3,504 bytes each."""
    count, depths = 200, 60
    noise = Random(0)
    single = lambda: struct.unpack("f", struct.pack("f", noise.random()))[0]  # noqa: E731

    def layer(depth: int, recorded: bool) -> LayerRecord:
        stats = [GradientStats(4096, norm := noise.random(), norm / 64, *([single(), 0.0, 0.0, 0, 0.0] * recorded))] * 2
        return LayerRecord(table[depth], stats[0] if recorded else None, stats[1], *([noise.random()] * 3 * recorded))

    table = [Layer(depth, f"blocks.{depth}.linear", "Linear", (f"blocks.{depth}.weight",)) for depth in range(depths)]
    writer = RunLogWriter(tmp_path)
    for number in range(count):
        recorded = number % 10 == 0
        clip = replace(CLIP, total_norm=single(), shares=tuple(noise.random() for _ in table))
        layers = Layers([layer(depth, recorded) for depth in range(depths)])
        writer.write(step(number, clip=clip, layers=layers, loss=single(), recorded=recorded))
    writer.close()
    assert writer.path.stat().st_size / count < 1752


def test_rms_that_follows_from_the_norm_is_not_written(tmp_path: Path) -> None:
    plain = LayerRecord(Layer(0, "0", "Linear"), None, GradientStats(16, 2.0, 0.5))
    odd = LayerRecord(Layer(0, "0", "Linear"), None, GradientStats(16, 2.0, 0.6))
    records = [step(i, layers=Layers([one])) for i, one in enumerate((plain, odd))]
    file = write(tmp_path, *records)
    shapes = [json.loads(line)["shape"] for line in file.read_text().splitlines() if line.startswith('{"shape"')]
    names = [{name for name, *_ in one["fields"]} for one in shapes]
    assert names[1] - names[0] == {"weight.rms"}
    assert read_run(file).records == tuple(records)


def test_a_shape_is_written_once_however_long_the_run(tmp_path: Path) -> None:
    records = [step(i, loss=0.5 if i % 2 else None, metrics={"x": 1.0} if i % 10 == 0 else {}) for i in range(100)]
    file = write(tmp_path, *records)
    assert file.read_text().count('{"shape"') == 3  # neither, a loss, a metric
    assert read_run(file).records == tuple(records)


def test_a_step_is_read_without_more_than_a_hundred_others_however_fast_they_came(tmp_path: Path) -> None:
    path = write(tmp_path, *(step(number) for number in range(1050)))
    blocks = [json.loads(line)["steps"] for line in written((tmp_path / "run.jsonl").read_bytes())]
    assert max(map(len, blocks)) <= 100
    assert sum(map(len, blocks)) == 1050
    assert [record.step for record in read_run(path).records] == list(range(1050))


def test_violations_are_one_entry_per_rule_and_parameters_with_the_last_count(tmp_path: Path) -> None:
    first = Violation("missing_zero_grad", 3, ("0.weight",), "At step 3 …", "call zero_grad()")
    other = replace(first, parameters=("1.weight",))
    late = Violation("no_grad_flow", 9, ("2.weight",), "Never received a gradient.", "check detach()")
    again = replace(first, count=2)
    write(tmp_path, step(3, violations=(first, other)), step(4, violations=(again,)), late, END)
    assert read_run(tmp_path).violations == (again, other, late)


def test_diagnoses_are_given_in_their_last_state(tmp_path: Path) -> None:
    begun = Diagnosis("vanishing", 2, 0, 0, {"decades": 2.7}, "It fades.", (Remedy("try"),), confirmed=False)
    confirmed, second = replace(begun, confirmed=True), replace(begun, step=50)
    cleared = replace(confirmed, cleared=40)
    events = [step(i, diagnoses=(one,)) for i, one in enumerate((begun, confirmed, cleared, second))]
    write(tmp_path, *events)
    assert read_run(tmp_path).diagnoses == (cleared, second)


def test_a_run_without_an_end_has_no_verdict(tmp_path: Path) -> None:
    file = write(tmp_path, step(0))
    assert (read_run(file).end, read_run(file).verdict) == (None, None)
    file.unlink()
    write(tmp_path, step(0), END)
    assert read_run(tmp_path).verdict == VERDICT


def test_the_log_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    writer = RunLogWriter(tmp_path)
    writer.write(RunInfo(name="mlp"))
    assert read_run(tmp_path).info == RunInfo(name="mlp")
    alarm = step(0, violations=(Violation("no_update", 0, (), "", ""),))
    writer.write(alarm)  # an alarm does not wait for the second to pass
    assert read_run(tmp_path).records == (alarm,)
    writer.close()


def test_what_json_does_not_know_is_written_in_its_nearest_plain_form(tmp_path: Path) -> None:
    class Number:
        def __float__(self) -> float:
            return 0.5

    write(tmp_path, RunInfo("mlp", config={"path": Path("data")}), step(0, metrics={"x": Number()}))
    run = read_run(tmp_path)
    assert run.info is not None
    assert run.info.config == {"path": "data"}
    assert run.records[0].metrics == {"x": 0.5}


def test_sigkill_loses_about_the_last_second(tmp_path: Path) -> None:
    program = f"""
import time
from diagnostics.records import ClipRecord, RunInfo, StepRecord
from diagnostics.runlog import RunLogWriter
writer = RunLogWriter({str(tmp_path)!r})
writer.write(RunInfo("mlp"))
clip = ClipRecord("none", 2.0, None, 1.0, None, False, 1.0)
for i in range(10**6):
    writer.write(StepRecord(i, clip, metrics={{"time": time.time()}}))
    time.sleep(0.01)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        give_up = time.time() + 30
        while time.time() < give_up and not _steps(tmp_path) > 50:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        killed = time.time()
    run = read_run(tmp_path)
    assert [record.step for record in run.records] == list(range(len(run.records)))
    assert killed - run.records[-1].metrics["time"] < 5.0  # one second, and room for a slow machine


def _steps(folder: Path) -> int:
    return len(read_run(folder).records) if list(folder.glob("run.jsonl")) else 0


def test_the_log_costs_no_torch() -> None:
    program = "import sys, diagnostics.runlog, diagnostics.sinks.runlog; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_plot_draws_the_figures_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    write(tmp_path, step(0), step(1))
    assert read_run(tmp_path).plot().svg().startswith("<svg")
