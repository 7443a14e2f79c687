"""The words of the project: frozen records that every other module speaks in.

Standard library only. A record holds plain numbers, never a tensor. Steps and depths count from 0, norms are in the
units of the gradient (loss per unit of the parameter or activation), and a field that was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostics import markup
from diagnostics.columns import Column, Layers
from diagnostics.layers import DepthFit, GradientStats, Layer, LayerRecord, steps_back

__all__ = [
    "NONFINITE",
    "NORM_QUANTILES",
    "NOTICE",
    "RELATIVE_DEPTHS",
    "SEVERE",
    "SEVERITY_NAMES",
    "SOLE_OPTIMIZER",
    "WARNING",
    "ClipRecord",
    "Column",
    "ContractError",
    "DepthFit",
    "Diagnosis",
    "DiagnosisError",
    "DiagnosticsWarning",
    "GradientStats",
    "Layer",
    "LayerRecord",
    "Layers",
    "NonFiniteGradientError",
    "Remedy",
    "RunEnd",
    "RunInfo",
    "StepRecord",
    "Verdict",
    "Violation",
    "steps_back",
]

NOTICE, WARNING, SEVERE, NONFINITE = 1, 2, 3, 4
SEVERITY_NAMES = ("none", "notice", "warning", "severe", "non-finite")
SOLE_OPTIMIZER = "optimizer"
RELATIVE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NORM_QUANTILES = (0.5, 0.9, 0.99)


class DiagnosticsWarning(UserWarning):
    """Everything that the project warns about: a broken rule of the loop, a diagnosis, a sink that was switched off."""


class ContractError(RuntimeError):
    """A rule of the loop was broken and the Monitor was told ``on_violation="raise"``."""


class DiagnosisError(RuntimeError):
    """A diagnosis at warning or above was confirmed and the Monitor was told ``on_diagnosis="raise"``."""


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity and the caller asked for an error."""


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What the clip rule saw and did at one step.

    Attributes:
        rule: ``"norm"``, ``"value"``, ``"quantile"``, ``"zscore_reciprocal"`` (or another target), ``"group"``, or
            ``"none"`` where no rule was given.
        norm_type: The p of the norm; positive, possibly ``inf``.
        max_norm: The norm that gradients above the threshold are scaled down to; ``inf`` while a rule is warming up,
            None for a rule that does not scale all gradients by one coefficient, and without a rule.
        total_norm: p-norm of all gradients before clipping.
        clip_coef: ``max_norm / (total_norm + 1e-6)``, not clamped; without the epsilon for a rule whose threshold
            adapts; ``total_norm_after / total_norm`` for one by value or by group; None without a rule.
        applied: Whether gradients were changed, which is ``clip_coef < 1`` where all were multiplied by it.
        total_norm_after: p-norm of the gradients that the optimizer saw.
        threshold: The norm above which this step would be clipped; by value, the magnitude of an element.
        shares: One number per layer (per parameter where there are no layers): its part of ``total_norm ** p``; for
            ``p = inf`` one or zero. They sum to 1 unless the norm is zero or not finite.
        parts: One ClipRecord per group for rules that clip groups on their own; their shares are by parameter.
        clip_fraction: Share of the steps so far, this one included, whose gradients were clipped; None outside a run.
        norm_quantiles: Median, 0.9- and 0.99-quantile of total_norm over the newest thousand steps, this one included,
            that had a positive and finite one (:data:`NORM_QUANTILES`); empty outside a run.
        group: Name of the group that a part tells of.

    Example:
        >>> ClipRecord("norm", 2.0, 1.0, total_norm=4.0, clip_coef=0.25, applied=True, total_norm_after=1.0).applied
        True
    """

    rule: str
    norm_type: float
    max_norm: float | None
    total_norm: float
    clip_coef: float | None
    applied: bool
    total_norm_after: float
    threshold: float | None = None
    shares: tuple[float, ...] = ()
    parts: tuple[ClipRecord, ...] = ()
    clip_fraction: float | None = None
    norm_quantiles: tuple[float, ...] = ()
    group: str = ""

    @property
    def terms(self) -> str:
        """The rule's terms in a few words, as of this step: ``"max_norm 1, norm_type inf"``; empty without a rule."""
        if self.parts:
            return f"groups {', '.join(part.group for part in self.parts)}"
        limit = self.max_norm if self.threshold is None else self.threshold
        if self.rule == "none" or limit is None:
            return ""
        named = {"norm": f"max_norm {limit:g}", "value": f"clip_value {limit:g}"}
        return named.get(self.rule, f"last threshold {limit:.3g}") + (
            "" if self.norm_type == 2 else f", norm_type {self.norm_type:g}"
        )


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something to try.

    Attributes:
        text: In plain words.
        override: The Hydra override that does it in this project's trainers; None where words must do.

    Example:
        >>> print(Remedy("normalise the activations", "model.norm=layer"))
        normalise the activations (model.norm=layer)
    """

    text: str
    override: str | None = None

    def __str__(self) -> str:
        return f"{self.text} ({self.override})" if self.override else self.text


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule of the training loop was broken.

    Attributes:
        rule: Its name, e.g. ``"missing_zero_grad"``; ``diagnostics.contract.rules.REMEDIES`` lists them.
        step: The first step at which it happened.
        parameters: Names of the parameters concerned.
        message: What happened, at which step, to which parameters, with a number.
        remedy: The line to add or move.
        count: How often it has happened so far.

    Example:
        >>> Violation("step_without_grads", 3, (), "Step 3 had nothing to spend.", "call loss.backward() first").count
        1
    """

    rule: str
    step: int
    parameters: tuple[str, ...]
    message: str
    remedy: str
    count: int = 1

    def __str__(self) -> str:
        again = f" Seen {self.count} times." if self.count > 1 else ""
        return f"{self.rule}: {self.message} {self.remedy}{again} More: diagnostics-explain {self.rule}."

    _repr_html_ = markup.violation


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A condition that the records of a run show.

    Attributes:
        condition: Its name, e.g. ``"vanishing"``; the package diagnosis lists them.
        severity: 1 notice, 2 warning, 3 severe, 4 non-finite.
        step: Onset: the first recorded step that showed it without a break since.
        depth: The layer where it is worst, where there is one.
        evidence: The numbers behind it.
        message: What is seen and what it means.
        remedies: What to try, in order of expected effect.
        confirmed: Whether enough recorded steps have shown it.
        cleared: The first recorded step that no longer showed it; None while it stands.

    Example:
        >>> Diagnosis("vanishing", 2, 0, 0, {"decades": 2.7}, "The gradient fades.").confirmed
        True
    """

    condition: str
    severity: int
    step: int
    depth: int | None
    evidence: Mapping[str, float]
    message: str
    remedies: tuple[Remedy, ...] = ()
    confirmed: bool = True
    cleared: int | None = None

    def __str__(self) -> str:
        return f"{self.condition} ({SEVERITY_NAMES[self.severity]}) since step {self.step}: {self.message}"

    _repr_html_ = markup.diagnosis


@dataclass(frozen=True, slots=True)
class Verdict:
    """One word, one number and one sentence about a run.

    Attributes:
        condition: The worst confirmed diagnosis that still stands at warning or above, else ``"healthy"``;
            ``"unknown"`` before the first recorded step.
        severity: That diagnosis's severity, 0 if healthy or unknown.
        text: The sentence.

    Example:
        >>> print(Verdict("healthy", 0, "healthy"))
        healthy
    """

    condition: str
    severity: int
    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        word = f"{self.condition} ({SEVERITY_NAMES[self.severity]})" if self.severity else self.condition
        return markup.line(word, "" if self.text == self.condition else self.text)


def condition_in_short(condition: str, *, unlawful: bool) -> str:
    """A verdict's condition for a column of many runs, never healthy alone while a rule of the loop is broken.

    Example:
        >>> condition_in_short("healthy", unlawful=True), condition_in_short("dead", unlawful=True)
        ('healthy gradients, unlawful loop', 'dead')
    """
    return "healthy gradients, unlawful loop" if unlawful and condition == "healthy" else condition


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything about one optimizer step.

    Attributes:
        step: Counted from 0, per optimizer; skipped steps count.
        optimizer: Its name: ``"optimizer"`` for the only one, or for several that were stepped together.
        loss: The loss that the caller passed in, or None.
        lr: Learning rate of each parameter group.
        backward_passes: Backward passes whose gradients the step spent.
        loss_scale: The AMP loss scale that the gradients were divided by; 1.0 without a scaler.
        clip: What clipping saw and did.
        layers: The layers in order of depth.
        skipped: Whether the update was left out because gradients were not finite.
        violations: Rules of the loop found broken at this step, new ones and repeats.
        diagnoses: Diagnoses that began, were confirmed, changed severity or cleared at this step.
        metrics: Numbers that the caller passed in.
        fit: The fit over depth; None unless the step was recorded with enough layers.
        recorded: Whether output gradients were taken.

    Example:
        >>> clip = ClipRecord("none", 2.0, None, 0.5, None, False, 0.5)
        >>> StepRecord(step=0, clip=clip).flat()["grad/total_norm"]
        0.5
    """

    step: int
    clip: ClipRecord
    optimizer: str = SOLE_OPTIMIZER
    loss: float | None = None
    lr: tuple[float, ...] = ()
    backward_passes: int = 1
    loss_scale: float = 1.0
    layers: Layers = field(default_factory=Layers)
    skipped: bool = False
    violations: tuple[Violation, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    fit: DepthFit | None = None
    recorded: bool = False

    @property
    def nonfinite(self) -> int:
        """Number of NaN and infinite elements in the weight gradients; none where their norm is finite."""
        if math.isfinite(self.clip.total_norm):
            return 0
        column = self.layers.columns(before_step=True).get("weight.nonfinite")
        return 0 if column is None else sum(column.numbers)

    def flat(self) -> dict[str, float]:
        """The step as a flat dict of W&B keys, which are the same for every model.

        Returns:
            ``grad/…`` and ``loop/…`` on every step, ``depth/…`` on recorded ones. With several optimizers the name
            stands between: ``grad/<name>/total_norm``. What was not measured has no key.
        """
        name = "" if self.optimizer == SOLE_OPTIMIZER else f"{self.optimizer}/"
        clip = self.clip
        values: dict[str, float | None] = {
            f"grad/{name}total_norm": clip.total_norm,
            f"grad/{name}total_norm_clipped": clip.total_norm_after,
            f"grad/{name}clip_coef": clip.clip_coef,
            f"grad/{name}clipped": float(clip.applied),
            f"grad/{name}clip_fraction": clip.clip_fraction,
            f"grad/{name}nonfinite": self.nonfinite,
            f"loop/{name}violations": len(self.violations),
        }
        if self.fit is not None:
            values[f"depth/{name}backward_slope"] = self.fit.slope
            values[f"depth/{name}decades"] = self.fit.decades
        if self.recorded:
            for quantity, column in (("rms", "trunk_rms"), ("update_ratio", "update_ratio")):
                pairs = zip(self.layers.layers, self.layers.values(column), strict=True)
                profile = [value for layer, value in pairs if layer.trunk and value is not None]
                for relative in RELATIVE_DEPTHS if profile else ():
                    index = math.floor(relative * (len(profile) - 1) + 0.5)
                    values[f"depth/{name}{quantity}_{round(100 * relative):03d}"] = profile[index]
        return {key: value for key, value in values.items() if value is not None}

    _repr_html_ = markup.step


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Where a run comes from; the first thing that every sink is given.

    Attributes:
        name: Short name for people.
        started: ISO 8601 time with zone.
        command: The command line.
        overrides: Hydra overrides of this run.
        config: The resolved configuration as plain containers.
        seed: Random seed, where there is one.
        device: Device that the parameters live on.
        versions: Package name to version.
        git: Commit and whether files had changed, e.g. ``{"commit": "1a2b…", "dirty": False}``.
        directory: Folder of the run.

    Example:
        >>> RunInfo(name="mlp").overrides
        ()
    """

    name: str
    started: str = ""
    command: str = ""
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    git: Mapping[str, Any] = field(default_factory=dict)
    directory: str = ""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended; the last thing that every sink is given.

    Attributes:
        status: ``"finished"``, ``"stopped"`` (early, by the trainer), ``"failed"`` (an exception) or ``"interrupted"``
            (Ctrl-C, SIGTERM).
        ended: ISO 8601 time with zone.
        steps: Number of records.
        verdict: The verdict over the whole run.
        summary: ``verdict``, ``severity``, ``decades``, ``violations``, ``clip_fraction``, ``first_nonfinite_step`` and
            ``first_violation_step``; what does not apply is left out.
        error: The exception, or why the run was stopped, in one line; or None.

    Example:
        >>> RunEnd("finished", "", 10, Verdict("healthy", 0, "healthy")).error is None
        True
    """

    status: str
    ended: str
    steps: int
    verdict: Verdict
    summary: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
