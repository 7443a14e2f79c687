"""Every task with every model, optimizer, clipping and precision: what fits trains, what does not is refused."""

import itertools
import math
import sys
import types

import pytest
import torch
from hydra import compose, initialize_config_dir

from diagnostics import MemorySink, Monitor
from diagnostics.cli import Job, assemble, build, run
from diagnostics.configs import CONF, ConfigurationError, resolve
from diagnostics.trainers.loop import train
from diagnostics.trainers.settings import PRECISIONS, TrainerSettings, make_scaler

# The conf files with sizes that a test can afford.
TASKS = {
    "digits": [],
    "mnist": [],
    "cifar10": [],
    "pysource": ["task.context=6"],
    "temporal_order": ["task.lag=4"],
    "adding": ["task.lag=3"],
    "seed_chain": ["task.story=false"],
}
MODELS = {
    "mlp": ["model.depth=2", "model.width=8"],
    "cnn": ["model.depth=3", "model.width=4"],
    "rnn": ["model.width=4"],
    "gru": ["model.width=4"],
    "lstm": ["model.width=4"],
    "gpt": ["model.depth=1", "model.width=8"],
    "sigmoid_chain": ["model.depth=2"],
}
# The other values of keys that change which modules run.
VARIANTS = {
    ("digits", "mlp"): ["model.norm=batch", "model.residual=true"],
    ("digits", "cnn"): ["model.norm=batch", "model.residual=true"],
    ("cifar10", "cnn"): ["model.norm=group", "model.residual=true"],
    ("pysource", "gpt"): ["model.norm_position=post", "model.tied=false", "model.dropout=0.1"],
    ("temporal_order", "rnn"): ["model.fused=true", "model.activation=relu"],
    ("adding", "gru"): ["model.fused=true", "model.recurrent_init=orthogonal"],
    ("pysource", "lstm"): ["model.fused=true", "model.forget_bias=null"],
}
OPTIMIZERS = [path.stem for path in sorted((CONF / "optimizer").glob("*.yaml"))]
CLIPS = [path.stem for path in sorted((CONF / "clip").glob("*.yaml"))]

