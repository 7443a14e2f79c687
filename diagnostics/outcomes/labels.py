"""How well diagnoses agree with what becomes of runs: runs are labelled by their outcome alone, then judged.

A run is *sick* if it ends below 90 % of what a shallow sound twin scores: same task, optimizer, steps, batches and
seed, but few layers, a good initialisation, fp32 and the usual clipping. For a recurrent model, whose depth is time,
the twin's sequences are short. The twin has the run's learning rate or the optimizer's default one, whichever scores
better, so that a wrong rate makes a run sick and not its twin.

The score is the held-out accuracy after the last step. Where a loss is what counts (``adding``, ``pysource``), it is
the share of chance's loss that is gone: 1 - loss / chance.

Why a run is sick is found by counterfactuals, never by a diagnosis:

- ``nonfinite``: its last loss is NaN or infinite, or more than half of its steps were skipped for such gradients;
- ``gradient``: it scores 90 % of its twin with nothing but its gradient's path repaired (residual connections and
  normalisation, an initialisation that preserves the gradient, gates in place of a plain recurrence, fp32, or clipping
  at norm 1), at the same depth, with the same optimizer and rate and as many steps;
- ``other``: it does not. The rate is wrong, the steps are too few, or the task is too hard for the model.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from diagnostics.cli import assemble
from diagnostics.configs import compose_settings
from diagnostics.monitor import Monitor
from diagnostics.sinks import Sink
from diagnostics.sinks.memory import MemorySink
from diagnostics.sinks.runlog import RunLogSink
from diagnostics.trainers import loop
from diagnostics.trainers.provenance import describe_run

ENOUGH = 0.9  # share of the twin's score from which a run is well
CHANCE = {"adding": 1 / 24, "pysource": math.log(256)}  # the loss of always saying the same, where a loss is the score
STALLED = 0.5  # share of skipped steps from which a run is called nonfinite by its outcome
RECURRENT = ("rnn", "gru", "lstm")
SOUND_CLIP = "clip=norm clip.max_norm=1.0"
GATED = "model=gru model.recurrent_init=orthogonal"
# What a pass needs so that its gradient neither fades nor grows, tried in this order.
REPAIRS: Mapping[str, tuple[str, ...]] = {
    "mlp": (
        "model.norm=layer model.residual=true model.init=default model.gain=null",
        "model.init=kaiming model.gain=null",
        "model.activation=tanh model.init=orthogonal model.gain=1.0",
    ),
    "cnn": ("model.norm=batch model.residual=true model.init=default", "model.init=kaiming"),
    "rnn": (
        SOUND_CLIP,
        f"model.recurrent_init=orthogonal model.recurrent_scale=1.0 model.activation=tanh {SOUND_CLIP}",
        f"{GATED} {SOUND_CLIP}",
        f"model=lstm {SOUND_CLIP}",
    ),
    "gru": (SOUND_CLIP, f"model.recurrent_init=orthogonal model.recurrent_scale=1.0 {SOUND_CLIP}"),
    "lstm": (SOUND_CLIP, f"model.recurrent_init=orthogonal model.recurrent_scale=1.0 {SOUND_CLIP}"),
    "gpt": ("model.norm_position=pre", SOUND_CLIP),
}

Row = TypeVar("Row")


@dataclass(frozen=True)
class Case:
    """A configuration to train.

    Attributes:
        kind: What it was written to show; no part of any label.
        overrides: Of the configuration, without a seed.
    """

    kind: str
    overrides: str


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        overrides: Of the configuration.
        seed: Of the trainer.
        score: After the last step; 0 for a loss that is not finite.
        best: The best of all evaluations.
        skipped: Share of steps whose gradients were not finite.
        finite: Whether the last evaluation's loss was.
    """

    overrides: str
    seed: int
    score: float
    best: float
    skipped: float
    finite: bool


