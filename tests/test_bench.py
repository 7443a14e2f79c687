"""The bench says of every variant what it was asked, and compares loops that do the same. No test asserts a time."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench  # noqa: E402
from benchmark import loops, parts, timing, variants, workloads  # noqa: E402

OURS = ("every_0", "default", "dense", "run_log", "run_log_wandb")


def test_table_and_json_hold_every_variant_with_an_interval_around_its_ratio(tmp_path):
    asked = ("twin", *OURS, "watch_1", "lightning", "composer")
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--quick", "--json", "bench.json"]
    options = ["--workload", "narrow", "--variant", *asked, "--clipping", "tenth", "--micro-batches", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["clock"] == "CPU time of the process"
    assert {"processor", "cores", "versions", "git", "load_at_start", "load_at_end"} <= result.keys()
    (table,) = result["tables"]
    assert (table["about"]["clipping"], table["about"]["micro_batches"]) == ("tenth", 4)
    rows = {row["variant"]: row for row in table["rows"]}
    assert [*rows] == ["plain", *asked]
    for name, row in rows.items():
        assert row["low"] <= row["ratio"] <= row["high"]
        assert re.search(rf"^{name} .* {row['ratio']:.4g} ", done.stdout, re.MULTILINE)
    assert rows["plain"]["ratio"] == 1
    for name in OURS:
        assert rows[name]["recorded"] == {"every_0": 0, "dense": 1}.get(name, 0.1)
        assert rows[name]["clipped"] == 0.1


def test_the_parts_are_tables_too(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    options = ["--quick", "--json", str(path), "--clip-call", "--hooks", "--memory", "--workload", "mlp"]
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", *options])
    bench.main()
    result = json.loads(path.read_text())
    assert "Monitor() at a recorded step" in capsys.readouterr().out
    calls, hooks, memory = (table["rows"] for table in result["tables"])
    assert [(row["tensors"], row["elements"]) for row in calls] == [(10, 256), (100, 256)]
    assert all(row["never_low"] <= row["never"] <= row["never_high"] for row in calls)
    assert [row["hook"] for row in hooks] == [name for name in parts.HOOKS if name != "no hook"]
    assert [row["steps"] for row in memory] == [20, 40]
    assert all(row["python"] > 0 for row in memory)


@pytest.mark.parametrize(("clipping", "micro_batches"), [("never", 1), ("always", 4), ("tenth", 4)])
@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_all_variants_of_a_workload_take_the_same_steps(name, clipping, micro_batches, tmp_path):
    spent = {}  # AdamW takes the same step whatever all gradients are multiplied by; its first moments tell
    with variants.Stage(tmp_path) as stage:
        for variant in (
            "plain",
            "off",
            "drop_in",
            "bare",
            "bare_dense",
            "every_0",
            "default",
            "dense",
            "lightning",
            "composer",
        ):
            training = workloads.Training(workloads.workload(name, quick=True), clipping, micro_batches)
            step = variants.VARIANTS[variant].start(training, stage)
            for number in range(7):
                step(number)
            moments = [training.optimizer.state[parameter]["exp_avg"] for parameter in training.parameters]
            spent[variant] = torch.nn.utils.parameters_to_vector([*training.parameters, *moments])
    for variant, found in spent.items():
        assert torch.equal(found, spent["plain"]), variant


def test_a_regime_that_was_not_kept_ends_the_bench(monkeypatch):
    monkeypatch.setitem(workloads.REGIMES, "never", 0.5)
    work = workloads.workload("mlp", quick=True)
    with pytest.raises(RuntimeError, match="every_0 clipped 100% of its last steps where the regime has 0%"):
        loops.compare(
            work, ["every_0"], clipping="never", micro_batches=1, rounds=1, seconds=0.001, clock=time.perf_counter
        )


def test_gradients_that_do_not_fit_into_memory_are_left_out_aloud():
    (row,) = parts.clip_calls([10_000], [10_000_000], rounds=1, seconds=0.1, clock=lambda: 0.0)
    assert row.skipped == "400.0 GB of gradients"
    assert row.never is None


def test_memory_counts_what_somebody_holds_beyond_the_loop():
    before = parts._storages()
    held = torch.zeros(1000)
    new = {place: size for place, size in parts._storages().items() if place not in before}
    assert new == {held.untyped_storage().data_ptr(): 4000}


def test_every_block_runs_once_per_round_in_an_order_that_changes():
    ran, ticks = [], iter(range(1000))
    blocks = {name: (lambda name=name: ran.append(name) or 2) for name in "abcd"}
    times = timing.interleave(blocks, 3, lambda: float(next(ticks)))
    rounds = ["".join(islice(ran, place, place + 4)) for place in range(0, 12, 4)]
    assert [sorted(one) for one in rounds] == [[*"abcd"]] * 3
    assert len(set(rounds)) > 1
    assert times == {name: [0.5] * 3 for name in "abcd"}


def test_what_the_collector_takes_is_spread_over_a_names_blocks():
    rounds, ticks = iter([1, 2]), iter(range(1000))

    def block():
        if next(rounds) == 1:
            gc.collect()
        return 1

    gc.disable()
    try:
        times = timing.interleave({"a": block}, 2, lambda: float(next(ticks)))
    finally:
        gc.enable()
    # Each look at the clock takes a second: without the collection 2 and 1, and half of its one second more.
    assert times == {"a": [2.5, 1.5]}


def test_a_ratio_is_taken_within_rounds_and_its_interval_narrows_with_them():
    slow_machine = [1.0, 10.0, 100.0]
    assert timing.ratio([1.1 * one for one in slow_machine], slow_machine) == pytest.approx((1.1, 1.1, 1.1))
    few, many = (timing.estimate([0.9, 0.95, 1.0, 1.05, 1.1] * times) for times in (1, 40))
    assert few.median == many.median == 1.0
    assert (few.low, few.high) == (0.9, 1.1)
    assert few.low < many.low <= 1.0 <= many.high < few.high


def test_work_is_repeated_until_it_fills_the_time():
    ticks = iter(range(0, 1000, 7))
    assert timing.repetitions(lambda: None, 70.0, lambda: float(next(ticks)), multiple=10) == 100
