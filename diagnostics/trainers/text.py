"""Next-byte prediction on the text of Python's own standard library, which every machine has."""

from __future__ import annotations

import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from diagnostics.trainers.tasks import Batch, Classification, Inputs

HOLD_OUT_ONE_IN = 10  # modules; about half a megabyte
TRAINING_BYTES = 2_000_000  # the first modules in the order of their checksums; read in a tenth of a second
HELD_OUT_WINDOWS = 256  # evenly spaced over the held-out text, so that all of its modules have a say


class PySource(Classification):
    """Which byte comes next in the source of Python's standard library.

    Tokens are bytes. The modules are the library's ``*.py`` files, without packages. A checksum of a module's name
    decides whether it is held out and where it stands, so that a module that another Python adds moves no other. The
    text itself is that of the running Python: losses compare within one Python version.

    Args:
        context: Bytes that one example has, at least 1; each is followed by one to predict.

    Raises:
        ValueError: The context is below 1 or longer than the held-out text, or this Python comes without sources.

    Example:
        >>> task = PySource(context=16)
        >>> bytes_in, next_bytes = next(task.batches(batch_size=4, seed=0))
        >>> tuple(bytes_in.shape), bool((bytes_in[:, 1:] == next_bytes[:, :-1]).all())
        ((4, 16), True)
    """

    name = "pysource"
    outputs = 256

    def __init__(self, *, context: int = 64) -> None:
        training, held_out = split_modules(_modules())
        self._training = _text(training)[:TRAINING_BYTES]
        self._held_out_text = _text(held_out)
        if not 1 <= context < min(len(self._training), len(self._held_out_text)):
            raise ValueError(f"context must be at least 1 byte and shorter than the held-out text; got {context}.")
        self.inputs = Inputs("tokens", (context,))

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Windows that begin anywhere in the training text, without end.

        Args:
            batch_size: Windows per batch.
            seed: Decides where they begin.

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 for {self.name}; got {batch_size}.")
        generator = torch.Generator().manual_seed(seed)
        ends = len(self._training) - self.inputs.features
        return iter(
            lambda: self._windows(self._training, torch.randint(0, ends, (batch_size,), generator=generator)), None
        )

    def held_out(self) -> Iterator[Batch]:
        """256 windows evenly spaced over the held-out text, 64 at a time."""
        last = len(self._held_out_text) - self.inputs.features - 1
        for starts in torch.split(torch.linspace(0, last, HELD_OUT_WINDOWS, dtype=torch.float64).long(), 64):
            yield self._windows(self._held_out_text, starts)

    def _windows(self, text: torch.Tensor, starts: torch.Tensor) -> Batch:
        windows = text[starts[:, None] + torch.arange(self.inputs.features + 1)].long()
        return windows[:, :-1], windows[:, 1:]


def split_modules(modules: list[Path]) -> tuple[list[Path], list[Path]]:
    """The modules to train on and those that are held out, each in the order of the checksums of their names.

    Example:
        >>> training, held_out = split_modules([Path("glob.py"), Path("heapq.py"), Path("ast.py")])
        >>> [path.stem for path in training], [path.stem for path in held_out]
        (['heapq', 'ast'], ['glob'])
    """
    ordered = sorted(modules, key=_checksum)
    held_out = [path for path in ordered if _checksum(path) % HOLD_OUT_ONE_IN == 0]
    return [path for path in ordered if path not in held_out], held_out


def _checksum(path: Path) -> int:
    return zlib.crc32(path.stem.encode())


def _modules() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    # A distributor may lay other files beside them: the build's variables, a sitecustomize.
    found = [path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names]
    if not all(split_modules(found)):
        raise ValueError(f"pysource reads the sources of Python's standard library; there are none in {folder}.")
    return found


def _text(modules: list[Path]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in modules)), dtype=torch.uint8)
