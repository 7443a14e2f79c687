"""The models: they compute what their dials say, and their depth is what their docstrings count."""

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from diagnostics import MemorySink, Monitor, schemas
from diagnostics.trainers import cnn, gpt, recurrent
from diagnostics.trainers.cnn import CNN
from diagnostics.trainers.gpt import GPT
from diagnostics.trainers.models import MLP
from diagnostics.trainers.recurrent import GRU, LSTM, RNN
from diagnostics.trainers.seed_chain import SigmoidChain
from diagnostics.trainers.tasks import Inputs

IMAGES = Inputs("images", (1, 8, 8))
SEQUENCES = Inputs("sequences", (7, 2))
TOKENS = Inputs("tokens", (6,))
RECURRENT = [RNN, GRU, LSTM]


def example(inputs, count=5):
    if inputs.kind == "tokens":
        return torch.randint(0, 11, (count, *inputs.shape))
    return torch.randn(count, *inputs.shape)


def layer_names(model, inputs):
    """The layers of one pass as the Monitor records them."""
    sink = MemorySink()
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.0), sinks=[sink], on_diagnosis="record") as monitor:
        model(example(inputs)).square().mean().backward()
        monitor.clip_and_step()
    return [record.layer.name for record in sink.records[0].layers]


# ── what all share ──


@pytest.mark.parametrize(
    ("make", "inputs", "names"),
    [
        (lambda: MLP(IMAGES, 11, depth=2, norm="layer"), IMAGES, "0.linear 0.norm 1.linear 1.norm head"),
        (lambda: CNN(IMAGES, 11, depth=2, norm="group"), IMAGES, "0.conv 0.norm 1.conv 1.norm head"),
        (lambda: RNN(SEQUENCES, 11), SEQUENCES, "cell@0 cell@1 cell@2 cell@3 cell@4 cell@5 cell@6 head"),
        (lambda: GRU(TOKENS, 11), TOKENS, "embedding cell@0 cell@1 cell@2 cell@3 cell@4 cell@5 head"),
        (lambda: LSTM(IMAGES, 11, fused=True), IMAGES, "cell head"),
        (
            lambda: GPT(TOKENS, 11, depth=1),
            TOKENS,
            (
                "tokens positions 0.attention_norm 0.attention.query_key_value 0.attention.projection "
                "0.feed_forward_norm 0.feed_forward.expansion 0.feed_forward.projection norm head"
            ),
        ),
        (
            lambda: GPT(TOKENS, 11, depth=1, norm_position="post"),
            TOKENS,
            (
                "tokens positions 0.attention.query_key_value 0.attention.projection 0.attention_norm "
                "0.feed_forward.expansion 0.feed_forward.projection 0.feed_forward_norm head"
            ),
        ),
    ],
)
def test_a_layer_is_one_call_of_a_module_that_owns_parameters(make, inputs, names):
    assert [re.sub(r"^(hidden|blocks)\.", "", name) for name in layer_names(make(), inputs)] == names.split()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CNN(IMAGES, 10, depth=0), "depth must be at least 1; got 0."),
        (lambda: CNN(IMAGES, 10, width=0), "width must be at least 1; got 0."),
        (lambda: CNN(IMAGES, 10, norm="layer"), "norm must be one of none, batch, group; got 'layer'."),
        (lambda: RNN(SEQUENCES, 1, activation="gelu"), "activation must be one of tanh, relu; got 'gelu'."),
        (lambda: LSTM(SEQUENCES, 1, width=0), "width must be at least 1; got 0."),
        (
            lambda: GRU(SEQUENCES, 1, recurrent_init="identity"),
            "recurrent_init must be one of default, orthogonal; got 'identity'.",
        ),
        (lambda: GPT(TOKENS, 11, width=10, heads=4), "width must be a multiple of heads, 4; got 10."),
        (lambda: GPT(TOKENS, 11, heads=0), "heads must be at least 1; got 0."),
        (lambda: GPT(TOKENS, 11, norm_position="mid"), "norm_position must be one of pre, post; got 'mid'."),
        (lambda: GPT(TOKENS, 11, dropout=1.0), "dropout must be at least 0 and below 1; got 1.0."),
        (
            lambda: SigmoidChain(IMAGES, 10),
            "sigmoid_chain takes vectors, and the task feeds images of 1x8x8; choose another model or another task.",
        ),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_sentence(make, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make()


def test_the_schema_offers_what_the_models_offer():
    assert list(schemas.CnnNorm.__members__) == list(cnn.CNN_NORMS)
    assert list(schemas.RecurrentInit.__members__) == list(recurrent.RECURRENT_INITS)
    assert list(schemas.NormPosition.__members__) == list(gpt.NORM_POSITIONS)
    for activation in schemas.RecurrentActivation.__members__:
        RNN(SEQUENCES, 1, activation=activation)


# ── cnn ──


@pytest.mark.parametrize(
    ("depth", "widths", "sizes"),
    [
        (1, [4], [8]),
        (2, [4, 8], [8, 4]),
        (6, [4, 4, 8, 8, 16, 16], [8, 8, 4, 4, 2, 2]),
        (7, [4, 4, 4, 8, 8, 16, 16], [8, 8, 8, 4, 4, 2, 2]),
    ],
)
def test_each_stage_doubles_the_width_and_halves_the_resolution(depth, widths, sizes):
    model, shapes = CNN(IMAGES, 10, depth=depth, width=4), []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[1:]))
    model(example(IMAGES))
    assert shapes == [(width, size, size) for width, size in zip(widths, sizes, strict=True)]


