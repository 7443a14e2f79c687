"""Depth means the same on any model: every layer's gradients are those of autograd by hand, whatever the model does.

The oracle keeps the outputs of the called modules and asks ``torch.autograd.grad`` for their gradients.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from diagnostics import Monitor
from diagnostics.depth import forward
from diagnostics.trainers.cnn import CNN
from diagnostics.trainers.gpt import GPT
from diagnostics.trainers.models import MLP
from diagnostics.trainers.tasks import Inputs

WIDTH = 6


def linear(inputs=WIDTH, outputs=WIDTH):
    return nn.Linear(inputs, outputs)


def watched(model, loss, steps=1, **options):
    """The last record of some steps without updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"on_diagnosis": "record", "on_violation": "record", "every": 1, **options}
    with Monitor(model, optimizer, sinks=[], **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            record = monitor.clip_and_step()
    assert monitor._watcher.failure is None
    return record


def tensors(value):
    """Written anew, so that the code's own search is not its oracle."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = vars(value) if hasattr(value, "__dataclass_fields__") else value
    if isinstance(parts, dict):
        parts = list(parts.values())
    return [one for part in parts for one in tensors(part)] if isinstance(parts, (list, tuple)) else []


def by_hand(model, loss):
    """Name of every call of a module with parameters to the gradients at its inputs and outputs, from autograd."""
    calls = []

    def keep(name):
        def hook(_module, args, kwargs, output):
            read = list({id(one): one for one in tensors((list(args), kwargs)) if one.requires_grad}.values())
            made = [one for one in tensors(output) if one.requires_grad]
            calls.append((name, read, made))

        return hook

    owners = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in owners.items()]
    value = loss(model)
    kept = [one for _, read, made in calls for one in (*read, *made)]
    found = iter(torch.autograd.grad(value, kept, allow_unused=True))
    for handle in handles:
        handle.remove()
    counts, result, seen = defaultdict(int), {}, defaultdict(int)
    for name, *_ in calls:
        counts[name] += 1
    for name, read, made in calls:
        key = (name or type(model).__name__) + (f"@{seen[name]}" if counts[name] > 1 else "")
        seen[name] += 1
        pair = [[one for one in (next(found) for _ in part) if one is not None] for part in (read, made)]
        result[key] = pair
    return result


def norm(gradients):
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def assert_is_by_hand(model, loss, **options):
    expected = by_hand(copy.deepcopy(model), loss)
    record = watched(model, loss, **options)
    assert [one.layer.name for one in record.layers] == list(expected)
    for one in record.layers:
        read, made = expected[one.layer.name]
        if not made:
            assert one.output is None
            continue
        assert one.output.norm == pytest.approx(norm(made), rel=1e-5)
        assert one.output.numel == sum(gradient.numel() for gradient in made)
        assert one.output.rms == pytest.approx(norm(made) / math.sqrt(one.output.numel), rel=1e-5)
        if read and norm(made) > 0:
            assert one.gain == pytest.approx(norm(read) / norm(made), rel=1e-5)
        else:
            assert one.gain is None
    return record


class Residual(nn.Module):
    """x + part(x)."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return x + self.part(x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.join, self.left, self.right, self.unused = linear(2 * WIDTH), linear(), linear(), linear()

    def forward(self, x):
        return self.join(torch.cat([self.left(x), torch.tanh(self.right(x))], -1))


class Unrolled(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(WIDTH, WIDTH), linear()

    def forward(self, x):
        state = None
        for step in (x, x + 1, x - 1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.other = linear(), linear()

    def forward(self, x):
        return self.shared(self.other(self.shared(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = linear(), linear()
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(linear() for _ in range(4))

    def forward(self, x):
        for part in reversed(self.parts):
            x = part(x).relu()
        return x


@dataclass
class Answer:
    hidden: torch.Tensor
    rest: dict
    count: int = 3


class Answering(nn.Module):
    """Owns a parameter and a child; returns a dataclass with a dict with a tuple, a number and a plain tensor."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.randn(WIDTH)), linear()

    def forward(self, x, *, shift):
        hidden = self.inner(x) * self.scale
        return Answer(hidden, {"pair": (hidden + shift, None), "mask": hidden.detach() > 0})


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.answering = linear(), Answering()

    def forward(self, x):
        x = self.first(x)
        answer = self.answering(x, shift=x.tanh())
        return answer.hidden * answer.rest["pair"][0]


class Chunks(nn.Module):
    """Returns views of one tensor, of which one is not used and one is used twice."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))

        def forward(self, x):
            return (x @ self.weight).chunk(3, -1)

    def __init__(self):
        super().__init__()
        self.split, self.last = self.Split(), linear()

    def forward(self, x):
        one, two, _ = self.split(x)
        return self.last(one * one + two)


class Same(nn.Module):
    """A module with a parameter whose output is its input, between two layers."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = linear(), self.Gate(), linear()

    def forward(self, x):
        return self.last(self.gate(self.first(x)))


class Detached(nn.Module):
    """A part whose output does not require grad, in the middle of the forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.aside, self.last = linear(), linear(), linear()

    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            shift = self.aside(x)
        return self.last(x + shift)


class Heads(nn.Module):
    """Attention from one module that holds its projections itself, and keyword arguments."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = linear(), nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x):
        x = self.embed(x)
        return self.attention(query=x, key=x.tanh(), value=x)[0]


class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.change, self.gate = linear(), linear()

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return x * (1 - gate) + gate * torch.tanh(self.change(x))


def squares(model):
    torch.manual_seed(1)
    return model(torch.randn(5, WIDTH)).square().sum()


MODELS = {
    "sequential": lambda: nn.Sequential(linear(), nn.Tanh(), linear(), nn.LayerNorm(WIDTH), linear()),
    "branches": Branches,
    "residual": lambda: MLP(WIDTH, 3, depth=4, width=WIDTH, residual=True),
    "highway": lambda: nn.Sequential(linear(), Highway(), Highway(), linear()),
    "cells unrolled": lambda: Unrolled(nn.RNNCell),
    "cells that return two states": lambda: Unrolled(nn.LSTMCell),
    "a shared module": Shared,
    "tied weights": Tied,
    "a loop over a list": Loop,
    "dataclasses and keywords": Asking,
    "views of an output": Chunks,
    "an output that is the input": Same,
    "an output without grad": Detached,
    "attention": Heads,
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_gradients_at_every_layer_are_those_of_autograd_by_hand(build):
    model = build()
    if isinstance(model, Branches):
        model.unused.requires_grad_(False)
    assert_is_by_hand(model, squares)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_transformer_s_gradients_are_those_of_autograd_by_hand(position):
    model = GPT(Inputs("tokens", (5,)), 11, depth=2, width=8, heads=2, norm_position=position)
    tokens = torch.randint(0, 11, (3, 5))
    assert_is_by_hand(model, lambda model: functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))


def test_convolutional_gradients_are_those_of_autograd_by_hand():
    model = CNN(Inputs("images", (1, 8, 8)), 4, depth=4, width=4, norm="group", residual=True)
    images = torch.randn(3, 1, 8, 8)
    assert_is_by_hand(model, lambda model: model(images).square().sum())


def test_functional_call_is_seen_as_a_call():
    def loss(model):
        torch.manual_seed(1)
        return functional_call(model, dict(model.named_parameters()), (torch.randn(5, WIDTH),)).square().sum()

    assert_is_by_hand(nn.Sequential(linear(), nn.Tanh(), linear()), loss)


def test_output_gradients_are_divided_by_the_loss_scale_and_gains_are_not():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    expected = by_hand(copy.deepcopy(model), squares)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with Monitor(model, optimizer, scaler=scaler, sinks=[]) as monitor:
        scaler.scale(squares(model)).backward()
        record = monitor.clip_and_step()
    for one in record.layers:
        read, made = expected[one.layer.name]
        assert one.output.norm == pytest.approx(norm(made), rel=1e-5)
        assert one.gain == (pytest.approx(norm(read) / norm(made), rel=1e-5) if read else None)


def test_two_forwards_of_one_model_in_a_step_merge_by_rank_and_each_call_keeps_its_own_gain():
    """A critic that judges real examples, which need no gradient, and generated ones, which do."""
    critic = nn.Sequential(linear(), nn.Tanh(), linear())
    made_up = torch.randn(5, WIDTH, requires_grad=True)

    def loss(model):
        return squares(model) + 3 * model(made_up * 1).square().sum()

    record = watched(critic, loss)
    twin = copy.deepcopy(critic)
    real, fake = by_hand(twin, squares), by_hand(twin, lambda model: 3 * model(made_up * 1).square().sum())
    assert [one.layer.name for one in record.layers] == ["0", "2"]
    for one in record.layers:
        name = one.layer.name
        assert one.output.norm == pytest.approx(math.hypot(norm(real[name][1]), norm(fake[name][1])), rel=1e-5)
    assert record.layers[0].gain == pytest.approx(norm(fake["0"][0]) / norm(fake["0"][1]), rel=1e-5)


def test_micro_batches_have_the_gain_of_the_whole_batch():
    model, x = nn.Sequential(linear(), nn.Tanh(), linear()), torch.randn(8, WIDTH)
    whole = watched(copy.deepcopy(model), lambda model: model(x).square().sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, accumulate=4, sinks=[]) as monitor:
        for part in x.chunk(4):
            model(part).square().sum().backward()
        parts = monitor.clip_and_step()
    assert parts.layers[1].gain == pytest.approx(whole.layers[1].gain, rel=1e-5)


def test_an_input_that_requires_grad_is_measured_and_keeps_no_hook():
    model, x = linear(), torch.randn(5, WIDTH, requires_grad=True)
    for _ in range(3):
        record = watched(model, lambda model: model(x).square().sum(), steps=2)
    x.grad = None
    model(x).square().sum().backward()
    expected = x.grad.norm() / (2 * model(x)).norm()
    assert record.layers[0].gain == pytest.approx(expected.item(), rel=1e-5)
    assert not x._backward_hooks


def test_layers_dropped_at_random_come_into_one_order_and_their_stream_is_fitted():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = linear()
            self.blocks = nn.ModuleList(nn.Sequential(linear(), nn.Tanh(), linear()) for _ in range(6))
            self.head = linear()
            self.draw = torch.Generator().manual_seed(3)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                if torch.rand((), generator=self.draw) < 0.7:
                    x = x + block(x)
            return self.head(x)

    record = watched(Dropping(), squares, steps=20)
    assert [one.layer.name for one in record.layers] == [
        "stem", *(f"blocks.{block}.{part}" for block in range(6) for part in (0, 2)), "head",
    ]  # fmt: skip
    assert [one.layer.name for one in record.layers if one.layer.trunk] == [
        "stem", *(f"blocks.{block}.2" for block in range(6)), "head",
    ]  # fmt: skip
    assert abs(record.fit.slope) < 0.3


def test_an_expert_that_is_called_later_comes_into_its_place():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.experts, self.last = linear(), nn.ModuleList([linear(), linear()]), linear()
            self.turn = 0

        def forward(self, x):
            self.turn += 1
            return self.last(self.experts[self.turn % 2](self.first(x)))

    record = watched(Experts(), squares, steps=4)
    assert [one.layer.name for one in record.layers] == ["first", "experts.0", "experts.1", "last"]
    assert [one.output is not None for one in record.layers] == [True, True, False, True]
    assert record.fit.depths == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = linear(), nn.Sequential(linear(), nn.Tanh(), linear()), linear()
            self.checkpointed = False

        def forward(self, x):
            x = self.stem(x)
            return self.head(checkpoint(self.block, x, use_reentrant=reentrant) if self.checkpointed else self.block(x))

    model = Net()
    plain = watched(model, squares)
    model.checkpointed = True
    record = watched(model, squares, steps=2)
    assert [one.layer.name for one in record.layers] == [one.layer.name for one in plain.layers]
    assert record.fit.slope == pytest.approx(plain.fit.slope, rel=1e-5)
    for one, other in zip(record.layers, plain.layers, strict=True):
        assert one.output.norm == pytest.approx(other.output.norm, rel=1e-5)
        assert one.output.numel == other.output.numel
        assert one.gain == (other.gain and pytest.approx(other.gain, rel=1e-5))


def test_a_checkpointed_residual_block_is_fitted_as_a_plain_one_where_its_graph_is_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = linear(), linear()
            self.blocks = nn.ModuleList(Residual(nn.Sequential(linear(), nn.Tanh(), linear())) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    record = watched(Net(), squares)
    trunk = [one for one in record.layers if one.layer.trunk]
    assert [one.layer.name for one in trunk] == ["stem", *(f"blocks.{block}.part.2" for block in range(3)), "head"]
    assert all(one.stream_rms == pytest.approx(one.output.rms, rel=1e-5) for one in trunk[1:-1])


def test_a_module_added_later_disturbs_nothing_and_a_replaced_parameter_is_told_of_outside():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, sinks=[], on_violation="record") as monitor:
        squares(model).backward()
        monitor.clip_and_step()
        model.append(linear())
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        optimizer.add_param_group({"params": [model[0].weight, *model[3].parameters()]})
        optimizer.zero_grad()
        expected = by_hand(copy.deepcopy(model), squares)
        squares(model).backward()
        record = monitor.clip_and_step()
    *layers, outside = record.layers
    assert [one.layer.name for one in layers] == ["0", "2"]
    assert [one.output.norm for one in layers] == [
        pytest.approx(norm(expected[name][1]), rel=1e-5) for name in ("0", "2")
    ]  # fmt: skip
    assert len(outside.layer.parameters) == 3


def test_names_are_those_of_the_model_inside_its_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

        def forward(self, x):
            return self._orig_mod(x)

    inner = nn.Sequential(linear(), nn.Sequential(linear()))
    for model in (Wrapper(inner), nn.DataParallel(inner), nn.DataParallel(Wrapper(inner))):
        record = watched(model, squares)
        assert [one.layer.name for one in record.layers] == ["0", "1.0"]
        assert record.layers[1].layer.parameters == ("1.0.weight", "1.0.bias")
    record = watched(nn.ModuleDict({"module": inner})["module"], squares)
    assert [one.layer.name for one in record.layers] == ["0", "1.0"]


# ── fused recurrent layers ──


class Fused(nn.Module):
    def __init__(self, kind, lengths=None):
        super().__init__()
        self.first, self.cell, self.head = linear(), kind(WIDTH, WIDTH, batch_first=True), linear()
        self.lengths = lengths

    def forward(self, x):
        x = self.first(x)
        if self.lengths is None:
            return self.head(self.cell(x)[0][:, -1])
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        states = pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]
        return self.head(states[torch.arange(len(x)), torch.tensor(self.lengths) - 1])


@pytest.mark.parametrize("lengths", [None, [9, 4, 7]], ids=["equal", "packed"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_fused_layer_with_a_loss_at_its_last_step_is_measured_where_it_has_a_gradient(kind, lengths):
    model, x = Fused(kind, lengths), torch.randn(3, 9, WIDTH)
    record = watched(model, lambda model: model(x).square().sum())
    one = record.layers[1]
    by_head = model(x).detach() * 2 @ model.head.weight  # the gradient at the last states: nothing lies between
    assert one.output.numel == by_head.numel()
    assert one.output.rms == pytest.approx(by_head.square().mean().sqrt().item(), rel=1e-5)
    assert one.output.zero_fraction == pytest.approx(0.0, abs=0.2)
    assert one.gain > 0


def test_the_gradient_at_a_fused_layers_results_says_nothing_of_its_recurrence():
    """Why there is no profile over time: one that fades by decades per step looks like one that carries on."""
    profiles = []
    for scale in (1e-3, 1.0):
        torch.manual_seed(0)
        fused = nn.RNN(3, 5)
        with torch.no_grad():
            nn.init.orthogonal_(fused.weight_hh_l0).mul_(scale)
        made, _ = fused(torch.randn(7, 2, 3))
        made.retain_grad()
        (made * torch.arange(70.0).view(7, 2, 5)).sum().backward()
        profiles.append(made.grad)
    assert torch.equal(*profiles)


# ── the trunk ──


def scaled_identity(factor):
    layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
    layer.weight.data = factor * torch.eye(WIDTH, dtype=torch.float64)
    return layer


@pytest.mark.parametrize("depth", [2, 8, 32])
def test_a_residual_stream_that_grows_by_1_plus_1_over_l_is_fitted_as_that(depth):
    blocks = [Residual(nn.Sequential(scaled_identity(0.01), scaled_identity(100 / depth))) for _ in range(depth)]
    model = nn.Sequential(scaled_identity(1.0), *blocks)
    record = watched(model, lambda model: model(torch.ones(2, WIDTH).double()).sum())
    assert record.fit.slope == pytest.approx(math.log10(1 + 1 / depth), rel=1e-9)
    assert record.fit.depths == depth + 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_plain_chain_is_fitted_layer_by_layer(factor):
    model = nn.Sequential(*(scaled_identity(factor) for _ in range(9)))
    record = watched(model, lambda model: model(torch.ones(2, WIDTH).double()).sum())
    assert record.fit.slope == pytest.approx(math.log10(factor), rel=1e-9)
    assert [one.layer.steps_back for one in record.layers] == [*reversed(range(9))]
    assert all(one.layer.trunk and one.stream_rms is None for one in record.layers)
    assert all(one.gain == pytest.approx(factor, rel=1e-9) for one in record.layers[1:])


def test_a_highway_net_s_stream_is_fitted():
    """With closed gates of 1/4 and an identity to carry: (1 - 1/4) + 1/4 * 2 of the gradient at every block."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.change, self.gate = scaled_identity(2.0), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, -math.log(3))

        def forward(self, x):
            gate = torch.sigmoid(self.gate(x))
            return x * (1 - gate) + gate * self.change(x)

    model = nn.Sequential(scaled_identity(1.0), *(Gated() for _ in range(6)), scaled_identity(1.0))
    record = watched(model, lambda model: model(torch.ones(2, WIDTH).double()).sum())
    assert record.fit.slope == pytest.approx(math.log10(1.25), rel=1e-6)
    assert record.fit.depths == 8


class Basic(nn.Module):
    """He et al. 2016: two convolutions; where the shape changes the shortcut is a projection."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(Basic):
    """Three convolutions, the outer ones over single places."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, stride)
        inner = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


@pytest.mark.parametrize(("block", "last"), [(Basic, "conv2"), (Bottleneck, "conv3")])
def test_a_resnet_is_fitted_at_its_blocks_and_their_stream_is_autograd_s(block, last):
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    blocks = nn.Sequential(block(8, 8), block(8, 8), block(8, 16, 2), block(16, 16))
    model = nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    images = torch.randn(4, 3, 8, 8)
    record = watched(model, lambda model: model(images).square().sum())
    ends = [f"1.{place}.{last}" for place in range(4)]
    ends[2] = "1.2.downsample.0"
    trunk = [one for one in record.layers if one.layer.trunk]
    assert [one.layer.name for one in trunk] == ["0.0", *ends, "4"]
    assert [one.layer.steps_back for one in trunk] == [5, 4, 3, 2, 1, 0]
    streams, hidden = [], model[0](images)
    for one in model[1]:
        hidden = one(hidden)
        streams.append(hidden)
    gradients = torch.autograd.grad(model[4](model[3](model[2](hidden))).square().sum(), streams)
    for one, stream, gradient in zip(trunk[1:-1], streams, gradients, strict=True):  # the join is before the last ReLU
        joined = gradient * (stream > 0)
        assert one.stream_rms == pytest.approx(joined.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_a_transformer_encoder_is_fitted_at_both_joins_of_every_layer(first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 3))
    record = watched(model, lambda model: model(torch.randn(2, 5, 8)).square().sum())
    trunk = [one for one in record.layers if one.layer.trunk]
    joins = [f"1.layers.{number}.{end}" for number in range(3) for end in ("self_attn", "linear2")]
    assert [one.layer.name for one in trunk] == ["0", *joins, "2"]
    assert [one.stream_rms is not None for one in trunk] == [False, *[True] * 6, False]


@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_gpt_s_stream_is_measured_behind_attention_and_feed_forward(position):
    """Without dropout what a branch adds has the gradient of the sum."""
    model = GPT(Inputs("tokens", (6,)), 11, depth=3, width=8, heads=2, norm_position=position)
    tokens = torch.randint(0, 11, (3, 6))
    record = watched(model, lambda model: functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
    trunk = [one for one in record.layers if one.layer.trunk]
    joins = [f"blocks.{block}.{part}.projection" for block in range(3) for part in ("attention", "feed_forward")]
    assert [one.layer.name for one in trunk] == ["tokens", "positions", *joins, "head"]
    for one in trunk[2:-1]:
        assert one.stream_rms == pytest.approx(one.output.rms, rel=1e-5)
    assert trunk[0].layer.steps_back == trunk[1].layer.steps_back == 7


class PreActivation(nn.Module):
    """The stream is no module's output, and every branch begins with a function: a root mean square norm by hand."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.up, self.down = linear(), linear(), linear(), linear()

    def forward(self, x):
        normed = functional.rms_norm(x, (WIDTH,))
        x = x + self.query(normed) * torch.sigmoid(self.key(normed))
        return x + self.down(torch.relu(self.up(functional.rms_norm(x, (WIDTH,)))))


def test_a_stream_that_is_no_module_s_input_or_output_is_found():
    model = nn.Sequential(linear(), *(PreActivation() for _ in range(3)), linear())
    record = watched(model, squares)
    trunk = [one for one in record.layers if one.layer.trunk]
    assert [one.layer.name for one in trunk] == [
        "0", *(f"{block}.{end}" for block in (1, 2, 3) for end in ("key", "down")), "4",
    ]  # fmt: skip
    torch.manual_seed(1)
    x, streams = model[0](torch.randn(5, WIDTH)), []
    for block in model[1:4]:
        normed = functional.rms_norm(x, (WIDTH,))
        x = x + block.query(normed) * torch.sigmoid(block.key(normed))
        streams.append(x)
        x = x + block.down(torch.relu(block.up(functional.rms_norm(x, (WIDTH,)))))
        streams.append(x)
    gradients = torch.autograd.grad(model[4](x).square().sum(), streams)
    for one, gradient in zip(trunk[1:-1], gradients, strict=True):
        assert one.stream_rms == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-5)


def test_a_branch_that_begins_closed_leaves_the_fit_a_stream():
    """ReZero and zero-initialised projections: nothing passes the branch, everything passes the stream."""

    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.alpha = linear(), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.alpha * self.part(x)

    record = watched(nn.Sequential(linear(), *(Closed() for _ in range(4)), linear()), squares)
    assert record.fit.depths == record.fit.points == 6
    assert [one.layer.name for one in record.layers if one.layer.trunk] == ["0", "1", "2", "3", "4", "5"]
    stems = [one.output.rms for one in record.layers if one.layer.name in "01234"]
    assert stems == pytest.approx([stems[0]] * 5, rel=1e-5)


def towers(shared):
    left = nn.Sequential(*(scaled_identity(0.5) for _ in range(5)))
    right = left if shared else copy.deepcopy(left)

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = left, right, scaled_identity(0.5)

        def forward(self, x):
            return self.head(self.left(x) * 0.5 + self.right(x) * 0.5)

    return Towers()


@pytest.mark.parametrize("shared", [False, True])
def test_towers_stand_side_by_side_and_have_the_slope_of_one(shared):
    record = watched(towers(shared), lambda model: model(torch.ones(2, WIDTH).double()).sum())
    assert record.fit.depths == 6
    assert record.fit.points == 11
    assert record.fit.slope == pytest.approx(math.log10(0.5), abs=0.05)
    assert all(one.layer.trunk for one in record.layers)


def test_a_layer_s_place_is_the_longest_way_to_the_loss_in_whatever_order_branches_are_called():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.short, self.head = linear(), linear(), linear(2 * WIDTH)
            self.long = nn.Sequential(*(linear() for _ in range(3)))
            self.turned = False

        def forward(self, x):
            x = self.stem(x)
            parts = [self.long(x), self.short(x)] if self.turned else [self.short(x), self.long(x)]
            return self.head(torch.cat(parts, -1))

    model = Uneven()
    for model.turned in (False, True):
        record = watched(model, squares)
        places = {one.layer.name: one.layer.steps_back for one in record.layers}
        assert places == {"stem": 4, "short": 1, "long.0": 3, "long.1": 2, "long.2": 1, "head": 0}


def test_a_tower_that_is_added_to_a_residual_stream_stays_in_the_trunk():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part, self.tower, self.head = linear(), linear(), linear(), linear()

        def forward(self, x):
            stream = self.stem(x)
            stream = stream + self.part(stream)
            return self.head(stream + self.tower(x))

    record = watched(Added(), squares)
    assert {one.layer.name: one.layer.trunk for one in record.layers} == dict.fromkeys(
        ["stem", "part", "tower", "head"], True
    )
    assert {one.layer.name: one.stream_rms is not None for one in record.layers}["part"]
    assert record.layers[2].stream_rms is None


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.in1, self.in2, self.deep = linear(), linear(), linear()
        self.out2, self.out1 = linear(2 * WIDTH), linear(2 * WIDTH)

    def forward(self, x):
        one = torch.tanh(self.in1(x))
        two = torch.tanh(self.in2(one))
        up = self.out2(torch.cat([torch.tanh(self.deep(two)), two], -1))
        return self.out1(torch.cat([torch.tanh(up), one], -1))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(linear((place + 1) * WIDTH) for place in range(4))

    def forward(self, x):
        made = [x]
        for part in self.parts:
            made.append(torch.relu(part(torch.cat(made, -1))))
        return made[-1]


class Recurrence(nn.Module):
    """Cells by hand behind an embedding, with all states stacked for the loss: no skip around time."""

    def __init__(self):
        super().__init__()
        self.embed, self.input, self.state, self.head = nn.Embedding(7, WIDTH), linear(), linear(), linear()

    def forward(self, x):
        embedded, states = self.embed(x.argsort(1)), [torch.zeros(len(x), WIDTH)]
        for step in embedded.unbind(1):
            states.append(torch.tanh(self.input(step) + self.state(states[-1])))
        return self.head(torch.stack(states[1:], 1))


@pytest.mark.parametrize(("build", "depths"), [(UNet, 5), (Dense, 4), (Recurrence, 8)])
def test_skips_that_end_in_a_concatenation_and_states_in_time_take_no_layer_off_the_trunk(build, depths):
    record = watched(build(), squares)
    assert all(one.layer.trunk for one in record.layers)
    assert record.fit.depths == depths


def test_an_encoder_and_a_decoder_that_looks_at_it_are_fitted_along_their_streams():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.source, self.target, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.body = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.head(self.body(self.source(x), self.target(x)))

    record = watched(Both(), lambda model: model(torch.randn(2, 5, 8)).square().sum())
    trunk = {one.layer.name: one.layer.steps_back for one in record.layers if one.layer.trunk}
    ends = [name for name in trunk if name.startswith("body.decoder")]
    assert [name.rsplit(".", 1)[1] for name in ends] == ["self_attn", "multihead_attn", "linear2"] * 2
    assert [trunk[name] for name in ends] == [6, 5, 4, 3, 2, 1]
    assert not any("linear1" in name for name in trunk)


def test_the_layers_option_fits_what_it_chooses_without_gaps():
    model = nn.Sequential(*(scaled_identity(0.5) for _ in range(9)))
    record = watched(model, lambda model: model(torch.ones(2, WIDTH).double()).sum(), layers="^[02468]$")
    assert record.fit.depths == 5
    assert record.fit.slope == pytest.approx(2 * math.log10(0.5), rel=1e-9)


def test_a_graph_that_cannot_be_read_leaves_the_order_of_calls(monkeypatch):
    monkeypatch.setattr(
        "diagnostics.depth.forward.find_trunk", lambda *_: (_ for _ in ()).throw(AttributeError("name"))
    )
    record = watched(MLP(WIDTH, 3, depth=4, width=WIDTH, residual=True), squares)
    assert all(one.layer.trunk and one.layer.steps_back is None for one in record.layers)
    assert record.fit.depths == 5


def test_the_graph_is_read_once_per_order_of_calls(monkeypatch):
    read, original = [], forward.find_trunk
    monkeypatch.setattr(forward, "find_trunk", lambda *given: read.append(1) or original(*given))
    watched(MLP(WIDTH, 3, depth=4, width=WIDTH, residual=True), squares, steps=5)
    assert len(read) == 1


def test_an_order_of_calls_that_begins_later_is_read_when_it_comes_again(monkeypatch):
    """What a pass reads and makes is noted only while there may be something new to find in it."""

    class Longer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            x = self.first(x)
            for block in self.blocks if self.calls > 3 else ():
                x = x + block(x).tanh()
            return self.head(x)

    read, original = [], forward.find_trunk
    monkeypatch.setattr(forward, "find_trunk", lambda *given: read.append(1) or original(*given))
    record = watched(Longer(), squares, steps=8)
    assert len(read) == 2
    assert [one.layer.trunk for one in record.layers] == [True] * 6
    assert [one.stream_rms is not None for one in record.layers] == [False, True, True, True, True, False]


# ── what it costs ──


class Kernels(TorchDispatchMode):
    """Counts operations that do something on the device: views and detached aliases do not."""

    VIEWS = (
        "detach",
        "view",
        "slice",
        "alias",
        "unsqueeze",
        "select",
        "as_strided",
        "permute",
        "t.default",
        "transpose",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(view in str(function) for view in self.VIEWS)
        return function(*args, **(kwargs or {}))


def kernels_per_layer(build, **options):
    """How many kernels a step costs for every further layer, Monitor or not."""
    counts = []
    for depth in (4, 8):
        model = build(depth)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = Monitor(model, optimizer, sinks=[], on_diagnosis="record", **options) if options else None
        for _ in range(2):
            optimizer.zero_grad()
            with Kernels() as kernels:
                model(torch.ones(8, 32)).square().mean().backward()
                optimizer.step() if monitor is None else monitor.clip_and_step()
        if monitor is not None:
            monitor.close()
        counts.append(kernels.count)
    return (counts[1] - counts[0]) / 4


def test_a_step_that_is_not_recorded_costs_no_kernel_per_layer():
    def build(depth):
        return MLP(32, 3, depth=depth, width=32)

    assert kernels_per_layer(build, every=0) == kernels_per_layer(build)


@pytest.mark.parametrize("residual", [False, True])
def test_a_recorded_step_costs_few_kernels_per_layer(residual):
    """Two parameters, an output, an input and a stream: five gradients and two weights."""

    def build(depth):
        return MLP(32, 3, depth=depth, width=32, residual=residual)

    assert kernels_per_layer(build, every=1) - kernels_per_layer(build) <= 15
