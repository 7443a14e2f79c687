"""Clip rules: what they do follows their papers, and nothing that went wrong once changes what they do later."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diagnostics import ClipByGroup, ClipByNorm, ClipByQuantile, ClipByValue, ClipByZScore, ClipRule, clip_gradients

PROPERTY = settings(deadline=None, max_examples=60)
ADAPTIVE = {
    "quantile": ClipByQuantile(0.5, window=20, warmup=4),
    "zscore": ClipByZScore(z=1.5, alpha=0.8, warmup=4),
    "zscore to the threshold": ClipByZScore(z=1.0, warmup=3, target="threshold"),
    "zscore to the mean": ClipByZScore(z=1.0, warmup=3, target="mean", norm_type=1.0),
    "group of quantile": ClipByGroup(ClipByQuantile(0.5, window=8, warmup=4)),
}
BAD = (math.nan, math.inf, 0.0)
norms = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


def weight(norm: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """A parameter whose gradient has this norm, whatever its p."""
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    parameter.grad = torch.zeros(3, dtype=dtype)
    parameter.grad[1] = norm
    return parameter


def told(rule, sizes):
    """Records of gradients of these norms, one after the other."""
    return [clip_gradients([weight(size)], rule) for size in sizes]


def quantile(values, q):
    """By its definition: a place between the ordered values, linearly."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = ordered[int(place)]
    return below + (ordered[min(int(place) + 1, len(ordered) - 1)] - below) * (place - int(place))


class TestQuantile:
    @PROPERTY
    @given(norms, st.floats(0.01, 1.0), st.integers(1, 12), st.integers(0, 12))
    def test_the_threshold_is_the_quantile_of_the_norms_before_this_one(self, sizes, q, warmup, more):
        rule = ClipByQuantile(q, window=warmup + more, warmup=warmup)
        for step, record in enumerate(told(rule.start(), sizes)):
            history = sizes[:step][-rule.window :]
            expected = quantile(history, q) if len(history) >= warmup else math.inf
            assert record.threshold == record.max_norm == pytest.approx(expected, rel=1e-12)
            assert record.applied == (record.total_norm > record.threshold)
            assert record.total_norm_after == pytest.approx(min(sizes[step], record.threshold), rel=1e-12)

    def test_a_quantile_agrees_with_torch_s(self):
        sizes = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).add(0.1)
        record = told(ClipByQuantile(0.37, warmup=10), [*sizes.tolist(), 1.0])[-1]
        assert record.threshold == pytest.approx(torch.quantile(sizes, 0.37).item(), rel=1e-12)

    def test_the_history_holds_norms_before_clipping_so_that_the_threshold_does_not_sink(self):
        records = told(ClipByQuantile(0.5, warmup=2), [1.0, 3.0] * 20)
        assert [record.threshold for record in records[-2:]] == [pytest.approx(2.0, abs=1.0)] * 2
        assert min(record.threshold for record in records[2:]) >= 1.0

    def test_thresholds_far_below_torch_s_epsilon_clip_to_the_threshold(self):
        record = told(ClipByQuantile(0.5, warmup=2), [1e-9, 1e-9, 3e-9])[-1]
        assert record.applied
        assert record.total_norm_after == pytest.approx(1e-9, rel=1e-6, abs=0)


def zclip(sizes, *, z, alpha, warmup, target):
    """The paper's algorithm 1 word for word, as a slow reference: threshold and norm afterwards at each step."""
    mean = variance = None
    first, found = [], []
    for norm in sizes:
        if mean is None:
            first.append(norm)
            found.append((math.inf, norm))
            if len(first) == warmup:
                mean, variance = statistics.fmean(first), statistics.pvariance(first)
            continue
        deviation = math.sqrt(variance)
        clipped = norm
        if norm > mean + z * deviation:
            score = (norm - mean) / deviation if deviation else math.inf
            clipped = {
                "reciprocal": mean + z**2 / score * deviation,
                "threshold": mean + z * deviation,
                "mean": mean,
            }[target]
        found.append((mean + z * deviation, clipped))
        mean = alpha * mean + (1 - alpha) * clipped
        variance = alpha * variance + (1 - alpha) * (clipped - mean) ** 2
    return found


