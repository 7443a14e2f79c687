"""MNIST and CIFAR-10 as torchvision has them: the extra ``vision``; downloaded once."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.trainers.tasks import Batch, Classification, Inputs, shuffled

HELD_OUT_BATCH = 1000  # images evaluated together: bounds the memory


class _Vision(Classification):
    """A data set of torchvision. Its own test images are held out, and it keeps images as bytes, channels last or none.

    Pixels are centred and scaled by the mean and the standard deviation over the training pixels of their channel.
    """

    name: str
    inputs: Inputs
    outputs = 10
    dataset: str  # its class in torchvision.datasets

    def __init__(self, *, folder: str = "~/.cache/torchvision", download: bool = True) -> None:
        self._training = self._load(folder, train=True, download=download)
        self._held_out = self._load(folder, train=False, download=download)
        pixels = self._training[0].float()
        self._mean = pixels.mean(dim=(0, 2, 3), keepdim=True)
        self._deviation = pixels.std(dim=(0, 2, 3), keepdim=True)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Shuffled training batches without end; each epoch has its own order and leaves out an incomplete last batch.

        Args:
            batch_size: Examples per batch; at most the number of training examples.
            seed: Decides the order.

        Raises:
            ValueError: There are fewer training examples than ``batch_size``.
        """
        batches = shuffled(*self._training, batch_size, seed, self.name)
        return ((self._scaled(images), labels) for images, labels in batches)

    def held_out(self) -> Iterator[Batch]:
        """The test images, 1,000 at a time."""
        images, labels = self._held_out
        for some, theirs in zip(torch.split(images, HELD_OUT_BATCH), torch.split(labels, HELD_OUT_BATCH), strict=True):
            yield self._scaled(some), theirs

    def _scaled(self, images: Tensor) -> Tensor:
        """Numbers of a batch; the whole data set stays in bytes, which take a quarter of the memory."""
        return (images.float() - self._mean) / self._deviation

    def _load(self, folder: str, *, train: bool, download: bool) -> Batch:
        datasets = _datasets(self.dataset)
        place = Path(folder).expanduser()
        try:
            data = getattr(datasets, self.dataset)(root=str(place), train=train, download=download)
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            tried = "could not be downloaded" if download else "was not to be downloaded"
            message = (
                f"{self.dataset} is not in {place} and {tried} ({reason}); put its files there or use task=digits."
            )
            raise ConnectionError(message) from error
        channels, height, width = self.inputs.shape
        images = torch.as_tensor(data.data).reshape(-1, height, width, channels)
        return images.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(data.targets).long()


class MNIST(_Vision):
    """70,000 grey images of handwritten digits, 28x28, of which 10,000 are held out.

    Args:
        folder: Where the files are kept; ``~`` stands for the home folder.
        download: Whether to fetch what is not there.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ConnectionError: The files are not there and cannot be fetched.

    Example:
        >>> print(MNIST.inputs)
        images of 1x28x28
    """

    name = "mnist"
    inputs = Inputs("images", (1, 28, 28))
    dataset = "MNIST"


class CIFAR10(_Vision):
    """60,000 colour images in ten classes, 32x32, of which 10,000 are held out.

    Args:
        folder: Where the files are kept; ``~`` stands for the home folder.
        download: Whether to fetch what is not there.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ConnectionError: The files are not there and cannot be fetched.

    Example:
        >>> print(CIFAR10.inputs)
        images of 3x32x32
    """

    name = "cifar10"
    inputs = Inputs("images", (3, 32, 32))
    dataset = "CIFAR10"


def _datasets(name: str) -> Any:
    try:
        return import_module("torchvision.datasets")
    except ModuleNotFoundError as error:
        missing = f"{name} comes with torchvision, which is not installed"
        message = f'{missing}; pip install "training-diagnostics[vision]".'
        raise ModuleNotFoundError(message, name=error.name) from error
