"""What the hooks note, against autograd by hand; and that they leave nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diagnostics import ClipByNorm, MemorySink, Monitor
from diagnostics.hooks.marks import FEW


def one_step(model, loss, **options):
    """One recorded step; returns its record and the Monitor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, sinks=[], **options)
    loss(model).backward()
    record = monitor.clip_and_step()
    monitor.close()
    return record, monitor


def outputs(record):
    return {one.layer.name: one.output for one in record.layers}


def test_output_gradients_are_those_of_autograd_by_hand(mlp):
    x = torch.randn(5, 4)
    record, _ = one_step(mlp, lambda model: model(x).square().sum())
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    held, h = [], x
    for module in twin:
        h = module(h)
        held.append(h)
    gradients = torch.autograd.grad(h.square().sum(), [held[0], held[2], held[4]])
    for one, gradient in zip(record.layers, gradients, strict=True):
        assert one.output.norm == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert one.output.rms == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-6)
        assert one.output.abs_max == gradient.abs().max().item()
        assert one.output.zero_fraction == pytest.approx((gradient == 0).float().mean().item())
        assert (one.output.numel, one.output.nonfinite) == (gradient.numel(), 0)


def test_weight_gradients_are_measured_before_clipping(mlp):
    x = torch.randn(5, 4)
    record, _ = one_step(mlp, lambda model: model(x).square().sum(), clip=ClipByNorm(1e-3))
    parameters = dict(mlp.named_parameters())
    for one in record.layers:
        clipped = torch.cat([parameters[name].grad.flatten() for name in one.layer.parameters])
        assert one.weight.norm * record.clip.clip_coef == pytest.approx(clipped.norm().item(), rel=1e-5)
    assert sum(record.clip.shares) == pytest.approx(1.0)


def test_depth_is_the_order_of_calls_not_of_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2, 2)
            self.first = nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x))

    record, _ = one_step(Backwards(), lambda model: model(torch.ones(1, 2)).sum())
    assert [(one.layer.depth, one.layer.name) for one in record.layers] == [(0, "first"), (1, "last")]


def test_a_cell_unrolled_in_time_is_one_depth_per_call_with_its_weights_at_the_first():
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(2, 3)

        def forward(self, x):
            state = torch.zeros(1, 3)
            for step in x:
                state = self.cell(step[None], state)
            return state

    record, _ = one_step(Unrolled(), lambda model: model(torch.randn(4, 2)).sum())
    assert [one.layer.name for one in record.layers] == [f"cell@{k}" for k in range(4)]
    assert [one.weight is not None for one in record.layers] == [True, False, False, False]
    assert all(one.output is not None for one in record.layers)


def test_linear_cells_lose_their_factor_at_every_call_exactly():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            nn.init.orthogonal_(self.cell.weight)
            self.cell.weight.data *= 0.5

        def forward(self, x):
            for _ in range(12):
                x = self.cell(x)
            return x

    record, _ = one_step(Linear(), lambda model: model(torch.randn(1, 3).double()).sum())
    norms = [one.output.norm for one in record.layers]
    for k in range(12):
        assert norms[k] == pytest.approx(norms[-1] * 0.5 ** (11 - k), rel=1e-12)
    assert record.fit.slope == pytest.approx(-0.30103, abs=1e-5)


def test_micro_batches_merge_to_what_the_whole_batch_gives(mlp):
    x = torch.randn(8, 4)
    whole, _ = one_step(copy.deepcopy(mlp), lambda model: model(x).square().sum())
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, accumulate=4, sinks=[]) as monitor:
        for part in x.chunk(4):
            mlp(part).square().sum().backward()
        parts = monitor.clip_and_step()
    assert parts.backward_passes == 4
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert one.output.numel == other.output.numel
        assert one.output.norm == pytest.approx(other.output.norm, rel=1e-5)


def test_passes_under_no_grad_and_eval_passes_record_nothing(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, sinks=[]) as monitor:
        mlp(torch.randn(2, 4)).sum().backward()
        with torch.no_grad():
            for _ in range(3):
                mlp(torch.randn(9, 4))
        record = monitor.clip_and_step()
    assert [one.layer.name for one in record.layers] == ["0", "2", "4"]
    assert [one.output.numel for one in record.layers] == [16, 16, 6]


def test_a_no_grad_pass_between_forward_and_backward_changes_nothing(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, sinks=[]) as monitor:
        loss = mlp(torch.randn(2, 4)).sum()
        with torch.no_grad():
            mlp(torch.randn(9, 4))
        loss.backward()
        record = monitor.clip_and_step()
    assert [one.layer.name for one in record.layers] == ["0", "2", "4"]
    assert all(one.output is not None for one in record.layers)