class TestZScore:
    @PROPERTY
    @given(
        norms,
        st.floats(0.1, 4),
        st.floats(0.05, 0.99),
        st.integers(2, 8),
        st.sampled_from(["reciprocal", "threshold", "mean"]),
    )
    def test_it_is_the_paper_s_algorithm(self, sizes, z, alpha, warmup, target):
        records = told(ClipByZScore(z=z, alpha=alpha, warmup=warmup, target=target).start(), sizes)
        expected = zclip(sizes, z=z, alpha=alpha, warmup=warmup, target=target)
        for record, (threshold, after) in zip(records, expected, strict=True):
            assert record.threshold == pytest.approx(threshold, rel=1e-6, abs=1e-12)
            assert record.total_norm_after == pytest.approx(after, rel=1e-6, abs=1e-12)
            assert record.rule == f"zscore_{target}"

    def test_a_spike_ends_below_its_threshold_the_lower_the_farther_out_it_is(self):
        steady = [1.0, 1.2] * 15
        near, far = (told(ClipByZScore(), [*steady, spike])[-1] for spike in (2.0, 200.0))
        assert near.threshold == far.threshold
        assert far.max_norm < near.max_norm < near.threshold
        assert far.total_norm_after == pytest.approx(far.max_norm)

    def test_a_spike_does_not_raise_the_threshold_that_meets_the_next_one(self):
        steady = [1.0, 1.2] * 15
        once, often = told(ClipByZScore(), [*steady, 100.0]), told(ClipByZScore(), [*steady, *[100.0] * 20])
        assert all(record.applied for record in often[30:])
        assert often[-1].threshold < once[-1].threshold * 1.01

    def test_norms_that_never_change_are_not_clipped(self):
        assert not any(record.applied for record in told(ClipByZScore(), [1.0] * 60))


class TestWarmUp:
    @pytest.mark.parametrize(
        "rule", [ClipByQuantile(0.5, warmup=5), ClipByZScore(warmup=5)], ids=["quantile", "zscore"]
    )
    def test_a_rule_that_warms_up_does_not_clip_and_says_so(self, rule):
        records = told(rule, [1.0, 50.0, 1.0, 1e4, 2.0, 1e6])
        assert [record.threshold for record in records[:5]] == [math.inf] * 5
        assert [record.applied for record in records] == [False] * 5 + [True]
        assert all(math.isinf(record.clip_coef) for record in records[:5])

    @pytest.mark.parametrize(
        "rule",
        [ClipByQuantile(0.9, warmup=3, max_norm=2.0), ClipByZScore(warmup=3, max_norm=2.0)],
        ids=["quantile", "zscore"],
    )
    def test_max_norm_bounds_every_step_the_warm_up_included(self, rule):
        records = told(rule, [1.0, 50.0, 100.0, 1e4, 1e5])
        assert [record.total_norm_after for record in records] == [1.0, 2.0, 2.0, 2.0, pytest.approx(2.0)]
        assert all(record.max_norm <= 2.0 for record in records)


class TestNothingIsPoisoned:
    @pytest.mark.parametrize("name", ADAPTIVE)
    @PROPERTY
    @given(norms, norms, st.sampled_from(BAD))
    def test_a_step_that_was_not_finite_or_zero_changes_nothing_later(self, name, before, after, bad):
        sound, hit = ADAPTIVE[name].start(), ADAPTIVE[name].start()
        told(sound, before)
        told(hit, before)
        met = told(hit, [bad])[0]
        assert not met.applied
        assert told(sound, after) == told(hit, after)

    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_a_history_that_is_not_finite_from_the_first_step_on_warms_up_all_the_same(self, name):
        rule = ADAPTIVE[name].start()
        told(rule, [math.nan, math.inf] * 10)
        assert told(rule, [1.0, 1.0, 1.0, 1.0, 9.0])[-1].applied

    def test_a_network_that_was_dead_for_a_while_is_not_wiped_when_it_revives(self):
        for name, rule in ADAPTIVE.items():
            state = rule.start()
            told(state, [0.0] * 50)
            assert told(state, [1.0])[0].total_norm_after == 1.0, name


