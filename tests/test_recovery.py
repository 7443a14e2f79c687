"""A slope that is gone: forgiven at once where it was short or the loss has come down, else not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.diagnosis import State, advance, diagnose, verdict
from diagnostics.diagnosis.recovery import GONE, Cost
from diagnostics.diagnosis.thresholds import Thresholds
from diagnostics.records import WARNING, ClipRecord, GradientStats, Layer, LayerRecord, Layers, StepRecord
from diagnostics.trainers.loop import incurable

CLIP = ClipRecord("none", 2.0, None, 1.0, None, applied=False, total_norm_after=1.0)


def record(step, decades, loss):
    """A step of ten layers over which the gradient falls (or, with negative decades, grows) by so much."""
    profile = [10.0 ** (-decades / 9 * (9 - depth)) for depth in range(10)]
    layers = [
        LayerRecord(Layer(depth, f"layer{depth}", "Linear"), GradientStats(1, size, size), None)
        for depth, size in enumerate(profile)
    ]
    return StepRecord(step=step, clip=CLIP, layers=Layers(layers), recorded=True, loss=loss)


def run(*parts, decades=3.0):
    """Parts of (steps, whether the slope is there, loss) one after the other."""
    steps = [part for part in parts for _ in range(part[0])]
    return [record(step, decades * there, loss) for step, (_, there, loss) in enumerate(steps)]


def judged(records, **thresholds):
    state = State()
    for one in records:
        state, _ = advance(state, one, Thresholds(**thresholds))
    return verdict(state)


@pytest.mark.parametrize(("decades", "condition"), [(3.0, "vanishing"), (-3.0, "exploding"), (8.0, "vanishing")])
def test_a_long_slope_is_not_forgiven_for_being_gone_while_the_loss_stays_where_it_was(decades, condition):
    found = judged(run((100, True, 2.3), (100, False, 1.5), decades=decades))
    assert (found.condition, found.severity) == (condition, WARNING)
    assert found.text == (
        f"{condition} since step 0: the slope stood for 100 steps and is gone since step 100, but the loss has not "
        "recovered: 1.5, after 2.3 then"
    )


def test_it_clears_once_the_loss_has_come_down():
    records = run((100, True, 2.3), (50, False, 1.5), (50, False, 0.3))
    found = diagnose(records)[0]
    assert judged(records).condition == "healthy"
    assert (found.cleared, found.severity) == (160, WARNING)  # the median of the newest twenty losses
    assert "made up for it" in found.message


def test_a_loss_with_a_floor_recovers_by_the_share_that_its_task_names():
    """A language model's: ln 256 at first, 3.16 by the frequencies of bytes alone, 1.75 in the end."""
    learned, stuck = (run((100, True, 5.55), (200, False, loss)) for loss in (1.75, 3.16))
    assert judged(learned).condition == "vanishing"
    assert judged(learned, recovered_loss=0.5).condition == "healthy"
    assert judged(stuck, recovered_loss=0.5).condition == "vanishing"


def test_a_slope_that_took_less_than_a_tenth_of_the_run_is_forgiven_whatever_the_loss():
    assert judged(run((10, True, 2.3), (85, False, 2.3))).condition == "vanishing"
    assert judged(run((10, True, 2.3), (95, False, 2.3))).condition == "healthy"
    assert judged(run((10, True, 2.3), (85, False, 2.3)), lasting_share=0.2).condition == "healthy"


def test_only_its_own_steps_count_of_a_slope_that_comes_and_goes():
    flickering = run(*[(1, True, 2.3), (1, False, 2.3)] * 100)
    cost = Cost()
    for one in flickering:
        cost = cost.after(WARNING if one.step % 2 == 0 else 0, one.step, one.loss)
    assert cost.steps == 100


@pytest.mark.parametrize("loss", [None, -2.3])
def test_without_a_loss_that_has_a_ratio_the_end_of_the_slope_clears_it(loss):
    assert judged(run((100, True, loss), (10, False, loss))).condition == "healthy"


def test_a_notice_costs_nothing():
    assert judged(run((99, True, 2.3), (10, False, 2.3), decades=2.0)).condition == "healthy"
    assert judged(run((200, True, 2.3), (5, False, 2.3), decades=2.0)).condition == "healthy"  # nor once it is gone


@pytest.mark.parametrize(("decades", "condition"), [(2.0, "vanishing"), (-2.0, "exploding")])
def test_a_notice_that_stands_for_most_of_the_run_while_the_loss_hardly_falls_is_a_warning(decades, condition):
    assert judged(run((99, True, 2.3), decades=decades)).condition == "healthy"
    found = judged(run((100, True, 2.3), (50, True, 1.2), decades=decades))
    assert (found.condition, found.severity) == (condition, WARNING)
    told = diagnose(run((100, True, 2.3), (50, True, 1.2), decades=decades))[0].message
    assert told.endswith("It has stood for 150 of 150 steps, and the loss has come down from 2.3 to 1.2 only.")


def test_it_is_a_notice_again_once_the_loss_has_come_down():
    records = run((150, True, 2.3), (50, True, 0.3), decades=2.0)
    assert judged(records[:150]).condition == "vanishing"
    assert judged(records).condition == "healthy"


def test_a_notice_that_was_there_for_less_than_half_of_the_run_or_without_a_loss_stays_one():
    assert judged(run((60, False, 2.3), (1, True, 2.3), (60, False, 2.3), (58, True, 2.3), decades=2.0)).severity == 0
    assert judged(run((200, True, None), decades=2.0)).severity == 0
    assert judged(run((200, True, -1.0), decades=2.0)).severity == 0


def test_from_when_on_a_notice_weighs_is_the_thresholds_to_say():
    records = run((60, True, 2.3), decades=2.0)
    assert judged(records).severity == 0
    assert judged(records, standing_steps=50).severity == WARNING
    late = run((60, False, 2.3), (60, True, 2.3), decades=2.0)
    assert judged(late, standing_share=0.9).severity == 0


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.floats(0.01, 3)), min_size=1, max_size=5))
def test_a_slope_that_is_there_is_never_excused_by_the_loss_and_one_never_seen_is_no_cost(parts):
    there = run(*parts, (5, True, 1e-3))
    assert judged(there).condition == "vanishing"
    assert judged(run(*((steps, False, loss) for steps, _, loss in parts))).severity == 0


def test_a_run_that_makes_up_for_its_slope_is_not_stopped():
    class Watched:
        def __init__(self, records):
            self.records, self.diagnoses = records, diagnose(records)

    stood, gone = run((100, True, 2.3)), run((100, True, 2.3), (20, False, 2.0))
    assert incurable(Watched(stood), 90) == "vanishing (warning) has stood since step 0"
    assert GONE in diagnose(gone)[0].evidence
    assert incurable(Watched(gone), 90) is None
