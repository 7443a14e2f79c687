"""The tasks: what is held out is fixed, what is generated is what the paper describes, what is missing is said."""

import itertools
import re
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from diagnostics.cli import assemble
from diagnostics.configs import CONF, ConfigurationError, resolve
from diagnostics.trainers import text
from diagnostics.trainers.sequences import Adding, TemporalOrder
from diagnostics.trainers.tasks import Digits, Inputs
from diagnostics.trainers.text import PySource
from diagnostics.trainers.vision import CIFAR10, MNIST

GENERATED = [TemporalOrder, Adding]


def built(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return assemble(resolve(compose("train", overrides=[*overrides, "trainer.device=cpu"])))


def held_out(task):
    return [torch.cat(tensors) for tensors in zip(*task.held_out(), strict=True)]


def rows(sequences):
    return {tuple(row) for row in sequences.flatten(1).tolist()}


@pytest.fixture(scope="module")
def pysource():
    return PySource(context=32)


# ── every task ──


@pytest.mark.parametrize("make", [Digits, TemporalOrder, Adding, lambda: PySource(context=8)])
def test_a_task_feeds_what_it_says_and_the_same_seed_gives_the_same_batches(make):
    task = make()
    (first, targets), _ = batches = list(itertools.islice(task.batches(6, seed=3), 2))
    again = list(itertools.islice(make().batches(6, seed=3), 2))
    assert first.shape == (6, *task.inputs.shape)
    assert len(targets) == 6
    assert all(
        torch.equal(a, b) for one, other in zip(batches, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert not torch.equal(first, next(task.batches(6, seed=4))[0])


@pytest.mark.parametrize("make", [*GENERATED, lambda: PySource(context=8)])
def test_what_is_held_out_never_changes_and_moves_no_other_random_number(make):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    inputs, targets = held_out(make())
    next(make().batches(4, seed=0))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(held_out(make())[0], inputs)
    assert torch.equal(held_out(make())[1], targets)


@pytest.mark.parametrize("make", [*GENERATED, lambda: PySource(context=8)])
def test_a_batch_of_none_is_refused(make):
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1 for \w+; got 0\.$"):
        make().batches(0, seed=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TemporalOrder(lag=3), "lag must be at least 4 steps; got 3."),
        (lambda: Adding(lag=2), "lag must be at least 3 steps; got 2."),
        (lambda: PySource(context=0), "context must be at least 1 byte and shorter than the held-out text; got 0."),
        (
            lambda: Inputs("pictures", (1, 2, 3)),
            "kind must be one of vectors, images, sequences, tokens; got 'pictures'.",
        ),
    ],
)
def test_a_task_that_cannot_be_is_refused_in_one_sentence(make, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make()


# ── generated ──


@pytest.mark.parametrize("lag", [4, 5, 10, 40])
def test_temporal_order_is_the_paper_s(lag):
    task = TemporalOrder(lag=lag)
    sequences, classes = next(task.batches(500, seed=0))
    assert torch.equal(sequences.sum(2), torch.ones(500, 5 * lag // 2))
    symbols = sequences.argmax(2)
    assert (symbols[:, 0] == 6).all()
    assert (symbols[:, -1] == 7).all()
    assert symbols[:, 1:-1].max() < 6
    for row, expected in zip(symbols.tolist(), classes.tolist(), strict=True):
        (first, one), (second, two) = [(step, symbol) for step, symbol in enumerate(row) if symbol in {4, 5}]
        assert ["XX", "XY", "YX", "YY"][expected] == "XY"[one - 4] + "XY"[two - 4]
        assert first <= lag / 2 < second
        assert len(row) - 1 - second >= lag


def test_the_paper_s_lags_give_sequences_of_its_length():
    assert TemporalOrder(lag=40).inputs.shape == (100, 8)
    assert Adding(lag=50).inputs.shape == (100, 2)


@pytest.mark.parametrize("lag", [3, 4, 10, 50])
def test_adding_is_the_paper_s(lag):
    task = Adding(lag=lag)
    sequences, targets = next(task.batches(500, seed=0))
    numbers, markers = sequences.unbind(2)
    assert numbers.abs().max() <= 1
    assert (markers[:, [0, -1]] == -1).all()
    marked = markers == 1
    assert marked.sum(1).tolist() == [2] * 500
    assert set(markers[:, 1:-1].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(targets[:, 0], 0.5 + (numbers * marked).sum(1) / 4)
    steps = marked.nonzero()[:, 1].view(500, 2)
    assert steps.min() >= 1
    assert steps.max() < lag
    assert (steps[:, 0] < 10).all()
    assert set(steps.flatten().tolist()) == set(range(1, lag))


def test_saying_one_half_gives_the_loss_that_the_docstring_of_adding_names():
    task = Adding(lag=10)
    _, targets = next(task.batches(200_000, seed=0))
    assert task.loss(torch.full_like(targets, 0.5), targets).item() == pytest.approx(1 / 24, rel=0.01)
    assert task.correct(targets + 0.039, targets) == len(targets)
    assert task.correct(targets + 0.041, targets) == 0


@pytest.mark.parametrize("make", GENERATED)
def test_training_never_shows_a_held_out_sequence(make):
    seen = rows(torch.cat([sequences for sequences, _ in itertools.islice(make().batches(500, seed=0), 4)]))
    sequences, _ = held_out(make())
    assert len(rows(sequences)) == len(sequences) == 1000
    assert seen.isdisjoint(rows(sequences))


# ── the standard library ──


def test_bytes_are_those_of_the_library_and_the_targets_are_the_next_ones(pysource):
    library = b"".join(path.read_bytes() for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    windows, following = next(pysource.batches(8, seed=0))
    for window, target in zip(windows.tolist(), following.tolist(), strict=True):
        assert window[1:] == target[:-1]
        assert bytes(window) in library
    assert windows.dtype == torch.long


def test_no_module_is_both_trained_on_and_held_out_whatever_the_order_of_the_files():
    training, held = text.split_modules(text._modules())
    assert set(training).isdisjoint(held)
    assert 0.05 < len(held) / (len(training) + len(held)) < 0.2
    assert text.split_modules(text._modules()[::-1]) == (training, held)


def test_a_module_that_another_python_adds_moves_no_other():
    training, held = text.split_modules(text._modules())
    fewer = [path for path in text._modules() if path not in {training[1], held[1]}]
    assert text.split_modules(fewer) == (training[:1] + training[2:], held[:1] + held[2:])


def test_the_held_out_windows_speak_for_the_whole_held_out_text(pysource):
    windows, _ = held_out(pysource)
    assert len(windows) == text.HELD_OUT_WINDOWS
    whole = bytes(pysource._held_out_text.tolist())
    assert whole.startswith(bytes(windows[0].tolist()))
    assert whole[:-1].endswith(bytes(windows[-1].tolist()))


def test_an_example_with_several_predictions_counts_by_the_share_that_is_right(pysource):
    _, targets = next(pysource.batches(3, seed=0))
    scores = torch.nn.functional.one_hot(targets, 256).float()
    assert pysource.correct(scores, targets).item() == 3
    scores[0] = scores[0].roll(1, dims=-1)
    assert pysource.correct(scores, targets).item() == 2
    expected = torch.nn.functional.cross_entropy(scores.view(-1, 256), targets.reshape(-1))
    assert pysource.loss(scores, targets) == expected


def test_a_python_without_sources_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _name: str(tmp_path))
    said = f"pysource reads the sources of Python's standard library; there are none in {tmp_path}."
    with pytest.raises(ValueError, match=re.escape(said)):
        PySource()


# ── torchvision, of which the tests bring a stand-in: what it stores, in small ──


class FakeMNIST:
    shape = (28, 28)

    def __init__(self, root, train, download):
        self.asked = root, train, download
        generator = torch.Generator().manual_seed(int(train))
        count = 90 if train else 30
        self.data = torch.randint(0, 256, (count, *self.shape), dtype=torch.uint8, generator=generator)
        self.targets = torch.arange(count) % 10


class FakeCIFAR10(FakeMNIST):
    shape = (32, 32, 3)

    def __init__(self, root, train, download):
        super().__init__(root, train, download)
        self.data, self.targets = self.data.numpy(), self.targets.tolist()


def stand_in(monkeypatch, **datasets):
    module = types.ModuleType("torchvision.datasets")
    for name, dataset in datasets.items():
        setattr(module, name, dataset)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.parametrize(("make", "fake"), [(MNIST, FakeMNIST), (CIFAR10, FakeCIFAR10)])
def test_torchvision_s_images_come_channels_first_and_scaled_by_the_training_pixels(monkeypatch, make, fake):
    stand_in(monkeypatch, MNIST=FakeMNIST, CIFAR10=FakeCIFAR10)
    task = make(folder="here", download=False)
    images, _ = next(task.batches(90, seed=0))
    assert images.shape == (90, *task.inputs.shape)
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(task.inputs.shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.ones(task.inputs.shape[0]), atol=1e-5, rtol=0)
    stored = torch.as_tensor(fake("here", False, False).data).float().view(30, *make.inputs.shape[1:], -1)
    tests, classes = held_out(task)
    assert classes.tolist() == [i % 10 for i in range(30)]
    of_training = torch.as_tensor(fake("here", True, False).data).float().reshape(-1, task.inputs.shape[0])
    expected = (stored - of_training.mean(0)) / of_training.std(0)
    torch.testing.assert_close(tests.permute(0, 2, 3, 1), expected)


def test_torchvision_gets_the_folder_with_the_home_folder_filled_in(monkeypatch):
    asked = []

    class Asking(FakeMNIST):
        def __init__(self, **keywords):
            asked.append(keywords)
            super().__init__(**keywords)

    stand_in(monkeypatch, MNIST=Asking)
    MNIST(folder="~/pictures")
    assert [(one["train"], one["download"]) for one in asked] == [(True, True), (False, True)]
    assert {one["root"] for one in asked} == {str(Path.home() / "pictures")}


@pytest.mark.parametrize(
    ("error", "download", "said"),
    [
        (
            OSError("<urlopen error [Errno -2] Name or service not known>"),
            True,
            (
                "MNIST is not in /data and could not be downloaded "
                "(<urlopen error [Errno -2] Name or service not known>); put its files there or use task=digits."
            ),
        ),
        (
            RuntimeError("Dataset not found. You can use download=True to download it"),
            False,
            (
                "MNIST is not in /data and was not to be downloaded (Dataset not found. You can use download=True to "
                "download it); put its files there or use task=digits."
            ),
        ),
    ],
)
def test_a_data_set_that_cannot_be_had_is_said_in_one_sentence(monkeypatch, error, download, said):
    def failing(**_):
        raise error

    stand_in(monkeypatch, MNIST=failing)
    with pytest.raises(ConnectionError, match=f"^{re.escape(said)}$"):
        MNIST(folder="/data", download=download)


@pytest.mark.parametrize(("task", "name"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_without_torchvision_the_configuration_says_what_to_install(monkeypatch, task, name):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    said = f'task: {name} comes with torchvision, which is not installed; pip install "training-diagnostics[vision]".'
    with pytest.raises(ConfigurationError, match=f"^{re.escape(said)}$"):
        built(f"task={task}")


@pytest.mark.parametrize("task", ["mnist", "cifar10"])
def test_with_torchvision_the_configuration_builds_the_task(monkeypatch, task, tmp_path):
    stand_in(monkeypatch, MNIST=FakeMNIST, CIFAR10=FakeCIFAR10)
    assert built(f"task={task}", f"task.folder={tmp_path}", "model=cnn").task.name == task
