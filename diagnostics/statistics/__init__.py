"""Tensor in, small tensor out: norms, samples, and their way to the host. Nothing here writes to its input.

Sums of squares leave the range of fp32 for gradients below 1e-22 or above 1e19, which is where vanishing and
exploding nets live. So a norm that looks as if it had left the range is taken again in float64 (:func:`exact_norms`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from diagnostics.statistics.stacks import Stacks

TRUSTED_DECADES = 30.0
"""fp32 reaches 38 decades down and up from 1; a sum of powers this far out is held with room to spare."""

WIDE_ENOUGH = 6.0
"""Sums of so high powers of fp32 numbers, from 1e-45 to 3e38, are within the range of float64."""

HALF = (torch.float16, torch.bfloat16)


def gradients_of(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, each once, and those gradients.

    Args:
        parameters: Tensors; one that is given twice counts once, one without gradient is left out.

    Returns:
        The parameters and their gradients, in the order given; the very list if that is what it was.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2)); weight.grad = torch.ones(2)
        >>> gradients_of([weight, weight, torch.nn.Parameter(torch.zeros(1))])[1]
        [tensor([1., 1.])]
    """
    owners = parameters if isinstance(parameters, list) else list(parameters)
    if len(set(map(id, owners))) < len(owners):
        owners = list({id(parameter): parameter for parameter in owners}.values())
    gradients = [parameter.grad for parameter in owners]
    if any(map(operator.is_, gradients, repeat(None))):
        owners = [parameter for parameter, gradient in zip(owners, gradients, strict=True) if gradient is not None]
        gradients = [gradient for gradient in gradients if gradient is not None]
    return owners, gradients  # type: ignore[return-value] # those that are None are out


@torch.no_grad()
def parameter_norms(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The p-norm of every gradient, in few kernels.

    Half types are accumulated in fp32; everything else gives bit for bit what ``torch.nn.utils.clip_grad_norm_`` sees.

    Args:
        gradients: Dense, sparse or complex tensors of any shape, dtype and device.
        norm_type: p > 0, possibly ``inf``.

    Returns:
        Shape ``[len(gradients)]``, real, on the first gradient's device.

    Example:
        >>> parameter_norms([torch.tensor([3.0, 4.0]), torch.ones(4)])
        tensor([5., 2.])
    """
    return stacked_norms(Stacks(gradients), norm_type)


@torch.no_grad()
def stacked_norms(stacks: Stacks, norm_type: float = 2.0) -> Tensor:
    """The same of tensors that are stacked where that saves kernels: on a CPU."""
    if not stacks.tensors or stacks.tensors[0].device.type != "cpu":
        return _norms_apart(stacks.tensors, norm_type)
    return stacks.reduce(lambda rows: row_norms(rows, norm_type), lambda rest: _norms_apart(rest, norm_type))


def row_norms(rows: Tensor, norm_type: float = 2.0) -> Tensor:
    """The p-norm of each row; half types are accumulated in fp32.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    norms: Tensor = torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=accumulation_dtype(rows.dtype))
    return norms


