"""How large the elements of a gradient are: profiles, peaks, shares of zeros and of numbers that are too small.

Tensor in, small tensor out; nothing here writes to its input or waits for the device. Sums of squares leave the range
of fp32 where vanishing and exploding nets live, so a norm is taken in float64, or relative to the peak; except that of
a gradient which fp32 has held before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diagnostics.statistics import HALF, dense, detached, largest, pack, parameter_norms
from diagnostics.statistics.samples import Samples, sample, stride
from diagnostics.statistics.stacks import STACKED, Stacks, from_host, order_of, reordered

FRACTION_SAMPLE = 1024
FP16_TINY = torch.finfo(torch.float16).tiny
SMALL = 4096
_MANY, _WIDE = 65536, 64
_LEAST, _MOST = 1e-15, 1e15
"""Between these fp32 holds a norm and the squares that it is made of, with room to spare."""


class Profile(NamedTuple):
    """The rows of :func:`profiles`: the shares of zeros and of too small numbers come from a sample.

    So does the number of non-finite elements of more than ``STACKED``.
    """

    norm: float
    peak: float
    zero_fraction: float
    underflow_fraction: float
    underflow_fp16_fraction: float
    nonfinite: float


class Parts(NamedTuple):
    """A gradient that will soon be gone, in few kernels; :func:`profiles` does the rest for many of them at once.

    Attributes:
        numel: Number of elements.
        norm: Euclidean norm.
        exact: Whether that holds whatever its size.
        low: Smallest element.
        high: Largest one.
        sample: Some elements.
    """

    numel: int
    norm: Tensor
    exact: bool
    low: Tensor
    high: Tensor
    sample: Tensor


def take_apart(gradient: Tensor, *, exact: bool = True) -> Parts | Tensor:
    """What :func:`profiles` needs of a gradient: real or complex, dense or sparse, any shape.

    Of a small plain gradient that is a copy, to be measured together with others of its shape.

    Args:
        gradient: The gradient.
        exact: False takes a fifth of the time: the norm is taken in fp32. Where that turns out not to have held it, it
            is estimated from a sample, since whoever looked again would have to wait for the device first.
    """
    if gradient.numel() <= STACKED and type(gradient) is Tensor and not (gradient.is_sparse or gradient.is_complex()):
        return detached(gradient).clone(memory_format=torch.contiguous_format)
    return _parts(gradient, exact=exact)


def _parts(gradient: Tensor, *, exact: bool = True) -> Parts:
    values, part = _real(gradient), sample(gradient).clone()
    if values.numel() == 0:
        nothing = torch.zeros((), device=values.device)
        return Parts(0, nothing, True, nothing, nothing, part)
    low, high = torch.aminmax(values)
    return Parts(values.numel(), euclidean_norm(values, exact=exact), exact, low, high, part)


def euclidean_norm(gradient: Tensor, *, exact: bool = True) -> Tensor:
    """The Euclidean norm, 0-dim, over the whole range of a dtype; or quickly, where the range of fp32 will do.

    Example:
        >>> euclidean_norm(torch.tensor([3e-30, 4e-30]))
        tensor(5.0000e-30, dtype=torch.float64)
    """
    values = _real(gradient)
    if not exact:
        return _quick_norm(values)
    if values.dtype == torch.float64 or values.device.type == "mps":
        return _scaled_norm(real_values(gradient))
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm


def _quick_norm(values: Tensor) -> Tensor:
    """In fp32, of many elements as the norm of the rows' norms: one sum of so many squares would lose digits."""
    kind = torch.float32 if values.dtype in HALF else None
    if values.numel() > _MANY and values.dim() > 1:
        rows = values.flatten(0, -2) if values.shape[-1] >= _WIDE else values.flatten(1)
        values = torch.linalg.vector_norm(rows, dim=1, dtype=kind)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=kind)
    return norm


