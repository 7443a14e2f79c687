"""Clipping does what torch's own does, except where torch's does harm. Oracles: torch and closed forms in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diagnostics import ClipByNorm, NonFiniteGradientError, clip_grad_norm_, clip_gradients
from diagnostics.clipping.norms import p_norm, shares

PROPERTY = settings(deadline=None, max_examples=80)
FULL = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
EVERY = (*FULL, *HALF, torch.complex64)
NORM_TYPES = (0.5, 1.0, 1.5, 2.0, 3.0, math.inf)
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of one element, relative; full types: 2e-6, the epsilon


def with_gradients(*gradients: Tensor | None) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        shape, dtype = ((1,), torch.float32) if gradient is None else (gradient.shape, gradient.dtype)
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def copies(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return with_gradients(*(None if one.grad is None else one.grad.clone() for one in parameters))


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [one.grad for one in parameters if one.grad is not None]


def true_norm(parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> float:
    """The p-norm of all elements by its definition, scaled by the largest so that nothing leaves the range."""
    sizes = [size for one in gradients(parameters) for size in wide(one).abs().flatten().tolist()]
    peak = max(sizes, default=0.0)
    if peak == 0 or math.isinf(norm_type):
        return peak
    return peak * math.fsum((size / peak) ** norm_type for size in sizes) ** (1 / norm_type)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def state(parameters: Sequence[nn.Parameter]) -> list[tuple[int, int, bytes]]:
    """Which tensors hold the gradients, how often they were written, and their bytes."""
    found = []
    for one in gradients(parameters):
        content = (one._values() if one.is_sparse else one.detach()).contiguous()
        found.append((id(one), one._version, bytes(content.flatten().view(torch.uint8).tolist())))
    return found


@st.composite
def parameter_lists(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = EVERY, least: int = 0, *, mixed: bool = True
) -> list[nn.Parameter]:
    """Parameters with gradients of any shape, some without; sizes between 1e-3 and 1e3."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    one_type = draw(st.sampled_from(dtypes))
    made: list[Tensor | None] = []
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(least, 9), max_size=3))
        dtype = draw(st.sampled_from(dtypes)) if mixed else one_type
        draft = torch.complex128 if dtype.is_complex else torch.float64
        gradient = torch.randn(shape, generator=generator, dtype=draft) * 10.0 ** draw(st.integers(-3, 3))
        made.append(draw(st.sampled_from([gradient.to(dtype)] * 4 + [None])))
    return with_gradients(*made)


norm_types = st.sampled_from(NORM_TYPES)
fractions = st.floats(0.01, 0.9)  # of the total norm, as max_norm