def _norms_apart(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    values = [dense(gradient) for gradient in gradients]
    norms: dict[int, Tensor] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if value.numel() == 0:
            dtype = accumulation_dtype(value.dtype) or value.dtype.to_real()
            norms[index] = torch.zeros((), dtype=dtype, device=value.device)
        else:
            groups.setdefault((value.device, value.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        group = [values[index] for index in indices]
        found = torch._foreach_norm(group, norm_type, accumulation_dtype(dtype))  # noqa: SLF001 -- as torch's own clip
        norms.update(zip(indices, found, strict=True))
    if not norms:
        return torch.zeros(0)
    device = values[0].device
    together = [norms[index] for index in range(len(values))]
    if len(groups) == 1 and len({getattr(norm, "device_mesh", None) for norm in together}) == 1:
        return whole(torch.stack(together))  # one collective for all, where there has to be one
    return torch.stack([whole(norm).to(device) for norm in together])


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every rank holds a part (a DTensor) as the whole, by a collective; any other as it is."""
    complete: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return complete


def total_norm(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """The p-norm of p-norms, which is the p-norm of all elements together.

    Returns:
        A 0-dim tensor; 0.0 for no norms.

    Example:
        >>> total_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def trusted(total: float, norm_type: float = 2.0) -> bool:
    """Whether an fp32 norm is far enough from the ends of the range for its p-th powers to have fitted.

    Example:
        >>> trusted(1.0), trusted(0.0), trusted(math.inf)
        (True, False, False)
    """
    power = 1.0 if math.isinf(norm_type) else max(norm_type, 1.0)
    return total > 0 and abs(math.log10(total)) * power < TRUSTED_DECADES


@torch.no_grad()
def exact_norms(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norms in float64 and counts of non-finite elements, for gradients whose quick norm left the range of fp32.

    Returns:
        Shape ``[2, len(gradients)]``: norms, then counts. fp64 gradients are scaled by their peaks, and hold too.
    """
    stacks = Stacks(gradients)
    counts = stacks.reduce(
        lambda rows: pack([(~torch.isfinite(rows)).sum(1)]),
        lambda rest: pack([whole((~torch.isfinite(dense(one))).sum()) for one in rest]),
    )
    if norm_type > WIDE_ENOUGH or not {one.dtype for one in gradients}.isdisjoint((torch.float64, torch.complex128)):
        norms = _scaled_norms(gradients, norm_type)
    else:  # float64 holds the powers of what comes from fp32
        norms = stacks.reduce(
            lambda rows: _wide_norms(rows, norm_type, 1),
            lambda rest: pack([_wide_norms(one, norm_type) for one in rest]),
        )
    return torch.stack([norms, counts.to(norms.device)])


def _wide_norms(values: Tensor, norm_type: float, *dims: int) -> Tensor:
    values = dense(values)
    return whole(torch.linalg.vector_norm(values, norm_type, dim=dims or None, dtype=wide(values.dtype)))


def _scaled_norms(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """Norms in float64 of gradients that are divided by their peaks first."""
    peaks = [
        whole(gradient.abs().amax()).double() if gradient.numel() else torch.zeros(())
        for gradient in map(dense, gradients)
    ]
    scales = [torch.where(torch.isfinite(peak) & (peak > 0), peak, torch.ones_like(peak)) for peak in peaks]
    scaled = [
        dense(gradient).to(wide(gradient.dtype)) / scale for gradient, scale in zip(gradients, scales, strict=True)
    ]
    return pack([parameter_norms(scaled, norm_type)]) * pack(scales)


def largest(values: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude, NaN where there is one: a look at both ends takes a tenth of the inf-norm's time.

    Args:
        values: Real or complex; 0 if empty.
        dim: Along which; None for that of all elements, 0-dim.

    Example:
        >>> largest(torch.tensor([1.0, -3.0]))
        tensor(3.)
    """
    values = values.abs() if values.is_complex() else values
    if values.numel() == 0:
        return values.new_zeros(())
    ends = () if dim is None else (dim,)
    return torch.maximum(values.amax(ends), -values.amin(ends))


def resolution(dtype: torch.dtype) -> float:
    """Relative distance of neighbouring numbers.

    Example:
        >>> resolution(torch.bfloat16)
        0.0078125
    """
    return torch.finfo(dtype).eps


def detached(tensor: Tensor) -> Tensor:
    """The tensor outside of any graph; itself where it is in none, which is quicker."""
    return tensor.detach() if tensor.requires_grad else tensor


@torch.no_grad()
def pack(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of small tensors in one float64 vector (fp32 where a device has no float64) on one device."""
    full = [tensor.reshape(-1) for tensor in tensors if tensor.numel()]
    return beside(full) if full else torch.zeros(0, dtype=torch.float64)


def beside(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors beside each other along the last dimension, with dtype and device as :func:`pack` gives them."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1:
        return (torch.cat([*tensors], -1) if len(tensors) > 1 else tensors[0]).to(device, dtype)  # one conversion
    # What comes from the host need not be waited for; the device is the host only where all tensors are there.
    return torch.cat([tensor.to(device, dtype, non_blocking=True) for tensor in tensors], -1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What a sum over a dtype is taken in; None for its own.

    Example:
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, None)
    """
    return torch.float32 if dtype in HALF else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for a complex dtype."""
    return torch.complex128 if dtype.is_complex else torch.float64


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or the rows that a sparse one holds."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor
