"""Statistics are true from the smallest subnormal number to the largest, and taking them changes nothing.

Oracles: the definitions, evaluated in float64 on plain Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diagnostics.monitor.assembly import profiled
from diagnostics.statistics import (
    exact_norms,
    gradients_of,
    pack,
    parameter_norms,
    total_norm,
    trusted,
)
from diagnostics.statistics.dead import unit_sizes
from diagnostics.statistics.magnitudes import Profile, euclidean_norm, is_held, peaks, profiles, take_apart
from diagnostics.statistics.reading import Reader
from diagnostics.statistics.samples import LARGEST_SAMPLE, RUN, SMALLEST_SAMPLE, Samples, sample, sample_size
from diagnostics.statistics.stacks import Stacks

PROPERTY = settings(deadline=None, max_examples=100)
NORM_TYPES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, math.inf)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
DECADES = {torch.float16: (-7, 3), torch.float64: (-300, 300), torch.complex128: (-300, 300)}  # else fp32's range


def sizes_of(tensor: Tensor) -> list[float]:
    values = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return [abs(value) for value in values.flatten().tolist()]


def true_norm(tensor: Tensor, norm_type: float = 2.0) -> float:
    sizes = sizes_of(tensor)
    peak = max(sizes, default=0.0)
    if peak == 0 or math.isinf(norm_type):
        return peak
    return peak * math.fsum((size / peak) ** norm_type for size in sizes) ** (1 / norm_type)


def sparse(indices: object, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any shape, layout and type, whose elements are of one size anywhere in the range of its type."""
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = draw(st.lists(st.integers(0, 7), max_size=3))
    draft = torch.complex128 if dtype.is_complex else torch.float64
    lowest, highest = DECADES.get(dtype, (-40, 36))
    tensor = torch.randn(shape, generator=generator, dtype=draft) * 10.0 ** draw(st.integers(lowest, highest))
    tensor = tensor.to(dtype)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


