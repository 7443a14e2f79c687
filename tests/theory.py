"""Nets whose gradients are known, and how they are measured: by a Monitor, as anyone would."""

from __future__ import annotations

import math

import torch
from torch import nn

from diagnostics import Monitor


def watch_steps(model, loss, *, steps=1, lr=0.0, optimizer=None):
    """The records of a few steps of SGD, and the verdict; with a learning rate of 0 the net stays as it is drawn."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    with Monitor(model, optimizer, every=1, sinks=[], on_diagnosis="record") as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            monitor.clip_and_step(loss=value)
        return list(monitor.records), monitor.verdict()


def measure(model, loss):
    """The record of one step."""
    return watch_steps(model, loss)[0][0]


def sized(model, inputs):
    """A loss of the usual size for a net of any output: its mean square distance from a fixed random target."""
    target = torch.randn_like(model(inputs).detach())

    def loss():
        return (model(inputs) - target).square().mean()

    return loss


def along(model, inputs):
    """A loss that is linear in the output and hence independent of the net: the gradient that theory starts with."""
    direction = torch.randn_like(model(inputs).detach())

    def loss():
        return (model(inputs) * direction).sum()

    return loss


def gaussian(inputs, outputs, weight, bias=None):
    """A Linear layer as mean-field theory draws it: weights of variance weight²/inputs, biases of variance bias²."""
    layer = nn.Linear(inputs, outputs, bias=bias is not None)
    nn.init.normal_(layer.weight, std=weight / math.sqrt(inputs))
    if bias is not None:
        nn.init.normal_(layer.bias, std=bias)
    return layer


def stack(depth, width, activation, layer):
    """Linear layers of one width with an activation behind each but the last."""
    modules = []
    for place in range(depth):
        modules += [layer(width, width), *([activation()] if place < depth - 1 else [])]
    return nn.Sequential(*modules)


def rms(record):
    """Root mean square of the output gradients of the fitted layers, first layer first."""
    return [one.output.rms for one in record.layers if one.layer.trunk and one.output is not None]
