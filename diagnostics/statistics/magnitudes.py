"""How large the elements of a gradient are: profiles, peaks, shares of zeros and of numbers that are too small.

Tensor in, small tensor out; nothing here writes to its input or waits for the device. Sums of squares leave the range
of fp32 where vanishing and exploding nets live, so norms are taken in float64 or relative to the peak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diagnostics.statistics import HALF, dense, detached, largest, pack, parameter_norms, sample, stride
from diagnostics.statistics.stacks import STACKED, Stacks, from_host

FRACTION_SAMPLE = 1024
FP16_TINY = torch.finfo(torch.float16).tiny
SMALL = 4096
_QUICK = 65536


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
    low: Tensor
    high: Tensor
    nonfinite: Tensor
    sample: Tensor


def take_apart(gradient: Tensor) -> Parts | Tensor:
    """What :func:`profiles` needs of a gradient: real or complex, dense or sparse, any shape.

    Of a small plain gradient that is a copy, to be measured together with others of its shape.
    """
    if gradient.numel() <= STACKED and type(gradient) is Tensor and not (gradient.is_sparse or gradient.is_complex()):
        return gradient.detach().clone(memory_format=torch.contiguous_format)
    return _parts(gradient)


def _parts(gradient: Tensor) -> Parts:
    part = sample(gradient, FRACTION_SAMPLE).clone()
    values = real_values(gradient)
    if values.numel() == 0:
        nothing = torch.zeros((), device=values.device)
        return Parts(nothing, nothing, nothing, nothing, part)
    low, high = torch.aminmax(values)
    nonfinite = torch.nan_to_num(values * 0, nan=1.0).sum()  # 0 * x is NaN just where x is not finite
    norm = _quick_norm(values) if is_quick(values) else _scaled_norm(values, low, high)
    return Parts(norm, low, high, nonfinite, part)


def safe_norm(gradient: Tensor) -> Tensor:
    """The Euclidean norm over the whole range of a dtype, 0-dim.

    Example:
        >>> safe_norm(torch.tensor([3e-30, 4e-30]))
        tensor(5.0000e-30, dtype=torch.float64)
    """
    values = real_values(gradient)
    return _quick_norm(values) if is_quick(values) else _scaled_norm(values, *torch.aminmax(values))


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
    norms, lows, highs, nonfinite = (pack(column) for column in list(zip(*parts, strict=True))[:4])
    shares = _fractions_apart([part.sample for part in parts]).to(norms.device)
    return torch.stack([norms, torch.maximum(highs, -lows), *shares, nonfinite])


def _row_profiles(rows: Tensor) -> Tensor:
    """The profiles of gradients that are rows, shape ``[6, rows]``."""
    values = real_values(rows)
    top = largest(values, 1)
    if values.dtype == torch.float32 and values.device.type != "mps":
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    else:
        scale = torch.where(top > 0, top, torch.ones_like(top))
        norms = torch.linalg.vector_norm(values / scale[:, None], dim=1) * scale
    nonfinite = (values * 0 != 0).sum(1)
    wide = norms.dtype
    return torch.stack([norms, top.to(wide), *_row_fractions(rows).to(wide), nonfinite.to(wide)])


def real_values(gradient: Tensor) -> Tensor:
    """The elements as real numbers that are at least fp32."""
    values = detached(dense(gradient))
    values = values.abs() if values.is_complex() else values
    return values.float() if values.dtype in HALF else values


def is_quick(values: Tensor) -> bool:
    """Whether a norm in float64 holds the squares, and costs no more than one that is taken relative to the peak."""
    return values.dtype == torch.float32 and values.numel() <= _QUICK and values.device.type != "mps"


def _quick_norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm


def _scaled_norm(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The Euclidean norm relative to the peak."""
    peak = torch.maximum(high, -low)
    relative = torch.linalg.vector_norm(values / torch.where(peak > 0, peak, torch.ones_like(peak)))
    return pack([relative]) * pack([peak])


@torch.no_grad()
def peaks(gradients: Stacks, rows: Mapping[int, Tensor] | None = None) -> Tensor:
    """The largest magnitude of every gradient, shape ``[len(gradients)]``; NaN where there is one.

    Small gradients share a kernel. For large ones the inf-norm takes ten times as long as a look at both ends.

    Args:
        gradients: Tensors.
        rows: Place of a gradient to peaks by row, where those are known: a large one's ``dead.row_sizes``.

    Example:
        >>> peaks(Stacks([torch.tensor([1.0, -3.0])]))
        tensor([3.], dtype=torch.float64)
    """
    known = [(rows or {}).get(place) for place in gradients.apart]
    return gradients.reduce(lambda stack: pack([largest(stack, 1)]), lambda rest: _peaks_apart(rest, known))


def _peaks_apart(gradients: Sequence[Tensor], known: Sequence[Tensor | None]) -> Tensor:
    values = [dense(gradient) for gradient in gradients]
    values = [value.abs() if value.is_complex() else value for value in values]
    small = [place for place, value in enumerate(values) if value.numel() <= SMALL]
    found = dict(zip(small, parameter_norms([values[place] for place in small], math.inf), strict=True))
    for place, (value, by_row) in enumerate(zip(values, known, strict=True)):
        if place not in found:
            found[place] = largest(value) if by_row is None else by_row.amax()
    return pack([found[place] for place in range(len(values))])


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
    taken = rows if numel <= FRACTION_SAMPLE else rows[:, :: stride(numel, FRACTION_SAMPLE)]
    marks = _marks(taken)
    shares = marks.sum(2, dtype=torch.float32) / taken.shape[1]
    return shares.double() if rows.device.type != "mps" else shares


def _marks(values: Tensor) -> Tensor:
    """Which are zero, subnormal, or subnormal in fp16; one kind after the other."""
    sizes = values.abs()
    zero = sizes == 0
    limits = (torch.finfo(values.dtype).tiny, FP16_TINY)
    return torch.stack([zero, *((sizes < limit) & ~zero for limit in limits)])


def _fractions_apart(gradients: Sequence[Tensor]) -> Tensor:
    samples = [sample(gradient, FRACTION_SAMPLE) for gradient in gradients]
    found = torch.zeros(3, len(samples), dtype=torch.float64)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, part in enumerate(samples):
        if part.numel():
            groups.setdefault((part.device, part.dtype), []).append(place)
    for (device, _), places in groups.items():
        marks = _marks(torch.cat([samples[place] for place in places]))
        shares = shares_by_part(marks, [samples[place].numel() for place in places])
        if len(groups) == 1 and len(places) == len(samples):
            return shares.double() if device.type != "mps" else shares
        found = found.to(device).index_copy(1, from_host(torch.tensor(places), device), shares.double())
    return found


def shares_by_part(marks: Tensor, sizes: Sequence[int]) -> Tensor:
    """The share of marks in each of the parts that follow one another along the last dimension.

    Args:
        marks: Booleans, shape ``[kinds, sum(sizes)]``.
        sizes: Of the parts; positive.

    Returns:
        Shape ``[kinds, len(sizes)]``.

    Example:
        >>> shares_by_part(torch.tensor([[True, False, True]]), [2, 1])
        tensor([[0.5000, 1.0000]])
    """
    lengths = torch.tensor(sizes)
    ends = from_host(torch.cumsum(lengths, 0), marks.device)
    sums = torch.cumsum(marks, 1, dtype=torch.float32)[:, ends - 1]
    return torch.diff(sums, dim=1, prepend=sums.new_zeros(len(sums), 1)) / from_host(lengths, marks.device)