class TestHistory:
    @pytest.mark.parametrize("name", ADAPTIVE)
    @PROPERTY
    @given(norms, norms)
    def test_a_state_that_was_saved_goes_on_as_if_nothing_had_happened(self, name, before, after):
        rule = ADAPTIVE[name].start()
        told(rule, before)
        saved = copy.deepcopy(rule.state_dict())
        expected = told(rule, after)
        resumed = ADAPTIVE[name].start()
        resumed.load_state_dict(saved)
        assert told(resumed, after) == expected

    def test_each_start_has_a_history_of_its_own_and_so_has_the_rule_itself(self):
        rule = ClipByQuantile(0.5, warmup=2)
        told(rule, [1.0, 1.0])
        assert told(rule, [5.0])[0].applied
        assert not told(rule.start(), [5.0])[0].applied
        assert rule == ClipByQuantile(0.5, warmup=2)  # what it remembers is no part of what it is
        assert not told(ClipByQuantile(0.5, warmup=2), [5.0])[0].applied

    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_the_same_norms_give_the_same_records(self, name):
        sizes = torch.rand(50, generator=torch.Generator().manual_seed(0)).add(0.01).tolist()
        assert told(ADAPTIVE[name].start(), sizes) == told(ADAPTIVE[name].start(), sizes)

    def test_rules_are_values(self):
        for rule in (ClipByNorm(1), ClipByValue(2.0), *ADAPTIVE.values()):
            assert isinstance(rule, ClipRule)
            assert rule == copy.deepcopy(rule)
            assert hash(rule) == hash(copy.deepcopy(rule))
            with pytest.raises(AttributeError):
                rule.norm_type = 3.0


class TestEveryNormType:
    @pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
    def test_an_adaptive_rule_ends_at_its_threshold(self, norm_type, dtype):
        for kind in (ClipByQuantile(0.5, warmup=2, norm_type=norm_type), ClipByZScore(warmup=2, norm_type=norm_type)):
            rule, generator = kind.start(), torch.Generator().manual_seed(0)
            for size in (1.0, 1.5, 40.0):
                parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (5, 7)]
                for one in parameters:
                    one.grad = (torch.rand(one.shape, generator=generator) * size + 0.1).to(dtype)
                before = [one.grad.clone() for one in parameters]
                record = clip_gradients(parameters, rule)
            assert record.applied
            after = clip_gradients(parameters, ClipByNorm(math.inf, norm_type)).total_norm
            rounding = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 2e-6)
            assert after == pytest.approx(record.max_norm, rel=rounding)
            for one, old in zip(parameters, before, strict=True):
                torch.testing.assert_close(one.grad, old * record.clip_coef, rtol=rounding, atol=0)

    def test_norms_beyond_fp32_enter_the_history_as_they_are(self):
        rule = ClipByQuantile(0.5, warmup=2).start()
        for _ in range(2):
            assert clip_gradients([weight(3e25, torch.float32)], rule).total_norm == pytest.approx(3e25)
        record = clip_gradients([weight(3e38, torch.float32)], rule)
        assert record.applied
        assert record.total_norm_after == pytest.approx(3e25)


