"""A run in columns says what its records say, and the fast way from disk says the same as the slow way."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_runlog import step, steps, write

from diagnostics.records import Diagnosis, GradientStats, Layer, LayerRecord, Layers
from diagnostics.reports.history import histories
from diagnostics.runlog import read_run


def equal(one: Any, other: Any) -> bool:
    """Equality that takes NaN for NaN and looks into dataclasses, mappings and arrays."""
    if is_dataclass(one):
        return type(one) is type(other) and all(
            equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return repr(one) == repr(other)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=5))
def test_the_columns_of_a_log_are_those_of_its_records(tmp_path_factory: pytest.TempPathFactory, records: Any) -> None:
    names = [[layer.layer.name for layer in record.layers] for record in records]
    assume(all(len(set(own)) == len(own) for own in names))  # as in a model
    folder = tmp_path_factory.mktemp("run")
    write(folder, *records)
    run = read_run(folder)
    slow, fast = histories(tuple(run.records)), histories(run.records)
    assert list(slow) == list(fast)
    for name, history in slow.items():
        for one in fields(history):
            assert equal(getattr(history, one.name), getattr(fast[name], one.name)), one.name


def test_what_is_not_asked_for_is_not_there_and_the_rest_is_the_same(tmp_path: Path) -> None:
    layer = LayerRecord(Layer(0, "0", "Linear"), GradientStats(4, 2.0, 1.0), GradientStats(4, 3.0, 1.5))
    run = read_run(write(tmp_path, *(step(i, loss=0.1 * i, layers=Layers([layer])) for i in range(3))))
    some = ("loss", "trunk_rms")
    for records in (run.records, tuple(run.records)):
        history = histories(records, some)["optimizer"]
        assert (list(history.by_step), list(history.by_layer)) == (["loss"], ["trunk_rms"])
        assert history.by_layer["trunk_rms"].values.tolist() == [[1.0]] * 3
        assert history.numel.tolist() == [4]


def test_a_step_is_sick_from_onset_until_the_diagnosis_cleared(tmp_path: Path) -> None:
    begun = Diagnosis("vanishing", 2, 1, 0, {}, "It fades.")
    notice = Diagnosis("spike", 1, 0, None, {}, "It jumps.")
    news = {0: (notice,), 2: (begun,), 4: (replace(begun, cleared=4),)}
    run = read_run(write(tmp_path, *(step(i, diagnoses=news.get(i, ())) for i in range(6))))
    for records in (run.records, tuple(run.records)):
        assert histories(records)["optimizer"].sick.tolist() == [False, True, True, True, False, False]


def test_layers_that_come_and_go_have_one_column_each(tmp_path: Path) -> None:
    def of(*names: str) -> Layers:
        stats = GradientStats(4, float(len(names)), 1.0)
        return Layers([LayerRecord(Layer(d, name, "Linear"), stats, None) for d, name in enumerate(names)])

    run = read_run(write(tmp_path, step(0, layers=of("a", "b")), step(1), step(2, layers=of("a", "new", "b"))))
    history = histories(run.records)["optimizer"]
    assert [layer.name for layer in history.layers] == ["a", "new", "b"]
    assert [layer.depth for layer in history.layers] == [0, 1, 2]  # as last seen: "b" was second before
    quantity = history.by_layer["output.norm"]
    assert quantity.rows.tolist() == [0, 2]
    assert quantity.measured.tolist() == [[True, False, True], [True] * 3]
    assert quantity.values[1].tolist() == [3.0] * 3


def test_a_layer_is_told_as_it_was_last_seen_however_often_the_order_changed(tmp_path: Path) -> None:
    def of(*names: str) -> Layers:
        return Layers(
            [LayerRecord(Layer(d, name, "Linear"), None, GradientStats(4, 2.0, 1.0)) for d, name in enumerate(names)]
        )

    run = read_run(write(tmp_path, *(step(i, layers=of(*names)) for i, names in enumerate(("ab", "ba", "ab", "ba")))))
    for records in (run.records, tuple(run.records)):
        assert [layer.name for layer in histories(records)["optimizer"].layers] == ["b", "a"]
    longer = read_run(
        write(tmp_path / "longer", *(step(i, layers=of(*names)) for i, names in enumerate(("ab", "ba", "ab"))))
    )
    assert [layer.name for layer in histories(longer.records)["optimizer"].layers] == ["a", "b"]
