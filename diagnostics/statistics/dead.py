"""Units whose gradient has been exactly zero for a while: one small counter per unit, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diagnostics.statistics import largest, pack
from diagnostics.statistics.magnitudes import real_values
from diagnostics.statistics.stacks import Stacks

DEAD_WINDOW = 10
"""Recorded steps in a row after which a unit without any gradient counts as dead."""


class DeadUnits:
    """How long every unit of some weights has had no gradient.

    Args:
        units: Name of a weight to the dimension that counts its layer's units.

    Example:
        >>> units = DeadUnits({"weight": 0})
        >>> rows = {("weight",): torch.tensor([[0.0, 2.0]])}
        >>> for _ in range(9):
        ...     names, shares = units.update(rows)
        >>> names
        []
        >>> units.update(rows)
        (['weight'], tensor([0.5000]))
    """

    def __init__(self, units: Mapping[str, int]) -> None:
        self.units = units
        self._seen: dict[str, int] = {}
        self._streaks: dict[tuple[str, ...], Tensor] = {}
        self._others: dict[str, Tensor] = {}  # of weights that the newest step has not judged

    @torch.no_grad()
    def update(self, rows: Mapping[tuple[str, ...], Tensor]) -> tuple[list[str], Tensor]:
        """Takes one recorded step.

        Args:
            rows: Names of weights with equally many units to a number per weight and unit, shape ``[weights, units]``,
                that is zero where its gradient is. What is not in it is not judged by this step.

        Returns:
            The weights that have been seen often enough, and the share of their units that are dead.
        """
        if rows.keys() != self._streaks.keys():
            self._regroup(rows)
        known: list[str] = []
        shares = []
        for names, sizes in rows.items():
            streaks = self._streaks[names] = (self._streaks[names] + 1) * (sizes == 0)
            seen = [self._seen.get(name, 0) + 1 for name in names]
            self._seen.update(zip(names, seen, strict=True))
            often = [place for place, times in enumerate(seen) if times >= DEAD_WINDOW]
            if often:
                known += [names[place] for place in often]
                share = (streaks >= DEAD_WINDOW).view(torch.uint8).sum(1, dtype=torch.int32) / streaks.shape[1]
                shares.append(share if len(often) == len(names) else share[often])
        return known, pack(shares).float()

    def _regroup(self, rows: Mapping[tuple[str, ...], Tensor]) -> None:
        """Puts the streaks beside each other as the weights of this step are."""
        for names, streaks in self._streaks.items():
            self._others.update(zip(names, streaks.unbind(), strict=True))
        self._streaks = {
            names: torch.stack(
                [self._others.pop(name, torch.zeros_like(row)) for name, row in zip(names, sizes.unbind(), strict=True)]
            )
            for names, sizes in rows.items()
        }


@torch.no_grad()
def row_share(gradient: Tensor) -> Tensor:
    """The share of vectors along the last dimension that are not zero, 0-dim.

    Example:
        >>> row_share(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        tensor(0.5000)
    """
    return (gradient.abs().amax(-1) != 0).float().mean()


@torch.no_grad()
def unit_sizes(gradients: Stacks, unit_dims: Mapping[int, int]) -> list[tuple[list[int], Tensor]]:
    """For every unit of some weights the largest magnitude of its gradient, weights with as many units side by side.

    Args:
        gradients: All gradients.
        unit_dims: Place of a weight to the dimension that counts its layer's units; sparse ones are left out.

    Returns:
        Places of weights, and a tensor of shape ``[weights, units]``.

    Example:
        >>> unit_sizes(Stacks([torch.ones(1), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]), {1: 0})
        [([1], tensor([[0., 1.]]))]
    """
    found: list[tuple[list[int], Tensor]] = []
    for places, rows in zip(gradients.places, gradients.rows, strict=True):
        if all(unit_dims.get(place) == 0 for place in places):
            units = gradients.tensors[places[0]].shape[0]
            found.append((places, largest(real_values(rows).reshape(len(places), units, -1), 2)))
    done = {place for places, _ in found for place in places}
    alike: dict[tuple[torch.device, torch.dtype, int], list[tuple[int, Tensor, Tensor]]] = {}
    for place, dim in unit_dims.items():
        gradient = gradients.tensors[place]
        if place not in done and gradient.numel() and not gradient.is_sparse:
            values = real_values(gradient)
            by_unit = (values.movedim(dim, 0) if dim else values).flatten(1)
            high, low = by_unit.amax(1), by_unit.amin(1)
            alike.setdefault((high.device, high.dtype, len(high)), []).append((place, high, low))
    for one in alike.values():
        highs, lows = torch.stack([high for _, high, _ in one]), torch.stack([low for *_, low in one])
        found.append(([place for place, *_ in one], torch.maximum(highs, -lows)))
    return found
