"""The W&B sink says its part and costs the user of the run nothing; runs are real, offline or with a local server."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_offline import OfflineRun, offline_run
from wandb_server import client, wandb_server

from diagnostics.records import (
    ClipRecord,
    DepthFit,
    Diagnosis,
    DiagnosticsWarning,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    RunEnd,
    RunInfo,
    StepRecord,
    Verdict,
)
from diagnostics.sinks import Sink
from diagnostics.sinks.wandb import WandbSink, active_run, open_run
from diagnostics.sinks.wandb.values import profile

STEPS = 30
EVERY = 10
SUMMARY = {"verdict": "healthy", "severity": 0, "decades": 1.5, "violations": 0, "clip_fraction": 0.25}
END = RunEnd("finished", "", STEPS, Verdict("healthy", 0, "healthy"), SUMMARY)
INFO = RunInfo(
    "mlp",
    command="python train.py task.password=hunter2",
    overrides=("task.password=hunter2", "model.depth=3"),
    seed=0,
    device="cpu",
    versions={"torch": "2.13"},
    git={"commit": "1a2b", "dirty": False},
)


@pytest.fixture(autouse=True)
def _no_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")


def record(step: int, rms: tuple[float, ...] = (1e-3, 1e-2, 1e-1), **changes: Any) -> StepRecord:
    """Step number ``step``; each tenth is a recorded one."""
    recorded = step % EVERY == 0
    layers = [
        LayerRecord(
            Layer(depth, f"layers.{depth}", "Linear"),
            GradientStats(4, 2 * size, size) if recorded else None,
            GradientStats(4, 1.0, 0.5),
            update_ratio=1e-3 if recorded else None,
        )
        for depth, size in enumerate(rms)
    ]
    clip = ClipRecord("norm", 2.0, 1.0, 1.0 + step, 1 / (1.0 + step), applied=step > 0, total_norm_after=1.0)
    fit = DepthFit(-1.0, -1.0, 0.01, len(rms), len(rms)) if recorded else None
    return replace(StepRecord(step, clip, layers=Layers(layers), fit=fit, recorded=recorded), **changes)


def in_a_run_of_theirs(
    folder: Path,
    loop: Callable[[Any, Callable[[int], None]], None],
    config: dict[str, Any] | None = None,
    **options: Any,
) -> OfflineRun:
    """Runs the user's loop, which is handed the run and a function that stands for ``clip_and_step``."""
    quiet = wandb.Settings(silent=True, console="off")
    run = wandb.init(project="theirs", mode="offline", dir=str(folder), config=config, settings=quiet)
    sink = WandbSink(run, **options)
    sink.write(INFO)
    loop(run, lambda step: sink.write(record(step)))
    sink.write(END)
    sink.close()
    run.finish()
    return offline_run(Path(run.dir).parent)


def with_step(run: Any, clip_and_step: Callable[[int], None]) -> None:
    for step in range(STEPS):
        run.log({"mine": step / 10, "grad/mine": -step}, step=2 * step)
        clip_and_step(step)
        run.log({"mine_later": step}, step=2 * step)


def without_step(run: Any, clip_and_step: Callable[[int], None]) -> None:
    for step in range(STEPS):
        clip_and_step(step)
        run.log({"mine": step / 10, "grad/mine": -step, "mine_later": step})


def with_commit(run: Any, clip_and_step: Callable[[int], None]) -> None:
    for step in range(STEPS):
        run.log({"mine": step / 10, "grad/mine": -step}, commit=False)
        clip_and_step(step)
        run.log({"mine_later": step})


@pytest.mark.parametrize(("loop", "stride"), [(with_step, 2), (without_step, 1), (with_commit, 1)])
def test_no_value_of_the_user_is_lost_or_moved_and_every_step_of_ours_arrives(
    tmp_path: Path, loop: Callable[..., None], stride: int
) -> None:
    """The oracle is the same loop without a sink: value by value, row by row, in W&B's own file."""

    def alone(run: Any, _: Callable[[int], None]) -> None:
        loop(run, lambda _: None)

    plain, watched = in_a_run_of_theirs(tmp_path / "a", alone), in_a_run_of_theirs(tmp_path / "b", loop)
    for key in ("mine", "grad/mine", "mine_later"):
        assert len(plain.column(key)) == STEPS
        assert watched.column(key) == plain.column(key)
    expected = [(stride * step, 1.0 + step) for step in range(STEPS)]
    assert watched.column("grad/total_norm") == expected
    assert [value for _, value in watched.column("optim_step")] == list(range(STEPS))
    assert watched.column("depth/backward_slope") == [(stride * step, -1.0) for step in range(0, STEPS, EVERY)]
    more = {key for row in watched.rows[STEPS:] for key in row}
    assert not {key for key in more if not key.startswith(("_", "report/"))}


