"""The story that the project began with: every number of the article to six digits, and what it left open."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diagnostics import ClipByNorm, Monitor, read_run
from diagnostics.trainers.seed_chain import (
    MAX_NORM,
    SeedChain,
    SigmoidChain,
    chain_rows,
    clip_numbers,
    equal_entries_ratio,
    first_gradient_rows,
    max_norm_rows,
    norm_type_rows,
    tell,
    train_clipping_too_late,
    train_without_zero_grad,
    watch_chain,
)

SIX_DIGITS = 1e-6
NUMBERS = [125.0, 75.0, 45.0, 15.0, 5.0]
ARTICLE = {
    norm_type_rows: [
        265, 0.00377358, 153.3786163, 0.00651981, 135.1689911, 0.00739815, 129.3491516, 0.00773102, 125, 0.008,
    ],
    first_gradient_rows: [153.3786163, 265.3299866, 385.3894043, 507.8385620],
    max_norm_rows: [0.00651981, 0.01303963, 0.01955944, 0.02607925],
    chain_rows: [
        -3.959321e-05, -1.624328e-03, -1.452917e-02, -1.198795e-01,
        0.10002593,
        -3.960348e-06, -1.624749e-04, -1.453293e-03, -1.199106e-02,
        0.50000394, 0.50016248, 0.50145328, 0.51199108,
        -3.960348e-06, -1.624749e-04, -1.453293e-03, -1.199106e-02,
    ],
}  # fmt: skip
finite = st.floats(-1e6, 1e6, width=32).filter(lambda number: number == 0 or abs(number) > 1e-3)
orders = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf])


@pytest.mark.parametrize("rows", ARTICLE)
def test_every_number_of_the_article_comes_out_to_six_digits(rows) -> None:
    assert len(rows()) == len(ARTICLE[rows])
    for row, printed in zip(rows(), ARTICLE[rows], strict=True):
        assert row.ours == pytest.approx(printed, rel=1.5e-6)
        assert row.article == pytest.approx(printed, rel=1.5e-6)
        assert row.difference == pytest.approx(abs(row.ours / row.article - 1), abs=1e-12)
        assert row.difference < SIX_DIGITS


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 4.0, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, 4.0, 1000.0])
def test_the_tables_agree_with_torch_s_own_clipping(norm_type: float, max_norm: float) -> None:
    parameter = nn.Parameter(torch.zeros(5))
    parameter.grad = torch.tensor(NUMBERS)
    total_norm = nn.utils.clip_grad_norm_([parameter], max_norm, norm_type)
    record = clip_numbers(NUMBERS, max_norm, norm_type)
    assert record.total_norm == total_norm.item()
    assert record.clip_coef == pytest.approx(max_norm / (total_norm.item() + 1e-6), rel=SIX_DIGITS)
    assert record.total_norm_after == pytest.approx(parameter.grad.norm(norm_type).item(), rel=SIX_DIGITS)


def test_the_chain_s_step_is_the_one_that_plain_torch_takes() -> None:
    chain = nn.Sequential(*(module for _ in range(4) for module in (nn.Linear(1, 1, bias=False), nn.Sigmoid())))
    for weight in chain.parameters():
        nn.init.constant_(weight, 0.5)
    nn.functional.mse_loss(chain(torch.tensor([0.1])), torch.tensor([1.0])).backward()
    before = [weight.grad.item() for weight in chain.parameters()]
    nn.utils.clip_grad_norm_(chain.parameters(), MAX_NORM)
    torch.optim.SGD(chain.parameters(), lr=1.0).step()
    after = [weight.grad.item() for weight in chain.parameters()]
    ours = [row.ours for row in chain_rows()]
    assert ours[:4] == before
    assert ours[5:9] == ours[13:] == after
    assert ours[9:13] == [weight.item() for weight in chain.parameters()]


def test_clip_and_step_takes_the_article_s_step_in_one_line() -> None:
    chain = SigmoidChain()
    optimizer = torch.optim.SGD(chain.parameters(), lr=1.0)
    with Monitor(chain, optimizer, clip=ClipByNorm(MAX_NORM), sinks=[]) as monitor:
        optimizer.zero_grad()
        nn.functional.mse_loss(chain(torch.tensor([0.1])), torch.tensor([1.0])).backward()
        record = monitor.clip_and_step()
    assert record.clip.clip_coef == pytest.approx(0.10002593, rel=SIX_DIGITS)
    weights = [weight.item() for weight in chain.parameters()]
    assert weights == [row.ours for row in chain_rows() if "after the step: weight" in row.what]


@settings(max_examples=300, deadline=None)
@given(st.lists(finite, min_size=1, max_size=20), orders, orders)
def test_a_larger_norm_type_never_gives_a_larger_total_norm(numbers: list[float], one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    of_smaller, of_larger = (clip_numbers(numbers, 1.0, order).total_norm for order in (smaller, larger))
    assert of_larger <= of_smaller * (1 + 1e-5)


@pytest.mark.parametrize("count", [1, 5, 100, 4_096, 1_000_000])
def test_of_n_equal_gradients_the_1_norm_is_the_root_of_n_times_the_2_norm(count: int) -> None:
    """So that norm_type hardly matters is true of five numbers and of no large model."""
    assert equal_entries_ratio(count) == pytest.approx(math.sqrt(count), rel=1e-5)


def test_norm_type_hardly_matters_for_the_article_s_five_numbers() -> None:
    total_norms = [row.ours for row in norm_type_rows() if "total_norm" in row.what]
    assert max(total_norms) / min(total_norms) == pytest.approx(2.12)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("depth", [4, 8, 12])
def test_the_chain_vanishes_by_the_same_slope_at_every_depth_clipped_or_not(depth: int, clipped: bool) -> None:
    seen = watch_chain(depth, clipped=clipped)
    assert seen.slope == pytest.approx(-0.91, abs=0.01)
    assert seen.diagnosis.condition == "vanishing"
    assert "clipping cannot cure it" in seen.diagnosis.message


def test_the_slope_of_a_long_chain_is_the_derivative_at_its_fixed_point() -> None:
    """Closed form: deep in the chain z = w σ(z), and a layer multiplies the gradient by w σ'(z)."""
    z = 0.0
    for _ in range(100):
        z = 0.5 / (1 + math.exp(-z))
    sigmoid = 1 / (1 + math.exp(-z))
    assert watch_chain(12, clipped=False).slope == pytest.approx(math.log10(0.5 * sigmoid * (1 - sigmoid)), abs=1e-3)


