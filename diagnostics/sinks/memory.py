"""Keeps everything in a list: for tests, notebooks and people who look at the end."""

from __future__ import annotations

from diagnostics.records import RunEnd, RunInfo, StepRecord, Violation
from diagnostics.sinks import Event


class MemorySink:
    """A list of all events, and the parts of it people ask for.

    Example:
        >>> sink = MemorySink()
        >>> sink.write(RunInfo(name="mlp"))
        >>> sink.info.name, sink.records
        ('mlp', [])
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        """Keeps the event."""
        self.events.append(event)

    def close(self) -> None:
        """Nothing to release."""

    @property
    def records(self) -> list[StepRecord]:
        """All step records."""
        return [event for event in self.events if isinstance(event, StepRecord)]

    @property
    def violations(self) -> list[Violation]:
        """Violations that no step could carry."""
        return [event for event in self.events if isinstance(event, Violation)]

    @property
    def info(self) -> RunInfo | None:
        """How the run began."""
        return next((event for event in self.events if isinstance(event, RunInfo)), None)

    @property
    def end(self) -> RunEnd | None:
        """How the run ended."""
        return next((event for event in self.events if isinstance(event, RunEnd)), None)
