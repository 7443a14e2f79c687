"""With ``asynchronous=True`` a step never waits for the device, and its record says the same, a step later."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from operations import Operations
from torch import nn

from diagnostics import ClipByGroup, ClipByNorm, ClipByQuantile, Monitor, read_run
from diagnostics.sinks.memory import MemorySink
from diagnostics.statistics.reading import Parcel

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
"""What makes the host wait for a device, as the dispatcher calls it."""


def trained(steps=70, *, limit=None, depth=5, bad=(), device="cpu", loop=None, **options):
    """A run on fixed data; its records and the weights that it ends with."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    data = torch.randn(steps, 16, 8).to(device)
    clip = None if limit is None else ClipByNorm(limit)
    options = {"sinks": [], "on_violation": "record", "on_diagnosis": "record"} | options
    returned = []
    with Monitor(model, optimizer, clip=clip, **options) as monitor:
        for number in range(steps):
            optimizer.zero_grad()
            loss = (model(data[number]) - data[number]).square().mean() * (1 + number % 3)
            (loss * float("nan") if number in bad else loss).backward()
            if loop is not None:
                loop(optimizer)
            else:
                returned.append(monitor.clip_and_step(loss=loss, metrics={"twice": 2 * loss}))
    return monitor, returned, torch.nn.utils.parameters_to_vector(model.parameters())


def written(monitor):
    """All that the records say, NaN and the layers' own numbers included."""
    return [(repr(record), repr(list(record.layers))) for record in monitor.records]


@pytest.mark.parametrize("limit", [None, 1e-3, 0.35, 1e3])
def test_records_and_weights_are_those_of_the_mode_that_waits(limit):
    waiting, _, expected = trained(limit=limit)
    monitor, _, weights = trained(limit=limit, asynchronous=True)
    assert torch.equal(weights, expected)
    assert written(monitor) == written(waiting)
    if limit == 0.35:
        assert {record.clip.applied for record in monitor.records} == {True, False}


def test_a_step_returns_the_newest_record_that_is_finished_and_close_writes_the_last():
    sink = MemorySink()
    monitor, returned, _ = trained(5, asynchronous=True, sinks=[sink])
    assert [None if one is None else one.step for one in returned] == [None, 0, 1, 2, 3]
    assert [record.step for record in monitor.records] == [record.step for record in sink.records] == [0, 1, 2, 3, 4]


def test_a_loop_that_steps_itself_is_seen_as_well():
    waiting, _, expected = trained(60, loop=lambda optimizer: optimizer.step())
    monitor, _, weights = trained(60, loop=lambda optimizer: optimizer.step(), asynchronous=True)
    assert torch.equal(weights, expected)
    assert written(monitor) == written(waiting)


@pytest.mark.parametrize("nonfinite", ["skip", "step"])
def test_gradients_that_are_not_finite_are_skipped_on_the_device_or_spent(nonfinite):
    waiting, _, expected = trained(60, bad=(7, 55), limit=0.35, nonfinite=nonfinite)
    monitor, _, weights = trained(60, bad=(7, 55), limit=0.35, nonfinite=nonfinite, asynchronous=True)
    assert torch.equal(weights.isnan(), expected.isnan())
    assert torch.equal(weights.nan_to_num(), expected.nan_to_num())
    assert [one.skipped for one in monitor.records] == [one.skipped for one in waiting.records]
    assert [one.step for one in monitor.records if one.nonfinite] == [
        one.step for one in waiting.records if one.nonfinite
    ]


