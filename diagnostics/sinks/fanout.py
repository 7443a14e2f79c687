"""Several sinks as one; a sink that fails is switched off and the others go on."""

from __future__ import annotations

from collections.abc import Sequence

from diagnostics.sinks import Event, Sink
from diagnostics.sinks.console import ConsoleSink
from diagnostics.sinks.runlog import RunLogSink
from diagnostics.sinks.wandb import WandbSink, active_run


class Fanout:
    """Hands every event to every sink.

    Args:
        sinks: The sinks; ``"auto"`` is the console, and W&B where a run is active.

    Raises:
        TypeError: If one of them is no sink.

    Example:
        >>> from diagnostics.sinks.memory import MemorySink
        >>> memory = MemorySink()
        >>> Fanout([memory]).write("anything")
        []
        >>> memory.events
        ['anything']
    """

    def __init__(self, sinks: Sequence[Sink] | str = "auto") -> None:
        given = [sinks] if isinstance(sinks, str) else list(sinks)
        self._sinks = _automatic() if given == ["auto"] else [sink for sink in given if isinstance(sink, Sink)]
        if len(self._sinks) < len(given):
            wrong = next(sink for sink in given if not isinstance(sink, Sink))
            raise TypeError(f"sinks must be 'auto' or a list of objects with write and close; got {wrong!r}.")
        for log in [sink.path for sink in self._sinks if isinstance(sink, RunLogSink)][:1]:
            for sink in self._sinks:
                if isinstance(sink, WandbSink):
                    sink.share_run_log(log)

    def write(self, event: Event) -> list[str]:
        """Hands the event on; returns a sentence for each sink that failed and was switched off."""
        return self._each("write", event)

    def close(self) -> list[str]:
        """Closes all sinks; returns a sentence for each that failed."""
        failures = self._each("close")
        self._sinks.clear()
        return failures

    def _each(self, method: str, *arguments: Event) -> list[str]:
        failures = []
        for sink in tuple(self._sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # noqa: BLE001, PERF203 -- a full disk or a lost server must not end the training
                self._sinks.remove(sink)
                reason = f"{type(error).__name__}: {error}"
                failures.append(f"{type(sink).__name__} failed and was switched off; training goes on ({reason}).")
        return failures


def _automatic() -> list[Sink]:
    sinks: list[Sink] = [ConsoleSink()]
    if active_run() is not None:
        sinks.append(WandbSink())
    return sinks
