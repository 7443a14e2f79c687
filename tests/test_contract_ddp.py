"""The rules of the loop under DistributedDataParallel, in a process group of one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_rules import found, loss_of, net, watching
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from diagnostics import ClipByNorm


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("lawful", [True, False])
@pytest.mark.usefixtures("group")
def test_accumulation_with_no_sync_is_silent_and_a_forgotten_zero_grad_is_not(lawful):
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, clip=ClipByNorm(1.0), accumulate=3) as monitor:
        for _ in range(4):
            for micro in range(3):
                with model.no_sync() if micro < 2 else nullcontext():
                    (loss_of(model) / 3).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if lawful:
                optimizer.zero_grad()
    assert [(rule, step) for rule, step, _ in found(monitor)] == ([] if lawful else [("missing_zero_grad", 1)])