def test_in_a_run_of_theirs_only_keys_of_ours_get_an_axis_and_there_is_no_train(tmp_path: Path) -> None:
    found = in_a_run_of_theirs(tmp_path, with_commit)
    assert set(found.metrics.values()) == {"optim_step"}
    assert {key.split("/")[0] for key in found.metrics} == {"grad", "depth", "loop"}
    assert "grad/mine" not in found.metrics
    assert not any("*" in key or key.startswith("train/") for key in [*found.metrics, *found.rows[0]])


def test_a_user_who_seldom_logs_keeps_his_rows_and_gets_our_newest_values(tmp_path: Path) -> None:
    def seldom(run: Any, clip_and_step: Callable[[int], None]) -> None:
        for step in range(STEPS):
            clip_and_step(step)
            if step % 10 == 9:
                run.log({"mine": step})

    found = in_a_run_of_theirs(tmp_path, seldom)
    assert found.column("mine") == [(0, 9), (1, 19), (2, 29)]
    assert found.column("optim_step") == [(0, 9), (1, 19), (2, 29)]
    assert found.column("grad/total_norm") == [(0, 10.0), (1, 20.0), (2, 30.0)]
    assert found.column("depth/rms_000") == [(0, 1e-3), (1, 1e-3), (2, 1e-3)]


def test_a_user_who_never_logs_gets_one_row_at_the_end_and_the_summary(tmp_path: Path) -> None:
    def never(_: Any, clip_and_step: Callable[[int], None]) -> None:
        for step in range(STEPS):
            clip_and_step(step)

    found = in_a_run_of_theirs(tmp_path, never)
    assert found.column("optim_step") == [(0, STEPS - 1)]
    assert found.column("grad/total_norm") == [(0, float(STEPS))]
    assert found.summary["diagnosis/verdict"] == "healthy"


def test_the_config_of_the_user_is_never_overwritten(tmp_path: Path) -> None:
    theirs = {"lr": 0.1, "run_info": {"seed": "mine", "extra": [1]}}
    found = in_a_run_of_theirs(tmp_path / "a", with_commit, config=theirs)
    assert found.config["lr"] == 0.1
    assert found.config["run_info"] == {
        "seed": "mine",
        "extra": [1],
        "command": "python train.py task.password=(hidden)",
        "overrides": ["task.password=(hidden)", "model.depth=3"],
        "device": "cpu",
        "versions": {"torch": "2.13"},
        "git": {"commit": "1a2b", "dirty": False},
        "layers": ["layers.0", "layers.1", "layers.2"],
        "status": "finished",
    }
    taken = in_a_run_of_theirs(tmp_path / "b", with_commit, config={"run_info": "mine"})
    assert taken.config["run_info"] == "mine"
    assert taken.config["training_run_info"]["seed"] == 0


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    """A run of our own with everything in it, while an earlier job's run was left open."""
    folder = tmp_path_factory.mktemp("own")
    leaked = wandb.init(mode="offline", dir=str(folder / "leaked"), settings=wandb.Settings(silent=True, console="off"))
    config = {
        "optimizer": {"lr": 0.1},
        "diagnostics": {"every": 10},
        "task": {"password": "hunter2", "max_tokens": 512},
    }
    options = {"name": "depth=3 task.password=hunter2", "group": "sweep", "notes": "hi", "config": config}
    with open_run(project="ours", directory=folder, **options) as run:
        sink = WandbSink(run, own=True, per_layer=True, profile_every=2)
        sink.write(INFO)
        for step in range(STEPS):
            sink.write(record(step, loss=2.0 - step / 100, metrics={"train/accuracy": step / STEPS}))
        sink.write(record(30, rms=(math.nan, 0.0, math.inf), loss=math.nan))
        run.log({"eval/loss": 0.5})
        sink.write(END)
        sink.close()
    assert offline_run(Path(leaked.dir).parent).rows == []
    return offline_run(Path(run.dir).parent)


def test_in_a_run_of_our_own_each_step_is_a_row_with_the_keys_of_flat_and_the_loss(own_run: OfflineRun) -> None:
    rows = own_run.rows[:STEPS]
    for step, row in enumerate(rows):
        assert row["optim_step"] == row["_step"] == step
        assert row["train/loss"] == 2.0 - step / 100
        assert row["train/accuracy"] == step / STEPS
        flat = record(step).flat()
        assert {key: row[key] for key in flat} == flat
        assert ("depth/backward_slope" in row) == (step % EVERY == 0)
    every_prefix = ("grad", "depth", "loop", "layer_grad_rms", "train", "eval")
    assert own_run.metrics.items() >= {f"{prefix}/*": "optim_step" for prefix in every_prefix}.items()
    assert own_run.column("eval/loss") == [(31, 0.5)]