class TestNorms:
    """Quick norms are right where they are trusted; exact ones everywhere."""

    @PROPERTY
    @given(tensors(), st.sampled_from(NORM_TYPES))
    def test_a_trusted_norm_is_right(self, tensor: Tensor, norm_type: float) -> None:
        norm = parameter_norms([tensor], norm_type)[0]
        assert norm.shape == ()
        assert not norm.is_complex()
        if trusted(norm.item(), norm_type):
            assert norm.item() == pytest.approx(true_norm(tensor, norm_type), rel=2e-5, abs=0)

    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    def test_trust_ends_before_the_powers_leave_fp32(self, norm_type: float) -> None:
        for decade in range(-45, 39):
            norm = parameter_norms([torch.full((9,), 2 * 10.0**decade)], norm_type)[0].item()
            true = true_norm(torch.full((9,), 2 * 10.0**decade), norm_type)
            assert not trusted(norm, norm_type) or norm == pytest.approx(true, rel=1e-5, abs=0)

    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    def test_gradients_of_ordinary_size_are_trusted(self, norm_type: float) -> None:
        reach = 30 / max(1.0, min(norm_type, 30))
        assert all(trusted(10 ** (sign * 0.9 * reach), norm_type) for sign in (-1, 0, 1))
        assert not any(trusted(value, norm_type) for value in (0.0, math.inf, math.nan))

    @PROPERTY
    @given(st.lists(tensors(), max_size=4), st.sampled_from(NORM_TYPES))
    def test_exact_norms_hold_over_the_whole_range(self, given_tensors: list[Tensor], norm_type: float) -> None:
        norms, counts = exact_norms(given_tensors, norm_type)
        assert norms.dtype == torch.float64
        assert norms.tolist() == pytest.approx([true_norm(one, norm_type) for one in given_tensors], rel=1e-9, abs=0)
        assert counts.tolist() == [0] * len(given_tensors)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_exact_norms_count_what_is_not_finite(self, dtype: torch.dtype) -> None:
        bad = torch.tensor([math.nan, 1.0, math.inf, -math.inf], dtype=dtype)
        norms, counts = exact_norms([bad, torch.ones(4, dtype=dtype), torch.tensor([math.inf], dtype=dtype)])
        assert counts.tolist() == [3, 0, 1]
        assert [math.isnan(norms[0]), norms[1].item(), norms[2].item()] == [True, 2.0, math.inf]

    @PROPERTY
    @given(st.lists(tensors(), min_size=1, max_size=4), st.sampled_from(NORM_TYPES))
    def test_the_norm_of_norms_is_the_norm_of_everything(self, given_tensors: list[Tensor], norm_type: float) -> None:
        norms = exact_norms(given_tensors, norm_type)[0]
        everything = torch.tensor([size for one in given_tensors for size in sizes_of(one)], dtype=torch.float64)
        scale = max(everything.tolist(), default=0) or 1.0
        total = total_norm(torch.stack([norm / scale for norm in norms]), norm_type).item() * scale
        assert total == pytest.approx(true_norm(everything, norm_type), rel=1e-9, abs=0)

    def test_no_gradients_have_norm_zero(self) -> None:
        assert total_norm(torch.zeros(0)).item() == 0.0
        assert parameter_norms([]).numel() == 0

    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    def test_a_gradient_without_elements_has_norm_zero(self, norm_type: float) -> None:
        empty = torch.zeros(0, 3)
        hollow = sparse(torch.zeros(1, 0), torch.zeros(0, 3), (5, 3))
        assert [norm.item() for norm in parameter_norms([empty, hollow], norm_type)] == [0.0, 0.0]
        assert exact_norms([empty, hollow], norm_type).tolist() == [[0.0, 0.0], [0.0, 0.0]]

    def test_half_types_are_accumulated_in_fp32(self) -> None:
        for dtype, value in ((torch.float16, 1000.0), (torch.bfloat16, 1.0)):
            norm = parameter_norms([torch.full((10_000,), value, dtype=dtype)])[0]
            assert (norm.dtype, norm.item()) == (torch.float32, pytest.approx(100 * value, rel=1e-5))

    def test_equal_indices_of_a_sparse_gradient_are_added_before_the_norm(self) -> None:
        gradient = sparse([[1, 1, 0]], torch.tensor([3.0, 1.0, 3.0]), (4,))
        assert parameter_norms([gradient])[0].item() == 5.0
        assert exact_norms([gradient])[0].item() == 5.0


class TestGradientsOf:
    """Which gradients there are."""

    def test_each_parameter_once_in_order_and_none_without_gradient(self) -> None:
        first, second, without = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        first.grad, second.grad = torch.ones(2), torch.zeros(2)
        owners, gradients = gradients_of([second, without, first, second])
        assert [id(one) for one in owners] == [id(second), id(first)]
        assert [id(one) for one in gradients] == [id(second.grad), id(first.grad)]


def profile(gradient: Tensor, *, exact: bool = True) -> Tensor:
    return profiles([take_apart(gradient, exact=exact)])[:, 0]