@pytest.mark.parametrize("residual", [False, True])
def test_a_cnn_computes_what_its_dials_say(residual):
    model = CNN(IMAGES, 10, depth=6, width=16, activation="tanh", norm="group", residual=residual).eval()
    hidden = images = example(IMAGES)
    for number, block in enumerate(model.blocks):
        first_of_stage = number in {0, 2, 4}
        stride = 2 if number in {2, 4} else 1
        result = functional.conv2d(hidden, block.conv.weight, block.conv.bias, stride=stride, padding=1)
        result = torch.tanh(functional.group_norm(result, 8))
        hidden = hidden + result if residual and not first_of_stage else result
    torch.testing.assert_close(model(images), model.head(hidden.mean((2, 3))))


def test_kaiming_counts_all_nine_weights_of_each_input_channel():
    torch.manual_seed(0)
    model = CNN(IMAGES, 10, depth=6, width=64, init="kaiming")
    assert model.blocks[1].conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert not model.blocks[1].conv.bias.any()


def test_each_norm_of_a_cnn_is_torch_s():
    kinds = {norm: type(CNN(IMAGES, 10, depth=1, norm=norm).blocks[0].norm) for norm in ("none", "batch", "group")}
    assert kinds == {"none": nn.Identity, "batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    assert CNN(IMAGES, 10, depth=1, width=12, norm="group").blocks[0].norm.num_groups == 4


# ── recurrent ──


def unrolled_and_fused(make, inputs, **options):
    """The two ways of running the same weights."""
    unrolled, fused = make(inputs, 11, width=8, **options), make(inputs, 11, width=8, fused=True, **options)
    fused.load_state_dict(
        {re.sub(r"(cell\.(weight|bias)_.h)$", r"\1_l0", k): v for k, v in unrolled.state_dict().items()}
    )
    return unrolled, fused


@pytest.mark.parametrize("inputs", [SEQUENCES, TOKENS, Inputs("images", (3, 4, 5))], ids=lambda inputs: inputs.kind)
@pytest.mark.parametrize("make", RECURRENT)
def test_a_cell_unrolled_in_time_computes_what_torch_s_fused_one_does(make, inputs):
    unrolled, fused = unrolled_and_fused(make, inputs)
    examples = example(inputs)
    torch.testing.assert_close(unrolled(examples), fused(examples))


def test_relu_is_the_rnn_s_other_activation():
    unrolled, fused = unrolled_and_fused(RNN, SEQUENCES, activation="relu")
    examples = example(SEQUENCES)
    torch.testing.assert_close(unrolled(examples), fused(examples))
    assert unrolled._states(examples).min() == 0


def test_an_image_is_read_row_by_row():
    model = GRU(Inputs("images", (3, 4, 5)), 11, width=8)
    image = torch.randn(1, 3, 4, 5)
    rows = torch.stack([image[0, :, row].flatten() for row in range(4)])
    assert torch.equal(model._steps(image)[0], rows)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("make", "gates"), [(RNN, 1), (GRU, 3), (LSTM, 4)])
