"""How large the elements of a gradient are: profiles, peaks, shares of zeros and of numbers that are too small.

Tensor in, small tensor out; nothing here writes to its input or waits for the device. Sums of squares leave the range
of fp32 where vanishing and exploding nets live, so norms are taken in float64, relative to the peak, or where they left
it from a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diagnostics.statistics import (
    HALF,
    TRUSTED_DECADES,
    dense,
    detached,
    largest,
    pack,
    parameter_norms,
    sample,
    stride,
)
from diagnostics.statistics.stacks import STACKED, Stacks, from_host, order_of, reordered

FRACTION_SAMPLE = 1024
FP16_TINY = torch.finfo(torch.float16).tiny
SMALL = 4096
_LARGE = 65536
_HELD = TRUSTED_DECADES / 2
"""Decades up and down from 1 in which fp32 holds the squares of what a norm is made of."""


class Profile(NamedTuple):
    """The rows of :func:`profiles`: the shares of zeros and of too small numbers come from a sample."""

    norm: float
    peak: float
    zero_fraction: float
    underflow_fraction: float
    underflow_fp16_fraction: float
    nonfinite: float


class Parts(NamedTuple):
    """A gradient that will soon be gone, in few kernels; :func:`profiles` does the rest for many of them at once."""

    norm: Tensor
    peak: Tensor
    nonfinite: Tensor
    sample: Tensor


def take_apart(gradient: Tensor) -> Parts | Tensor:
    """What :func:`profiles` needs of a gradient: real or complex, dense or sparse, any shape.

    Of a small plain gradient that is a copy, to be measured together with others of its shape.
    """
    if gradient.numel() <= STACKED and type(gradient) is Tensor and not (gradient.is_sparse or gradient.is_complex()):
        return detached(gradient).clone(memory_format=torch.contiguous_format)
    return _parts(gradient)


def _parts(gradient: Tensor) -> Parts:
    part = sample(gradient, FRACTION_SAMPLE).clone()
    values = real_values(gradient)
    if values.numel() == 0:
        nothing = torch.zeros((), device=values.device)
        return Parts(nothing, nothing, nothing, part)
    low, high = torch.aminmax(values)
    peak, few = torch.maximum(high, -low), real_values(part)
    large = values.numel() > _LARGE  # so many are not finite as the sample says
    nonfinite = _nonfinite(few) * (values.numel() / few.numel()) if large else _nonfinite(values)
    return Parts(_norm(values, few, peak), peak, nonfinite, part)


def _nonfinite(values: Tensor, *dims: int) -> Tensor:
    """How many elements are not finite: of all, or along some dimensions."""
    rest = values - values  # NaN just where the element is not finite
    return torch.ne(rest, rest, out=rest).sum(dims)


def safe_norm(gradient: Tensor) -> Tensor:
    """The Euclidean norm over the whole range of a dtype, 0-dim.

    Example:
        >>> safe_norm(torch.tensor([3e-30, 4e-30]))
        tensor(5.0000e-30, dtype=torch.float64)
    """
    return _norm(real_values(gradient))


def _norm(values: Tensor, part: Tensor | None = None, peak: Tensor | None = None) -> Tensor:
    """The Euclidean norm, given a sample and the peak where they are known.

    A large gradient's is taken in fp32. Where that has not held it, it is estimated from a sample: whoever looked again
    would have to wait for the device first, and to look twice at all of them takes five times as long.
    """
    if _is_quick(values):
        norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
        return norm
    if values.dtype == torch.float64 or values.device.type == "mps":
        return _scaled_norm(values, largest(values) if peak is None else peak)
    part, norm = sample(values, FRACTION_SAMPLE) if part is None else part, torch.linalg.vector_norm(values)
    estimate = torch.linalg.vector_norm(part, dtype=torch.float64) * math.sqrt(values.numel() / part.numel())
    held = (norm > 10**-_HELD) & (norm < 10**_HELD)
    return torch.where(held, norm.double(), estimate if peak is None else torch.maximum(estimate, peak))


@torch.no_grad()
def profiles(parts: Sequence[Parts | Tensor]) -> Tensor:
    """Everything a recorded step keeps of some gradients.

    Returns:
        Shape ``[6, len(parts)]``, with rows in the order of :class:`Profile`.

    Example:
        >>> profiles([take_apart(torch.tensor([3e-30, 4e-30]))])[:2, 0]
        tensor([5.0000e-30, 4.0000e-30], dtype=torch.float64)
    """
    if not parts:
        return torch.zeros(len(Profile._fields), 0)
    small = Stacks([part for part in parts if isinstance(part, Tensor)])
    apart = [part for part in parts if not isinstance(part, Tensor)]
    if not small.tensors:
        return _profiles_apart(apart)
    found = small.reduce(_row_profiles, lambda rest: _profiles_apart([*map(_parts, rest)]), dim=1)
    if not apart:
        return found
    places = sorted(range(len(parts)), key=lambda place: not isinstance(parts[place], Tensor))
    order = from_host(torch.tensor(places).argsort(), found.device)
    return torch.cat([found, _profiles_apart(apart).to(found.device)], 1).index_select(1, order)


def _profiles_apart(parts: Sequence[Parts]) -> Tensor:
    norms, peaks, nonfinite = (pack(column) for column in list(zip(*parts, strict=True))[:3])
    shares = _fractions_apart([part.sample for part in parts]).to(norms.device)
    return torch.stack([norms, peaks, *shares, nonfinite])


def _row_profiles(rows: Tensor) -> Tensor:
    """The profiles of gradients that are rows, shape ``[6, rows]``."""
    values = real_values(rows)
    top = largest(values, 1)
    if values.dtype == torch.float32 and values.device.type != "mps":
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    else:
        scale = torch.where(top > 0, top, torch.ones_like(top))
        norms = torch.linalg.vector_norm(values / scale[:, None], dim=1) * scale
    wide = norms.dtype
    return torch.stack([norms, top.to(wide), *_row_fractions(rows).to(wide), _nonfinite(values, 1).to(wide)])


def real_values(gradient: Tensor) -> Tensor:
    """The elements as real numbers that are at least fp32."""
    values = detached(dense(gradient))
    values = values.abs() if values.is_complex() else values
    return values.float() if values.dtype in HALF else values


def _is_quick(values: Tensor) -> bool:
    """Whether a norm in float64, which holds the squares, takes no longer than another pass over the memory."""
    small = values.numel() <= _LARGE or values.device.type == "cuda"
    return values.dtype == torch.float32 and small and values.device.type != "mps"


def _scaled_norm(values: Tensor, peak: Tensor) -> Tensor:
    """The Euclidean norm relative to the peak."""
    relative = torch.linalg.vector_norm(values / torch.where(peak > 0, peak, torch.ones_like(peak)))
    return pack([relative]) * pack([peak])


@torch.no_grad()
def peaks(gradients: Stacks, rows: Sequence[tuple[Sequence[int], Tensor]] = ()) -> Tensor:
    """The largest magnitude of every gradient, shape ``[len(gradients)]``; NaN where there is one.

    Small gradients share a kernel. For large ones the inf-norm takes ten times as long as a look at both ends.

    Args:
        gradients: Tensors.
        rows: What ``dead.unit_sizes`` has found of some of them.

    Example:
        >>> peaks(Stacks([torch.tensor([1.0, -3.0])]))
        tensor([3.], dtype=torch.float64)
    """

    def of_rest(_rest: Sequence[Tensor]) -> Tensor:
        apart = {place: number for number, place in enumerate(gradients.apart)}
        known = [(places, sizes.amax(1)) for places, sizes in rows if places[0] in apart]
        others = sorted(apart.keys() - {place for places, _ in known for place in places})
        found = [(others, _peaks_apart([gradients.tensors[place] for place in others])), *known]
        order = order_of([apart[place] for places, _ in found for place in places])
        return reordered(pack([one for _, one in found]), order)

    return gradients.reduce(lambda stack: pack([largest(stack, 1)]), of_rest)


def _peaks_apart(gradients: Sequence[Tensor]) -> Tensor:
    values = [dense(gradient) for gradient in gradients]
    values = [value.abs() if value.is_complex() else value for value in values]
    small = [place for place, value in enumerate(values) if value.numel() <= SMALL]
    found = dict(zip(small, parameter_norms([values[place] for place in small], math.inf), strict=True))
    return pack([found[place] if place in found else largest(value) for place, value in enumerate(values)])


@torch.no_grad()
def fractions(gradients: Stacks) -> Tensor:
    """Shares in a sample of every gradient: of zeros, of subnormal numbers, of what would be subnormal in fp16.

    Returns:
        Shape ``[3, len(gradients)]``.

    Example:
        >>> fractions(Stacks([torch.tensor([0.0, 1.0, 1e-6, 1e-40])]))
        tensor([[0.2500],
                [0.2500],
                [0.5000]], dtype=torch.float64)
    """
    return gradients.reduce(_row_fractions, _fractions_apart, dim=1)


def _row_fractions(rows: Tensor) -> Tensor:
    numel = rows.shape[1]
    sizes = (rows if numel <= FRACTION_SAMPLE else rows[:, :: stride(numel, FRACTION_SAMPLE)]).abs()
    marks = torch.empty(sizes.shape, device=sizes.device)  # fp32, which is summed four times as fast as booleans are
    zero = torch.eq(sizes, 0, out=marks).sum(1)
    limits = (torch.finfo(sizes.dtype).tiny, FP16_TINY)
    counts = torch.stack([zero, *(torch.lt(sizes, limit, out=marks).sum(1) - zero for limit in limits)])
    return (counts.double() if rows.device.type != "mps" else counts) / sizes.shape[1]


def _fractions_apart(gradients: Sequence[Tensor]) -> Tensor:
    groups: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    samples = [sample(gradient, FRACTION_SAMPLE) for gradient in gradients]
    for place, part in enumerate(samples):
        if part.numel():
            groups.setdefault((part.device, part.dtype, part.numel()), []).append(place)
    found = torch.zeros(3, len(samples), dtype=torch.float64)
    for (device, _, _), places in groups.items():
        shares = _row_fractions(torch.stack([samples[place] for place in places]))
        if len(places) == len(samples):
            return shares
        order = from_host(torch.tensor(places), device)
        found = found.to(device, shares.dtype).index_copy(1, order, shares)
    return found
