"""Rows, ranks and ranges: what the table of many runs says of them."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.reports.fleet import Group, Spread, Summary, assemble, flatten, is_seed


def summary(name, *overrides, severity=0, place="sweep", **changes):
    fields = {
        "path": Path(place) / name / "run.jsonl", "place": Path(place), "name": name, "overrides": overrides,
        "config": {}, "seed": None, "condition": "vanishing" if severity else "healthy", "severity": severity,
        "slope": None, "decades": None, "clip_fraction": None, "violations": (), "loss": None, "steps": 1,
        "status": "finished",
    }  # fmt: skip
    return Summary(**fields | changes)


def grid(sick, **values):
    """One run for each combination of values, sick where the function says so."""
    return [
        summary("-".join(own), *map("=".join, zip(values, own, strict=True)), severity=3 if sick(*own) else 0)
        for own in product(*values.values())
    ]


def test_seeds_alone_make_one_row_and_other_differences_do_not():
    runs = [summary(f"{lr}{seed}", f"lr={lr}", f"seed={seed}") for lr in (1, 2) for seed in range(3)]
    assert [(row.overrides, len(row.members)) for row in assemble(runs).rows] == [(("lr=1",), 3), (("lr=2",), 3)]


def test_equal_runs_of_two_places_stay_apart():
    runs = [summary("a", "lr=1", place=place) for place in ("before", "after")]
    assert [len(row.members) for row in assemble(runs).rows] == [1, 1]


def test_runs_that_say_nothing_of_themselves_are_told_apart_by_name():
    assert [row.label for row in assemble([summary("one"), summary("two")]).rows] == ["one", "two"]


def test_what_all_runs_share_is_said_once_and_not_in_the_rows():
    fleet = assemble([summary("a", "model=mlp", "+lr=1"), summary("b", "model=mlp", "lr=2")])
    assert fleet.common == ("model=mlp",)
    assert {row.overrides for row in fleet.rows} == {("lr=1",), ("lr=2",)}


def test_a_row_is_as_sick_as_its_sickest_run_and_rows_stand_in_that_order():
    runs = [
        summary(f"{lr}-{seed}", f"lr={lr}", f"seed={seed}", severity=3 * (lr == 2 and seed == 1))
        for lr in (1, 2)
        for seed in (0, 1)
    ]
    rows = assemble(runs).rows
    assert [(row.overrides, row.condition, row.severity, row.sick) for row in rows] == [
        (("lr=2",), "vanishing", 3, 1),
        (("lr=1",), "healthy", 0, 0),
    ]


def test_health_is_unknown_only_where_nothing_is_known():
    assert summary("a", severity=2).sick is True
    assert summary("a", severity=1).sick is False
    assert summary("a", violations=("missing_zero_grad",)).sick is True
    assert summary("a", condition="unknown").sick is None


def test_no_row_is_healthy_and_no_more_while_a_rule_of_the_loop_is_broken():
    broken = {"violations": ("missing_zero_grad",)}
    runs = [summary("a", **broken), summary("b", "lr=1"), summary("c", "lr=2", severity=3, **broken)]
    assert {row.label: row.verdict for row in assemble(runs).rows} == {
        "a": "healthy gradients, unlawful loop",
        "b": "healthy",
        "c": "vanishing (severe)",
    }


@given(st.lists(st.none() | st.floats(-1e300, 1e300), max_size=9))
def test_a_spread_holds_its_median_between_its_ends(values):
    spread, known = Spread.of(values), [value for value in values if value is not None]
    if not known:
        assert spread is None
    else:
        assert (spread.count, spread.low, spread.high) == (len(known), min(known), max(known))
        assert math.isnan(spread.median) or spread.low <= spread.median <= spread.high


def test_a_nan_is_not_hidden_by_the_runs_beside_it():
    assert math.isnan(Spread.of([1.0, math.nan, 2.0]).median)


def test_the_setting_that_decides_comes_first_with_its_counts():
    fleet = assemble(grid(lambda model, _: model == "sigmoid", model=["sigmoid", "relu"], width=["8", "16", "32"]))
    (best,) = fleet.separations  # width says nothing and is not listed
    assert (best.key, best.right, best.runs) == ("model", 6, 6)
    assert best.groups == (Group("sigmoid", 3, 3), Group("relu", 3, 0))
    assert str(best) == "model tells 6 of 6 runs right (without it 3): sigmoid: 3 of 3 sick, relu: 0 of 3 sick"


def test_two_settings_are_ranked_by_how_many_runs_they_tell():
    runs = grid(
        lambda model, lr, width: (
            (model == "sigmoid" and (lr == "9" or width in "12")) or (model == "relu" and lr == "9" and width == "1")
        ),
        model=["sigmoid", "relu"],
        lr=["1", "9"],
        width=["1", "2", "3", "4"],
    )
    assert [one.key for one in assemble(runs).separations] == ["model", "lr", "width"]
    assert [(one.right, one.baseline) for one in assemble(runs).separations] == [(13, 9), (11, 9), (11, 9)]


def test_a_setting_that_is_different_in_every_run_does_not_shine():
    runs = [summary(str(i), f"name=run{i}", f"model={'ab'[i % 2]}", severity=3 * (i % 2)) for i in range(8)]
    found = {one.key: one.right for one in assemble(runs).separations}
    assert found["model"] == 8
    assert found.get("name", 4) == 4  # a coin toss


def test_many_numbers_are_split_where_it_tells_most():
    runs = [summary(str(lr), f"lr={lr}", severity=3 * (lr >= 0.3)) for lr in (0.01, 0.1, 0.2, 0.3, 1.0, 3.0, 10.0)]
    (found,) = assemble(runs).separations
    assert found.groups == (Group("≥ 0.3", 4, 4), Group("≤ 0.2", 3, 0))
    assert found.right == 7


def test_a_missing_override_is_a_value_of_its_own_and_seeds_are_none():
    runs = [summary(str(i), *(["fix=true"] * (i % 2)), f"seed={i}", severity=0 if i % 2 else 3) for i in range(4)]
    (found,) = assemble(runs).separations
    assert found.key == "fix"
    assert found.groups == (Group("(not given)", 2, 2), Group("true", 2, 0))


@pytest.mark.parametrize("severity", [0, 3])
def test_where_all_are_sick_or_all_are_sound_nothing_separates_them(severity):
    assert assemble(grid(lambda *_: severity, model=["a", "b"], lr=["1", "2"])).separations == ()


def test_a_run_whose_health_is_unknown_is_not_counted():
    runs = [
        *grid(lambda model, _: model == "a", model=["a", "b"], lr=["1", "2"]),
        summary("x", "model=a", condition="unknown"),
    ]
    assert assemble(runs).separations[0].runs == 4


def test_seed_keys_and_nested_configurations():
    assert [is_seed(key) for key in ("seed", "trainer.seed", "seeds", "seed.x")] == [True, True, False, False]
    assert dict(flatten({"a": {"b": {"c": None}}, "d": [1, 2], "e": {}})) == {"a.b.c": "None", "d": "[1, 2]"}
