"""What another max_norm would have done is what torch's own clipping does to the same gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diagnostics.records import ClipRecord, Diagnosis, GradientStats, Layer, LayerRecord, Layers, StepRecord
from diagnostics.reports.history import histories
from diagnostics.reports.whatif import CAVEAT, told, what_if


def history(*norms, **changes):
    clip = ClipRecord("none", 2.0, None, 0.0, None, applied=False, total_norm_after=0.0)
    records = [StepRecord(i, replace(clip, total_norm=norm, total_norm_after=norm)) for i, norm in enumerate(norms)]
    return histories([replace(record, **changes) for record in records])["optimizer"]


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=30), st.floats(1e-8, 1e8))
def test_share_and_coefficient_are_those_of_torch_s_own_clipping(norms, max_norm):
    assume(all(abs(norm / max_norm - 1) > 1e-9 for norm in norms))
    (found,) = what_if(history(*norms), [max_norm])
    coefficients = []
    for norm in norms:
        gradient = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        gradient.grad = torch.tensor([norm], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([gradient], max_norm)
        coefficients.append(gradient.grad.item() / norm)
    clipped = [one for one in coefficients if one < 1 - 1e-12]
    (candidate,) = found.candidates
    assert candidate.clipped == pytest.approx(len(clipped) / len(norms), abs=1e-9)
    assert candidate.coefficient is None if not clipped else candidate.coefficient == pytest.approx(np.median(clipped))


@given(st.lists(st.floats(1e-3, 1e3), min_size=100, max_size=300))
def test_a_suggestion_clips_at_most_its_share_and_a_smaller_one_clips_more(norms):
    (found,) = what_if(history(*norms))
    assert [one.share for one in found.suggestions] == [0.01, 0.05, 0.1]
    for hint in found.suggestions:
        assert what_if(history(*norms), [hint.max_norm])[0].candidates[0].clipped <= hint.share + 1e-12
        assert what_if(history(*norms), [hint.max_norm * 0.99])[0].candidates[0].clipped > hint.share - 1 / len(norms)


def test_steps_that_were_sick_skipped_or_not_finite_are_not_healthy():
    sick = Diagnosis("exploding", 3, 2, 0, {}, "It grows.", cleared=4)
    records = [
        StepRecord(
            i, ClipRecord("none", 2.0, None, norm, None, False, norm), skipped=i == 5, diagnoses=(sick,) * (i == 2)
        )
        for i, norm in enumerate([1.0, 1.0, 50.0, 60.0, 1.0, 70.0, math.nan, math.inf, 1.0])
    ]  # fmt: skip
    (found,) = what_if(histories(records)["optimizer"])
    assert (found.steps, found.nonfinite, found.healthy) == (7, 2, 4)


def test_too_few_healthy_steps_get_no_suggestion_that_they_cannot_carry():
    (found,) = what_if(history(*np.linspace(1, 2, 30)))
    assert [one.share for one in found.suggestions] == [0.05, 0.1]
    assert what_if(history(1.0))[0].suggestions == ()


def test_norms_of_other_types_are_put_together_where_every_layer_s_was_recorded():
    weights = [
        (GradientStats(4, 3.0, 1.5, abs_max=2.0), GradientStats(4, 4.0, 2.0, abs_max=3.5)),
        (GradientStats(4, 6.0, 3.0), GradientStats(4, 8.0, 4.0, abs_max=1.0)),
    ]
    layers = [
        Layers(
            [LayerRecord(Layer(d, str(d), "Linear"), None, one) for d, one in enumerate(pair)]
            + [LayerRecord(Layer(2, "2", "Tanh"), None, None)]
        )
        for pair in weights
    ]
    clip = ClipRecord(
        "norm", 1.0, 9.0, total_norm=7.0, clip_coef=1.0, applied=False, total_norm_after=7.0, threshold=9.0
    )
    own, euclidean, largest = what_if(
        histories([StepRecord(i, clip, layers=one) for i, one in enumerate(layers)])["optimizer"]
    )
    assert (own.norm_type, own.recorded, euclidean.norm_type, largest.norm_type) == (1.0, True, 2.0, math.inf)
    assert (own.steps, euclidean.steps, largest.steps) == (2, 2, 1)  # the peaks were taken at one step only
    assert [one.max_norm for one in own.candidates if one.current] == [9.0]
    assert euclidean.recorded is False
    assert largest.nonfinite == 0  # what was not taken is not NaN
    assert (
        share(histories([StepRecord(i, clip, layers=one) for i, one in enumerate(layers)]), 2.0, 5.1) == 0.5
    )  # 5 and 10
    assert share(histories([StepRecord(i, clip, layers=one) for i, one in enumerate(layers)]), math.inf, 3.4) == 1.0


def share(found, norm_type, max_norm):
    (one,) = [one for one in what_if(found["optimizer"], [max_norm]) if one.norm_type == norm_type]
    return one.candidates[0].clipped


@given(st.lists(st.floats(0, allow_infinity=True), min_size=1, max_size=50))
def test_the_ladder_rises_from_a_rung_that_clips_nearly_all_to_one_that_clips_nothing(norms):
    (found,) = what_if(history(*norms))
    rungs = [one.max_norm for one in found.candidates]
    assert rungs == sorted(set(rungs))
    assert len(rungs) <= 20
    if any(0 < norm < 1e300 for norm in norms) and max(norm for norm in norms if norm < math.inf) < 1e300:
        assert found.candidates[-1].clipped == 0.0 or found.candidates[-1].coefficient > 0.4
        shares = [one.clipped for one in found.candidates]
        assert shares == sorted(shares, reverse=True)


def test_gradients_that_were_zero_or_never_finite_leave_nothing_to_choose():
    assert what_if(history(0.0, 0.0))[0].candidates == ()
    assert what_if(history(math.nan))[0].candidates == ()
    assert list(told(what_if(history(0.0)))) == []


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_max_norm_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"max_norm must be a positive number; got {wrong!r}\. Leave it out"):
        what_if(history(1.0), [wrong])


def test_in_words_it_says_what_it_cannot_know():
    said = list(told(what_if(history(*[1.0] * 99, 4.0), [2.0])))
    assert said[0] == "What another max_norm would have clipped, norm_type 2, of 100 steps:"
    assert said[1].split() == ["2", "1.0%,", "by", "0.5", "(median)"]
    assert said[2].startswith("  Of the 100 healthy steps it would have clipped 1% by 1")
    assert said[-1].strip() == CAVEAT