@dataclass(frozen=True)
class Label:
    """A run, and what became of it.

    Attributes:
        kind: What the configuration was written to show; no part of the label.
        overrides: Of the configuration.
        seed: Of the trainer.
        score: The run's.
        best: The best score of all its evaluations.
        twin_score: The shallow sound twin's.
        label: ``well`` or ``sick``.
        reason: Of a sick run: ``nonfinite``, ``gradient`` or ``other``.
        healed_by: The repair that found the reason ``gradient``.
        twin: The twin's overrides.
    """

    kind: str
    overrides: str
    seed: int
    score: float
    best: float
    twin_score: float
    label: str
    reason: str
    healed_by: str
    twin: str


def merge(overrides: str, changes: str) -> str:
    """Overrides with changes applied; another option of a group takes that group's own keys away.

    Example:
        >>> merge("model=mlp model.depth=30 optimizer=sgd", "model=cnn optimizer.lr=1.0")
        'model=cnn optimizer=sgd optimizer.lr=1.0'
    """
    merged = dict(word.split("=", maxsplit=1) for word in overrides.split())
    for word in changes.split():
        key, value = word.split("=", maxsplit=1)
        if "." not in key and merged.get(key) != value:
            merged = {known: kept for known, kept in merged.items() if not known.startswith(f"{key}.")}
        merged[key] = value
    return " ".join(f"{key}={value}" for key, value in merged.items())


def twins(overrides: str) -> tuple[str, ...]:
    """The shallow sound configurations that a run is measured by: with its learning rate, and with the default one.

    Example:
        >>> twins("task=digits model=mlp model.depth=30 optimizer=sgd clip=none")
        ('task=digits model=mlp optimizer=sgd clip=norm model.depth=2 model.init=kaiming',)
    """
    keys = dict(word.split("=", maxsplit=1) for word in overrides.split())
    kept = {
        key: value
        for key, value in keys.items()
        if key in {"model.width", "model.heads", "trainer.steps", "trainer.batch_size"}
        or not key.startswith(("model.", "trainer.", "clip."))
    }
    family = "rnn" if keys["model"] in RECURRENT and keys["task"] != "digits" else keys["model"]
    sound = {
        "mlp": "model.depth=2 model.init=kaiming",
        "cnn": "model.depth=2 model.norm=batch",
        "gpt": "model.depth=1",
        "rnn": f"{GATED} model.width={keys.get('model.width')}",
    }.get(family, "model=mlp model.depth=2 model.width=64 model.init=kaiming")
    if keys["task"] in {"adding", "temporal_order"}:
        sound += " task.lag=4"
    own = merge(" ".join(f"{key}={value}" for key, value in kept.items()), f"{sound} clip=norm")
    default = " ".join(word for word in own.split() if not word.startswith("optimizer.lr="))
    return tuple(dict.fromkeys((own, default)))


def train(overrides: str, seed: int, log: Path | None = None) -> Result:
    """Trains a configuration and says what it came to.

    Args:
        overrides: As on the command line of ``scripts/train.py``.
        seed: Of the trainer.
        log: Where to write the run log; without one nothing is measured by depth.
    """
    words = (*overrides.split(), f"trainer.seed={seed}", "trainer.device=cpu", "trainer.evaluate_every=50")
    settings = compose_settings(words)
    parts = assemble(settings)
    memory = MemorySink()
    info = describe_run(
        name=overrides,
        directory=Path(),
        command=f"python scripts/train.py {' '.join(words)}",
        overrides=words,
        config=settings,
        seed=seed,
        device="cpu",
    )
    quiet = {"on_violation": "record", "on_diagnosis": "record", "run": info}
    how = {**parts.monitoring, **quiet, **({} if log else {"every": 0})}
    sinks: list[Sink] = [memory, RunLogSink(log)] if log else [memory]
    with Monitor(parts.model, parts.optimizer, sinks=sinks, **how) as monitor:
        last = loop.train(
            parts.model, parts.task, parts.optimizer, monitor, parts.trainer, clip=parts.clip, scaler=parts.scaler
        )
    task = parts.task.name
    scores = [score(task, record.metrics) for record in memory.records if record.metrics]
    skipped = sum(record.skipped for record in memory.records) / len(memory.records)
    finite = math.isfinite(last["eval/loss"])
    return Result(overrides, seed, score(task, last), max(scores), skipped, finite)