class TestProfile:
    """What a recorded step keeps of one gradient."""

    @PROPERTY
    @given(tensors())
    def test_norm_and_peak_are_true_over_the_whole_range(self, tensor: Tensor) -> None:
        found = Profile(*profile(tensor).double().tolist())
        smallest = 2e-45 if tensor.is_complex() else 0  # the size of a complex number is one in fp32
        assert found.peak == pytest.approx(max(sizes_of(tensor), default=0.0), rel=1e-6, abs=smallest)
        assert found.norm == pytest.approx(true_norm(tensor), rel=1e-5, abs=smallest * max(1, tensor.numel()))
        assert found.nonfinite == 0

    @pytest.mark.parametrize("decade", [-44, -41, -39, -38, -37, -20, 0, 18, 20, 37])
    def test_subnormal_and_huge_gradients_keep_their_norm(self, decade: int) -> None:
        found = Profile(*profile(torch.full((16,), 10.0**decade)).tolist())
        assert found.norm == pytest.approx(4 * torch.tensor(10.0**decade).item(), rel=1e-5)

    @PROPERTY
    @given(tensors())
    def test_fractions_of_a_small_tensor_are_counts(self, tensor: Tensor) -> None:
        sizes, smallest = sizes_of(tensor), torch.finfo(tensor.dtype).tiny
        found = Profile(*profile(tensor).double().tolist())
        count = len(sizes) or 1
        assert found.zero_fraction == pytest.approx(sum(size == 0 for size in sizes) / count)
        if not tensor.is_complex():  # the size of a complex number is rounded
            assert found.underflow_fraction == pytest.approx(sum(0 < size < smallest for size in sizes) / count)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zeros_and_subnormal_numbers_are_told_apart(self, dtype: torch.dtype) -> None:
        tiny = torch.finfo(dtype).tiny
        found = Profile(*profile(torch.tensor([0.0, -0.0, tiny / 2, -tiny / 2, tiny, 1.0], dtype=dtype)).tolist())
        assert (found.zero_fraction, found.underflow_fraction) == (pytest.approx(2 / 6), pytest.approx(2 / 6))
        assert found.peak == 1.0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_what_fp16_would_not_hold_is_counted_in_any_dtype_and_zeros_are_not(self, dtype: torch.dtype) -> None:
        found = Profile(*profile(torch.tensor([0.0, 2.0**-15, -(2.0**-15), 2.0**-14, 1.0], dtype=dtype)).tolist())
        assert found.underflow_fp16_fraction == pytest.approx(2 / 5)
        assert found.underflow_fraction == pytest.approx(2 / 5 if dtype == torch.float16 else 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_not_finite_is_counted_and_shows_in_the_peak(self, dtype: torch.dtype) -> None:
        found = Profile(*profile(torch.tensor([[math.inf, 1.0], [-math.inf, 2.0]], dtype=dtype)).tolist())
        assert (found.peak, found.nonfinite) == (math.inf, 2.0)
        found = Profile(*profile(torch.tensor([math.nan, 1.0, math.inf], dtype=dtype)).tolist())
        assert (math.isnan(found.peak), found.nonfinite) == (True, 2.0)

    def test_a_complex_number_is_not_finite_if_one_part_is_not(self) -> None:
        found = profile(torch.tensor([complex(1, math.nan), complex(math.inf, 0), 1j]))
        assert found[-1] == 2

    def test_a_negative_peak_is_a_peak(self) -> None:
        assert profile(torch.tensor([1.0, -3.0]))[1] == 3.0

    def test_zeros_have_norm_zero(self) -> None:
        assert profile(torch.zeros(4)).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_gradient_without_elements_is_all_zero(self, dtype: torch.dtype) -> None:
        assert profile(torch.zeros(0, 3, dtype=dtype)).tolist() == [0.0] * 6

    def test_a_sparse_gradient_is_judged_by_the_rows_it_holds(self) -> None:
        gradient = sparse([[1, 1]], torch.tensor([[2.0, 0.0], [2.0, 3.0]]), (9, 2))
        norm, peak, zero, *_ = profile(gradient).tolist()
        assert (norm, peak, zero) == (pytest.approx(5.0), 4.0, 0.0)

    def test_fractions_of_a_large_tensor_come_from_all_of_its_columns(self) -> None:
        gradient = torch.ones(512, 256)
        gradient[:, ::2] = 0  # half the columns are dead, as behind a ReLU
        assert profile(gradient)[2].item() == pytest.approx(0.5, abs=0.01)


class TestSample:
    """A part of a tensor that stands for the whole: all of a small one, else runs of neighbours."""

    @PROPERTY
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    @example([64, 65])
    @example([2, 3, 5, 7, 11, 13])
    def test_runs_lie_evenly_apart_and_coprime_with_every_dimension(self, shape: list[int]) -> None:
        numel = math.prod(shape)
        places = sample(torch.arange(numel).reshape(shape))
        if numel <= LARGEST_SAMPLE:
            assert places.tolist() == list(range(numel))
            return
        starts = places[:, 0].tolist()
        assert torch.equal(places, places[:, :1] + torch.arange(RUN))
        assert starts[0] == 0
        (apart,) = {later - earlier for earlier, later in pairwise(starts)}
        assert apart > RUN
        assert all(math.gcd(apart, size) == 1 for size in shape)
        assert all(apart % divisor for divisor in range(2, apart))
        assert numel - places.max() <= apart

    @PROPERTY
    @given(st.integers(1, 100_000))
    def test_it_takes_as_many_elements_as_it_says_and_none_twice(self, numel: int) -> None:
        seen = sample(torch.arange(numel)).flatten().tolist()
        assert len(seen) == len(set(seen)) == sample_size(torch.Size([numel]))

    def test_it_takes_a_64th_within_its_limits(self) -> None:
        sizes = [LARGEST_SAMPLE + 1, 30_030, 65_536, 100_000, 180_180, 262_144, 510_510, 2**20, 10**6, 10**8]
        for size in sizes:
            meant = min(max(SMALLEST_SAMPLE, size / 64), LARGEST_SAMPLE)
            assert 0.8 * meant <= sample_size(torch.Size([size])) <= meant

    @PROPERTY
    @given(st.integers(100, 5000), st.sampled_from([16, 64, 100, 256, 300, 384, 512, 768, 1000, 1024, 2048]))
    @example(3000, 768)
    def test_every_column_of_a_weight_is_seen_about_equally_often(self, rows: int, columns: int) -> None:
        seen = torch.bincount(sample(torch.arange(columns).expand(rows, columns)).flatten(), minlength=columns)
        blocks = seen.float().unfold(0, 16, 16).mean(1)
        if seen.sum() > 4 * columns:
            assert blocks.min() >= 0.4 * seen.float().mean()
        assert blocks.max() <= 2.5 * max(1.0, seen.float().mean())

    def test_rows_of_very_different_size_enter_by_their_share(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(512, 300) * torch.logspace(-2, 0, 512)[:, None]
        estimate = sample(weight).norm() * math.sqrt(weight.numel() / sample_size(weight.shape))
        assert estimate.item() == pytest.approx(weight.norm().item(), rel=0.1)

    def test_it_is_a_view_of_a_contiguous_tensor(self) -> None:
        tensor = torch.zeros(100, 100)
        assert sample(tensor).data_ptr() == tensor.data_ptr()

    def test_it_is_the_same_part_every_time(self) -> None:
        tensor = torch.randn(100, 100)
        assert torch.equal(sample(tensor), sample(tensor.clone()))


def test_peaks_come_in_the_order_of_the_gradients_whoever_has_found_them() -> None:
    torch.manual_seed(0)
    shapes = [(70, 70), (3,), (60, 80), (70, 70), (5000,), (2, 2), (2, 2), (2, 2), (2, 2)]
    gradients = [torch.randn(shape) * 10**-place for place, shape in enumerate(shapes)]
    stacks = Stacks(gradients)
    known = unit_sizes(stacks, {0: 0, 2: 1, 3: 0, 5: 0, 6: 0, 7: 0, 8: 0})
    wanted = [one.abs().max().item() for one in gradients]
    assert peaks(stacks, known).tolist() == peaks(stacks).tolist() == pytest.approx(wanted)


class TestLargeProfiles:
    """A gradient that is too large to be kept: looked at where it is, exactly or quickly."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-24, 1e-18, 1e-12, 1.0, 1e12, 1e18, 1e30, 1e36])
    def test_an_exact_look_holds_over_the_whole_range(self, size: float, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        gradient = torch.rand(60, 70).add_(1).mul_(size).to(dtype)
        assert Profile(*profile(gradient).tolist()).norm == pytest.approx(true_norm(gradient), rel=1e-5)
        assert euclidean_norm(gradient).item() == pytest.approx(true_norm(gradient), rel=1e-5)

    @pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-24, 1e-18, 1e-12, 1.0, 1e12, 1e18, 1e30, 1e36])
    def test_a_quick_look_holds_within_fp32_and_estimates_beyond(self, size: float) -> None:
        torch.manual_seed(0)
        gradient = torch.rand(300, 300).add_(1).mul_(size)
        found = Profile(*profile(gradient, exact=False).tolist())
        held = is_held(euclidean_norm(gradient, exact=False).item())
        assert held == (1e-17 < size < 1e13)
        assert found.norm == pytest.approx(true_norm(gradient), rel=1e-5 if held else 0.05)

    @pytest.mark.parametrize("shape", [(2048, 2048), (64, 256, 16, 16)])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-5)])
    def test_a_quick_look_at_millions_of_elements_loses_no_digits_that_count(
        self, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
    ) -> None:
        torch.manual_seed(0)
        gradient = torch.rand(shape).add_(0.5).to(dtype)
        wide = torch.linalg.vector_norm(gradient.double()).item()
        assert euclidean_norm(gradient, exact=False).item() == pytest.approx(wide, rel=tolerance)

    def test_one_element_that_the_sample_misses_is_no_zero(self) -> None:
        missed = set(range(90_000)).difference(sample(torch.arange(90_000).view(300, 300)).flatten().tolist())
        gradient = torch.zeros(300, 300)
        gradient.view(-1)[max(missed)] = 1e-30
        for exact in (True, False):
            assert profile(gradient, exact=exact)[0].item() == pytest.approx(1e-30)

    def test_of_several_gradients_only_those_that_fp32_has_not_held_are_estimated(self) -> None:
        torch.manual_seed(0)
        sizes = [1.0, 1e-30, 1e-30, 1e3]
        gradients = [torch.rand(60, 70).mul_(size) for size in sizes]
        exact = [False, True, False, True]
        found = profiles([take_apart(one, exact=known) for one, known in zip(gradients, exact, strict=True)])[0]
        error = [abs(norm / true_norm(one) - 1) for norm, one in zip(found.tolist(), gradients, strict=True)]
        assert [one < 1e-5 for one in error] == [True, True, False, True]
        assert error[2] < 0.05

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize(
        ("dtype", "size", "tolerance"),
        [(torch.float64, 1e-12, 1e-12), (torch.bfloat16, 1e-9, 1e-5), (torch.complex64, 1e-9, 1e-5)],
    )
    def test_other_types_have_theirs(self, dtype: torch.dtype, size: float, tolerance: float, exact: bool) -> None:
        torch.manual_seed(0)
        gradient = (torch.randn(300, 300) * size).to(dtype)
        assert profile(gradient, exact=exact)[0].item() == pytest.approx(true_norm(gradient), rel=tolerance)

    def test_of_non_finite_elements_there_are_as_many_as_the_sample_says_and_never_none(self) -> None:
        gradient = torch.ones(300, 300)
        gradient[:150] = math.nan
        found = profiled([gradient.numel()], profiles([take_apart(gradient)]).flatten().tolist())
        assert found.nonfinite == [pytest.approx(45_000, rel=0.05)]
        gradient[:] = 1.0
        gradient[299, 298] = math.inf
        found = profiled([gradient.numel()], profiles([take_apart(gradient)]).flatten().tolist())
        assert (found.nonfinite, found.norm) == ([1], [math.inf])


class TestSamples:
    """Samples of many tensors, in few kernels."""

    def test_samples_of_many_kinds_come_back_in_their_order(self) -> None:
        torch.manual_seed(0)
        shapes = [(8, 4), (100, 100), (), (8, 4), (0,), (70, 70), (100, 100), (8, 4), (8, 4)]
        tensors = [torch.randn(shape) for shape in shapes]
        tensors += [torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.complex64)]
        before = Samples(Stacks(tensors))
        parts = [sample(one).clone() for one in tensors]
        assert before.norms().tolist() == pytest.approx([one.norm().item() for one in parts], rel=1e-6)
        assert before.peaks().tolist() == pytest.approx([max(one.abs().flatten().tolist(), default=0) for one in parts])
        sums = [torch.view_as_real(one).sum() if one.is_complex() else one.sum() for one in parts]
        roots = [math.sqrt(max(1, one.numel())) for one in parts]
        wanted = [total.item() / root for total, root in zip(sums, roots, strict=True)]
        assert before.projections().tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        for place, one in enumerate(tensors):
            one.add_(place)
        moved = [(sample(now) - old).norm().item() for now, old in zip(tensors, parts, strict=True)]
        assert before.moved(tensors).tolist() == pytest.approx(moved, rel=1e-6)


class TestReader:
    """The only place where the host waits for the device."""

    def test_one_copy_brings_everything_in_the_order_asked(self) -> None:
        reader = Reader()
        asked = [reader.ask(torch.full((n,), float(n))) for n in range(5)]
        assert asked[3].values == [3.0] * 3
        assert [one.values for one in asked] == [[float(n)] * n for n in range(5)]
        assert reader.copies == 1

    def test_what_is_asked_later_comes_with_the_next_copy(self) -> None:
        reader = Reader()
        first = reader.ask(torch.tensor(1.0))
        assert (first.values, reader.copies) == ([1.0], 1)
        second, third = reader.ask(torch.tensor(2)), reader.ask(torch.tensor([True, False]))
        assert (third.values, second.values, first.values, reader.copies) == ([1.0, 0.0], [2.0], [1.0], 2)

    def test_shapes_and_types_mix_without_loss(self) -> None:
        given_tensors = [
            torch.tensor([[1e-45, 3e38]]),
            torch.tensor(1e-300, dtype=torch.float64),
            torch.tensor(2**53 - 1),
            torch.tensor([6e-8], dtype=torch.float16),
            torch.tensor(math.nan),
        ]
        reader = Reader()
        asked = [reader.ask(one) for one in given_tensors]
        for reading, one in zip(asked, given_tensors, strict=True):
            assert reading.values == pytest.approx(one.double().flatten().tolist(), rel=0, abs=0, nan_ok=True)

    def test_the_values_are_those_of_the_moment_they_are_read(self) -> None:
        """Nothing is copied when asked; who asks for a tensor that is overwritten later has to ask for a copy."""
        tensor, reader = torch.zeros(1), Reader()
        asked = reader.ask(tensor)
        tensor += 1
        assert asked.values == [1.0]

    def test_nothing_asked_is_nothing_read(self) -> None:
        assert pack([]).shape == (0,)
        assert Reader().ask(torch.zeros(0)).values == []


KINDS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(70, 30),
    "transposed": lambda: torch.randn(70, 30).t(),
    "strided": lambda: torch.randn(70, 60)[:, ::2],
    "half": lambda: torch.randn(2100).half(),
    "double": lambda: torch.randn(2100).double(),
    "complex": lambda: torch.randn(2100, dtype=torch.complex64),
    "not finite": lambda: torch.tensor([math.nan, math.inf, 1.0]),
    "empty": lambda: torch.zeros(0),
    "sparse": lambda: sparse([[0, 0, 3]], torch.randn(3, 700), (5, 700)),
    "in a graph": lambda: torch.randn(2100, requires_grad=True) * 2,
}
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter_norms": lambda tensor: parameter_norms([tensor])[0],
    "exact_norms": lambda tensor: exact_norms([tensor]),
    "sample": sample,
    "profile": profile,
    "pack": lambda tensor: pack([sample(tensor).abs()]),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_never_writes_and_makes_no_graph(kind: str, measure: str) -> None:
    tensor = KINDS[kind]()
    held = tensor._values() if tensor.is_sparse else tensor
    before = tensor._version, held._version, content(held)
    found = MEASURES[measure](tensor)
    assert (tensor._version, held._version, content(held)) == before
    assert not found.requires_grad


def content(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().view(torch.uint8).flatten().tolist()


def test_the_comparison_sees_a_write_of_equal_values() -> None:
    tensor = KINDS["transposed"]()
    before = tensor._version, content(tensor)
    tensor.mul_(1.0)
    assert (tensor._version, content(tensor)) != before
