"""Before and after by depth: what is put side by side is comparable, and what cannot be measured is left out of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_fleet import summary

from diagnostics.records import ClipRecord, GradientStats, Layer, LayerRecord, Layers, StepRecord
from diagnostics.reports.comparison import GRID, compare, relative_profile
from diagnostics.reports.fleet import assemble
from diagnostics.reports.history import histories

CLIP = ClipRecord("none", 2.0, None, 1.0, None, applied=False, total_norm_after=1.0)


def history(*steps, trunk=None):
    """A run whose layers have these rms, one list per step."""
    records = []
    for number, sizes in enumerate(steps):
        layers = [
            LayerRecord(
                Layer(depth, str(depth), "Linear", trunk=trunk is None or trunk[depth]),
                None if rms is None else GradientStats(1, rms, rms),
                None,
            )
            for depth, rms in enumerate(sizes)
        ]
        records.append(StepRecord(number, CLIP, layers=Layers(layers)))
    return histories(records)["optimizer"]


def test_networks_of_different_depth_have_profiles_of_one_length():
    deep, shallow = [10.0 ** -(8 - depth) for depth in range(9)], [1e-8, 1e-4, 1.0]
    assert relative_profile(history(deep)) == pytest.approx(relative_profile(history(shallow)))
    assert relative_profile(history(deep)) == pytest.approx(-8 * (1 - np.array(GRID)))


def test_a_profile_is_the_median_over_steps_without_zeros_and_what_is_not_finite():
    steps = [[1e-2, 1.0], [1e-4, 1.0], [1e-3, 1.0], [0.0, math.inf], [math.nan, 1.0]]
    profile = relative_profile(history(*steps))
    assert (profile[0], profile[-1]) == (pytest.approx(-3.0), 0.0)


def test_a_layer_that_was_never_measured_is_bridged_and_does_not_move_the_others():
    profile = relative_profile(history([1e-4, None, 0.0, 1e-1, 1.0]))
    assert profile[0] == -4
    assert profile[5] == pytest.approx(-2.0)  # the middle, on the line from depth 0 to depth 3
    assert profile[10] == 0


def test_only_the_trunk_is_compared():
    assert relative_profile(history([1e-4, 1e9, 1.0], trunk=[True, False, True]))[5] == pytest.approx(-2.0)


def test_a_run_without_a_recorded_step_has_no_profile():
    assert np.isnan(relative_profile(history([None, None]))).all()
    assert np.isnan(relative_profile(history([]))).all()


def test_a_side_is_the_median_run_with_its_range_and_the_first_side_is_the_measure():
    before = assemble([summary(str(i), f"seed={i}", severity=3, slope=-0.5 - 0.1 * i) for i in range(3)])
    after = assemble([summary("x", slope=-0.1), summary("y", "lr=2", slope=-0.2, severity=2)])
    falls = [[place * decades for place in GRID] for decades in (-1.0, -2.0, -6.0)]
    found = compare({"a": before, "b": after}, {"a": falls, "b": [falls[0]]})
    one, other = found.sides
    assert (one.runs, one.sick, dict(one.conditions)) == (3, 3, {"vanishing": 3})
    assert (other.runs, other.sick, dict(other.conditions)) == (2, 1, {"healthy": 1, "vanishing": 1})
    assert (one.profile[-1], one.low[-1], one.high[-1]) == (-2.0, -6.0, -1.0)
    assert found.differences(1)[-1] == 1.0
    assert found.sentence == (
        "a → b: 3 of 3 runs sick, then 1 of 2; backward slope -0.60, then -0.15 decades per layer."
    )


def test_a_side_whose_runs_recorded_nothing_leaves_the_others_as_they_are():
    empty = [math.nan] * len(GRID)
    found = compare({"a": assemble([summary("x")]), "b": assemble([])}, {"a": [empty, [0.0] * len(GRID)], "b": []})
    assert found.sides[0].profile == (0.0,) * len(GRID)
    assert all(map(math.isnan, found.differences(1)))
