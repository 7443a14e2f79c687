"""What a Monitor does as one of several ranks: compares its replica with the others', and decides together with them.

A rank on its own decides nothing that the others would have to know: to record densely, or to raise, is a wish that
goes with the next recorded step's reduction, and that all ranks then fulfil.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from diagnostics import statistics
from diagnostics.contract.acts import Compared
from diagnostics.distributed import Ranks, relative_difference
from diagnostics.monitor.catalogue import Catalogue
from diagnostics.monitor.observation import Observation
from diagnostics.monitor.schedule import Schedule
from diagnostics.records import ContractError, DiagnosisError, StepRecord
from diagnostics.statistics.reading import Reader, Reading

ROUNDING = 1e-4
"""Relative difference of equal norms: a thousand times the resolution of float32, in which most are accumulated."""
NOISE = 1e-7
"""By how much a gradient may differ, relative to the largest: before a normalisation a bias has rounding for one."""

_HEADER = 5  # step, optimizer, wish to record densely, wish to raise, leaving
_LEAVING = (0.0, 0.0, 0.0, 0.0, 1.0)
_COLUMNS = 3  # that a fingerprint has


class Replicas:
    """The other ranks, as far as there are any.

    Args:
        group: The process group, or None: then nothing is done and nothing costs.
        catalogue: The parameters.
        reader: Who brings the numbers.
        schedule: Is told of alarms.
        warn: Says a sentence to the user.
    """

    def __init__(
        self,
        group: Any,
        catalogue: Catalogue,
        reader: Reader,
        schedule: Schedule,
        warn: Callable[[str], None],
    ) -> None:
        self._reader = reader
        self._schedule = schedule
        self._warn = warn
        tensors = catalogue.tensors()
        self._tolerances = [_tolerance(one.dtype) for one in tensors] if group else []
        self._ranks = Ranks(group, dict(zip(catalogue.names, tensors, strict=True))) if group else None
        self._met = False
        self._asked: Reading | None = None
        self._wish = False
        self._held: ContractError | DiagnosisError | None = None
        self._raise = False

    @property
    def active(self) -> bool:
        """Whether there are others to go by."""
        return self._ranks is not None

    def ask(self, observation: Observation, step: int, place: int) -> None:
        """Compares a recorded step before it is taken: the same number of times on every rank.

        Args:
            observation: What was measured.
            step: The step's number.
            place: Which of the optimizers.
        """
        if self._ranks is None or not observation.recorded:
            return
        if not self._met and not self._meet(self._ranks):
            return
        if not self._ranks.goes_on():
            self._ranks = None
            return
        header = (float(step), float(place), float(self._wish), float(self._held is not None), 0.0)
        numbers = []
        for column in observation.fingerprint():
            zero = next(iter(column.values()), torch.zeros(())).new_zeros(())
            numbers += [column.get(index, zero) for index in range(len(self._tolerances))]
        self._asked = self._reader.ask(self._ranks.extremes(header, numbers))
        self._wish = False

    def settle(self, observation: Observation, step: int) -> None:
        """Takes what was reduced: what differs, and what a rank wishes."""
        reading, self._asked = self._asked, None
        if reading is None or self._ranks is None:
            return
        values = reading.values
        largest, smallest = values[: len(values) // 2], [-value for value in values[len(values) // 2 :]]
        if largest[_HEADER - 1]:  # a rank has left
            self._ranks = None
            return
        if largest[:2] != smallest[:2]:
            steps = (int(smallest[0]), int(largest[0]))
            observation.compared = Compared(self._ranks.number, steps=steps)
            self._ranks = None
            return
        if largest[2]:
            self._schedule.alarm(step)
        self._raise = largest[3] > 0
        gradients, weights = self._differing(largest[_HEADER:], smallest[_HEADER:])
        observation.compared = Compared(self._ranks.number, gradients, weights)

    def alarm(self, step: int) -> None:
        """Records the steps after this one, or wishes to."""
        if self._ranks is None:
            self._schedule.alarm(step)
        else:
            self._wish = True

    @contextmanager
    def raising_together(self, record: StepRecord) -> Iterator[None]:
        """What is raised inside is raised on all ranks: now if all of them know of it, else at the next recorded step.

        Args:
            record: The step that is told of.
        """
        try:
            yield
        except (ContractError, DiagnosisError) as error:
            known = any(one.rule == "rank_divergence" and one.count == 1 for one in record.violations)
            if self._ranks is None or (known and isinstance(error, ContractError)):
                raise
            self._held = self._held or error
        if self._raise:
            self._raise = False
            self._raise_held(ContractError("Another rank stopped the training: see what it says."))

    def close(self, status: str) -> None:
        """After the last step nobody waits for anybody: raises what was to be raised with the others."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            with suppress(RuntimeError):  # the group is gone, or another rank is
                ranks.leave(_LEAVING, _COLUMNS * len(self._tolerances))
        if status in ("finished", "stopped"):
            self._raise_held(None)

    def _raise_held(self, otherwise: ContractError | None) -> None:
        error, self._held = self._held or otherwise, None
        if error is not None:
            raise error

    def _meet(self, ranks: Ranks) -> bool:
        self._met = ranks.agree()
        if not self._met:
            self._ranks = None
            self._warn(
                f"Replicas are not compared, since not all of the {ranks.number} ranks have a Monitor on the same "
                "parameters: make one on every rank, or pass process_group=False."
            )
        return self._met

    def _differing(
        self, largest: Sequence[float], smallest: Sequence[float]
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Which gradients and which weights differ, and by how much."""
        count = len(self._tolerances)
        columns = [values[place : place + count] for place in (0, count, 2 * count) for values in (largest, smallest)]
        noise = NOISE * max(filter(math.isfinite, columns[0]), default=0.0)
        gradients, weights = {}, {}
        for index, (tolerance, *measured) in enumerate(zip(self._tolerances, *columns, strict=True)):
            high, low, norm, least_norm, top, bottom = measured
            apart = relative_difference(high, low)
            if apart > tolerance and high - low > noise:
                gradients[index] = apart
            turned = (top - bottom) / norm if 0 < norm < math.inf else 0.0
            apart = max(relative_difference(norm, least_norm), turned)
            if apart > tolerance:
                weights[index] = apart
        return gradients, weights


def _tolerance(dtype: torch.dtype) -> float:
    return max(ROUNDING, 2 * statistics.resolution(dtype)) if dtype.is_floating_point else ROUNDING