def test_what_is_not_finite_arrives_as_itself(own_run: OfflineRun) -> None:
    row = own_run.rows[30]
    assert math.isnan(row["train/loss"])
    assert math.isnan(row["depth/rms_000"])
    assert row["depth/rms_100"] == math.inf


def test_the_profile_is_one_histogram_with_a_bin_per_depth(own_run: OfflineRun) -> None:
    profiles = own_run.column("depth/profile")
    assert [step for step, _ in profiles] == [0, 20]
    assert profiles[0][1]["bins"] == [0, 1, 2, 3]
    assert profiles[0][1]["values"] == pytest.approx([17, 18, 19])


def test_a_profile_of_a_thousand_depths_has_at_most_512_bins_and_only_finite_heights() -> None:
    deep = (*(10.0 ** -(depth % 30) for depth in range(997)), math.nan, math.inf, 0.0)
    histogram = profile(record(0, rms=deep))["depth/profile"]
    assert len(histogram.histogram) == 512
    assert (histogram.bins[0], histogram.bins[-2]) == (0, 999)
    assert all(math.isfinite(height) and height >= 0 for height in histogram.histogram)
    assert profile(record(0, rms=(math.inf, math.nan, 0.0, 1.0)))["depth/profile"].histogram == [0, 0, 0, 20]
    assert profile(record(1)) == {}


def test_layers_have_keys_of_their_own_only_when_asked_for(own_run: OfflineRun, tmp_path: Path) -> None:
    assert own_run.column("layer_grad_rms/d002") == [(0, 0.1), (10, 0.1), (20, 0.1), (30, math.inf)]
    found = in_a_run_of_theirs(tmp_path, without_step)
    assert not any(key.startswith("layer_grad_rms") for row in found.rows for key in row)


def test_config_and_summary_of_a_run_of_our_own(own_run: OfflineRun) -> None:
    assert (own_run.project, own_run.group, own_run.exit_code) == ("ours", "sweep", 0)
    assert own_run.config["optimizer"] == {"lr": 0.1}
    assert own_run.config["diagnostics"] == {"every": 10}
    assert own_run.config["run_info"]["seed"] == 0
    assert own_run.config["run_info"]["layers"] == ["layers.0", "layers.1", "layers.2"]
    for key, value in SUMMARY.items():
        assert own_run.summary[f"diagnosis/{key}"] == value


def test_no_secret_reaches_the_file(own_run: OfflineRun) -> None:
    assert own_run.name == "depth=3 task.password=(hidden)"
    assert own_run.config["task"] == {"password": "(hidden)", "max_tokens": 512}
    assert "hunter2" not in own_run.text


def test_a_secret_on_the_command_line_is_not_stored_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "task.password=hunter2"])
    with open_run(project="ours", directory=tmp_path) as run:
        pass
    folder = Path(run.dir).parent
    assert "hunter2" not in offline_run(folder).text
    assert not [file for file in folder.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]


@pytest.mark.parametrize(
    ("error", "exit_code"), [(ValueError("x"), 1), (KeyboardInterrupt(), 1), (SystemExit(143), 1), (SystemExit(0), 0)]
)
def test_a_run_that_breaks_off_ends_as_failed_and_the_exception_goes_on(
    tmp_path: Path, error: BaseException, exit_code: int
) -> None:
    with pytest.raises(type(error)) as caught, open_run(project="ours", directory=tmp_path) as run:
        run.log({"train/loss": 1.0})
        raise error
    assert caught.value is error
    found = offline_run(Path(run.dir).parent)
    assert (found.exit_code, found.column("train/loss")) == (exit_code, [(0, 1.0)])
    assert active_run() is None


def test_a_finish_that_fails_is_said_and_hides_no_exception_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        dir = "wandb/files"

        def finish(self, exit_code: int) -> None:
            raise TimeoutError("upload took too long")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    with pytest.warns(DiagnosticsWarning, match="could not finish the run .TimeoutError: upload took too long.; what"):
        with open_run(project="ours", directory=tmp_path):
            pass
    with pytest.raises(ValueError, match="of the user"), open_run(project="ours", directory=tmp_path):
        raise ValueError("of the user")  # warnings are errors in this test, and still it is this one that comes out


ONLINE = """
from test_sinks_wandb import END, INFO, STEPS, record
from diagnostics.sinks.wandb import WandbSink, open_run, opening
opening.INIT_SECONDS = {seconds}
try:
    with open_run(project="ours", group="sweep", directory={folder!r}, mode="online", config={{"a": 1}}) as run:
        sink = WandbSink(run, own=True)
        for event in (INFO, *map(record, range(STEPS)), END):
            sink.write(event)
except ConnectionError as error:
    print(error)
"""