def is_held(norm: float) -> bool:
    """Whether a norm that was taken quickly is the true one.

    Example:
        >>> is_held(1e-10), is_held(0.0), is_held(math.nan)
        (True, False, False)
    """
    return _LEAST < norm < _MOST


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
    sampled = Samples(Stacks([part.sample for part in parts])).reduce(_row_samples)
    zero, own, fp16, nonfinite, rms = sampled
    norms = pack([part.norm for part in parts]).to(sampled.device)
    peaks = torch.maximum(pack([part.high for part in parts]), -pack([part.low for part in parts])).to(sampled.device)
    numel = from_host(torch.tensor([float(part.numel) for part in parts]), sampled.device)
    if not all(part.exact for part in parts):
        exact = from_host(torch.tensor([part.exact for part in parts]), sampled.device)
        held = exact | ((norms > _LEAST) & (norms < _MOST))
        norms = torch.where(held, norms, torch.maximum(rms * numel.sqrt(), peaks))
    return torch.stack([norms, peaks, zero, own, fp16, nonfinite * numel])


def _row_samples(rows: Tensor) -> Tensor:
    """Of samples that are rows: the shares of small numbers, the share that is not finite, the root mean square."""
    values, count = real_values(rows), float(max(1, rows.shape[1]))
    kind = torch.float32 if rows.device.type == "mps" else torch.float64
    norms = torch.linalg.vector_norm(values, dim=1, dtype=kind)
    others = torch.stack([_nonfinite(values).to(kind) / count, norms / math.sqrt(count)])
    return torch.cat([_row_fractions(rows).to(kind), others])


def _nonfinite(rows: Tensor) -> Tensor:
    """How many elements of each row are not finite."""
    rest = rows - rows  # NaN just where the element is not finite
    return torch.ne(rest, rest, out=rest).sum(1)


def _row_profiles(rows: Tensor) -> Tensor:
    """The profiles of gradients that are rows, shape ``[6, rows]``."""
    values = real_values(rows)
    top = largest(values, 1)
    if values.dtype == torch.float32 and values.device.type != "mps":
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    else:
        scale = torch.where(top > 0, top, torch.ones_like(top))
        norms = torch.linalg.vector_norm(values / scale[:, None], dim=1) * scale
    kind = norms.dtype
    return torch.stack([norms, top.to(kind), *_row_fractions(rows).to(kind), _nonfinite(values).to(kind)])


def real_values(gradient: Tensor) -> Tensor:
    """The elements as real numbers that are at least fp32."""
    values = _real(gradient)
    return values.float() if values.dtype in HALF else values


def _real(gradient: Tensor) -> Tensor:
    """The elements as real numbers of their own dtype."""
    values = detached(dense(gradient))
    return values.abs() if values.is_complex() else values


def _scaled_norm(values: Tensor) -> Tensor:
    """The Euclidean norm relative to the peak."""
    peak = largest(values)
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


def fractions(samples: Samples) -> Tensor:
    """Shares in some samples: of zeros, of subnormal numbers, of what would be subnormal in fp16.

    Returns:
        Shape ``[3, samples]``.

    Example:
        >>> fractions(Samples(Stacks([torch.tensor([0.0, 1.0, 1e-6, 1e-40])])))
        tensor([[0.2500],
                [0.2500],
                [0.5000]], dtype=torch.float64)
    """
    return samples.reduce(_row_fractions)


def _row_fractions(rows: Tensor) -> Tensor:
    numel = rows.shape[1]
    sizes = (rows if numel <= FRACTION_SAMPLE else rows[:, :: stride(numel, FRACTION_SAMPLE)]).abs()
    marks = torch.empty(sizes.shape, device=sizes.device)  # fp32, which is summed four times as fast as booleans are
    zero = torch.eq(sizes, 0, out=marks).sum(1)
    limits = (torch.finfo(sizes.dtype).tiny, FP16_TINY)
    counts = torch.stack([zero, *(torch.lt(sizes, limit, out=marks).sum(1) - zero for limit in limits)])
    return (counts.double() if rows.device.type != "mps" else counts) / max(1, sizes.shape[1])
