"""Models under torch.compile tell of their depth as eager ones do, in one graph for all steps, and train the same."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diagnostics import Monitor

WIDTH = 16
dynamo = pytest.importorskip("torch._dynamo")


class Residual(nn.Module):
    """Blocks on a stream; a result that is a mapping."""

    def __init__(self, blocks=3):
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return {"logits": self.last(x), "stream": (x.detach(), None)}


class Unrolled(nn.Module):
    """A cell that is called five times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(4, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        state = None
        for _ in range(5):
            state = self.cell(x, state)
        return self.head(state)


class Checkpointed(nn.Module):
    """Its middle runs again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = checkpoint(lambda x: torch.tanh(self.second(torch.tanh(self.first(x)))), x, use_reentrant=False)
        return self.third(x)


class Block(nn.Module):
    """What is usually compiled one by one."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Interrupted(nn.Module):
    """A graph break between two of its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        dynamo.graph_break()
        return self.third(torch.tanh(self.second(x)))


def chain():
    return nn.Sequential(
        nn.Linear(4, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)
    )


MODELS = [chain, Residual, Unrolled, Checkpointed]


@pytest.fixture(autouse=True)
def _from_nothing():
    dynamo.reset()
    dynamo.utils.counters.clear()


def by_function(model, **options):
    return torch.compile(model, **{"backend": "aot_eager", "fullgraph": True} | options)


def by_method(model, **options):
    model.compile(**{"backend": "aot_eager", "fullgraph": True} | options)
    return model


def not_at_all(model, **_options):
    return model


def batches(sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator) for size in sizes]


def train(model, how, *, sizes=(8,) * 4, watched=True, **options):
    """Trains, and returns the records and the weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, sinks=[], **{"every": 1} | options) if watched else None
    called, records = how(model), []
    with monitor or nullcontext():
        for x in batches(sizes):
            optimizer.zero_grad()
            result = called(x)
            (result["logits"] if isinstance(result, dict) else result).square().mean().backward()
            if monitor is None:
                optimizer.step()
            else:
                records.append(monitor.clip_and_step())
    return records, [parameter.detach().clone() for parameter in model.parameters()]


def told(record):
    """What a record says of the depth."""
    return [(one.layer, one.output, one.gain, one.stream_rms, one.trunk_norm) for one in record.layers]


@pytest.mark.parametrize("how", [by_function, by_method])
@pytest.mark.parametrize("make", MODELS)
def test_the_depth_is_what_the_same_model_has_without_compilation(make, how):
    model = make()
    eager, weights = train(copy.deepcopy(model), not_at_all)
    compiled, compiled_weights = train(copy.deepcopy(model), how)
    assert [told(record) for record in compiled] == [told(record) for record in eager]
    assert all(one.output is not None for record in compiled for one in record.layers)
    assert all(map(torch.equal, weights, compiled_weights))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("how", [by_function, by_method])
def test_a_step_that_is_not_recorded_runs_the_same_graph_and_takes_nothing(how, monkeypatch):
    arrived = []
    monkeypatch.setattr("diagnostics.hooks.measured", lambda *_args, **_options: arrived.append(1))
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, sinks=[], every=10)
    called = how(model)
    monitor._watcher.recording = False
    for _ in range(3):
        called(torch.randn(8, 4))["logits"].sum().backward()
    assert arrived == []
    monitor._watcher.recording = True
    called(torch.randn(8, 4))["logits"].sum().backward()
    assert len(arrived) > 10
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    monitor.close()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("make", [chain, Residual, Unrolled])
def test_the_compiler_makes_of_a_watched_model_what_it_makes_of_one_that_nobody_watches(make):
    def inductor(model):
        return torch.compile(model)

    model = make()
    _, watched = train(copy.deepcopy(model), inductor)
    dynamo.reset()
    _, alone = train(copy.deepcopy(model), inductor, watched=False)
    assert all(map(torch.equal, watched, alone))


def test_a_graph_that_is_compiled_anew_for_another_shape_tells_too():
    model = Residual()
    sizes = (8, 8, 5, 5, 3)
    eager, _ = train(copy.deepcopy(model), not_at_all, sizes=sizes)
    for how in (by_function, by_method):
        dynamo.reset()
        compiled, _ = train(copy.deepcopy(model), how, sizes=sizes)
        assert [told(record) for record in compiled] == [told(record) for record in eager]


def test_a_model_that_ran_before_it_was_compiled_tells_after_a_new_shape_at_a_step_that_is_not_recorded():
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, sinks=[], every=10) as monitor:
        records = []

        def step(size, *, recorded):
            monitor._watcher.recording = recorded
            optimizer.zero_grad()
            model(torch.randn(size, 4))["logits"].square().mean().backward()
            records.append(monitor.clip_and_step())

        step(8, recorded=True)
        by_method(model, dynamic=False)
        step(8, recorded=True)
        step(5, recorded=False)
        step(5, recorded=True)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2
    seen = [all(one.output is not None for one in record.layers) for record in records]
    assert seen == [True, True, False, True]


