"""A step's layers are kept as columns of numbers, and whoever looks finds the records that were put in."""

from __future__ import annotations

import copy
import math
import pickle
from array import array

import pytest
import torch
from torch import nn

from diagnostics import Monitor, columns
from diagnostics.columns import Column
from diagnostics.records import GradientStats, Layer, LayerRecord, Layers

LAYERS = tuple(Layer(depth, f"layer{depth}", "Linear", (f"layer{depth}.weight",)) for depth in range(3))
FULL = GradientStats(9, 6.0, 2.0, 4.0, 0.5, 0.25, 3, 0.125)
RECORDS = [
    LayerRecord(LAYERS[0], FULL, None, 1.0, 0.5, 0.25, 0.0, 7.0),
    LayerRecord(LAYERS[1], None, GradientStats(4, 2.0, 1.0)),
    LayerRecord(LAYERS[2], GradientStats(4, -0.0, 5.0), FULL, gain=math.nan),
]


def same(one, other):
    """By `repr`, which also tells NaN, -0.0 and 1 from 1.0."""
    return repr(list(one)) == repr(list(other))


def watched(every=1, steps=1, depth=3, **options):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=every, sinks=[], **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            monitor.clip_and_step()
    return monitor


def test_columns_hold_all_that_records_say():
    again = Layers.from_columns(LAYERS, Layers(RECORDS).columns())
    assert same(again, RECORDS)
    assert again.layers is LAYERS


def test_copies_and_pickles_hold_it_too():
    layers = Layers.from_columns(LAYERS, Layers(RECORDS).columns(), lambda: [0.1, None, 0.3])
    for other in (pickle.loads(pickle.dumps(layers)), copy.deepcopy(layers)):
        assert same(other, layers)
        assert [one.update_ratio for one in other] == [0.1, None, 0.3]


def test_what_was_not_measured_is_not_what_was_measured_as_nan():
    column = Column.of([math.nan, None])
    assert math.isnan(column[0])
    assert column[1] is None
    assert Column.of([None, None]) is None


def test_whole_numbers_come_back_whole():
    assert Column.of([3, None, 2**40]).dense() == [3, None, 2**40]
    assert [type(one) for one in Column.of([3, 0.5]).dense()] == [float, float]


def test_columns_without_a_number_are_left_out_and_rms_follows():
    layers = Layers([RECORDS[1]])
    assert set(layers.columns()) == {"weight.numel", "weight.norm"}
    assert layers.values("weight.rms") == [1.0]
    assert layers.values("output.norm") == [None]
    assert "output.rms" in Layers(RECORDS).columns()  # the last one's does not follow from its norm


@pytest.mark.parametrize("name", ["trunk_rms", "trunk_norm"])
def test_the_trunk_by_columns_is_the_trunk_by_records(name):
    assert Layers(RECORDS).values(name) == [getattr(one, name) for one in RECORDS]


def test_equal_layers_are_equal_however_they_were_made():
    layers = Layers(RECORDS[:2])
    assert layers == Layers.from_columns(LAYERS[:2], layers.columns()) == RECORDS[:2]
    assert hash(layers) == hash(Layers.from_columns(LAYERS[:2], layers.columns()))
    assert layers != Layers(RECORDS[1:2])


@pytest.mark.parametrize("every", [0, 1])
def test_a_step_makes_no_object_per_layer_until_somebody_looks(monkeypatch, every):
    made = []
    real = columns._layer_records
    monkeypatch.setattr(columns, "_layer_records", lambda *given: made.append(given) or real(*given))
    monitor = watched(every, steps=3)
    if every == 0:
        assert not made
    made.clear()
    assert monitor.records[-1].layers[0].weight.norm > 0
    assert len(made) == 1


def test_steps_share_the_table_of_layers_and_keep_eight_bytes_a_number():
    monitor = watched(0, steps=3, depth=10)
    first, *others = (record.layers for record in monitor.records)
    assert all(one.layers is first.layers for one in others)
    column = first.columns()["weight.norm"]
    assert isinstance(column.numbers, array)
    assert column.numbers.itemsize * len(column.numbers) == 80
    assert all(one.columns()["weight.numel"] is first.columns()["weight.numel"] for one in others)


def test_update_ratios_wait_for_whoever_asks_for_them():
    asked = []
    layers = Layers(RECORDS, lambda: asked.append(1) or [0.1, None, 0.3])
    assert layers.values("output.norm") == [6.0, None, -0.0]
    assert "update_ratio" in layers.columns(before_step=True)  # what the records themselves say
    assert not asked
    assert layers.values("update_ratio") == [0.1, None, 0.3]
    assert list(layers.columns()["update_ratio"]) == [0.1, None, 0.3]
    assert len(asked) == 1
