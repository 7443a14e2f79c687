"""What a step costs, counted: passes over the gradients, kernels, copies to the host. Whoever adds one is told here."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diagnostics import ClipByNorm, Monitor
from diagnostics.statistics.reading import Parcel

LAYERS = 6
PACKING = {"stack": 2, "cat": 3, "index_select": 1, "_to_copy": 3, "zeros": 1}


class Costs(TorchDispatchMode):
    """Counts operations, and those of them that touch each of some tensors' memory."""

    def __init__(self, watched):
        super().__init__()
        self.places = {one.untyped_storage().data_ptr(): index for index, one in enumerate(watched)}
        self.kernels, self.passes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "_fused_" not in function.name() and "record_function" not in function.name():
            self.kernels[function.overloadpacket.__name__] += 1
            given = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, torch.Tensor)]
            touched = {self.places.get(one.untyped_storage().data_ptr()) for one in given} - {None}
            self.passes.update(touched)
        return result


def step(monkeypatch, *, width, max_norm, steps=52, every=10, **options):
    """The costs of the last of some steps, by our part alone; and its copies to the host."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    options = {"clip": ClipByNorm(max_norm), "on_diagnosis": "record", "sinks": [], **options}
    with Monitor(model, optimizer, every=every, **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.ones(4, width)).square().mean()
            loss.backward()
            copies = []
            real = Parcel.read
            costs = Costs([parameter.grad for parameter in model.parameters()])
            with monkeypatch.context() as patch, costs:
                patch.setattr(Parcel, "read", lambda self, copies=copies, real=real: copies.append(1) or real(self))
                monitor.clip_and_step(loss=loss)
    own = costs.kernels - Counter(_foreach_add_=1)  # the optimizer counts its own steps
    return own, costs.passes, len(copies)


@pytest.mark.parametrize("width", [8, 128])
def test_a_step_that_is_not_clipped_reads_each_gradient_once(monkeypatch, width):
    kernels, passes, copies = step(monkeypatch, width=width, max_norm=1e9)
    assert passes == dict.fromkeys(range(2 * LAYERS), 1)
    assert copies == 1
    own = {"linalg_vector_norm": 3} if width == 8 else {"linalg_vector_norm": 2, "_foreach_norm": 1}
    coefficient = {"add": 1, "reciprocal": 1, "mul": 1}
    assert kernels == Counter(own | coefficient | PACKING)


def test_a_step_that_is_clipped_writes_each_gradient_once_more(monkeypatch):
    kernels, passes, copies = step(monkeypatch, width=8, max_norm=1e-6)
    assert passes == dict.fromkeys(range(2 * LAYERS), 2)
    assert kernels["_foreach_mul_"] == 1
    assert copies == 1


def test_a_coefficient_that_is_folded_writes_none(monkeypatch):
    kernels, passes, _ = step(monkeypatch, width=8, max_norm=1e-6, fold=True)
    assert passes == dict.fromkeys(range(2 * LAYERS), 1)
    assert "_foreach_mul_" not in kernels


def test_a_step_that_never_waits_writes_each_once_whether_clipped_or_not(monkeypatch):
    _, passes, copies = step(monkeypatch, width=8, max_norm=1e9, asynchronous=True)
    assert passes == dict.fromkeys(range(2 * LAYERS), 2)
    assert copies == 1


@pytest.mark.parametrize(("width", "most"), [(8, 1), (128, 6)])
def test_a_recorded_step_reads_a_small_gradient_once_and_a_large_one_few_times(monkeypatch, width, most):
    _, passes, copies = step(monkeypatch, width=width, max_norm=1e9, steps=3, every=1)
    assert max(passes.values()) <= most
    assert copies == 1


def test_no_layer_has_a_forward_hook_between_recorded_steps():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    hooked = []
    with Monitor(model, optimizer, every=10, sinks=[], on_diagnosis="record") as monitor:
        for _ in range(62):
            hooked.append(sum(len(layer._forward_hooks) for layer in model))
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            record = monitor.clip_and_step()
            assert record.recorded == (hooked[-1] == LAYERS)
    assert set(hooked) == {0, LAYERS}
    assert sum(len(layer._forward_hooks) for layer in model) == 0