def online(url: str, folder: Path, seconds: int = 30) -> str:
    """What an online run prints."""
    return client(url, folder, "-c", ONLINE.format(folder=str(folder), seconds=seconds)).stdout


def test_an_online_run_delivers_rows_config_and_summary(tmp_path: Path) -> None:
    with wandb_server() as server:
        assert online(server.url, tmp_path) == ""  # the console is left alone
    assert [row["grad/total_norm"] for row in server.run.rows[:STEPS]] == [1.0 + step for step in range(STEPS)]
    assert [row["optim_step"] for row in server.run.rows[:STEPS]] == list(range(STEPS))
    assert server.run.rows[0].keys() >= record(0).flat().keys() | {"depth/profile"}
    assert server.run.config["a"] == 1
    assert server.run.config["run_info"]["layers"] == ["layers.0", "layers.1", "layers.2"]
    assert server.run.summary.items() >= {f"diagnosis/{key}": value for key, value in SUMMARY.items()}.items()
    assert (server.run.bucket["groupName"], server.run.exit_code) == ("sweep", 0)
    assert not [name for name, content in server.run.files.items() if b"hunter2" in content]


def test_a_server_that_does_not_answer_ends_in_one_sentence(tmp_path: Path) -> None:
    said = online("http://127.0.0.1:9", tmp_path, seconds=1)  # the discard port: nobody listens
    assert re.fullmatch(
        r"W&B could not start an online run \(.+\); run `wandb login` if you have not, or choose mode offline and send "
        r"the run later with `wandb sync`\.\n",
        said,
    )


def test_without_a_run_or_with_a_wrong_number_the_sink_says_what_to_do() -> None:
    assert active_run() is None
    with pytest.raises(ValueError, match=r"found no active W&B run; call wandb\.init\(\) before it, or pass run=\."):
        WandbSink()
    for wrong in ({"every": 0}, {"profile_every": -1}):
        with pytest.raises(ValueError, match="every must be at least 1 and profile_every at least 0; got"):
            WandbSink(wandb.init(mode="disabled"), **wrong)


def test_the_active_run_is_used_and_a_disabled_one_takes_everything() -> None:
    with open_run(project="ours", mode="disabled") as run:
        assert active_run() is run
        sink = WandbSink()
        assert isinstance(sink, Sink)
        for event in (INFO, record(0), record(1), END):
            sink.write(event)


def test_every_thins_all_but_the_steps_that_change_a_diagnosis() -> None:
    logged: list[int] = []

    class Run:
        disabled = True  # keeps nothing for the close

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, row: dict[str, Any], **_: Any) -> None:
            logged.append(row["optim_step"])

    sink = WandbSink(Run(), every=5, profile_every=0)
    news = (Diagnosis("vanishing", 2, 0, 0, {}, "It fades."),)
    for step in range(12):
        sink.write(record(step, diagnoses=news if step == 7 else ()))
    assert logged == [0, 5, 7, 10]


def test_an_error_of_wandb_is_not_hidden(tmp_path: Path) -> None:
    with open_run(project="ours", directory=tmp_path) as run:
        sink = WandbSink(run, own=True)
    with pytest.raises(Exception, match="finished"):
        sink.write(record(0))


def test_wandb_is_not_loaded_by_those_who_do_not_use_it() -> None:
    program = (
        "import sys, diagnostics.sinks.wandb as w; assert w.active_run() is None; assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})


def test_a_monitored_loop_in_a_run_of_theirs_loses_nothing(tmp_path: Path) -> None:
    """The real Monitor, which finds the active run by itself."""
    import torch

    from diagnostics import ClipByNorm, MemorySink, Monitor

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = MemorySink()
    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(mode="offline", dir=str(tmp_path), settings=settings) as run:
        sinks = [memory, WandbSink()]
        with Monitor(model, optimizer, clip=ClipByNorm(max_norm=0.1), every=5, sinks=sinks) as monitor:
            for step in range(12):
                optimizer.zero_grad()
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                run.log({"loss": loss.item()}, step=3 * step)
                monitor.clip_and_step(loss=loss)
    found = offline_run(Path(run.dir).parent)
    assert [step for step, _ in found.column("loss")] == [3 * step for step in range(12)]
    told = {row["optim_step"]: row["grad/total_norm"] for row in found.rows if "optim_step" in row}
    assert told.items() <= {one.step: one.clip.total_norm for one in memory.records}.items()
    assert len(told) >= 11
    assert found.summary["diagnosis/verdict"] == monitor.verdict().condition
    assert found.config["run_info"]["layers"] == ["0", "1", "2", "3"]
