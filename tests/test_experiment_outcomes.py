"""What the experiments under conf/experiment promise: slopes at the first step, and what becomes of the runs."""

import pytest

from diagnostics import MemorySink, Monitor
from diagnostics.cli import assemble
from diagnostics.configs import compose_settings
from diagnostics.records import SEVERE
from diagnostics.trainers import loop


def run(experiment, *overrides):
    """The final evaluation, the records and the verdict of one job of an experiment."""
    words = [f"experiment={experiment}", "trainer.device=cpu", "trainer.evaluate_every=1000", *overrides]
    parts, sink = assemble(compose_settings(words)), MemorySink()
    how = {**parts.monitoring, "on_violation": "record", "on_diagnosis": "record"}
    with Monitor(parts.model, parts.optimizer, sinks=[sink], **how) as monitor:
        evaluation = loop.train(
            parts.model, parts.task, parts.optimizer, monitor, parts.trainer, clip=parts.clip, scaler=parts.scaler
        )
    return evaluation, sink.records, monitor.verdict()


@pytest.mark.parametrize(
    ("experiment", "overrides", "slope", "tolerance"),
    [
        ("activations_over_depth", ["model.activation=sigmoid", "model.depth=8"], -0.850, 0.05),
        ("activations_over_depth", ["model.activation=relu", "model.depth=16"], -0.389, 0.05),
        ("xavier_and_he", ["model.init=xavier"], -0.1505, 0.05),
        ("xavier_and_he", ["model.init=kaiming"], 0.0, 0.05),
        ("chaotic_tanh", ["model.gain=0.7"], -0.155, 0.03),  # log10 of the gain while units are small
        ("chaotic_tanh", ["model.gain=1.0"], -0.01, 0.03),
        ("chaotic_tanh", ["model.gain=3.0"], 0.13, 0.04),
        ("rnn_and_lstm", ["model=rnn"], -0.24, 0.03),
        ("rnn_and_lstm", ["model=lstm"], -0.07, 0.05),
    ],
)
def test_the_first_gradient_falls_or_grows_as_the_experiment_says(experiment, overrides, slope, tolerance):
    _, (first, *_), _ = run(experiment, *overrides, "trainer.steps=1")
    assert first.fit.slope == pytest.approx(slope, abs=tolerance)


@pytest.mark.parametrize("clip", ["none", "norm"])
def test_only_clipping_lets_an_exploding_recurrent_network_learn(clip):
    accuracy = run("clipping_rescues", f"clip={clip}", "trainer.steps=200")[0]["eval/accuracy"]
    assert accuracy > 0.95 if clip == "norm" else accuracy < 0.45


def test_units_that_died_leave_a_gradient_of_exactly_zero():
    evaluation, records, verdict = run("dead_relu", "trainer.steps=50")
    *hidden, head = (layer.output.rms for layer in records[49].layers)
    assert set(hidden) == {0.0}
    assert head > 0
    assert evaluation["eval/accuracy"] < 0.2
    assert (verdict.condition, verdict.severity) == ("dead", SEVERE)


def test_the_norm_tells_of_a_loss_spike_before_it_comes():
    _, records, _ = run("loss_spike", "clip=none", "trainer.steps=45")
    losses, norms = ([value(record) for record in records] for value in (lambda r: r.loss, lambda r: r.clip.total_norm))
    peak = losses.index(max(losses))
    assert losses[peak] > 10 > 0.7 > losses[peak - 3]
    assert all(
        after > 1.5 * before for before, after in zip(norms[peak - 4 : peak], norms[peak - 3 : peak], strict=False)
    )
    _, clipped, _ = run("loss_spike", "clip=norm", "trainer.steps=45")
    assert max(record.loss for record in clipped) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "overrides", "least", "most"),
    [
        *(("activations_over_depth", ["model.activation=sigmoid", f"model.depth={depth}"], 0, 0.2) for depth in (4, 8)),
        ("activations_over_depth", ["model.activation=sigmoid", "model.depth=2"], 0.9, 1),
        *(
            ("activations_over_depth", ["model.activation=relu", f"model.depth={depth}"], 0.75, 1)
            for depth in (2, 4, 8)
        ),
        ("activations_over_depth", ["model.activation=relu", "model.depth=16"], 0, 0.2),
        ("xavier_and_he", ["model.init=xavier"], 0, 0.3),
        ("xavier_and_he", ["model.init=kaiming"], 0.85, 1),
        ("chaotic_tanh", ["model.gain=0.7"], 0, 0.2),
        ("chaotic_tanh", ["model.gain=1.0"], 0.9, 1),
        ("chaotic_tanh", ["model.gain=3.0"], 0, 0.3),
        ("rnn_and_lstm", ["model=rnn"], 0, 0.5),
        ("rnn_and_lstm", ["model=lstm"], 0.95, 1),
        *(("dead_relu", [f"trainer.seed={seed}"], 0, 0.2) for seed in range(3)),
        ("loss_spike", ["clip=norm"], 0.9, 1),
    ],
)
def test_runs_come_to_what_the_experiment_says(experiment, overrides, least, most):
    assert least <= run(experiment, *overrides)[0]["eval/accuracy"] <= most


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "successes"), [("none", {0, 1}), ("norm", {5})])
def test_clipping_raises_the_rate_of_success(clip, successes):
    scores = [run("clipping_rescues", f"clip={clip}", f"trainer.seed={seed}")[0]["eval/accuracy"] for seed in range(5)]
    assert sum(score > 0.95 for score in scores) in successes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position", "warmup_steps", "seed", "learns"),
    [("pre", 0, 0, True), ("pre", 0, 2, True), ("post", 0, 0, False), ("post", 0, 2, False), ("post", 100, 0, True)],
)
def test_a_post_norm_transformer_needs_a_warm_up(position, warmup_steps, seed, learns):
    chosen = [f"model.norm_position={position}", f"trainer.warmup_steps={warmup_steps}", f"trainer.seed={seed}"]
    assert (run("transformer_warmup", *chosen)[0]["eval/loss"] < 3.1) == learns