class TestGroups:
    def test_each_group_is_clipped_as_if_it_were_alone(self):
        generator = torch.Generator().manual_seed(0)
        ours = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
        for one in ours:
            one.grad = torch.randn(4, generator=generator)
        theirs = copy.deepcopy(ours)
        for one, other in zip(theirs, ours, strict=True):
            one.grad = other.grad.clone()
        groups = [{"params": ours[:1]}, {"params": ours[1:]}]
        record = clip_gradients(groups, ClipByGroup(ClipByNorm(0.5)))
        first = torch.nn.utils.clip_grad_norm_(theirs[:1], 0.5)
        second = torch.nn.utils.clip_grad_norm_(theirs[1:], 0.5)
        assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))
        assert [(part.group, part.total_norm) for part in record.parts] == [("0", first.item()), ("1", second.item())]
        after = torch.nn.utils.get_total_norm([one.grad for one in ours]).item()
        assert record.total_norm == pytest.approx(math.hypot(first.item(), second.item()))
        assert record.total_norm_after == pytest.approx(after)
        assert record.clip_coef == pytest.approx(after / record.total_norm)
        assert (record.rule, record.applied, record.max_norm) == ("group", True, None)
        assert math.fsum(record.shares) == pytest.approx(1)

    def test_names_choose_the_first_pattern_that_is_found_and_others_keep_the_rule(self):
        model = nn.ModuleDict({"embedding": nn.Linear(2, 2), "head": nn.Linear(2, 2), "free": nn.Linear(2, 2)})
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rules = {"^embedding": ClipByNorm(0.1), r"weight$": ClipByValue(0.25), "^free": None}
        record = clip_gradients(model.named_parameters(), ClipByGroup(ClipByNorm(0.5), by="name", rules=rules))
        parts = {part.group: part for part in record.parts}
        assert {name: part.rule for name, part in parts.items()} == {
            "^embedding": "norm",
            "weight$": "value",
            "others": "norm",
            "^free": "none",
        }
        assert torch.nn.utils.get_total_norm([p.grad for p in model["embedding"].parameters()]).item() == pytest.approx(
            0.1
        )
        assert model["head"].weight.grad.max() == model["free"].weight.grad.max() == 0.25
        assert model["head"].bias.grad.norm().item() == pytest.approx(0.5)
        assert torch.equal(model["free"].bias.grad, torch.ones(2))
        everything = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        assert record.total_norm_after == pytest.approx(everything)

    @pytest.mark.parametrize("first", [1.0, 2.0, math.inf])
    @pytest.mark.parametrize("second", [1.0, 2.0, math.inf])
    def test_groups_of_different_norms_are_summed_up_in_the_length(self, first, second):
        pair = [weight(3.0), weight(4.0)]
        pair[0].grad[0] = 1.0
        rule = ClipByGroup(ClipByNorm(0.5, first), rules={"1": ClipByNorm(0.5, second)})
        before = torch.nn.utils.get_total_norm([one.grad for one in pair], rule.norm_type).item()
        record = clip_gradients([{"params": [one]} for one in pair], rule)
        assert record.norm_type == (first if first == second else 2.0)
        assert record.total_norm == pytest.approx(before)
        after = torch.nn.utils.get_total_norm([one.grad for one in pair], rule.norm_type).item()
        assert record.total_norm_after == pytest.approx(after, rel=1e-5)

    def test_every_group_has_a_history_of_its_own(self):
        rule = ClipByGroup(ClipByQuantile(1.0, warmup=2)).start()
        for sizes in ((1.0, 100.0), (1.0, 100.0), (50.0, 50.0)):
            record = clip_gradients([{"params": [weight(size)]} for size in sizes], rule)
        assert [part.applied for part in record.parts] == [True, False]
        assert [part.threshold for part in record.parts] == [1.0, 100.0]

    def test_a_group_that_is_not_finite_does_not_touch_the_others_history_or_gradients(self):
        rule = ClipByGroup(ClipByNorm(1.0))
        pair = [weight(math.nan), weight(0.5)]
        record = clip_gradients([{"params": [one]} for one in pair], rule)
        assert math.isnan(record.total_norm)
        assert pair[1].grad[1] == 0.5

    def test_plain_parameters_are_one_group_as_for_an_optimizer(self):
        record = clip_gradients([weight(3.0), weight(4.0)], ClipByGroup(ClipByNorm(1.0)))
        assert [(part.group, part.total_norm) for part in record.parts] == [("0", 5.0)]

    def test_groups_come_as_an_optimizer_takes_them(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        named = torch.optim.SGD(model.named_parameters(), lr=0.1)
        by_name = ClipByGroup(ClipByNorm(1.0), by="name", rules={"bias": None})
        for form in (named.param_groups, model.named_parameters(), list(model.named_parameters())):
            assert [part.group for part in clip_gradients(form, by_name).parts] == ["others", "bias"]
        one = [{"params": model[0].weight}, {"params": iter([model[1].weight, model[0].bias])}]
        assert [len(part.shares) for part in clip_gradients(one, ClipByGroup(ClipByNorm(1.0))).parts] == [1, 2]
        used = model.parameters()
        list(used)
        with pytest.raises(ValueError, match="nothing left in it"):
            clip_gradients(used, ClipByGroup(ClipByNorm(1.0)))

    def test_nothing_to_clip_has_no_parts(self):
        record = clip_gradients([], ClipByGroup(ClipByNorm(1.0)))
        assert (record.total_norm, record.parts, record.applied) == (0.0, (), False)