def test_the_total_norm_does_not_know_what_the_slope_knows() -> None:
    total_norms = []
    for depth in (4, 8, 12):
        chain = SigmoidChain(depth=depth)
        nn.functional.mse_loss(chain(torch.tensor([0.1])), torch.tensor([1.0])).backward()
        total_norms.append(nn.utils.get_total_norm([weight.grad for weight in chain.parameters()]).item())
    assert total_norms == pytest.approx([0.1208, 0.1209, 0.1209], abs=5e-5)


def test_the_chain_without_zero_grad_is_reported() -> None:
    (violation,) = train_without_zero_grad()
    assert (violation.rule, violation.step, violation.count) == ("missing_zero_grad", 1, 2)
    assert "optimizer.zero_grad()" in violation.remedy


def test_the_chain_clipped_after_the_step_is_reported() -> None:
    (violation,) = train_clipping_too_late()
    assert (violation.rule, violation.step, violation.count) == ("clip_after_step", 0, 3)
    assert "10 times as much" in violation.message


def test_the_story_is_told_in_the_article_s_order_with_both_remarks() -> None:
    said: list[str] = []
    assert tell(said.append) < SIX_DIGITS
    text = " ".join(" ".join(said).split())
    parts = ["1. Five gradients", "2. The first gradient", "3. max_norm", "4. Four sigmoid layers", "missing_zero_grad",
             "clip_after_step", "4 layers, not clipped", "12 layers, clipped", "clipping cannot cure it"]  # fmt: skip
    assert sorted(parts, key=text.index) == parts
    assert (
        "A larger norm_type gives a smaller total_norm: the article sees it in five numbers, and it holds for any."
        in text
    )
    assert "the 1-norm is sqrt(n) times the 2-norm (10 times for n = 100 and 100 times for n = 10,000)" in text
    assert all(line.isascii() and len(line) <= 110 for line in said)


def test_a_chain_refuses_a_depth_that_is_none() -> None:
    for depth in (0, "abc"):
        with pytest.raises(ValueError, match=f"depth must be a whole number of at least 1; got {depth!r}."):
            SigmoidChain(depth=depth)


def test_the_task_tells_the_story_when_it_is_made_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    SeedChain(story=False)
    assert capsys.readouterr().out == ""
    SeedChain()
    assert "153.378616" in capsys.readouterr().out


def test_the_experiment_tells_the_story_and_trains_the_chain_the_ordinary_way(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    command = [sys.executable, str(script), "experiment=seed_chain", "sink=[console,runlog]", "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.index("153.378616") < done.stdout.index("verdict: vanishing since step 0")
    run = read_run(tmp_path / "run")
    assert run.verdict is not None
    assert run.verdict.condition == "vanishing"
    assert run.records[0].clip.clip_coef == pytest.approx(0.10002593, rel=SIX_DIGITS)
    assert run.records[0].fit is not None
    assert run.records[0].fit.slope == pytest.approx(-0.91, abs=0.01)
    assert (tmp_path / "run" / "page.html").is_file()
