"""Sinks: where records go. Two methods, and many sinks compose.

A sink may do anything with what it is given except change the training run: the Monitor switches off one that raises,
with one warning, and goes on.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

from diagnostics.records import RunEnd, RunInfo, StepRecord, Violation

Event: TypeAlias = RunInfo | StepRecord | Violation | RunEnd


@runtime_checkable
class Sink(Protocol):
    """Takes a RunInfo first, then records and violations in order, then a RunEnd; ``close`` is called once, last.

    A StepRecord may arrive one step late. Its own violations and diagnoses are inside it; a Violation comes on its own
    only where no step is left to carry it (found at close).

    Example:
        >>> class Printer:
        ...     def write(self, event: Event) -> None:
        ...         print(type(event).__name__)
        ...     def close(self) -> None: ...
        >>> isinstance(Printer(), Sink)
        True
    """

    def write(self, event: Event) -> None:
        """Takes one event."""
        ...

    def close(self) -> None:
        """Flushes and releases what the sink holds."""
        ...
