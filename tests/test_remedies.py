"""Remedies: what is tried first, and that every override that is named is one that its app understands."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from diagnostics.cli import assemble
from diagnostics.configs import CONF, resolve
from diagnostics.diagnosis.conditions import CONDITIONS
from diagnostics.diagnosis.remedies import prescribe
from diagnostics.records import Diagnosis, RunInfo

RUNS = {
    "mlp": (),
    "cnn": ("model=cnn",),
    "rnn": ("model=rnn", "task=temporal_order"),
    "gru": ("model=gru", "task=temporal_order"),
    "lstm": ("model=lstm", "task=temporal_order"),
    "gpt": ("model=gpt", "task=pysource", "model.norm_position=post"),
    "seed_chain": ("model=sigmoid_chain", "task=seed_chain"),
}
EVIDENCE = {"norm_p90": 3.14159, "born": 0.0, "forward": 1.0}


def settings(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("train", overrides=["trainer.device=cpu", *overrides]))


def remedies(condition, *overrides, config=None, **evidence):
    diagnosis = Diagnosis(condition, 2, 0, 0, {**EVIDENCE, **evidence}, "")
    run = RunInfo("x", config=settings(*overrides) if config is None else config)
    return prescribe(diagnosis, run).remedies


def overrides_of(found):
    return [remedy.override for remedy in found if remedy.override]


MORE = {"plain": ("optimizer=sgd", "clip=none"), "half": ("trainer.precision=fp16", "optimizer=adam")}


@pytest.mark.parametrize(("run", "options"), [*((run, ()) for run in RUNS), *(("mlp", more) for more in MORE.values())])
def test_every_override_composes_and_builds_and_changes_something(run, options):
    before = settings(*RUNS[run], *options)
    offered = {
        override for condition in CONDITIONS for override in overrides_of(remedies(condition, config=before, born=0.0))
    }
    assert offered
    for override in offered:
        after = settings(*RUNS[run], *options, *override.split())
        assert after != before, override
        assemble(after)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_has_a_remedy_in_words_for_any_model(condition):
    foreign = remedies(condition, config={"model": {"activation": "swish"}, "seed": 3})
    assert foreign
    assert overrides_of(foreign) == []
    assert prescribe(Diagnosis(condition, 2, 0, 0, {}, ""), None).remedies


def test_somebody_else_s_app_gets_overrides_of_the_numbers_that_it_has():
    config = {"optim": {"lr": 0.5}, "diagnostics": {"_target_": "diagnostics.jobs.make_monitor", "clip": {}}}
    assert overrides_of(remedies("nonfinite", config=config)) == ["optim.lr=0.05", "diagnostics/clip=norm"]
    config["diagnostics"]["clip"] = {"max_norm": 1.0}
    assert overrides_of(remedies("clipped_always", config=config)) == ["diagnostics.clip.max_norm=3.1"]


def test_what_the_run_already_follows_is_left_out():
    assert overrides_of(remedies("vanishing"))[0] == "model.norm=layer model.residual=true"
    assert overrides_of(remedies("vanishing", "model.norm=batch"))[0] == "model.residual=true"
    texts = [str(remedy) for remedy in remedies("vanishing", "model.residual=true")]
    assert not any("residual=" in text for text in texts)
    assert any(text.endswith("(model.norm=batch)") for text in texts)
    assert overrides_of(remedies("vanishing", "model.init=kaiming"))[0] == (
        "model.norm=layer model.residual=true model.init=default"
    )
    assert not any(
        "ReLU" in remedy.text for remedy in remedies("vanishing", "model.init=kaiming")
    )  # it is that already
    assert "model.activation=relu" in overrides_of(remedies("vanishing", "model.init=kaiming", "model.activation=tanh"))
    assert not any("AdamW" in remedy.text for remedy in remedies("vanishing", "optimizer=adam"))
    assert any("AdamW" in remedy.text for remedy in remedies("vanishing", "optimizer=sgd"))


@pytest.mark.parametrize(
    ("condition", "overrides", "first"),
    [
        (
            "vanishing",
            ("model.activation=sigmoid", "model.depth=12", "optimizer=sgd"),
            "model.norm=layer model.residual=true",
        ),
        ("vanishing", ("model=cnn", "model.depth=15"), "model.norm=batch model.residual=true"),
        ("vanishing", ("model=rnn", "task=temporal_order"), "model=gru model.recurrent_init=orthogonal"),
        ("vanishing", ("model=gru", "task=temporal_order"), "model=lstm"),
        ("vanishing", ("model=rnn", "task=temporal_order", "model.recurrent_scale=0.5"), None),
        ("vanishing", ("model=lstm", "task=temporal_order"), "model.forget_bias=3.0"),
        ("exploding", ("model.norm=batch", "model.depth=60"), "model.residual=true"),
        ("exploding", ("model=rnn", "task=temporal_order", "model.recurrent_scale=2.0"), None),
        ("nonfinite", ("optimizer=sgd", "optimizer.lr=100"), "optimizer.lr=0.03"),
        ("nonfinite", ("optimizer=sgd", "optimizer.lr=10", "clip=none"), "optimizer.lr=0.03 clip=norm"),
        (
            "nonfinite",
            ("optimizer=sgd", "model.residual=true", "model.init=kaiming"),
            "model.norm=layer model.init=default optimizer.lr=0.03",
        ),
        ("nonfinite", ("trainer.precision=fp16",), "trainer.precision=bf16"),
        ("underflow", ("trainer.precision=fp16",), "trainer.precision=bf16"),
        ("clipped_always", (), "clip.max_norm=3.1"),
        ("stalled_layers", ("optimizer=sgd",), "optimizer=adamw optimizer.lr=0.001"),
        ("spike", ("clip=none",), "clip=norm"),
        ("spike", (), "trainer.warmup_steps=60"),
        ("dead", ("optimizer=sgd",), "optimizer.lr=0.01"),
    ],
)
def test_what_is_tried_first(condition, overrides, first):
    found = overrides_of(remedies(condition, *overrides))[0]
    assert found == first if first else found.startswith("model.recurrent_init=orthogonal")


def test_a_born_dead_net_is_not_told_to_slow_down():
    assert overrides_of(remedies("dead", born=1.0))[0] == "model.norm=layer model.residual=true"


def test_an_override_is_one_word_or_several_that_hydra_parses():
    parser = OverridesParser.create()
    for condition in CONDITIONS:
        for override in overrides_of(remedies(condition, "optimizer=sgd", "clip=none")):
            parser.parse_overrides(override.split())
