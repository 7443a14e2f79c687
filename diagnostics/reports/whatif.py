"""What another max_norm would have done to the steps of a run: shares, coefficients, and which one clips how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diagnostics.reports.history import History

EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm
SHARES = (0.01, 0.05, 0.1)
MANTISSAS = (1.0, 2.0, 5.0)
MOST_CANDIDATES = 13
CAVEAT = (
    "This is arithmetic on the norms of this run. Another max_norm would have led to other weights, and so to other "
    "gradients from the first step that it clips differently; what training would have become cannot be known from it."
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One max_norm.

    Attributes:
        max_norm: In the units of the gradient's norm.
        clipped: Share of the steps that it would have clipped; of those with a finite norm.
        coefficient: Median of ``max_norm / (total_norm + 1e-6)`` over the steps that it would have clipped; None
            where it clips none.
        current: Whether the run's own rule had this threshold.
    """

    max_norm: float
    clipped: float
    coefficient: float | None
    current: bool = False


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The max_norm that would have clipped this share of the healthy steps, or a little less where norms are equal."""

    share: float
    max_norm: float


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The choices of max_norm under one norm.

    Attributes:
        norm_type: The p of the norm: the run's own, and 2 and inf where every layer's was recorded.
        recorded: Whether it is the run's own norm, of every step; else it is put together from the layers' norms.
        steps: Steps whose norm is known and finite.
        nonfinite: Steps whose norm was NaN or infinite; they count in no share.
        healthy: Those of ``steps`` at which no diagnosis at warning or above stood and that were not skipped.
        candidates: Rising max_norms; empty without a step whose norm is positive.
        suggestions: One for each of 1 %, 5 % and 10 %; empty with fewer healthy steps than that share needs.
        caveat: What this cannot know.
    """

    norm_type: float
    recorded: bool
    steps: int
    nonfinite: int
    healthy: int
    candidates: tuple[Candidate, ...]
    suggestions: tuple[Suggestion, ...]
    caveat: str = CAVEAT


def what_if(history: History, max_norms: Sequence[float] | None = None) -> tuple[WhatIf, ...]:
    """What other thresholds would have done.

    Args:
        history: The steps of one optimizer.
        max_norms: Candidates; None for 1, 2 and 5 times the powers of ten across the run's norms, and the run's own.

    Returns:
        One for each norm that the run recorded, its own first.

    Raises:
        ValueError: A max_norm is not a positive number.

    Example:
        >>> from diagnostics.records import ClipRecord, StepRecord
        >>> from diagnostics.reports.history import histories
        >>> norms = [1.0, 1.0, 1.0, 4.0]
        >>> records = [StepRecord(i, ClipRecord("none", 2.0, None, x, None, False, x)) for i, x in enumerate(norms)]
        >>> (found,) = what_if(histories(records)["optimizer"], [2.0])
        >>> round(found.candidates[0].clipped, 2), round(found.candidates[0].coefficient, 3)
        (0.25, 0.5)
    """
    wrong = [norm for norm in max_norms or () if not 0 < norm < math.inf]
    if wrong:
        raise ValueError(f"max_norm must be a positive number; got {wrong[0]!r}. Leave it out for a ladder of them.")
    return tuple(_answer(history, norms, max_norms) for norms in _known(history))


@dataclass(frozen=True, slots=True)
class _Norms:
    """A p, whether it is the run's own, the places of the steps whose norm is known, and their norms."""

    p: float
    own: bool
    rows: NDArray[np.int64]
    values: NDArray[np.float64]


def _known(history: History) -> Iterator[_Norms]:
    yield _Norms(history.norm_type, True, np.arange(len(history.steps)), history.by_step["clip.total_norm"])
    for p, name in ((2.0, "weight.norm"), (math.inf, "weight.abs_max")):
        quantity = history.by_layer.get(name)
        if p == history.norm_type or quantity is None:
            continue
        everywhere = history.by_layer["weight.norm"].measured.any(axis=0)  # the layers that have weights
        whole = quantity.measured[:, everywhere].all(axis=1)
        values = quantity.values[whole][:, everywhere]
        if len(values):
            peaks = np.abs(values).max(axis=1)
            scale = np.where((peaks > 0) & np.isfinite(peaks), peaks, 1.0)  # squares of 1e200 would overflow
            norms = peaks if p == math.inf else scale * np.sqrt(np.square(values / scale[:, None]).sum(axis=1))
            yield _Norms(p, False, quantity.rows[whole], norms)


def _answer(history: History, norms: _Norms, max_norms: Sequence[float] | None) -> WhatIf:
    finite = np.isfinite(norms.values)
    known = norms.values[finite]
    healthy = norms.values[finite & ~history.sick[norms.rows] & ~history.skipped[norms.rows]]
    current = _current(history) if norms.own else None
    tried = sorted(max_norms) if max_norms is not None else _ladder(known, current)
    return WhatIf(
        norm_type=norms.p,
        recorded=norms.own,
        steps=len(known),
        nonfinite=len(norms.values) - len(known),
        healthy=len(healthy),
        candidates=tuple(_candidate(norm, known, current) for norm in tried) if len(known) else (),
        suggestions=tuple(Suggestion(share, norm) for share in SHARES if (norm := _clips(share, healthy)) is not None),
    )


def _current(history: History) -> float | None:
    """The threshold of the run's last step, where its rule scales all gradients by their norm."""
    threshold = history.by_step["clip.threshold"]
    if history.rule != "norm" or not len(threshold):
        return None
    return float(threshold[-1]) if 0 < threshold[-1] < math.inf else None


def _ladder(norms: NDArray[np.float64], current: float | None) -> list[float]:
    positive = norms[norms > 0]
    if not len(positive):
        return []
    low, high = math.log10(float(np.quantile(positive, 0.01))), math.log10(float(positive.max()))
    powers = range(math.floor(low), math.ceil(high) + 1)
    rungs = [mantissa * 10.0**power for power in powers for mantissa in MANTISSAS]
    below = [rung for rung in rungs if math.log10(rung) <= low][-1:]
    between = [rung for rung in rungs if low < math.log10(rung) <= high]
    above = [rung for rung in rungs if math.log10(rung) > high][:1]
    thinned = between[:: -(-len(between) // MOST_CANDIDATES)] if between else []
    return sorted({*below, *thinned, *above, *([current] if current else [])})


def _candidate(max_norm: float, norms: NDArray[np.float64], current: float | None) -> Candidate:
    coefficients = max_norm / (norms + EPSILON)
    clipped = coefficients[coefficients < 1]
    return Candidate(
        max_norm=float(max_norm),
        clipped=len(clipped) / len(norms),
        coefficient=float(np.median(clipped)) if len(clipped) else None,
        current=max_norm == current,
    )


def _clips(share: float, norms: NDArray[np.float64]) -> float | None:
    """The smallest max_norm that clips at most this share of the steps; None where that is less than one step."""
    count = math.floor(share * len(norms) + 1e-9)
    if count < 1:
        return None
    largest = float(np.sort(norms)[-count - 1])
    return largest + EPSILON if largest > 0 else None
