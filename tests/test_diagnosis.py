"""Slopes against closed forms; conditions over time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.diagnosis import State, advance, diagnose, fit_depth, verdict
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import (
    ClipRecord,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    StepRecord,
    Violation,
)

CLIP = ClipRecord("none", 2.0, None, 1.0, None, applied=False, total_norm_after=1.0)


def layers(profile, kinds=None):
    """A profile of rms over depth as layer records."""
    records = []
    for depth, rms in enumerate(profile):
        kind = kinds[depth] if kinds else "Linear"
        layer = Layer(depth, f"layer{depth}", kind, trunk="Norm" not in kind)
        records.append(LayerRecord(layer, GradientStats(1, rms, rms), None))
    return records


def record(step, slope, depths=10, **more):
    profile = [10.0 ** (slope * (depths - 1 - depth)) for depth in range(depths)]
    return StepRecord(step=step, clip=CLIP, layers=Layers(layers(profile)), recorded=True, **more)


def conditions(records, **thresholds):
    return [
        (found.condition, found.severity, found.step, found.cleared)
        for found in diagnose(records, Thresholds(**thresholds))
    ]


@given(st.floats(-2, 2), st.integers(2, 100))
def test_the_slope_of_a_geometric_profile_is_its_ratio_whatever_the_depth(slope, depths):
    profile = [10.0 ** (slope * (depths - 1 - depth)) for depth in range(depths)]
    fit = fit_depth(layers(profile))
    assert fit.slope == pytest.approx(slope, abs=1e-9)
    assert fit.decades == pytest.approx(abs(slope) * (depths - 1), abs=1e-7)
    assert fit.intercept == pytest.approx(0, abs=1e-7)
    assert fit.uncertainty == pytest.approx(0, abs=1e-9)


@given(st.integers(8, 60), st.data())
def test_a_quarter_of_outliers_does_not_move_the_slope(depths, data):
    profile = [10.0 ** (-0.3 * (depths - 1 - depth)) for depth in range(depths)]
    for place in data.draw(st.sets(st.integers(0, depths - 1), max_size=depths // 5)):
        profile[place] *= data.draw(st.sampled_from([1e-6, 1e6]))
    assert fit_depth(layers(profile)).slope == pytest.approx(-0.3, abs=0.15)


def test_normalisation_layers_are_recorded_and_not_fitted():
    kinds = ["Linear", "LayerNorm"] * 5
    profile = [10.0 ** (-(9 - depth) // 2) if kinds[depth] == "Linear" else 1e9 for depth in range(10)]
    fit = fit_depth(layers(profile, kinds))
    assert (fit.depths, fit.slope) == (5, -1.0)


def test_exact_zeros_and_non_finite_values_are_left_out_of_the_fit_and_counted_in_its_depth():
    fit = fit_depth(layers([0.0, 1e-2, math.nan, 1.0, math.inf]))
    assert (fit.depths, fit.points) == (5, 2)
    assert fit.slope == pytest.approx(-1.0)


def test_one_layer_has_no_slope():
    assert fit_depth(layers([1.0])) is None


def test_severity_comes_from_decades():
    for decades, severity in [(1.4, None), (1.6, 1), (2.6, 2), (5.1, 3)]:
        found = conditions([record(step, -decades / 9) for step in range(3)])
        assert found == ([("vanishing", severity, 0, None)] if severity else [])


def test_growth_on_the_way_back_is_exploding():
    assert conditions([record(step, 0.5) for step in range(3)])[0][0] == "exploding"


def test_a_slope_within_its_own_uncertainty_is_no_diagnosis():
    noisy = [10.0 ** (-0.3 * (9 - depth) + (2.5 if depth % 2 else -2.5)) for depth in range(10)]
    fit = fit_depth(layers(noisy))
    assert fit.decades > 1.5
    records = [StepRecord(step=step, clip=CLIP, layers=Layers(layers(noisy)), recorded=True) for step in range(5)]
    assert conditions(records) == []


def test_the_first_record_diagnoses_and_the_third_confirms():
    state = State()
    seen = []
    for step in range(3):
        state, changed = advance(state, record(step, -0.5), Thresholds())
        seen.append([(one.condition, one.confirmed) for one in changed])
    assert seen == [[("vanishing", False)], [], [("vanishing", True)]]


def test_one_bad_record_is_forgotten():
    records = [record(0, 0.0), record(1, -0.9), record(2, 0.0)]
    assert conditions(records) == []


def test_a_condition_clears_after_three_records_without_it_and_the_verdict_tells():
    records = [record(step, -0.5) for step in range(4)] + [record(step, 0.0) for step in range(4, 8)]
    assert conditions(records) == [("vanishing", 2, 0, 6)]
    state = State()
    for one in records:
        state, _ = advance(state, one, Thresholds())
    assert verdict(state).condition == "healthy"
    assert verdict(state).text == "healthy; vanishing at steps 0–6, cleared"


def test_two_good_records_do_not_clear():
    records = [record(step, -0.5) for step in range(4)] + [record(4, 0.0), record(5, 0.0), record(6, -0.5)]
    assert conditions(records) == [("vanishing", 2, 0, None)]


def test_severity_rises_and_falls_with_the_records():
    records = [record(step, -0.3) for step in range(3)] + [record(step, -0.9) for step in range(3, 6)]
    assert conditions(records) == [("vanishing", 3, 0, None)]
    records += [record(step, -0.2) for step in range(6, 9)]
    assert conditions(records) == [("vanishing", 1, 0, None)]


def test_unrecorded_steps_neither_confirm_nor_clear():
    unrecorded = [StepRecord(step=step, clip=CLIP) for step in range(1, 50)]
    assert conditions([record(0, -0.5), *unrecorded]) == [("vanishing", 2, 0, None)]
    assert not diagnose([record(0, -0.5), *unrecorded])[0].confirmed


def test_a_run_of_one_record_says_that_it_is_unconfirmed():
    state, _ = advance(State(), record(0, -0.5), Thresholds())
    assert verdict(state).condition == "vanishing"
    assert "unconfirmed (1 record)" in verdict(state).text


def test_no_recorded_step_is_unknown():
    assert verdict(State()).condition == "unknown"


def test_healthy_is_never_said_alone_while_violations_exist():
    state, _ = advance(State(), record(0, 0.0), Thresholds(confirm=1))
    broken = Violation("missing_zero_grad", 1, (), "", "")
    assert (
        verdict(state, [broken], Thresholds(confirm=1)).text == "healthy gradients, unlawful loop (missing_zero_grad)"
    )


def nonfinite_record(step, **more):
    layer = LayerRecord(Layer(3, "deep", "Linear"), None, GradientStats(4, math.nan, math.nan, nonfinite=2))
    clip = replace(CLIP, total_norm=math.nan)
    return StepRecord(step=step, clip=clip, layers=Layers([layer]), **more)


def test_a_non_finite_gradient_is_diagnosed_at_once_with_its_layer():
    (found,) = diagnose([nonfinite_record(7)])
    assert (found.condition, found.severity, found.step, found.depth, found.confirmed) == ("nonfinite", 4, 7, 3, True)
    assert "deep" in found.message


def test_an_overflow_that_the_loss_scaler_corrects_is_no_illness_but_ten_in_a_row_are():
    records = [nonfinite_record(step, skipped=True, loss_scale=65536.0) for step in range(10)]
    assert diagnose(records[:9]) == ()
    assert diagnose(records)[0].condition == "nonfinite"


def test_the_message_on_vanishing_says_that_clipping_cannot_cure_it():
    assert "clipping cannot cure it" in diagnose([record(0, -0.5)])[0].message


def test_a_severity_falls_only_when_the_decades_are_well_below_its_limit():
    strong, little_less, clearly_less = (
        [record(step, -decades / 9) for step in range(9)] for decades in (2.6, 2.3, 1.9)
    )
    later = [replace(one, step=one.step + 9) for one in little_less]
    assert conditions([*strong, *later]) == [("vanishing", 2, 0, None)]
    assert conditions([*strong, *(replace(one, step=one.step + 9) for one in clearly_less)]) == [
        ("vanishing", 1, 0, None)
    ]
    assert conditions(little_less) == [("vanishing", 1, 0, None)]


def test_what_has_cleared_slowly_is_told_by_the_worst_that_it_was():
    decades = [3.0] * 4 + [1.9] * 4 + [0.1] * 4
    records = [record(step, -one / 9) for step, one in enumerate(decades)]
    assert conditions(records) == [("vanishing", 2, 0, 10)]
