"""What to try, per condition and per what a run already is: words, and the override that does it. No torch.

The order is that of the effect measured by outcome (the accuracy that is reached), not by verdict. An override is named
where the run's configuration shows that its app understands it; somebody else's model gets words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diagnostics.records import Diagnosis, Remedy, RunInfo

OURS = "diagnostics.trainers."
_LEARNING_RATES = ("optimizer.lr", "optim.lr", "optimizer.learning_rate", "learning_rate", "lr")
_MAX_NORMS = ("clip.max_norm", "diagnostics.clip.max_norm")
_RECURRENT = ("rnn", "gru", "lstm")
_USUAL_RATES = {"sgd": 0.03, "adam": 0.001, "adamw": 0.001}
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is, as far as its configuration tells.

    Attributes:
        config: The resolved configuration; empty if it is not known.
    """

    config: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The class of one of our trainers' models in lower case, ``""`` for any other model."""
        target = str(self.get("model._target_", ""))
        return target.rsplit(".", maxsplit=1)[-1].lower() if target.startswith(OURS) else ""

    @property
    def optimizer(self) -> str:
        """The optimizer's class in lower case, as far as it is known."""
        return str(self.get("optimizer._target_", "")).rsplit(".", maxsplit=1)[-1].lower()

    def get(self, key: str, default: Any = None) -> Any:
        """What stands under a dotted key."""
        node: Any = self.config
        for part in key.replace("/", ".").split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def first_number(self, *keys: str) -> str | None:
        """The first of several keys under which the configuration has a number."""
        return next((key for key in keys if isinstance(self.get(key), (int, float))), None)

    def follows(self, override: str) -> bool:
        """Whether the run already does what an override says: a value, or a group's option by its class."""
        key, _, value = override.partition("=")
        current = self.get(key, _ABSENT)
        if isinstance(current, Mapping):
            current = str(current.get("_target_", "")).rsplit(".", maxsplit=1)[-1]
        return ("null" if current is None else str(current).lower()) == value.lower()

    def knows(self, override: str) -> bool:
        """Whether the configuration has an override's key."""
        return self.get(override.partition("=")[0], _ABSENT) is not _ABSENT


def prescribe(diagnosis: Diagnosis, run: RunInfo | None) -> Diagnosis:
    """The diagnosis with remedies that fit the run, in order of expected effect.

    An override is named only where the run's configuration has its key and its model takes the value. What the run
    already follows is left out.

    Args:
        diagnosis: What was found.
        run: Where it was found; None for words only.
    """
    setup = Setup({} if run is None else run.config)
    offered = [_offer(setup, text, overrides) for text, overrides in _tries(diagnosis, setup)]
    remedies: dict[str, Remedy] = {}
    for remedy in offered:
        if remedy is not None:
            remedies.setdefault(remedy.override or remedy.text, remedy)
    return replace(diagnosis, remedies=tuple(remedies.values()))


Try = tuple[str, str]
"""Words, and overrides with blanks between; none where words must do."""


def _offer(setup: Setup, text: str, overrides: str) -> Remedy | None:
    needed = [one for one in overrides.split() if not setup.follows(one)]
    if any(one.startswith("model=") for one in needed):  # another model does not follow what this one does
        needed = overrides.split()
    if overrides and not needed:
        return None
    if overrides and setup.config and all(setup.knows(one) for one in needed):
        return Remedy(text, " ".join(needed))
    return Remedy(text)


