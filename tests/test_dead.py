"""A unit is dead when its gradient was exactly zero at each of the last recorded steps, and only then."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diagnostics import Monitor
from diagnostics.depth import find_owners, unit_weights
from diagnostics.statistics.dead import DEAD_WINDOW, DeadUnits, row_share, unit_sizes
from diagnostics.statistics.stacks import Stacks


def shares(model, loss, steps=DEAD_WINDOW, **options):
    """Name of the layer to the last record's share of dead units."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, sinks=[], on_diagnosis="record", on_violation="record", **options) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            loss(model, step).backward()
            record = monitor.clip_and_step()
    return {one.layer.name: one.dead_fraction for one in record.layers}


def squares(model, _step=0):
    return model(torch.randn(8, 4)).square().sum()


def half_dead():
    """Of eight units behind a ReLU two never fire."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].bias.data[[1, 5]] = -1e6
    return model


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from(["no", "beside", "apart"])),
        min_size=1,
        max_size=25,
    )
)
def test_streaks_are_those_of_a_list_kept_by_hand(steps):
    """The second weight is not there at every step, nor always beside the first."""
    units, history = DeadUnits({"one": 0, "other": 0}), {"one": [], "other": []}
    for zero, there in steps:
        given_now = {"one": zero, **({"other": zero[::-1]} if there != "no" else {})}
        sizes = {name: torch.tensor([0.0 if one else 1.5 for one in row]) for name, row in given_now.items()}
        groups = [tuple(sizes)] if there == "beside" else [(name,) for name in sizes]
        found = units.update({names: torch.stack([sizes[name] for name in names]) for names in groups})
        for name, row in given_now.items():
            history[name].append(row)
        expected = {}
        for name in given_now:
            last = history[name][-DEAD_WINDOW:]
            if len(history[name]) >= DEAD_WINDOW:
                expected[name] = sum(all(unit) for unit in zip(*last, strict=True)) / len(last[0])
        assert dict(zip(found[0], found[1].tolist(), strict=True)) == pytest.approx(expected)


def test_a_streak_goes_on_when_weights_are_judged_in_other_company():
    """As where a gradient is missing at one step, so that others are measured side by side without it."""
    units, row = DeadUnits({"one": 0, "other": 0}), torch.tensor([0.0, 1.5])
    together, alone = {("one", "other"): torch.stack([row, row])}, {("one",): row[None]}
    for step in range(DEAD_WINDOW):
        names, found = units.update(together if step % 3 else alone)
    assert (names, found.tolist()) == (["one"], [0.5])
    for _ in range(DEAD_WINDOW):
        names, found = units.update(together)
    assert (names, found.tolist()) == (["one", "other"], [0.5, 0.5])


def test_dead_units_of_a_relu_layer_are_counted_once_enough_steps_are_recorded():
    assert shares(half_dead(), squares, DEAD_WINDOW - 1) == {"0": None, "2": None}
    assert shares(half_dead(), squares) == {"0": pytest.approx(2 / 8), "2": 0.0}


def test_only_recorded_steps_count():
    assert shares(half_dead(), squares, 3 * DEAD_WINDOW, every=0)["0"] is None


def test_a_unit_that_had_a_gradient_once_in_the_window_is_alive():
    def once(model, step):
        model[0].bias.data[1] = 1e3 if step == 4 else -1e6
        return squares(model)

    assert shares(half_dead(), once)["0"] == pytest.approx(1 / 8)
    assert shares(half_dead(), once, 5 + DEAD_WINDOW)["0"] == pytest.approx(2 / 8)


@pytest.mark.parametrize("width", [4, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_1e_minus_30_is_alive(width, dtype):
    """Also where its squares leave the range of its dtype, in small weights and in large ones."""
    model = nn.Sequential(nn.Linear(4, width * 20), nn.Linear(width * 20, 80)).to(dtype)
    scale = 1e-30 if dtype == torch.float32 else 1e-200
    found = shares(model, lambda model, _: model(torch.ones(8, 4, dtype=dtype)).sum() * scale)
    assert found == {"0": 0.0, "1": 0.0}


@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_unit_sizes_are_zero_just_where_a_row_is(size, dtype):
    gradient = torch.zeros(4, size, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    gradient[1, -1], gradient[2, 0], gradient[3, 1] = tiny, float("nan"), -1.0
    for one, dim in ((gradient, 0), (gradient.T.contiguous(), 1)):
        ((places, sizes),) = unit_sizes(Stacks([one]), {0: dim})
        assert places == [0]
        assert (sizes == 0).tolist() == [[True, False, False, False]]


def test_tokens_that_do_not_occur_are_not_dead_and_vectors_have_no_units():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, _x):
            return self.head(self.norm(self.tokens(torch.tensor([1, 2]))))

    assert shares(Reader(), squares) == {"tokens": None, "norm": None, "head": 0.0}


def test_units_of_a_transposed_convolution_are_its_outputs():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 4, 2, stride=2)

        def forward(self, _x):
            return self.up(torch.ones(1, 2, 3, 3))[:, :3]

    assert shares(Up(), squares) == {"up": pytest.approx(1 / 4)}
    owners, parameters = find_owners({"": (model := nn.Sequential(nn.ConvTranspose1d(2, 3, 1), nn.Conv1d(3, 2, 1)))})
    assert unit_weights(owners, parameters) == {"0.weight": 1, "1.weight": 0}
    assert len(model) == 2


def test_an_expert_that_is_never_chosen_is_dead_and_one_without_gradients_is_not_judged():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.never = nn.Linear(4, 3), nn.Linear(4, 3)
            self.weighed = True

        def forward(self, x):
            return self.one(x) + (0 * self.never(x) if self.weighed else 0)

    model = Experts()
    assert shares(model, squares) == {"one": 0.0, "never": 1.0}
    model.weighed = False
    model.never.requires_grad_(False)
    assert shares(model, squares) == {"one": 0.0}


def test_the_share_of_rows_with_a_gradient():
    gradient = torch.zeros(3, 5, 2)
    gradient[0, 4, 1] = gradient[2, 4, 0] = float("nan")
    gradient[1, 0, 0] = 1e-30
    assert row_share(gradient).item() == pytest.approx(3 / 15)