class TestAsTorch:
    """Where torch's own clip does no harm, ours is not distinguishable from it."""

    @PROPERTY
    @given(parameter_lists(FULL, least=1, mixed=False), norm_types, st.floats(0.01, 10), st.sampled_from([None, True]))
    def test_norm_and_gradients_are_equal_bit_for_bit(
        self, ours: list[nn.Parameter], norm_type: float, fraction: float, foreach: bool | None
    ) -> None:
        theirs = copies(ours)
        max_norm = fraction * true_norm(ours, norm_type) or 1.0
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
        total = clip_grad_norm_(ours, max_norm, norm_type, foreach=foreach)
        assert torch.equal(total, expected)
        assert total.dtype == expected.dtype or not gradients(ours)
        assert all(torch.equal(one, other) for one, other in zip(gradients(ours), gradients(theirs), strict=True))

    @PROPERTY
    @given(parameter_lists((*FULL, torch.complex64), least=1), norm_types, fractions)
    def test_mixed_types_and_the_slow_kernels_differ_by_rounding_only(
        self, ours: list[nn.Parameter], norm_type: float, fraction: float
    ) -> None:
        theirs = copies(ours)
        max_norm = fraction * true_norm(ours, norm_type) or 1.0
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=False)
        total = clip_grad_norm_(ours, max_norm, norm_type, foreach=False)
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(gradients(ours), gradients(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("norm_type", [0.5, 1.5, 2.0, 4.0, math.inf])
    @pytest.mark.parametrize("foreach", [None, True, False])
    def test_a_layer_ends_at_max_norm_with_all_elements_scaled_alike(
        self, norm_type: float, foreach: bool | None
    ) -> None:
        before = [torch.arange(1.0, 101).view(10, 10), torch.ones(10) / 1000]
        layer = with_gradients(*(one.clone() for one in before))
        expected = true_norm(layer, norm_type)
        total = clip_grad_norm_(layer, 2.0, norm_type, foreach=foreach)
        assert total.item() == pytest.approx(expected, rel=1e-5)
        assert true_norm(layer, norm_type) == pytest.approx(2.0, rel=1e-5)
        scale = torch.cat([(one / old).flatten() for one, old in zip(gradients(layer), before, strict=True)])
        assert scale.std() < 1e-7

    def test_gradients_of_a_graph_are_clipped_outside_it(self) -> None:
        weights = [nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
        with warnings.catch_warnings():  # torch warns of the reference cycle that create_graph makes
            warnings.simplefilter("ignore")
            for weight in weights:
                weight.pow(3).sum().backward(create_graph=True)
        total = clip_grad_norm_(weights[:1], 1.0)
        expected = torch.nn.utils.clip_grad_norm_(weights[1:], 1.0)
        assert torch.equal(total, expected)
        assert not total.requires_grad
        assert torch.equal(*gradients(weights))
        curvatures = [torch.autograd.grad(weight.grad.sum(), weight)[0] for weight in weights]
        assert torch.equal(*curvatures)
        for weight in weights:
            weight.grad = None


class TestUntouched:
    """Gradients are written when clip_coef < 1 and at no other time."""

    @PROPERTY
    @given(parameter_lists(), norm_types, st.floats(1.01, 1e6) | st.just(math.inf))
    def test_below_the_threshold_not_even_the_version_moves(
        self, parameters: list[nn.Parameter], norm_type: float, factor: float
    ) -> None:
        max_norm = factor * (true_norm(parameters, norm_type) + 2e-6)
        before = state(parameters)
        clip_grad_norm_(parameters, max_norm, norm_type)
        assert clip_gradients(parameters, ClipByNorm(max_norm, norm_type)).applied is False
        assert state(parameters) == before

    def test_the_comparison_sees_a_write_of_equal_values(self) -> None:
        parameters = with_gradients(torch.tensor([3.0, 4.0]))
        before = state(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        assert state(parameters) != before

    def test_a_coefficient_of_exactly_one_writes_nothing(self) -> None:
        parameters = with_gradients(torch.tensor([3.0, 4.0]))
        before = state(parameters)
        record = clip_gradients(parameters, ClipByNorm((torch.tensor(5.0) + 1e-6).item()))
        assert (record.clip_coef, record.applied) == (1.0, False)
        assert state(parameters) == before

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 4.0, math.inf])
    @pytest.mark.parametrize("dtype", [*FULL, torch.float16, torch.complex64])
    def test_a_norm_that_is_not_finite_leaves_all_gradients_alone(
        self, bad: float, norm_type: float, dtype: torch.dtype
    ) -> None:
        parameters = with_gradients(torch.ones(4, dtype=dtype), torch.tensor([bad, 2.0], dtype=dtype))
        before = state(parameters)
        total = clip_grad_norm_(parameters, 1.0, norm_type)
        record = clip_gradients(parameters, ClipByNorm(1.0, norm_type))
        assert not torch.isfinite(total)
        assert math.isnan(total.item()) == math.isnan(bad)
        assert record.applied is False
        assert all(math.isnan(share) for share in record.shares)
        assert state(parameters) == before

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_error_if_nonfinite_raises_before_anything_is_written(self, bad: float) -> None:
        parameters = with_gradients(torch.ones(2), torch.tensor([bad]))
        before = state(parameters)
        with pytest.raises(NonFiniteGradientError, match=r"total norm of order 2 is (nan|inf)") as caught:
            clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        assert isinstance(caught.value, RuntimeError)  # what torch raises
        assert state(parameters) == before

    def test_error_if_nonfinite_lets_finite_gradients_through(self) -> None:
        parameters = with_gradients(torch.full((2,), 3e38))  # the fp32 norm overflows, the gradients do not
        assert clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True).item() == pytest.approx(3e38 * math.sqrt(2))

    def test_no_rule_only_measures(self) -> None:
        parameters = with_gradients(torch.tensor([3.0, 4.0]))
        before = state(parameters)
        record = clip_gradients(parameters, None)
        assert (record.rule, record.max_norm, record.clip_coef, record.applied) == ("none", None, None, False)
        assert (record.total_norm, record.total_norm_after) == (5.0, 5.0)
        assert state(parameters) == before


class TestClipped:
    """What holds after clipping, for every type, shape and p."""

    @PROPERTY
    @given(parameter_lists(), norm_types, fractions)
    def test_the_norm_ends_at_most_at_max_norm(
        self, parameters: list[nn.Parameter], norm_type: float, fraction: float
    ) -> None:
        total = true_norm(parameters, norm_type)
        assume(total > 1e-2)
        max_norm = fraction * total
        where = [(id(one), one.dtype, one.stride()) for one in gradients(parameters)]
        assert clip_grad_norm_(parameters, max_norm, norm_type).item() == pytest.approx(total, rel=1e-5)
        # subnormal half numbers round by an absolute amount, which many small elements and a small p add up
        coarse = [one for one in gradients(parameters) if one.dtype in HALF]
        excess = max((ROUNDING[one.dtype] for one in coarse), default=2e-6)
        slack = sum(one.numel() for one in coarse) ** (1 / norm_type) * 2**-24
        assert true_norm(parameters, norm_type) <= max_norm * (1 + excess) + slack
        assert [(id(one), one.dtype, one.stride()) for one in gradients(parameters)] == where

    @PROPERTY
    @given(parameter_lists((*FULL, torch.complex64)), norm_types, fractions)
    def test_clipping_twice_is_clipping_once(
        self, parameters: list[nn.Parameter], norm_type: float, fraction: float
    ) -> None:
        total = true_norm(parameters, norm_type)
        assume(fraction * total >= 1)  # below 1 the epsilon in the coefficient is more than 1e-6 of max_norm
        clip_grad_norm_(parameters, fraction * total, norm_type)
        once = [one.clone() for one in gradients(parameters)]
        clip_grad_norm_(parameters, fraction * total, norm_type)
        for one, before in zip(gradients(parameters), once, strict=True):
            torch.testing.assert_close(one, before, rtol=2e-6, atol=0)

    @PROPERTY
    @given(parameter_lists(), norm_types, st.floats(0.01, 10))
    def test_the_record_follows_the_formulas(
        self, parameters: list[nn.Parameter], norm_type: float, fraction: float
    ) -> None:
        total = true_norm(parameters, norm_type)
        assume(total > 1e-2 and abs(fraction - 1) > 1e-3)
        max_norm = fraction * total
        norms = [true_norm([one], norm_type) for one in parameters if one.grad is not None]
        record = clip_gradients(parameters, ClipByNorm(max_norm, norm_type))
        assert (record.rule, record.norm_type, record.max_norm, record.threshold) == (
            "norm",
            norm_type,
            max_norm,
            max_norm,
        )
        assert record.total_norm == pytest.approx(total, rel=1e-5)
        assert record.clip_coef == pytest.approx(max_norm / (record.total_norm + 1e-6), rel=1e-6)
        assert record.applied == (record.clip_coef < 1)
        assert record.total_norm_after == pytest.approx(min(record.clip_coef, 1) * record.total_norm)
        assert math.fsum(record.shares) == pytest.approx(1, rel=1e-4)
        if math.isinf(norm_type):
            assert [share > 0 for share in record.shares] == [norm == max(norms) for norm in norms]
        else:
            parts = [(norm / total) ** norm_type for norm in norms]
            assert list(record.shares) == pytest.approx(parts, rel=1e-4, abs=1e-6)

    @PROPERTY
    @given(parameter_lists((torch.float64,)))
    def test_a_larger_p_gives_a_smaller_norm(self, parameters: list[nn.Parameter]) -> None:
        totals = [clip_gradients(parameters, ClipByNorm(math.inf, p)).total_norm for p in (0.5, 1, 2, 3, 8, math.inf)]
        assert all(total >= following * (1 - 1e-12) for total, following in pairwise(totals))

    def test_mixed_types_share_one_coefficient(self) -> None:
        before = [torch.tensor([300.0, -400.0]).to(dtype) for dtype in EVERY]
        parameters = with_gradients(*(one.clone() for one in before))
        total = clip_grad_norm_(parameters, 1.0)
        assert total.item() == pytest.approx(500 * math.sqrt(len(EVERY)))
        for one, old in zip(gradients(parameters), before, strict=True):
            assert one.dtype == old.dtype
            torch.testing.assert_close(wide(one), wide(old) / total.item(), rtol=ROUNDING.get(one.dtype, 1e-6), atol=0)


class TestRange:
    """Norms that fp32 cannot hold: torch's clip answers 0 or infinity, and turns finite gradients into zeros."""

    def test_half_gradients_whose_half_norm_overflows(self) -> None:
        ours = with_gradients(*(torch.full((3000,), 1000.0, dtype=torch.float16) for _ in range(3)))
        theirs = copies(ours)
        torch.nn.utils.clip_grad_norm_(theirs, 1000.0)
        assert not any(one.any() for one in gradients(theirs))
        assert clip_grad_norm_(ours, 1000.0).item() == pytest.approx(1000 * math.sqrt(9000))  # 94868
        assert true_norm(ours) == pytest.approx(1000, rel=1e-3)

    @pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0])
    def test_fp32_gradients_whose_fp32_norm_overflows(self, norm_type: float) -> None:
        ours = with_gradients(torch.tensor([3e38, 0.0, -3e38]), torch.tensor([1.5e38]))
        theirs, expected = copies(ours), true_norm(ours, norm_type)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
        assert not any(one.any() for one in gradients(theirs))
        total = clip_grad_norm_(ours, 1.0, norm_type)
        assert (total.dtype, total.item()) == (torch.float64, pytest.approx(expected, rel=1e-12))
        assert true_norm(ours, norm_type) == pytest.approx(1.0, rel=2e-6)

    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    @pytest.mark.parametrize("decade", [-40, -38, -30, -25, -16, -11, 11, 16, 25, 36])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
    def test_a_norm_is_true_wherever_the_gradient_lives(
        self, norm_type: float, decade: int, dtype: torch.dtype
    ) -> None:
        parameters = with_gradients(*(torch.full((5,), n * 10.0**decade).to(dtype) for n in (3, -1, 2)))
        expected = true_norm(parameters, norm_type)
        record = clip_gradients(parameters, ClipByNorm(math.inf, norm_type))
        total = clip_grad_norm_(parameters, math.inf, norm_type)
        assert total.item() == pytest.approx(expected, rel=1e-5, abs=0)
        assert record.total_norm == pytest.approx(expected, rel=1e-5, abs=0)
        assert math.fsum(record.shares) == pytest.approx(1, rel=1e-4)

    def test_the_norm_is_returned_in_fp32_where_fp32_holds_it(self) -> None:
        tiny = with_gradients(torch.full((4,), 1e-25))
        subnormal = with_gradients(torch.full((4,), 1e-42))
        assert clip_grad_norm_(tiny, 1.0).dtype == torch.float32
        assert clip_grad_norm_(subnormal, 1.0).dtype == torch.float64

    @given(st.floats(0.01, 0.9), st.integers(13, 37), st.sampled_from([torch.float32, torch.complex64, torch.bfloat16]))
    @PROPERTY
    def test_huge_gradients_are_scaled_and_keep_their_direction(
        self, max_norm: float, decade: int, dtype: torch.dtype
    ) -> None:
        before = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).mul(10.0**decade).to(dtype).t()
        parameters = with_gradients(before.clone(memory_format=torch.preserve_format))
        assert parameters[0].grad.stride() == (1, 2)
        clip_grad_norm_(parameters, max_norm)
        expected = wide(before) * (max_norm / wide(before).abs().pow(2).sum().sqrt())
        torch.testing.assert_close(wide(parameters[0].grad), expected, rtol=ROUNDING.get(dtype, 2e-6), atol=0)
        assert parameters[0].grad.stride() == (1, 2)

    def test_true_infinity_beside_huge_finite_gradients_is_still_infinite(self) -> None:
        parameters = with_gradients(torch.tensor([3e38, 3e38]), torch.tensor([math.inf]))
        before = state(parameters)
        assert clip_grad_norm_(parameters, 1.0).item() == math.inf
        assert state(parameters) == before