def _tries(diagnosis: Diagnosis, setup: Setup) -> Iterator[Try]:
    condition, evidence = diagnosis.condition, diagnosis.evidence
    if condition in ("vanishing", "exploding"):
        yield from _slope(condition, setup)
    elif condition == "stalled_layers":
        yield from _adaptive(setup)
        yield from _slope("vanishing", setup)
    elif condition == "dead":
        yield from _dead(setup, born=bool(evidence.get("born", 0.0)))
    elif condition == "nonfinite":
        yield from _nonfinite(setup, forward=evidence.get("forward"))
    elif condition == "underflow":
        yield "use bf16, which has fp32's range", "trainer.precision=bf16" if setup.model else ""
        yield "multiply the loss by a torch.amp.GradScaler's scale", ""
    elif condition == "denormal":
        yield "let the CPU take them for zero: torch.set_flush_denormal(True)", ""
        yield from _slope("vanishing", setup)
    elif condition == "clipped_always":
        yield "clip only the steps that stand out: at the ninth decile of this run's own norms", _limit(setup, evidence)
    elif condition == "spike":
        yield from _clip(setup)
        yield from _warm_up(setup)
        yield _slower(setup)
    elif condition == "broken_at":
        yield "look at the lines of forward() between these two layers", ""


def _slope(condition: str, setup: Setup) -> Iterator[Try]:
    if setup.model in _RECURRENT:
        yield from _recurrent(condition, setup)
    elif setup.model == "gpt":
        yield "normalise before attention and feed-forward network, not after", "model.norm_position=pre"
        yield from _warm_up(setup)
        yield _slower(setup)
    else:
        yield from _structure(setup)
        yield (
            "use ReLU with the initialisation that keeps its gradient's variance (Kaiming)",
            _own(setup, "model.activation=relu model.init=kaiming"),
        )
        if not setup.model:
            yield "in a recurrent network, use gates (LSTM, GRU) and orthogonal recurrent weights", ""
        yield from _adaptive(setup) if condition == "vanishing" else _clip(setup)


def _recurrent(condition: str, setup: Setup) -> Iterator[Try]:
    """What carries a gradient through time.

    Weights that are no isometry in the beginning, or a ReLU, are what most often makes a plain recurrence fade or grow,
    and clipping is what lets it survive the rest. One that begins well and fades all the same needs gates.
    """
    clip = _clipped(setup)
    begun_badly = setup.get("model.recurrent_scale") not in (None, 1.0) or setup.get("model.activation") == "relu"
    activation = " model.activation=tanh" if setup.get("model.activation") == "relu" else ""
    begin = (
        "begin with orthogonal recurrent weights, and clip the gradient norm",
        f"model.recurrent_init=orthogonal model.recurrent_scale=1.0{activation}{clip}",
    )
    if condition == "exploding" or begun_badly:
        yield begin
    if setup.model == "lstm":
        yield "let the forget gate keep more in the beginning", "model.forget_bias=3.0"
    elif setup.model == "rnn":
        yield (
            "use gates that can keep the state (GRU), with orthogonal recurrent weights",
            f"model=gru model.recurrent_init=orthogonal{clip}",
        )
        yield "use gates that can keep the state (LSTM)", f"model=lstm{clip}"
    else:
        yield "use gates with a state of their own: an LSTM", f"model=lstm{clip}"
    yield begin
    if condition == "vanishing":
        yield from _adaptive(setup)


def _dead(setup: Setup, *, born: bool) -> Iterator[Try]:
    if not born:
        yield _slower(setup)
    yield from _structure(setup)
    yield "use an activation without a flat half (GELU, leaky ReLU)", _own(setup, "model.activation=gelu")
    yield "initialise for the activation (Kaiming), with wider layers", _own(setup, "model.init=kaiming")


def _nonfinite(setup: Setup, *, forward: float | None) -> Iterator[Try]:
    if setup.get("trainer.precision") == "fp16" and setup.model:
        yield "use bf16, which has fp32's range", "trainer.precision=bf16"
    slower, rate = _slower(setup)
    usual = _USUAL_RATES.get(setup.optimizer, math.inf)
    too_fast = setup.get("optimizer.lr", 0.0) > usual if setup.model else False
    if too_fast:  # the usual rate, not one still lower, for a net that has learnt nothing yet
        rate = f"optimizer.lr={usual}"
    besides = f" {rate}" if too_fast else ""
    if setup.model in _RECURRENT:
        yield from ((text, f"{overrides}{besides}") for text, overrides in _recurrent("exploding", setup))
    elif _grows_forward(setup):
        yield "normalise between the layers, with PyTorch's own initialisation", f"{_sound(setup)}{besides}"
    if setup.model:
        yield f"{slower}, and clip the gradient norm", f"{rate}{_clipped(setup)}"
    yield slower, rate
    yield from _clip(setup)
    if forward != 0.0:
        yield "look at the input and the loss for division by zero, log of zero and overflow", ""
    else:
        yield "look for sqrt, norm, log or a division whose derivative is infinite at zero", ""