def test_recurrent_weights_are_orthogonal_times_the_scale_gate_by_gate(make, gates, fused):
    model = make(SEQUENCES, 1, width=8, fused=fused, recurrent_init="orthogonal", recurrent_scale=0.5)
    weight = dict(model.cell.named_parameters())["weight_hh_l0" if fused else "weight_hh"]
    assert len(weight) == gates * 8
    for gate in weight.detach().split(8):
        torch.testing.assert_close(gate @ gate.T, 0.25 * torch.eye(8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", RECURRENT)
def test_the_default_recurrent_weights_are_torch_s_own(make):
    torch.manual_seed(0)
    ours = make(SEQUENCES, 1, width=8).cell.weight_hh
    torch.manual_seed(0)
    cell = {RNN: nn.RNNCell, GRU: nn.GRUCell, LSTM: nn.LSTMCell}[make](2, 8)
    assert torch.equal(ours, cell.weight_hh)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [1.0, 5.0])
def test_the_forget_bias_is_what_a_memory_keeps_per_step(bias, fused):
    """Without weights a cell state c becomes sigmoid(bias) * c, plus nothing, since tanh(0) is added."""
    model = LSTM(SEQUENCES, 1, width=4, forget_bias=bias, fused=fused)
    with torch.no_grad():
        for name, parameter in model.cell.named_parameters():
            if name.startswith("weight"):
                parameter.zero_()
            else:
                parameter[8:12] = 0.0  # the candidate's bias, behind input and forget gate
    state = (torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.5))
    if fused:
        _, (_, memory) = model.cell(torch.zeros(1, 1, 2), state)
    else:
        _, memory = model.cell(torch.zeros(1, 2), tuple(part[0] for part in state))
    torch.testing.assert_close(memory.flatten(), torch.full((4,), 0.5 / (1 + math.exp(-bias))))


def test_without_a_forget_bias_torch_s_own_are_left():
    torch.manual_seed(0)
    ours = LSTM(SEQUENCES, 1, width=4, forget_bias=None).cell.bias_ih
    torch.manual_seed(0)
    assert torch.equal(ours, nn.LSTMCell(2, 4).bias_ih)


# ── gpt ──


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("make", [GPT, *RECURRENT])
def test_a_prediction_knows_nothing_of_later_tokens(make, norm_position):
    model = make(TOKENS, 11, width=8, **({"depth": 2, "norm_position": norm_position} if make is GPT else {}))
    tokens = example(TOKENS)
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_block_computes_what_the_papers_write(norm_position):
    torch.manual_seed(0)
    model = GPT(TOKENS, 11, depth=1, width=8, heads=2, norm_position=norm_position, tied=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    (block,) = model.blocks
    tokens = example(TOKENS)

    def attention(hidden):
        query, key, value = block.attention.query_key_value(hidden).split(8, dim=-1)
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = query[..., head] @ key[..., head].transpose(1, 2) / 4**0.5
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ value[..., head])
        return block.attention.projection(torch.cat(heads, dim=-1))

    def feed_forward(hidden):
        return block.feed_forward.projection(functional.gelu(block.feed_forward.expansion(hidden)))

    hidden = model.tokens(tokens) + model.positions(torch.arange(6))
    for part, norm in ((attention, block.attention_norm), (feed_forward, block.feed_forward_norm)):
        hidden = hidden + part(norm(hidden)) if norm_position == "pre" else norm(hidden + part(hidden))
    torch.testing.assert_close(model(tokens), model.head(model.norm(hidden)))
    assert isinstance(model.norm, nn.LayerNorm if norm_position == "pre" else nn.Identity)


def test_weights_are_drawn_as_gpt_2_s():
    torch.manual_seed(0)
    model = GPT(TOKENS, 256, depth=8, width=64)
    block = model.blocks[3]
    for weight in (model.tokens.weight, block.attention.query_key_value.weight, block.feed_forward.expansion.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (block.attention.projection.weight, block.feed_forward.projection.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_the_token_embedding(tied):
    model = GPT(TOKENS, 11, width=8, depth=1, tied=tied)
    assert (model.head.weight is model.tokens.weight) == tied


def test_a_new_gpt_knows_nothing_and_says_so():
    torch.manual_seed(0)
    inputs = Inputs("tokens", (64,))
    tokens = torch.randint(0, 256, (8, 64))
    loss = functional.cross_entropy(GPT(inputs, 256)(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.02)


def test_dropout_acts_in_training_only():
    model = GPT(TOKENS, 11, depth=1, width=8, dropout=0.5)
    tokens = example(TOKENS)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_depth_counts_blocks():
    for depth, make in itertools.product((1, 4), (CNN, GPT)):
        assert len(make(IMAGES if make is CNN else TOKENS, 11, depth=depth).blocks) == depth