@pytest.mark.parametrize("how", [by_function, by_method])
def test_equal_models_share_their_graph_and_each_tells_of_itself(how):
    """Dynamo keeps eight graphs of a function and no more: a sweep in one process trains more models than that."""
    models = [Residual() for _ in range(12)]
    eager = [train(copy.deepcopy(model), not_at_all, sizes=(8, 8))[0] for model in models]
    compiled = [train(model, how, sizes=(8, 8))[0] for model in models]
    for ours, theirs in zip(compiled, eager, strict=True):
        assert [told(record) for record in ours] == [told(record) for record in theirs]
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("how", [by_function, by_method])
def test_a_model_with_a_graph_break_says_that_it_is_not_seen_and_trains_all_the_same(how):
    model = Interrupted()
    with pytest.warns(UserWarning, match="the whole forward is one graph"):
        records, weights = train(copy.deepcopy(model), lambda model: how(model, fullgraph=False))
    _, alone = train(copy.deepcopy(model), lambda model: how(model, fullgraph=False), watched=False)
    assert all(one.output is None and one.weight is not None for one in records[1].layers)
    assert all(map(torch.equal, weights, alone))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_comes_compiled_has_the_names_of_the_one_inside(backend):
    model = Residual()
    eager, _ = train(copy.deepcopy(model), not_at_all)
    compiled, _ = train(torch.compile(copy.deepcopy(model), backend=backend), not_at_all)
    assert [told(record) for record in compiled] == [told(record) for record in eager]
    assert not any("_orig_mod" in one.layer.name for one in compiled[0].layers)


@pytest.mark.parametrize("how", [by_function, by_method])
def test_a_monitor_that_comes_after_the_first_call_says_what_to_do(how):
    model = Residual()
    called = how(model)
    called(torch.randn(8, 4))["logits"].sum().backward()
    model.zero_grad()
    with pytest.warns(UserWarning, match="Monitor is created before its first call"):
        records, _ = train(model, lambda _model: called)
    assert all(one.output is None and one.weight is not None for one in records[1].layers)
    with torch.compiler.set_stance("force_eager"):
        records, _ = train(model, lambda _model: called)
    assert all(one.output is not None for one in records[1].layers)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_blocks_that_are_compiled_one_by_one_are_not_compiled_once_more_for_being_watched():
    graphs, records = [], []
    for watched in (False, True):
        dynamo.reset()
        dynamo.utils.counters.clear()
        model = nn.Sequential(nn.Linear(4, WIDTH), *(Block() for _ in range(6)))

        def blocks(model):
            for block in model[1:]:
                block.compile(backend="aot_eager")
            return model

        records, _ = train(model, blocks, watched=watched)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] <= graphs[0] + 1, graphs
    assert all(one.output is None and one.weight is not None for one in records[1].layers[1:])


def test_what_is_exported_holds_nothing_of_ours():
    model = chain()
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=[]):
        program = torch.export.export(model, (torch.randn(8, 4),))
    assert "diagnostics" not in program.graph_module.code


def test_half_precision_and_a_loss_scale():
    model, found = chain(), []
    for how in (not_at_all, by_function):
        one = copy.deepcopy(model)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        called = how(one)
        with Monitor(one, optimizer, sinks=[], every=1, scaler=scaler) as monitor:
            for x in batches([8] * 2):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = called(x).float().square().mean()
                scaler.scale(loss).backward()
                found.append([one.output.norm for one in monitor.clip_and_step(loss=loss).layers])
    assert found[2:] == [pytest.approx(norms, rel=1e-3) for norms in found[:2]]


def test_a_gradient_that_vanishes_is_diagnosed_under_the_compiler(monkeypatch):
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()) for _ in range(4)]
    model = nn.Sequential(nn.Linear(4, WIDTH), *layers, nn.Linear(WIDTH, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record") as monitor:
        called = by_method(model)
        for x in batches([32] * 5):
            optimizer.zero_grad()
            functional.cross_entropy(called(x), x.argmax(dim=1) % 3).backward()
            monitor.clip_and_step()
    assert monitor.verdict().condition == "vanishing"


def test_a_closed_monitor_leaves_a_graph_that_tells_nobody():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, sinks=[], every=1)
    called = by_function(model)
    called(torch.randn(8, 4)).sum().backward()
    monitor.clip_and_step()
    seen = len(monitor.records)
    monitor.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert len(monitor.records) == seen