ADVICE = "; choose another model or another task."
NO_IMAGES = "mlp takes vectors or images, and the task feeds "
NOT_AN_IMAGE = "cnn takes images, and the task feeds "
NO_TOKENS = "gpt takes tokens, and the task feeds "
NO_VECTORS = "sigmoid_chain takes vectors, and the task feeds "
REFUSED = {
    ("digits", "gpt"): NO_TOKENS + "images of 1x8x8",
    ("digits", "sigmoid_chain"): NO_VECTORS + "images of 1x8x8",
    ("mnist", "gpt"): NO_TOKENS + "images of 1x28x28",
    ("mnist", "sigmoid_chain"): NO_VECTORS + "images of 1x28x28",
    ("cifar10", "gpt"): NO_TOKENS + "images of 3x32x32",
    ("cifar10", "sigmoid_chain"): NO_VECTORS + "images of 3x32x32",
    ("pysource", "mlp"): NO_IMAGES + "tokens of 6",
    ("pysource", "cnn"): NOT_AN_IMAGE + "tokens of 6",
    ("pysource", "sigmoid_chain"): NO_VECTORS + "tokens of 6",
    ("temporal_order", "mlp"): NO_IMAGES + "sequences of 10x8",
    ("temporal_order", "cnn"): NOT_AN_IMAGE + "sequences of 10x8",
    ("temporal_order", "gpt"): NO_TOKENS + "sequences of 10x8",
    ("temporal_order", "sigmoid_chain"): NO_VECTORS + "sequences of 10x8",
    ("adding", "mlp"): NO_IMAGES + "sequences of 6x2",
    ("adding", "cnn"): NOT_AN_IMAGE + "sequences of 6x2",
    ("adding", "gpt"): NO_TOKENS + "sequences of 6x2",
    ("adding", "sigmoid_chain"): NO_VECTORS + "sequences of 6x2",
    ("seed_chain", "cnn"): NOT_AN_IMAGE + "vectors of 1",
    ("seed_chain", "rnn"): "rnn takes sequences, images or tokens, and the task feeds vectors of 1",
    ("seed_chain", "gru"): "gru takes sequences, images or tokens, and the task feeds vectors of 1",
    ("seed_chain", "lstm"): "lstm takes sequences, images or tokens, and the task feeds vectors of 1",
    ("seed_chain", "gpt"): NO_TOKENS + "vectors of 1",
}
# What fits by itself and not together: it would break in the first step, or later.
REFUSED_TOGETHER = {
    "model=lstm model.fused=true trainer.precision=fp16": "trainer.precision must be fp32 or bf16 for a fused LSTM on "
    "the CPU; got 'fp16'.",
    "model.norm=batch trainer.batch_size=1": "trainer.batch_size must be at least 2 for batch normalisation, "
    "2 per pass; got 1.",
    "model.norm=batch trainer.micro_batches=4": "trainer.batch_size must be at least 8 for batch normalisation, "
    "2 per pass; got 4.",
    "trainer.micro_batches=3": "trainer.micro_batches must divide batch_size, 4; got 3.",
    "trainer.mistake=clip_after_step trainer.precision=fp16": "trainer.precision must be fp32 or bf16 with "
    "mistake=clip_after_step; got 'fp16'.",
    "trainer.mistake=clip_after_step clip=none": "trainer.mistake=clip_after_step needs a norm to clip with; "
    "add clip=norm.",
    "task=pysource model=gpt model.width=10 model.heads=3": "model.width must be a multiple of heads, 3; got 10.",
    "task=pysource model=gpt task.context=100000000": "task.context must be at least 1 byte and shorter than the "
    "held-out text; got 100000000.",
    "task=temporal_order model=lstm task.lag=1": "task.lag must be at least 4 steps; got 1.",
    "task=adding model=lstm task.lag=1": "task.lag must be at least 3 steps; got 1.",
    "optimizer=sgd optimizer.momentum=0 optimizer.nesterov=true": "optimizer: Nesterov momentum requires a momentum "
    "and zero dampening.",
    f"trainer.seed={2**64}": f"trainer.seed must be at most {2**64 - 1}; got {2**64}.",
    "trainer.threads=100000": "trainer.threads must be at most 1024; got 100000.",
}
ALLOWED_TOGETHER = [
    "model=lstm model.fused=true trainer.precision=bf16",
    "model=gru model.fused=true trainer.precision=fp16",
    "model=cnn model.norm=batch trainer.batch_size=1",
    "model.norm=batch trainer.micro_batches=2",
    "model.norm=layer trainer.batch_size=1",
    "trainer.warmup_steps=100",
    f"trainer.seed={2**64 - 1}",
]
PAIRS = [pair for pair in itertools.product(TASKS, MODELS) if pair not in REFUSED]
RUNS = [
    (*pair, keys, precision)
    for pair, keys in [*((pair, ()) for pair in PAIRS), *VARIANTS.items()]
    for precision in PRECISIONS
    # Refused, as PyTorch's CPU kernels have no fused LSTM in fp16: "could not create a primitive descriptor".
    if not (pair[1] == "lstm" and "model.fused=true" in keys and precision == "fp16")
]
# Every run without clipping and by norm, and by one of the other rules in turn.
TURNS = itertools.cycle(sorted(set(CLIPS) - {"none", "norm"}))
CHOICES = [
    (*run, optimizer, clip)
    for run, optimizer in itertools.product(RUNS, OPTIMIZERS)
    for clip in ("none", "norm", next(TURNS))
]


class Pictures:
    """Stands in for torchvision's data sets, in small."""

    shape = (28, 28)

    def __init__(self, root, train, download):
        count = 40 if train else 10
        self.data = torch.randint(0, 256, (count, *self.shape), dtype=torch.uint8)
        self.targets = torch.arange(count) % 10


class ColourPictures(Pictures):
    shape = (32, 32, 3)


