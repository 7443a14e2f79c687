"""Units whose gradient has been exactly zero for a while: one small counter per unit, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diagnostics.statistics import largest, pack
from diagnostics.statistics.magnitudes import SMALL, is_quick, real_values, shares_by_part
from diagnostics.statistics.stacks import Stacks

DEAD_WINDOW = 10
"""Recorded steps in a row after which a unit without any gradient counts as dead."""


class DeadUnits:
    """How long every unit of some weights has had no gradient.

    Args:
        units: Name of a weight to the dimension that counts its layer's units.

    Example:
        >>> units = DeadUnits({"weight": 0})
        >>> rows = {"weight": torch.tensor([0.0, 2.0])}
        >>> for _ in range(9):
        ...     names, shares = units.update(rows)
        >>> names
        []
        >>> units.update(rows)
        (['weight'], tensor([0.5000]))
    """

    def __init__(self, units: Mapping[str, int]) -> None:
        self.units = units
        self._streaks: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._newest: tuple[list[str], Tensor] = ([], torch.zeros(0))  # the same streaks once more, all together

    @torch.no_grad()
    def update(self, rows: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
        """Takes one recorded step.

        Args:
            rows: Name of a weight to one number per unit that is zero where its gradient is, as
                :func:`row_sizes` gives them. What is not in it is not judged by this step.

        Returns:
            The weights that have been seen often enough, and the share of their units that are dead.
        """
        if not rows:
            return [], torch.zeros(0)
        sizes = [len(numbers) for numbers in rows.values()]
        zero = pack([*rows.values()]) == 0
        names, (newest, streaks) = list(rows), self._newest
        if names != newest:
            before = zip(map(self._streaks.get, rows), sizes, strict=True)
            streaks = torch.cat([torch.zeros(size, device=zero.device) if old is None else old for old, size in before])
        streaks = (streaks + 1) * zero
        self._newest = names, streaks
        self._streaks |= zip(rows, torch.split(streaks, sizes), strict=True)
        for name in rows:
            self._seen[name] = self._seen.get(name, 0) + 1
        known = [place for place, name in enumerate(rows) if self._seen[name] >= DEAD_WINDOW]
        if not known:
            return [], torch.zeros(0)
        shares = shares_by_part((streaks >= DEAD_WINDOW)[None], sizes)[0]
        return [names[place] for place in known], shares if len(known) == len(rows) else shares[known]


@torch.no_grad()
def row_share(gradient: Tensor) -> Tensor:
    """The share of vectors along the last dimension that are not zero, 0-dim.

    Example:
        >>> row_share(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        tensor(0.5000)
    """
    return (gradient.abs().amax(-1) != 0).float().mean()


@torch.no_grad()
def unit_sizes(gradients: Stacks, unit_dims: Mapping[int, int]) -> dict[int, Tensor]:
    """:func:`row_sizes` of some gradients by place; those of one shape by one kernel.

    Args:
        gradients: All gradients.
        unit_dims: Place of a weight to the dimension that counts its layer's units.

    Example:
        >>> unit_sizes(Stacks([torch.ones(1), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]), {1: 0})[1] == 0
        tensor([ True, False])
    """
    found: dict[int, Tensor] = {}
    for places, rows in zip(gradients.places, gradients.rows, strict=True):
        if all(unit_dims.get(place) == 0 for place in places):
            units = gradients.tensors[places[0]].shape[0]
            sizes = largest(rows.reshape(len(places), units, -1), 2)
            found.update(zip(places, sizes.unbind(), strict=True))
    for place, dim in unit_dims.items():
        gradient = gradients.tensors[place]
        if place not in found and gradient.numel() and not gradient.is_sparse:
            found[place] = row_sizes(gradient, dim)
    return {place: found[place] for place in unit_dims if place in found}


def row_sizes(gradient: Tensor, unit_dim: int = 0) -> Tensor:
    """For every unit of a weight a number that is zero where all of its gradient is, and nowhere else.

    Args:
        gradient: Dense, of at least two dimensions.
        unit_dim: The dimension that counts units.

    Returns:
        Shape ``[units]``: norms; of a large gradient peaks, of which ``magnitudes.peaks`` makes use.

    Example:
        >>> row_sizes(torch.tensor([[0.0, 0.0], [1e-30, 0.0]])) == 0
        tensor([ True, False])
    """
    values = real_values(gradient)
    rows = (values.movedim(unit_dim, 0) if unit_dim else values).flatten(1)
    if rows.numel() <= SMALL and is_quick(rows):
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norms
    return largest(rows, 1)