def test_autograd_grad_for_saliency_does_not_count(mlp):
    x = torch.randn(2, 4, requires_grad=True)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, sinks=[]) as monitor:
        torch.autograd.grad(mlp(x).sum() * 1000, x)
        mlp(x).sum().backward()
        torch.autograd.grad(mlp(x).sum() * 1000, [x, *mlp.parameters()])
        record = monitor.clip_and_step()
    assert record.backward_passes == 1
    assert record.layers[2].output.norm == pytest.approx(6**0.5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_are_counted_once(mlp, reentrant):
    x = torch.randn(5, 4, requires_grad=True)
    plain, _ = one_step(copy.deepcopy(mlp), lambda model: model(x).square().sum())

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp

        def forward(self, x):
            x = checkpoint(self.body[:2], x, use_reentrant=reentrant)
            return checkpoint(self.body[2:], x, use_reentrant=reentrant)

    record, _ = one_step(Checkpointed(), lambda model: model(x).square().sum())
    assert record.backward_passes == 1
    assert [one.layer.name for one in record.layers] == ["body.0", "body.2", "body.4"]
    for one, other in zip(record.layers, plain.layers, strict=True):
        assert one.output.numel == other.output.numel
        assert one.output.norm == pytest.approx(other.output.norm, rel=1e-5)


def test_outputs_in_tuples_dicts_and_nested_ones_are_found():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return {"a": (x * self.weight, [x * self.weight]), "b": 3}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            out = self.odd(x)["a"]
            return out[0] + out[1][0]

    record, _ = one_step(Net(), lambda model: model(torch.ones(2)).sum())
    assert outputs(record)["odd"].numel == 4


def test_a_module_list_whose_root_never_runs_restarts_its_calls_after_each_backward():
    cells = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.SGD(cells.parameters(), lr=0.1)
    with Monitor(cells, optimizer, sinks=[]) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            cells[1](cells[0](torch.ones(1, 2))).sum().backward()
            record = monitor.clip_and_step()
    assert [one.layer.name for one in record.layers] == ["0", "1"]


def test_the_parameters_of_an_owner_that_is_never_called_belong_to_its_nearest_called_ancestor():
    attention = nn.MultiheadAttention(4, 2)
    record, _ = one_step(attention, lambda model: model(*[torch.randn(3, 1, 4)] * 3)[0].sum())
    (layer,) = [one.layer for one in record.layers]
    assert {"in_proj_weight", "out_proj.weight"} <= set(layer.parameters)
    assert sum(record.clip.shares) == pytest.approx(1.0)


def test_a_gradient_of_1e_minus_30_is_measured_and_not_taken_for_zero(mlp):
    x = torch.randn(5, 4)
    record, _ = one_step(mlp, lambda model: model(x).sum() * 1e-30)
    plain = outputs(record)["4"]
    assert plain.rms == pytest.approx(1e-30, rel=1e-5)
    assert record.layers[2].weight.norm > 0
    assert record.clip.total_norm > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_gradient_that_leaves_the_range_of_fp32_is_estimated_once_and_exact_from_then_on(asynchronous):
    """What is too large to be kept is measured quickly where that was enough before; nobody can look at it again."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    x = torch.randn(64, 64)
    factors = [1.0] * 4 + [1e-30] * 4 + [1.0] * 3
    sink = MemorySink()
    with Monitor(model, optimizer, sinks=[sink], on_diagnosis="record", asynchronous=asynchronous) as monitor:
        for factor in factors:
            optimizer.zero_grad()
            (model(x).square().sum() * factor).backward()
            monitor.clip_and_step()
    hidden = x.double()
    made = []
    for module in model:
        hidden = (
            nn.functional.linear(hidden, *(one.double() for one in module.parameters()))
            if list(module.parameters())
            else hidden.tanh()
        )
        made.append(hidden.requires_grad_() if not made else hidden)
    true = [one.norm().item() for one in torch.autograd.grad(hidden.square().sum(), made[::2])]
    for step, (record, factor) in enumerate(zip(sink.records, factors, strict=True)):
        found = [one.output.norm / factor for one in record.layers]
        estimated = step in (4, 5)  # the hooks hear of it one step late
        assert found == pytest.approx(true, rel=0.1 if estimated else 1e-5)
        assert [one.gain is None for one in record.layers] == [True, estimated, estimated]


@pytest.mark.parametrize("layers", [FEW // 2, FEW])  # of two parameters
class TestManyGradientsThatAStepHasSpent:
    """Known by their ``id`` where there are many, and by no more than that a tensor with it may be another one."""

    def loop(self, layers, prepare, *, backward=True, steps=6):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with Monitor(model, optimizer, sinks=[], on_violation="record", on_diagnosis="record") as monitor:
            for step in range(steps):
                prepare(step, optimizer, list(model.parameters()))
                if backward:
                    model(torch.randn(2, 4)).sum().backward()
                optimizer.step()
        return [(one.rule, one.step, len(one.parameters)) for one in monitor.violations]

    @pytest.mark.parametrize("since", [1, 3])
    def test_gradients_that_are_not_cleared_are_found_at_once(self, layers, since):
        found = self.loop(layers, lambda step, optimizer, _: step >= since or optimizer.zero_grad())
        assert found == [("missing_zero_grad", since, 2 * layers)]

    def test_gradients_that_are_zeroed_in_place_are_cleared(self, layers):
        assert self.loop(layers, lambda _, optimizer, __: optimizer.zero_grad(set_to_none=False)) == []

    def test_some_that_are_not_cleared_among_others_are_found_the_second_time(self, layers):
        def clear_half(_step, _optimizer, parameters):
            for parameter in parameters[:layers]:
                parameter.grad = None

        (found,) = self.loop(layers, clear_half)
        assert found == ("missing_zero_grad", 1 if 2 * layers <= FEW else 2, layers)

    def test_those_that_the_step_itself_puts_in_place_are_spent_as_well(self, layers):
        class Halving(torch.optim.SGD):
            def step(self, closure=None):
                for parameter in self.param_groups[0]["params"]:
                    parameter.grad = parameter.grad / 2
                return super().step(closure)

        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        optimizer = Halving(model.parameters(), lr=1e-3)
        with Monitor(model, optimizer, sinks=[], on_violation="record", on_diagnosis="record") as monitor:
            for _ in range(3):
                model(torch.randn(2, 4)).sum().backward()
                optimizer.step()
        assert [(one.rule, one.step) for one in monitor.violations] == [("missing_zero_grad", 1)]

    @pytest.mark.parametrize("backward", [True, False])
    def test_others_in_their_place_are_the_loops_affair(self, layers, backward):
        def replace(step, optimizer, parameters):
            optimizer.zero_grad()
            for parameter in parameters if step or not backward else ():  # at the addresses of those that are gone
                parameter.grad = torch.ones_like(parameter)

        assert self.loop(layers, replace, backward=backward) == []


def test_double_backward_counts_the_pass_that_accumulates():
    x = torch.randn(5, 4, requires_grad=True)
    smooth = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def penalty(model):
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    record, _ = one_step(smooth, penalty)
    assert record.backward_passes == 1
    assert outputs(record)["0"].norm > 0


def hook_counts(model, optimizer):
    counts = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    for module in model.modules():
        counts += [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
    for parameter in model.parameters():
        counts += [len(parameter._backward_hooks or ()), len(parameter._post_accumulate_grad_hooks or ())]
    return counts


def test_close_leaves_no_hook_on_model_parameters_or_optimizer(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    before = hook_counts(mlp, optimizer)
    monitor = Monitor(mlp, optimizer, sinks=[])
    assert hook_counts(mlp, optimizer) != before
    monitor.close()
    assert hook_counts(mlp, optimizer) == before


def test_an_unclosed_monitor_does_not_keep_the_model_alive():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, sinks=[])
    model(torch.ones(1, 2)).sum().backward()
    monitor.clip_and_step()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_copies_of_a_watched_model_carry_hooks_that_do_nothing(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, sinks=[]) as monitor:
        for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
            twin(torch.randn(7, 4)).sum().backward()
        mlp(torch.randn(2, 4)).sum().backward()
        record = monitor.clip_and_step()
    assert [one.output.numel for one in record.layers] == [16, 16, 6]


def test_a_failing_hook_never_reaches_the_backward_pass_and_is_told_once(mlp, monkeypatch):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    monkeypatch.setattr("diagnostics.statistics.magnitudes.take_apart", lambda *_, **__: 1 / 0)
    monitor = Monitor(mlp, optimizer, sinks=[], every=1)
    mlp(torch.randn(2, 4)).sum().backward()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="A hook failed and was switched off"):
        monitor.clip_and_step()
    optimizer.zero_grad()
    mlp(torch.randn(2, 4)).sum().backward()
    assert monitor.clip_and_step().step == 1
    monitor.close()


def test_every_0_registers_no_forward_hook_and_takes_no_output_gradient(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, every=0, sinks=[]) as monitor:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in mlp.modules())
        functional.mse_loss(mlp(torch.randn(2, 4)), torch.zeros(2, 3)).backward()
        record = monitor.clip_and_step()
    assert not record.recorded
    assert all(one.output is None and one.weight.norm > 0 for one in record.layers)


def test_paused_notes_neither_passes_nor_steps(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, sinks=[]) as monitor:
        with monitor.paused():
            mlp(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert monitor.records == ()
        mlp(torch.randn(2, 4)).sum().backward()
        assert monitor.clip_and_step().backward_passes == 1


def test_a_model_whose_layers_are_not_called_says_so(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with Monitor(mlp, optimizer, sinks=[], on_violation="record") as monitor:
        functional.linear(torch.randn(2, 4), mlp[0].weight, mlp[0].bias).sum().backward()
        with pytest.warns(UserWarning, match="the model's layers are not called as modules"):
            monitor.clip_and_step()


def test_activations_go_when_the_backward_pass_is_done_though_their_place_in_the_graph_is_noted():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    model[0].register_forward_hook(lambda _module, _args, output: kept.append(weakref.ref(output)))
    gc.disable()  # no cycle may be needed to free them
    try:
        with Monitor(model, optimizer, sinks=[], every=1) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(torch.randn(2, 4)).square().sum()
                loss.backward()
                del loss
                assert kept[-1]() is None
                monitor.clip_and_step()
    finally:
        gc.enable()