class TestWhatIsGiven:
    """Everything that torch's signature takes."""

    def test_a_generator_a_tuple_and_a_single_tensor(self) -> None:
        for form in (iter, tuple, list, lambda given: given[0], lambda given: {"weight": given[0]}.values()):
            parameters = with_gradients(torch.tensor([3.0, 4.0]))
            assert clip_grad_norm_(form(parameters), 1.0).item() == 5.0
            assert true_norm(parameters) == pytest.approx(1.0, rel=2e-6)

    def test_nothing_at_all_has_norm_zero(self) -> None:
        for parameters in ([], with_gradients(None), with_gradients(None, None)):
            assert clip_grad_norm_(parameters, 1.0).item() == 0.0
            assert clip_gradients(parameters, ClipByNorm(1.0)).shares == ()

    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    @pytest.mark.parametrize("dtype", EVERY)
    def test_gradients_without_elements_count_nothing(self, norm_type: float, dtype: torch.dtype) -> None:
        empty = torch.zeros(3, 0, dtype=dtype)
        alone = clip_grad_norm_(with_gradients(empty), 1.0, norm_type)
        beside = clip_grad_norm_(with_gradients(empty, torch.tensor([2.0])), 1.0, norm_type)
        assert (alone.item(), beside.item()) == (0.0, pytest.approx(2.0))
        assert alone.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    def test_parameters_without_gradient_stay_without(self) -> None:
        parameters = with_gradients(None, torch.tensor([3.0, 4.0]), None)
        clip_grad_norm_(parameters, 1.0)
        assert [one.grad is None for one in parameters] == [True, False, True]
        assert clip_gradients(parameters, ClipByNorm(1.0)).shares == (pytest.approx(1.0),)

    @PROPERTY
    @given(parameter_lists(FULL), fractions)
    def test_a_parameter_given_twice_counts_once(self, parameters: list[nn.Parameter], fraction: float) -> None:
        once, max_norm = copies(parameters), fraction * true_norm(parameters) or 1.0
        expected = clip_grad_norm_(once, max_norm)
        assert torch.equal(clip_grad_norm_([*parameters, *reversed(parameters)], max_norm), expected)
        assert all(torch.equal(one, other) for one, other in zip(gradients(parameters), gradients(once), strict=True))

    def test_an_exhausted_generator_is_an_error(self) -> None:
        parameters = nn.Linear(2, 2).parameters()
        assert len(list(parameters)) == 2
        for clip in (lambda: clip_grad_norm_(parameters, 1.0), lambda: clip_gradients(parameters, ClipByNorm(1.0))):
            with pytest.raises(ValueError, match="got a generator with nothing left in it: pass a list"):
                clip()

    @given(st.floats(min_value=0, exclude_min=True, allow_nan=False) | st.integers(1, 10**9))
    @example(math.inf)
    @PROPERTY
    def test_every_positive_number_is_a_threshold(self, value: float) -> None:
        rule = ClipByNorm(value, value)
        assert (rule.max_norm, rule.norm_type) == (float(value), float(value))
        assert isinstance(rule.max_norm, float)