@pytest.fixture(scope="module", autouse=True)
def _torchvision():
    module = types.ModuleType("torchvision.datasets")
    module.MNIST, module.CIFAR10 = Pictures, ColourPictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        patch.setitem(sys.modules, "torchvision.datasets", module)
        yield


@pytest.fixture(scope="module")
def composed():
    """Resolved configurations, each composed once."""
    known = {}

    def get(*overrides):
        if overrides not in known:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose("train", overrides=["trainer.device=cpu", "trainer.batch_size=4", *overrides])
            known[overrides] = resolve(config)
        return known[overrides]

    return get


@pytest.fixture(scope="module")
def tasks(composed):
    return {name: build(composed(f"task={name}", *keys)["task"], "task") for name, keys in TASKS.items()}


def test_the_matrix_has_every_task_and_every_model_of_the_configuration():
    assert set(TASKS) == {path.stem for path in (CONF / "task").glob("*.yaml")}
    assert set(MODELS) == {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_a_pair_that_makes_no_sense_is_refused_in_one_sentence_before_training(composed, pair):
    task, model = pair
    settings = composed(f"task={task}", *TASKS[task], f"model={model}", *MODELS[model])
    with pytest.raises(ConfigurationError) as refusal:
        assemble(settings)
    assert str(refusal.value) == f"model: {REFUSED[pair]}{ADVICE}"


@pytest.mark.parametrize("together", REFUSED_TOGETHER)
def test_settings_that_break_together_are_refused_in_one_sentence_before_training(composed, together):
    with pytest.raises(ConfigurationError) as refusal:
        assemble(composed(*together.split()))
    assert str(refusal.value) == REFUSED_TOGETHER[together]


@pytest.mark.parametrize("together", ALLOWED_TOGETHER)
def test_no_setting_is_refused_that_trains(composed, tmp_path, together):
    settings = composed(*together.split(), "trainer.steps=2", "sink=[]")
    assert math.isfinite(run(settings, Job("here", (), tmp_path, group=None, shared=tmp_path)))


def test_compilation_without_a_compiler_is_refused_in_one_sentence(composed, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError) as refusal:
        assemble(composed("trainer.compile=true"))
    said = "trainer.compile must be false where there is no C++ compiler, such as no-such-compiler; got true."
    assert str(refusal.value) == said


def name_of(run):
    task, model, variant, *others = run
    return " ".join([task, model, *variant, *others])


@pytest.mark.parametrize(
    ("task", "model", "variant", "precision", "optimizer", "clip"), CHOICES, ids=map(name_of, CHOICES)
)
def test_what_makes_sense_trains_lawfully(composed, tasks, task, model, variant, optimizer, clip, precision):
    settings = composed(f"task={task}", *TASKS[task], f"model={model}", *MODELS[model], *variant)
    choices = composed(f"optimizer={optimizer}", f"clip={clip}")
    trainer = TrainerSettings(steps=2, batch_size=4, precision=precision)
    net = build(settings["model"], "model", tasks[task].inputs, tasks[task].outputs)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    stepping = build(choices["optimizer"], "optimizer", net.parameters())
    rule = build(choices["clip"], "clip") if choices["clip"] else None
    scaler, sink = make_scaler(precision, torch.device("cpu")), MemorySink()
    with Monitor(
        net, stepping, clip=rule, scaler=scaler, sinks=[sink], on_violation="record", on_diagnosis="record"
    ) as monitor:
        evaluation = train(net, tasks[task], stepping, monitor, trainer, clip=rule, scaler=scaler)
    assert all(math.isfinite(value) for value in evaluation.values())
    assert list(monitor.violations) == []
    first, last = sink.records
    assert first.recorded
    assert first.clip.rule == {"zscore": "zscore_reciprocal"}.get(clip, clip)
    assert len(first.clip.parts) == (clip == "group")
    assert all(layer.output is not None for layer in first.layers)
    if not last.skipped:
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert math.isfinite(last.clip.total_norm)
