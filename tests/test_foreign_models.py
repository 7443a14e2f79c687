"""Models that are built or called in unusual ways: watching changes nothing, and what can be seen is seen."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from diagnostics import DiagnosticsWarning, Monitor

STEPS = 4


def train(build, *, watched, **options):
    """Some steps on one batch; returns the weights, and the Monitor."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, sinks=[], on_violation="raise", **options) if watched else None
    x = torch.randn(4, 6)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
        assert monitor._watcher.failure is None
        assert math.isclose(sum(monitor.records[-1].clip.shares), 1, rel_tol=1e-6)
    return [parameter.detach().clone() for parameter in model.parameters()], monitor


def scripted(*layers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(*layers))


@pytest.mark.parametrize("every", [0, 1])
def test_a_lazy_model_is_watched_from_before_its_first_call(every):
    def build():
        return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(3))

    alone, _ = train(build, watched=False)
    trained, monitor = train(build, watched=True, every=every)
    assert all(map(torch.equal, trained, alone))
    assert [one.layer.name for one in monitor.records[-1].layers] == ["0", "2", "3"]
    assert [record.backward_passes for record in monitor.records[-2:]] == [1, 1]
    assert all((one.output is not None) == (every == 1) for one in monitor.records[-1].layers)


def test_a_scripted_part_of_a_model_is_passed_over_and_the_rest_is_seen():
    def build():
        return nn.Sequential(nn.Linear(6, 8), scripted(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 1))

    alone, _ = train(build, watched=False)
    trained, monitor = train(build, watched=True, every=1)
    assert all(map(torch.equal, trained, alone))
    outputs = {one.layer.name: one.output for one in monitor.records[-1].layers}
    assert outputs["0"] is not None
    assert outputs["2"] is not None


def test_a_scripted_model_is_watched_by_its_weights_and_depth_is_said_not_to_be_judged():
    def build():
        return scripted(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    alone, _ = train(build, watched=False)
    with pytest.warns(DiagnosticsWarning, match="depth is not judged") as told:
        trained, monitor = train(build, watched=True)
    assert len(told) == 1
    assert all(map(torch.equal, trained, alone))
    assert monitor.records[-1].clip.total_norm > 0