class TestSparse:
    """Gradients of sparse embeddings, which torch's own clip refuses."""

    @pytest.mark.parametrize("coalesced", [True, False])
    @PROPERTY
    @given(words=st.lists(st.integers(0, 5), max_size=12), norm_type=norm_types, decade=st.sampled_from([-25, 0, 38]))
    @example(words=[], norm_type=math.inf, decade=0)
    @example(words=[1, 1, 1, 4], norm_type=2.0, decade=38)
    def test_a_row_met_several_times_is_scaled_once(
        self, coalesced: bool, words: list[int], norm_type: float, decade: int
    ) -> None:
        embedding = nn.Embedding(6, 3, sparse=True)
        scale = (torch.arange(1.0, 4) * 10.0**decade / 40).clamp(max=1e37)
        (embedding(torch.tensor(words, dtype=torch.long)) * scale).sum().backward()
        parameters = [embedding.weight]
        if coalesced:
            parameters[0].grad = parameters[0].grad.coalesce()
        dense = with_gradients(parameters[0].grad.to_dense())
        before, total = wide(dense[0].grad), true_norm(dense, norm_type)
        max_norm = total / 3 or 1.0
        record = clip_gradients(parameters, ClipByNorm(max_norm, norm_type))
        assert record.total_norm == pytest.approx(total, rel=1e-5, abs=0)
        assert record.applied == (total > 0)
        assert parameters[0].grad.is_sparse
        after, smallest = wide(parameters[0].grad.to_dense()), 2.0**-149  # each addend rounds to a multiple of it
        torch.testing.assert_close(
            after, before * min(record.clip_coef, 1), rtol=2e-6, atol=smallest * (len(words) + 1)
        )

    def test_nothing_is_written_below_the_threshold(self) -> None:
        embedding = nn.Embedding(6, 3, sparse=True)
        embedding(torch.tensor([1, 1, 2])).sum().backward()
        before = state([embedding.weight])
        clip_grad_norm_(embedding.parameters(), 100.0)
        assert state([embedding.weight]) == before
        assert not embedding.weight.grad.is_coalesced()

    def test_sparse_beside_dense(self) -> None:
        embedding = nn.Embedding(6, 3, sparse=True)
        embedding(torch.tensor([1, 1])).sum().backward()  # one row of three 2s
        parameters = [embedding.weight, *with_gradients(torch.full((4,), 1.0))]
        assert clip_grad_norm_(parameters, 2.0).item() == 4.0
        assert torch.equal(embedding.weight.grad.to_dense()[1], torch.full((3,), 2 * 2.0 / (4 + 1e-6)))


