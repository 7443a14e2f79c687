"""How far a run is: a bar on a terminal, one line per half minute where there is none."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

LINE_EVERY = 30.0  # seconds; a log file of an hour's run then has 120 lines


class Progress:
    """Counts steps towards a known number; a context manager.

    Args:
        steps: How many there will be.
        stream: Where to draw; standard error if None.
        clock: Seconds from an arbitrary start, never running backwards.

    Example:
        >>> import io
        >>> seconds = iter([0.0, 10.0, 31.0])
        >>> log = io.StringIO()
        >>> with Progress(2, log, clock=lambda: next(seconds)) as progress:
        ...     progress.advance(loss=2.5)
        ...     progress.advance(loss=2.25)
        >>> print(log.getvalue(), end="")
        step 2 of 2, loss 2.25, 0.1 steps per second
    """

    def __init__(self, steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps = steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = self._spoken = clock()
        self._done = 0
        self._bar = _bar(steps, self._stream)

    def advance(self, loss: float | None) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
            self._bar.update()
        elif (now := self._clock()) - self._spoken >= LINE_EVERY:
            self._spoken = now
            self._say(loss, now - self._started)

    def _say(self, loss: float | None, seconds: float) -> None:
        shown = "" if loss is None else f" loss {loss:.3g},"
        line = f"step {self._done} of {self._steps},{shown} {self._done / seconds:.1f} steps per second"
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Progress:  # noqa: PYI034 - Self came with Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Prints a line above the bar, where there is one; standard error if ``stream`` is None.

    Example:
        >>> import sys
        >>> write_line("vanishing since step 0", sys.stdout)
        vanishing since step 0
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        from tqdm import tqdm  # noqa: PLC0415 - a run without a terminal does without it

        tqdm.write(text, file=stream)
    else:
        print(text, file=stream, flush=True)


def _bar(steps: int, stream: TextIO) -> Any:
    # The jobs of a parallel sweep share one terminal: their bars would overwrite each other.
    if not stream.isatty() or multiprocessing.current_process().name != "MainProcess":
        return None
    from tqdm import tqdm  # noqa: PLC0415 - a run without a terminal does without it

    return tqdm(total=steps, file=stream, unit="step", dynamic_ncols=True, leave=False)