def _structure(setup: Setup) -> Iterator[Try]:
    """What carries a gradient through any depth: normalisation and residual connections, together.

    With a wider initialisation residual connections alone double it at every layer: forty residual ReLU layers reached
    0.97 of the digits with PyTorch's own and 0.24 with Kaiming's. In a convolutional network they do not pass the
    blocks that change the resolution.
    """
    yield (
        "add residual connections and normalise between the layers, with PyTorch's own initialisation",
        _own(setup, _sound(setup)),
    )
    yield (
        "add residual connections, with PyTorch's own initialisation",
        _own(setup, "model.residual=true model.init=default model.gain=null"),
    )
    yield "normalise between the layers", _own(setup, "model.norm=batch")


def _sound(setup: Setup) -> str:
    """Normalisation, which a model that has one keeps, residual connections, and PyTorch's own initialisation."""
    norm = (
        ""
        if setup.get("model.norm", "none") != "none"
        else f"model.norm={'batch' if setup.model == 'cnn' else 'layer'} "
    )
    gain = " model.gain=null" if setup.get("model.gain", _ABSENT) is not _ABSENT else ""
    return f"{norm}model.residual=true model.init=default{gain}"


def _grows_forward(setup: Setup) -> bool:
    """Whether a net of ours multiplies what passes through it: residual connections or a gain, and no normalisation."""
    grows = bool(setup.get("model.residual")) or setup.get("model.gain") is not None
    return setup.model in ("mlp", "cnn") and grows and setup.get("model.norm", "none") == "none"


def _own(setup: Setup, overrides: str) -> str:
    """Overrides of those of our models whose layers can be chosen; none for another model."""
    return overrides if setup.model in ("mlp", "cnn") else ""


def _adaptive(setup: Setup) -> Iterator[Try]:
    if setup.optimizer not in ("adam", "adamw"):
        overrides = f"optimizer=adamw optimizer.lr={_USUAL_RATES['adamw']}" if setup.model else ""
        yield "use an optimizer that divides by the gradient's own size, such as AdamW", overrides


def _slower(setup: Setup) -> Try:
    key = setup.first_number(*_LEARNING_RATES)
    if key is None:
        return "lower the learning rate", ""
    rate = min(setup.get(key) / 10, _USUAL_RATES.get(setup.optimizer, math.inf))
    return "lower the learning rate", f"{key}={rate:.3g}"


def _warm_up(setup: Setup) -> Iterator[Try]:
    if not setup.get("trainer.warmup_steps"):
        steps = setup.get("trainer.steps")
        overrides = f"trainer.warmup_steps={max(1, steps // 10)}" if setup.model and steps else ""
        yield "let the learning rate rise over the first steps", overrides


def _clip(setup: Setup) -> Iterator[Try]:
    if setup.first_number(*_MAX_NORMS) is None:
        foreign = setup.get("diagnostics._target_") == "diagnostics.jobs.make_monitor"
        overrides = "diagnostics/clip=norm" if foreign else "clip=norm" if setup.model else ""
        yield "clip the gradient norm, which bounds the step", overrides


def _clipped(setup: Setup) -> str:
    """The override that clips, as another one's companion; nothing where the run clips already."""
    return " clip=norm" if setup.model and setup.first_number(*_MAX_NORMS) is None else ""


def _limit(setup: Setup, evidence: Mapping[str, float]) -> str:
    key, norm = setup.first_number(*_MAX_NORMS), evidence.get("norm_p90", math.nan)
    return f"{key}={norm:.2g}" if key and 0 < norm < math.inf else ""