def operations(depth, *, steps, asynchronous=True, every=10):
    """What ``clip_and_step`` has the device do in the last of some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    options = {"every": every, "asynchronous": asynchronous, "sinks": [], "on_diagnosis": "record"}
    with Monitor(model, optimizer, clip=ClipByNorm(1.0), **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 8)).square().mean()
            loss.backward()
            counted = Operations()
            with counted:
                monitor.clip_and_step(loss=loss)
    return counted.names


@pytest.mark.parametrize(("steps", "every"), [(52, 10), (3, 0), (3, 1)])
def test_nothing_waits_for_the_device(steps, every, monkeypatch):
    copies = []
    real = Parcel.read
    monkeypatch.setattr(Parcel, "read", lambda self: copies.append(self) or real(self))
    names = operations(6, steps=steps, every=every)
    assert not [name for name in names if name in WAITING]
    assert len(copies) == steps  # one a step, that of the last by close()


def test_the_mode_that_waits_does_so_once_a_step(monkeypatch):
    copies = []
    real = Parcel.read
    monkeypatch.setattr(Parcel, "read", lambda self: copies.append(self) or real(self))
    names = operations(6, steps=52, asynchronous=False)
    assert not [name for name in names if name in WAITING]
    assert len(copies) == 52


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("steps", "every"), [(52, 10), (3, 1)])
def test_the_number_of_kernels_does_not_grow_with_the_layers(asynchronous, steps, every):
    few, many = (
        [name for name in operations(depth, steps=steps, every=every, asynchronous=asynchronous) if name not in VIEWS]
        for depth in (8, 40)
    )
    assert len(few) == len(many)


VIEWS = ("detach", "view", "_unsafe_view", "unbind", "select", "slice", "zeros", "zeros_like", "alias", "reshape")
"""No kernels; and what the optimizer makes of its state."""


def test_a_step_whose_numbers_are_on_their_way_keeps_no_gradient_alive():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Monitor(model, optimizer, asynchronous=True, sinks=[], every=1) as monitor:
        model(torch.ones(4, 8)).square().mean().backward()
        alive = [weakref.ref(parameter.grad) for parameter in model.parameters()]
        monitor.clip_and_step()
        assert monitor.records == ()
        optimizer.zero_grad()
        assert [one() for one in alive] == [None, None]


def test_what_is_saved_holds_every_step():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Monitor(model, optimizer, asynchronous=True, sinks=[]) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            monitor.clip_and_step()
        assert len(monitor.state_dict()["units"]["optimizer"]["norms"]) == 3
        assert len(monitor.records) == 3


def test_the_trainers_run_with_it_and_log_the_same(tmp_path):
    logs = []
    for asynchronous in ("false", "true"):
        folder = tmp_path / asynchronous
        options = ["trainer.steps=12", "diagnostics.nonfinite=step", f"diagnostics.asynchronous={asynchronous}"]
        quiet = ["sink=[runlog]", "hydra.output_subdir=null", f"hydra.run.dir={folder}", "trainer.schedule=cosine"]
        command = [sys.executable, "scripts/train.py", "model.depth=2", "model.width=8", *options, *quiet]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, timeout=120)
        logs.append([(repr(one), repr(list(one.layers))) for one in read_run(folder).records])
    assert len(logs[0]) == 12
    assert logs[0] == logs[1]


def made(optimizer=None, **options):
    model = nn.Linear(2, 2)
    chosen = torch.optim.AdamW(model.parameters(), fused=True) if optimizer is None else optimizer(model.parameters())
    return Monitor(model, chosen, asynchronous=True, sinks=[], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "raise"}, "nonfinite must not be 'raise' with asynchronous=True"),
        ({"on_violation": "raise"}, "on_violation must not be 'raise' with asynchronous=True"),
        ({"on_diagnosis": "raise"}, "on_diagnosis must not be 'raise' with asynchronous=True"),
        ({"clip": ClipByQuantile(0.9)}, "clip must be a ClipByNorm or None with asynchronous=True"),
        ({"clip": ClipByGroup(ClipByNorm(1.0))}, "clip must be a ClipByNorm or None with asynchronous=True"),
        ({"optimizer": torch.optim.SGD}, "nonfinite='skip' needs fused optimizers with asynchronous=True"),
        (
            {"optimizer": lambda held: torch.optim.SGD(held, momentum=0.9, fused=True)},
            "nonfinite='skip' needs fused optimizers with asynchronous=True",
        ),
    ],
)
def test_what_would_have_to_wait_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_calls_that_would_have_to_wait_are_refused():
    with made() as monitor:
        with pytest.raises(ValueError, match="closure must be None with asynchronous=True"):
            monitor.clip_and_step(closure=lambda: None)
        with pytest.raises(RuntimeError, match="clip_grad_norm_ needs a Monitor that waits for the norm"):
            monitor.clip_grad_norm_([], 1.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limit", [None, 0.35])
def test_a_gpu_is_never_waited_for(limit):
    trained(3, limit=limit, asynchronous=True, device="cuda")  # kernels are loaded, pinned memory is there
    torch.cuda.set_sync_debug_mode("error")
    try:
        monitor, _, weights = trained(70, limit=limit, asynchronous=True, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _, _, expected = trained(70, limit=limit, device="cuda")
    assert len(monitor.records) == 70
    assert torch.equal(weights, expected)