class TestArithmetic:
    """The small functions on the host."""

    @PROPERTY
    @given(st.lists(st.just(0.0) | st.floats(1e-3, 1e3), max_size=9), norm_types, st.integers(-300, 290))
    def test_p_norm_holds_over_the_whole_range_of_float64(
        self, sizes: list[float], norm_type: float, decade: int
    ) -> None:
        largest = max(sizes, default=0.0)
        plain = largest if math.isinf(norm_type) else math.fsum(x**norm_type for x in sizes) ** (1 / norm_type)
        scaled = p_norm([x * 10.0**decade for x in sizes], norm_type)
        assert scaled == pytest.approx(plain * 10.0**decade, rel=1e-9, abs=0)

    def test_p_norm_passes_on_what_is_not_finite(self) -> None:
        assert math.isnan(p_norm([1.0, math.nan, math.inf], 2.0))
        assert p_norm([1.0, math.inf], 2.0) == math.inf
        assert p_norm([], 2.0) == 0.0

    def test_ties_share_the_infinity_norm(self) -> None:
        assert shares([2.0, 1.0, 2.0], 2.0, math.inf) == (0.5, 0.0, 0.5)

    def test_nothing_has_no_shares(self) -> None:
        assert all(math.isnan(share) for share in shares([0.0, 0.0], 0.0, 2.0))