def score(task: str, evaluation: Mapping[str, float]) -> float:
    """Accuracy, or the share of chance's loss that is gone; 0 where the loss is not finite.

    Example:
        >>> score("digits", {"eval/loss": 0.1, "eval/accuracy": 0.9})
        0.9
        >>> score("adding", {"eval/loss": 1 / 240, "eval/accuracy": 0.5})
        0.9
    """
    if not math.isfinite(evaluation["eval/loss"]):
        return 0.0
    return 1 - evaluation["eval/loss"] / CHANCE[task] if task in CHANCE else evaluation["eval/accuracy"]


class Runs:
    """Trains each configuration once, keeps what it came to in a file, and can be interrupted and continued.

    Args:
        folder: For ``runs.csv`` and the run logs; created.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = folder / "runs.csv"
        known = read_table(self._file, Result) if self._file.exists() else []
        self._known = {(one.overrides, one.seed): one for one in known}

    def log(self, overrides: str, seed: int) -> Path:
        """Where the run log of a run is or will be."""
        return self._folder / f"{hashlib.sha256(f'{overrides} {seed}'.encode()).hexdigest()[:12]}.jsonl"

    def result(self, overrides: str, seed: int, *, logged: bool = False) -> Result:
        """The result of a run, which is trained where it or its log is missing."""
        log = self.log(overrides, seed)
        key = (overrides, seed)
        if key in self._known and (log.exists() or not logged):
            return self._known[key]
        log.unlink(missing_ok=True)  # of a run that was interrupted
        self._known[key] = train(overrides, seed, log if logged else None)
        write_table(self._file, self._known.values())
        return self._known[key]


def label(runs: Runs, case: Case, seed: int) -> Label:
    """Labels a run by its outcome; looks at no diagnosis.

    Args:
        runs: Trains what is not known yet.
        case: The configuration.
        seed: Of the trainer.
    """
    overrides = case.overrides
    result = runs.result(overrides, seed, logged=True)
    twin = max((runs.result(twin, seed) for twin in twins(overrides)), key=lambda twin: twin.score)
    sick = result.score < ENOUGH * twin.score
    reason, healed_by = _reason(runs, result, twin.score) if sick else ("", "")
    scores = round(result.score, 4), round(result.best, 4), round(twin.score, 4)
    return Label(case.kind, overrides, seed, *scores, "sick" if sick else "well", reason, healed_by, twin.overrides)


def _reason(runs: Runs, result: Result, twin_score: float) -> tuple[str, str]:
    if not result.finite or result.skipped > STALLED:
        return "nonfinite", ""
    model = dict(word.split("=", maxsplit=1) for word in result.overrides.split())["model"]
    precision = "trainer.precision=fp32" if "trainer.precision" in result.overrides else ""
    for repair in REPAIRS[model]:
        repaired = merge(result.overrides, f"{repair} {precision}")
        if runs.result(repaired, result.seed).score >= ENOUGH * twin_score:
            return "gradient", repair
    return "other", ""


def read_table(file: Path, row: type[Row]) -> list[Row]:
    """The rows of a CSV file as dataclasses.

    Args:
        file: As :func:`write_table` wrote it.
        row: The dataclass, of text, numbers and booleans.
    """
    types = get_type_hints(row)
    with file.open(newline="", encoding="utf-8") as lines:
        return [row(**{key: _parse(text, types[key]) for key, text in line.items()}) for line in csv.DictReader(lines)]


def _parse(text: str, kind: type) -> Any:
    return text == "True" if kind is bool else kind(text)


def write_table(file: Path, rows: Iterable[Any]) -> None:
    """Writes dataclasses as a CSV file."""
    plain = [asdict(row) for row in rows]
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(plain[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
