"""The cases that PyTorch's own tests hold for its clipping, with torch as the oracle: ours must not be told from it."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import clip_grad_value_ as torch_clip_value
from torch.nn.utils import get_total_norm

from diagnostics import ClipByNorm, ClipByValue, Monitor, NonFiniteGradientError, clip_grad_norm_, clip_gradients

PROPERTY = settings(deadline=None, max_examples=60)
NORM_TYPES = (0.5, 1, 1.5, 2, 4, math.inf, "inf")
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": lambda x: x.repeat(1, 2)[:, ::2],
    "expanded copy": lambda x: x[:1].expand_as(x).clone(memory_format=torch.preserve_format),
    "channels last": lambda x: x.reshape(1, 2, 2, -1).contiguous(memory_format=torch.channels_last),
    "scalar": lambda x: x[0, 0].clone(),
    "empty": lambda x: x[:0],
}


def twins(*gradients):
    """Two lists of parameters with equal gradients, each with memory of its own and the layout that it came with."""
    pair = []
    for _ in range(2):
        made = []
        for gradient in gradients:
            parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
            parameter.grad = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype).copy_(
                gradient
            )
            made.append(parameter)
        pair.append(made)
    return pair


def same(ours, theirs):
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))
    assert all(one.grad.stride() == other.grad.stride() for one, other in zip(ours, theirs, strict=True))


class TestNorm:
    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    @pytest.mark.parametrize("foreach", [None, True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_is_scaled_in_place(self, layout, foreach, norm_type):
        gradient = LAYOUTS[layout](torch.arange(1.0, 25).reshape(4, 6))
        ours, theirs = twins(gradient, torch.ones(10) / 1000)
        if layout == "empty" and float(norm_type) == math.inf:  # torch's slow kernels refuse it
            theirs, foreach = theirs[1:], None
        expected = torch_clip(theirs, 2.0, norm_type, foreach=foreach)
        total = clip_grad_norm_(ours, 2.0, norm_type, foreach=foreach)
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (total.dtype, total.device, total.shape) == (expected.dtype, expected.device, expected.shape)
        for one, other in zip(ours[-len(theirs) :], theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
            assert one.grad.stride() == other.grad.stride()

    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    @pytest.mark.parametrize("foreach", [None, True, False])
    def test_small_gradients_are_left_unchanged(self, norm_type, foreach):
        ours, theirs = twins(torch.rand(10, 10) / 10000, torch.ones(10) / 500)
        before = [one.grad.clone() for one in ours]
        total = clip_grad_norm_(ours, 2e3, norm_type, foreach=foreach)
        assert total.item() == pytest.approx(torch_clip(theirs, 2e3, norm_type, foreach=foreach).item())
        assert all(torch.equal(one.grad, old) for one, old in zip(ours, before, strict=True))
        same(ours, theirs)

    def test_a_single_tensor_is_a_list_of_one(self):
        ours, theirs = twins(torch.randn(10, 10))
        assert torch.equal(clip_grad_norm_(ours[0], 0.5), torch_clip(theirs, 0.5))
        same(ours, theirs)

    @pytest.mark.parametrize(
        "max_norm", [1, True - 0.5, torch.tensor(1.0), torch.tensor([[1.0]]), torch.tensor(1, dtype=torch.int64)]
    )
    @pytest.mark.parametrize("norm_type", [2, 2.0, torch.tensor(2.0), "inf"])
    def test_numbers_may_come_as_torch_takes_them(self, max_norm, norm_type):
        ours, theirs = twins(torch.randn(10, 10))
        assert torch.equal(clip_grad_norm_(ours, max_norm, norm_type), torch_clip(theirs, max_norm, norm_type))
        same(ours, theirs)

    def test_numpy_s_numbers_too(self):
        numpy = pytest.importorskip("numpy")
        for number in (numpy.float32(0.5), numpy.float64(0.5), numpy.array(0.5)):
            ours, theirs = twins(torch.randn(10))
            assert torch.equal(clip_grad_norm_(ours, number), torch_clip(theirs, number))
            same(ours, theirs)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("norm_type", [0.1, 1, 2, 3.5, math.inf])
    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_error_if_nonfinite_raises_where_torch_raises(self, bad, norm_type, place, dtype):
        gradients = [torch.full((10,), 1.0, dtype=dtype) for _ in range(3)]
        gradients[place][-1] = bad
        ours, theirs = twins(*gradients)
        with pytest.raises(RuntimeError, match="non-finite"):
            torch_clip(theirs, 1.0, norm_type, error_if_nonfinite=True)
        with pytest.raises(NonFiniteGradientError):
            clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True)
        assert all(
            torch.equal(
                one.grad,
                g,
            )
            or one.grad.isnan().any()
            for one, g in zip(ours, gradients, strict=True)
        )

    @pytest.mark.parametrize("norm_type", [0.1, 1, 2, 3.5, math.inf])
    @pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 1e3])
    def test_error_if_nonfinite_does_not_raise_on_finite_gradients(self, value, norm_type):
        ours, theirs = twins(*(torch.full((10, 10), value) for _ in range(3)))
        total = clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True)
        assert torch.equal(total, torch_clip(theirs, 1.0, norm_type, error_if_nonfinite=True))
        same(ours, theirs)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.cuda
    @pytest.mark.parametrize("foreach", [None, True, False])
    def test_gradients_on_two_devices_have_one_norm(self, foreach):
        ours, theirs = twins(torch.arange(1.0, 101), torch.ones(10) / 1000)
        for pair in (ours, theirs):
            moved = nn.Parameter(pair[1].detach().cuda())
            moved.grad = pair[1].grad.cuda()
            pair[1] = moved
        total, expected = clip_grad_norm_(ours, 0.5, foreach=foreach), torch_clip(theirs, 0.5, foreach=foreach)
        assert (total.device, total.item()) == (expected.device, pytest.approx(expected.item()))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)

    def test_gradients_on_a_device_without_values_are_refused_as_by_torch(self):
        parameter = nn.Parameter(torch.zeros(3, device="meta"))
        parameter.grad = torch.zeros(3, device="meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            clip_grad_norm_([parameter], 1.0)


class TestTotalNorm:
    @pytest.mark.parametrize("norm_type", [0.5, 1.5, 2.0, 4.0, math.inf])
    @pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"empty"}))
    def test_measuring_alone_gives_torch_s_total_norm(self, layout, norm_type):
        ours, _ = twins(LAYOUTS[layout](torch.randn(4, 6)), torch.randn(10))
        record = clip_gradients(ours, ClipByNorm(math.inf, norm_type))
        assert record.total_norm == get_total_norm([one.grad for one in ours], norm_type).item()
        assert not record.applied

    def test_no_gradients_have_norm_zero_as_torch_s(self):
        assert clip_gradients([], None).total_norm == get_total_norm([]).item() == 0.0

    def test_the_parts_of_torch_s_clip_give_the_same_as_the_whole(self):
        ours, theirs = twins(torch.arange(1.0, 101).reshape(10, 10), torch.ones(10) / 1000)
        grads = [one.grad for one in theirs]
        torch.nn.utils.clip_grads_with_norm_(theirs, 2.0, get_total_norm(grads))
        clip_grad_norm_(ours, 2.0)
        same(ours, theirs)


class TestValue:
    @pytest.mark.parametrize("foreach", [None, True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_elements_end_within_the_limit_exactly_as_by_torch(self, layout, foreach, dtype):
        gradient = LAYOUTS[layout](torch.arange(-12.0, 12).reshape(4, 6)).to(dtype)
        ours, theirs = twins(gradient, (torch.ones(10) * 2).to(dtype))
        for value in (2.5, 0.3):  # 0.3 is no number of any of these types
            torch_clip_value(theirs, value, foreach=foreach)
            record = clip_gradients(ours, ClipByValue(value))
            same(ours, theirs)
        assert record.total_norm_after == pytest.approx(clip_gradients(ours, None).total_norm, rel=1e-6)
        assert not clip_gradients(ours, ClipByValue(0.3)).applied  # once is enough

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_one_element_of_many_is_found(self, dtype):
        for sizes in ((5000, 3), (3, 5000), (4096, 4097), (5000, 5000)):
            for place in (0, 1):
                ours, theirs = twins(*(torch.zeros(size, dtype=dtype) for size in sizes))
                for pair in (ours, theirs):
                    pair[place].grad[-1] = -3.0
                torch_clip_value(theirs, 2.0)
                assert clip_gradients(ours, ClipByValue(2.0)).applied
                same(ours, theirs)

    def test_a_single_tensor_and_parameters_without_gradient(self):
        ours, theirs = twins(torch.tensor([-5.0, 0.1, 5.0]))
        torch_clip_value(theirs[0], 1.0)
        clip_gradients(ours[0], ClipByValue(1.0))
        same(ours, theirs)
        assert not clip_gradients([nn.Parameter(torch.ones(2))], ClipByValue(1.0)).applied

    @PROPERTY
    @given(
        st.lists(st.lists(st.floats(-4, 4, width=32), max_size=6), min_size=1, max_size=4),
        st.floats(0.01, 5),
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    )
    def test_the_record_says_what_torch_s_clamp_does(self, rows, value, dtype):
        ours, theirs = twins(*(torch.tensor(row, dtype=dtype) for row in rows))
        before = [(one.grad.clone(), one.grad._version) for one in ours]
        torch_clip_value(theirs, value)
        record = clip_gradients(ours, ClipByValue(value))
        same(ours, theirs)
        changed = [not torch.equal(one.grad, old) for one, (old, _) in zip(ours, before, strict=True)]
        assert record.applied == any(changed)
        written = [one.grad._version != version for one, (_, version) in zip(ours, before, strict=True)]
        assert written == changed  # not written to where nothing is beyond the limit
        after = get_total_norm([one.grad.double() for one in theirs]).item()
        assert record.total_norm_after == pytest.approx(after, rel=1e-5)
        assert record.clip_coef == pytest.approx(after / record.total_norm if record.total_norm else 1.0, rel=1e-5)
        assert (record.rule, record.threshold, record.max_norm) == ("value", value, None)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_gradients_that_are_not_finite_are_left_alone(self, bad):
        ours, _ = twins(torch.tensor([bad, 5.0]), torch.tensor([7.0]))
        record = clip_gradients(ours, ClipByValue(1.0))
        assert not record.applied
        assert (ours[0].grad[1].item(), ours[1].grad.item()) == (5.0, 7.0)

    def test_real_and_imaginary_part_are_limited_each_by_itself(self):
        ours, _ = twins(torch.tensor([3 + 0.5j, -0.1 - 4j], dtype=torch.complex64))
        record = clip_gradients(ours, ClipByValue(1.0))
        torch.testing.assert_close(ours[0].grad, torch.tensor([1 + 0.5j, -0.1 - 1j], dtype=torch.complex64))
        assert record.total_norm_after == pytest.approx(ours[0].grad.norm().item())

    @pytest.mark.parametrize("coalesced", [True, False])
    def test_a_row_of_a_sparse_gradient_that_is_met_twice_counts_with_its_sum(self, coalesced):
        embedding = nn.Embedding(4, 2, sparse=True)
        (embedding(torch.tensor([1, 1, 3])) * torch.tensor([0.4, 2.0])).sum().backward()
        if coalesced:
            embedding.weight.grad = embedding.weight.grad.coalesce()
        dense = embedding.weight.grad.to_dense()
        assert clip_gradients(embedding.parameters(), ClipByValue(0.7)).applied
        assert embedding.weight.grad.is_sparse
        torch.testing.assert_close(embedding.weight.grad.to_dense(), dense.clamp(-0.7, 0.7))
        assert not clip_gradients(embedding.parameters(), ClipByValue(0.7)).applied


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def data(steps, *, overflow=()):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        inputs = torch.randn(5, 6, generator=generator) * 3
        yield inputs * (math.inf if step in overflow else 1.0), torch.randn(5, 1, generator=generator)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class TestGradScaler:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("way", ["wrapper", "unscaled by hand", "unscaled by hand, own step", "scaled threshold"])
    def test_a_scaled_loop_that_clips_trains_as_the_unscaled_one(self, name, way):
        """Powers of two scale without rounding, so the weights must be equal bit for bit, skipped steps apart."""
        plain, model = network(), network()
        reference, optimizer = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=3)
        rule = None if way == "scaled threshold" else ClipByNorm(0.2)
        monitor = Monitor(model, optimizer, clip=rule, scaler=scaler, sinks=[], on_diagnosis="record")
        overflow = {3, 4}
        for step, (inputs, targets) in enumerate(data(12, overflow=overflow)):
            if step not in overflow:
                reference.zero_grad()
                nn.functional.mse_loss(plain(inputs), targets).backward()
                torch_clip(plain.parameters(), 0.2)
                reference.step()
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(inputs), targets)).backward()
            if way.startswith("unscaled"):
                scaler.unscale_(optimizer)
            if way.endswith("own step"):
                monitor.clip_grad_norm_(model.parameters(), 0.2)
            if way == "scaled threshold":
                monitor.clip_grad_norm_(model.parameters(), 0.2 * scaler.get_scale())
            if way in {"wrapper", "unscaled by hand"}:
                monitor.clip_and_step()
            else:
                scaler.step(optimizer)
                scaler.update()
        monitor.close()
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0 if way != "scaled threshold" else 1e-5, atol=0)
        assert [record.step for record in monitor.records] == list(range(12))
        assert {record.step for record in monitor.records if record.skipped} == overflow
        assert monitor.violations == ()

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("unscale", [True, False])
    def test_norms_are_those_of_unscaled_gradients_whoever_unscales(self, name, unscale):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with Monitor(model, optimizer, scaler=scaler, sinks=[], on_diagnosis="record") as monitor:
            for inputs, targets in data(3):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(inputs), targets)
                expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                record = monitor.records[-1]
                assert record.clip.total_norm == pytest.approx(get_total_norm(expected).item(), rel=1e-5)
                assert [layer.weight.abs_max for layer in record.layers] == [
                    pytest.approx(max(g.abs().max().item() for g in expected[i : i + 2]), rel=1e-5) for i in (0, 2)
                ]

    def test_a_step_that_only_the_scaler_skipped_is_recorded_with_its_scale_and_its_passes(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        monitor = Monitor(model, optimizer, scaler=scaler, sinks=[], on_diagnosis="record", accumulate=2)
        for inputs, targets in data(5, overflow={1, 2, 4}):
            for half in (slice(0, 2), slice(2, 5)):
                scaler.scale(nn.functional.mse_loss(model(inputs[half]), targets[half])).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        monitor.close()
        told = [(one.step, one.skipped, one.loss_scale, one.backward_passes) for one in monitor.records]
        assert told == [(0, False, 64, 2), (1, True, 64, 2), (2, True, 32, 2), (3, False, 16, 2), (4, True, 16, 2)]
        assert math.isnan(monitor.records[1].clip.total_norm)
        assert monitor.violations == ()

    def test_with_two_optimizers_only_the_one_that_was_skipped_is_recorded_as_skipped(self):
        models = {"a": network(), "b": network()}
        first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for model in models.values())
        scaler = torch.amp.GradScaler("cpu")
        with Monitor(models, [first, second], scaler=scaler, sinks=[], on_diagnosis="record") as monitor:
            for step, (inputs, targets) in enumerate(data(4)):
                for name, optimizer in (("a", first), ("b", second)):
                    optimizer.zero_grad()
                    bad = math.inf if (name, step) == ("b", 1) else 1.0
                    scaler.scale(nn.functional.mse_loss(models[name](inputs * bad), targets)).backward()
                scaler.step(first)
                scaler.step(second)
                scaler.update()
        told = {name: [one.skipped for one in monitor.records if one.optimizer == name] for name in "ab"}
        assert told == {"a": [False] * 4, "b": [False, True, False, False]}

    def test_what_happens_while_the_monitor_is_paused_is_no_skipped_step(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")

        def step(inputs, targets):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(inputs), targets)).backward()
            scaler.step(optimizer)
            scaler.update()

        with Monitor(model, optimizer, scaler=scaler, sinks=[], on_diagnosis="record") as monitor:
            one, other, third = data(3)
            step(*one)
            with monitor.paused():
                step(*other)
            step(*third)
        assert [record.skipped for record in monitor.records] == [False, False]

    def test_a_watched_model_with_a_scaler_is_freed_when_nobody_has_it_any_more(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        monitor = Monitor(model, optimizer, scaler=scaler, sinks=[])
        scaler.scale(model(torch.ones(1, 6)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        alive = weakref.ref(model[0].weight)
        del model, optimizer, monitor
        gc.collect()
        assert alive() is None

    def test_a_scaler_is_left_as_it_was(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        before = set(vars(scaler))
        with Monitor(model, optimizer, scaler=scaler, sinks=[]) as monitor:
            scaler.scale(model(torch.ones(1, 6)).sum()).backward()
            monitor.clip_and_step()
            assert set(vars(scaler)) == before
            copy.deepcopy(scaler)
