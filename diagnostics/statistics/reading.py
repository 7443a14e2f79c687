"""Numbers on their way from the device to the host: all that a step asks for, by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from diagnostics.statistics import pack


class _Source(Protocol):
    """Who brings numbers."""

    def read(self) -> None:
        """Brings them."""


class Reading:
    """Numbers on their way from the device.

    Looking at ``values`` brings them, and all others that were asked for with them, unless they have come already.
    """

    def __init__(self, source: _Source, numel: int) -> None:
        self.source: _Source | None = source
        self._values: list[float] | None = None
        self.numel = numel

    @property
    def values(self) -> list[float]:
        """The numbers, flat."""
        if self._values is None and self.source is not None:
            self.source.read()
        assert self._values is not None
        return self._values

    def bring(self, values: list[float]) -> None:
        """The numbers have come."""
        self._values, self.source = values, None  # or each would keep all that came with it


class Reader:
    """Collects small tensors and brings all of them to the host by one copy: the only place where the host waits.

    Example:
        >>> reader = Reader()
        >>> first, second = reader.ask(torch.ones(2)), reader.ask(torch.tensor(3))
        >>> second.values, first.values, reader.copies
        ([3.0], [1.0, 1.0], 1)
    """

    def __init__(self) -> None:
        self.copies = 0
        self._asked: list[tuple[Tensor, Reading]] = []

    def ask(self, tensor: Tensor) -> Reading:
        """Takes a tensor whose values are wanted."""
        reading = Reading(self, tensor.numel())
        self._asked.append((tensor, reading))
        return reading

    def read(self) -> None:
        """Brings everything that was asked for."""
        self.depart(wait=True).read()

    def depart(self, *, wait: bool = False) -> Parcel:
        """Sends everything that was asked for on its way, without waiting for it.

        Args:
            wait: It is read at once, so that it need not be laid aside.
        """
        asked, self._asked = self._asked, []
        self.copies += 1
        return Parcel(asked, wait=wait)


class Parcel:
    """Numbers that have left the device together.

    On CUDA they are copied into pinned memory behind whatever the device still has to do; torch keeps such memory and
    gives it out again, so nothing is allocated once a few steps are over. On a CPU they are a copy already.

    Args:
        asked: The tensors, and who waits for their values.
        wait: They are read at once.

    Example:
        >>> reader = Reader()
        >>> one = reader.ask(torch.ones(2))
        >>> parcel = reader.depart()
        >>> parcel.arrived, one.values
        (True, [1.0, 1.0])
    """

    def __init__(self, asked: Sequence[tuple[Tensor, Reading]], *, wait: bool) -> None:
        self._readings = [reading for _, reading in asked]
        self._values = pack([tensor for tensor, _ in asked])
        self._event: torch.cuda.Event | None = None
        for reading in self._readings:
            reading.source = self
        if self._values.is_cuda and not wait:
            stream = torch.cuda.current_stream(self._values.device)
            self._values = self._values.to("cpu", non_blocking=True)  # into pinned memory
            self._event = stream.record_event()

    @property
    def arrived(self) -> bool:
        """Whether reading them would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> None:
        """Brings the numbers, once the device has got so far."""
        if self._event is not None:
            self._event.synchronize()
        values, place = self._values.tolist(), 0
        for reading in self._readings:
            reading.bring(values[place : place + reading.numel])
            place += reading.numel
