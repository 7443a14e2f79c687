"""Under fp16 the loss is multiplied by a scale that moves; what is recorded are the gradients without it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from diagnostics import ClipByNorm, MemorySink, Monitor

HALF = 2e-3  # two units in the last place of fp16, relative
SCALE = 2.0**16


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))


def batches(count):
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        yield torch.randn(32, 12, generator=generator), torch.randint(0, 5, (32,), generator=generator)


def parts_of(batch, micro_batches):
    return zip(*(tensor.chunk(micro_batches) for tensor in batch), strict=True)


def loss_of(model, inputs, targets, micro_batches):
    with torch.autocast("cpu", torch.float16):
        return functional.cross_entropy(model(inputs), targets) / micro_batches


def true_gradients(model, batch, micro_batches):
    """By autograd alone, in fp16 without a loss scale: the total norm, and the rms of every layer's output gradient."""
    model = copy.deepcopy(model)
    squares, numbers = [0.0] * 3, [0] * 3
    gradients = [0.0 for _ in model.parameters()]
    for inputs, targets in parts_of(batch, micro_batches):
        with torch.autocast("cpu", torch.float16):
            hidden, outputs = inputs, []
            for place, module in enumerate(model):
                hidden = functional.linear(hidden, module.weight, module.bias) if place % 2 == 0 else hidden.tanh()
                outputs += [hidden] if place % 2 == 0 else []
            loss = functional.cross_entropy(hidden, targets) / micro_batches
        found = torch.autograd.grad(loss, [*outputs, *model.parameters()])
        for place, gradient in enumerate(found[:3]):
            squares[place] += gradient.double().square().sum().item()
            numbers[place] += gradient.numel()
        gradients = [total + gradient.double() for total, gradient in zip(gradients, found[3:], strict=True)]
    total_norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    return total_norm, [math.sqrt(square / number) for square, number in zip(squares, numbers, strict=True)]


def all_in_one(monitor, _scaler, _optimizer, _parameters):
    monitor.clip_and_step()


def unscaled_by_the_loop(monitor, scaler, optimizer, _parameters):
    scaler.unscale_(optimizer)
    monitor.clip_and_step()


def stepped_by_the_loop(_monitor, scaler, optimizer, _parameters):
    scaler.step(optimizer)
    scaler.update()


def clipped_and_stepped_by_the_loop(monitor, scaler, optimizer, parameters):
    scaler.unscale_(optimizer)
    monitor.clip_grad_norm_(parameters, 0.05)
    scaler.step(optimizer)
    scaler.update()


WAYS = [all_in_one, unscaled_by_the_loop, stepped_by_the_loop, clipped_and_stepped_by_the_loop]


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_norms_and_output_gradients_are_true_at_every_loss_scale(way, micro_batches):
    model, sink = network(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1)  # another scale at every step
    clip = None if way is stepped_by_the_loop else ClipByNorm(max_norm=0.05)
    truths = []  # of the steps that were taken
    with Monitor(
        model, optimizer, clip=clip, scaler=scaler, accumulate=micro_batches, every=1, sinks=[sink]
    ) as monitor:
        for batch in batches(9):
            truth, scale = true_gradients(model, batch, micro_batches), scaler.get_scale()
            optimizer.zero_grad()
            for inputs, targets in parts_of(batch, micro_batches):
                scaler.scale(loss_of(model, inputs, targets, micro_batches)).backward()
            way(monitor, scaler, optimizer, model.parameters())
            if scaler.get_scale() > scale:
                truths.append(truth)
    assert not monitor.violations
    taken = [record for record in sink.records if not record.skipped]
    assert [record.loss_scale for record in taken[:3]] == [SCALE, 2 * SCALE, 4 * SCALE]
    assert 4 <= len(taken) < 9  # the scale grew until something overflowed, and fell
    for record, (total_norm, rms) in zip(taken, truths, strict=True):
        assert record.backward_passes == micro_batches
        assert record.clip.total_norm == pytest.approx(total_norm, rel=HALF)
        assert [layer.output.rms for layer in record.layers] == pytest.approx(rms, rel=HALF)
        if clip:
            assert record.clip.total_norm_after == pytest.approx(0.05, rel=HALF)
