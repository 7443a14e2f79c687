"""What every test needs: one thread, one seed, and small nets."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def mlp() -> nn.Sequential:
    """Three Linear layers with an in-place operation between them, which module backward hooks cannot bear."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Calls the training job with a command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    from diagnostics import cli  # loads Hydra, which most tests do without

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
        cli.train()

    return start
