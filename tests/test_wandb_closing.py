"""What a run leaves in W&B when it ends: really sent, by an online run and by `wandb sync`, and read back there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from test_sinks_wandb import END, EVERY, INFO, STEPS, _no_traffic, in_a_run_of_theirs, record
from wandb_graphql import Received, SentArtifact, SentRun
from wandb_offline import OfflineRun, offline_run
from wandb_server import client, wandb_server

from diagnostics import ClipByNorm, ConsoleSink, Monitor, RunLogSink, read_run
from diagnostics.records import Diagnosis, DiagnosticsWarning, Remedy, Violation
from diagnostics.sinks.wandb import WandbSink, closing, describe, history, open_run

__all__ = ["_no_traffic"]

VANISHING = Diagnosis(
    "vanishing", 3, 0, 0, {"decades": 2.7}, "It fades.", (Remedy("use relu", "model.activation=relu"),)
)
NOTICE = Diagnosis("saturated", 1, 4, None, {}, "A little.")
VIOLATION = Violation("missing_zero_grad", 7, ("a.weight", "b.weight"), "Twice.", "Call zero_grad().", count=2)
AT_CLOSE = {f"report/{name}" for name in ("diagnoses", "violations", "profile_table", "heatmap", "page")}

SICK_RUN = """
import sys
from test_wandb_closing import sick_run
for name in sys.argv[2:]:
    sick_run(sys.argv[1], name)
"""


def sick_run(mode: str, name: str, **options: Any) -> Path:
    """A run of our own in the current folder, with all that there is to leave; the folder of W&B's files."""
    with open_run(project="ours", name=name, group="sweep", mode=mode, directory=".") as run:
        sink = WandbSink(run, own=True, **options)
        sink.write(INFO)
        for step in range(STEPS):
            news = {0: {"diagnoses": (VANISHING, NOTICE)}, 7: {"violations": (VIOLATION,)}, 20: {"rms": (0.0, 1.0)}}
            sink.write(record(step, **news.get(step, {})))
        sink.write(record(STEPS, rms=(math.nan, 1e-2, 1e-1), diagnoses=(VANISHING,)))
        sink.write(END)
        sink.close()
        run.log({"eval/loss": 0.5})
    return Path(run.dir).parent


@pytest.fixture(scope="module", params=["online", "sync"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Received:
    """A W&B server that was sent two runs: while they ran, or later from their files."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch, wandb_server() as found:
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        mode = "online" if request.param == "online" else "offline"
        client(found.url, folder, "-c", SICK_RUN, mode, "first", "second")
        if request.param == "sync":
            assert not found.runs
            runs = map(str, folder.glob("wandb/offline-run-*"))
            client(found.url, folder, "-m", "wandb", "sync", *runs)
    return found


@pytest.fixture(params=["first", "second"])
def sent(request: pytest.FixtureRequest, server: Received) -> SentRun:
    (found,) = (run for run in server.runs.values() if run.bucket["displayName"] == request.param)
    return found


def run_logs(server: Received, run: SentRun) -> list[SentArtifact]:
    return [one for one in server.artifacts_of(run) if one.type == "run-log"]  # W&B makes others of tables


def media(run: SentRun, key: str) -> bytes:
    """The file that stands under a key of the run's history."""
    (value,) = run.column(key)
    return run.files[value["path"]]


def test_both_runs_arrive_apart_with_every_step_and_a_row_of_objects_at_the_end(sent: SentRun) -> None:
    assert (sent.bucket["groupName"], sent.exit_code) == ("sweep", 0)
    assert sent.column("grad/total_norm") == [1.0 + step for step in range(STEPS + 1)]
    assert sent.summary["diagnosis/verdict"] == "healthy"
    (at_close,) = (row for row in sent.rows if "report/page" in row)
    assert at_close.keys() >= AT_CLOSE
    assert (at_close["optim_step"], at_close["_step"]) == (STEPS, STEPS + 1)
    assert sent.rows[-1]["eval/loss"] == 0.5
    assert not any(key.startswith("report/") for row in sent.rows[: STEPS + 1] for key in row)


def test_the_run_log_arrives_as_an_artifact_with_its_end(server: Received, sent: SentRun, tmp_path: Path) -> None:
    (artifact,) = run_logs(server, sent)
    assert (artifact.name, artifact.type) == (f"run-log-{sent.id}", "run-log")
    assert artifact.metadata == {"verdict": "healthy", "severity": 0}
    (tmp_path / "run.jsonl").write_bytes(artifact.files["run.jsonl"])
    run = read_run(tmp_path)
    assert len(run.records) == STEPS + 1
    assert run.end == END
    assert run.diagnoses == (VANISHING, NOTICE)
    assert run.violations == (VIOLATION,)


def test_diagnoses_and_violations_arrive_as_tables(sent: SentRun) -> None:
    diagnoses, violations = (json.loads(media(sent, f"report/{name}")) for name in ("diagnoses", "violations"))
    rows = [dict(zip(diagnoses["columns"], row, strict=True)) for row in diagnoses["data"]]
    assert [(row["condition"], row["severity"], row["since step"]) for row in rows] == [
        ("vanishing", "severe", 0),
        ("saturated", "notice", 4),
    ]
    assert rows[0]["remedies"] == "use relu (model.activation=relu)"
    assert json.loads(rows[0]["evidence"]) == {"decades": 2.7}
    assert violations["data"] == [["missing_zero_grad", 7, 2, "a.weight, b.weight", "Twice.", "Call zero_grad()."]]


def test_the_profile_arrives_as_lines_that_leave_out_what_has_no_logarithm_and_say_so(sent: SentRun) -> None:
    table = json.loads(media(sent, "report/profile_table"))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table["data"]:
        (name,) = (cell for cell in row if isinstance(cell, str))
        x, y = (cell for cell in row if not isinstance(cell, str))
        lines.setdefault(name, []).append((x, y))
    assert lines == {
        "step 0": [(0, -3), (1, -2), (2, -1)],
        "step 20 (1 layers zero or not finite)": [(1, 0)],
        f"step {STEPS} (1 layers zero or not finite)": [(1, -2), (2, -1)],
    }


def test_the_heatmap_arrives_as_a_picture_that_is_not_blank(sent: SentRun, tmp_path: Path) -> None:
    (tmp_path / "heatmap.png").write_bytes(media(sent, "report/heatmap"))
    pixels = np.asarray(Image.open(tmp_path / "heatmap.png").convert("RGB"))
    assert min(pixels.shape[:2]) >= 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_the_page_arrives_whole(sent: SentRun) -> None:
    page = media(sent, "report/page").decode()
    assert page.startswith("<!")
    assert page.rstrip().endswith("</html>")
    assert "vanishing" in page
    assert "missing_zero_grad" in page


def test_one_alert_arrives_for_a_condition_that_is_severe(sent: SentRun) -> None:
    (alert,) = sent.alerts
    assert (alert["title"], alert["severity"], alert["waitDuration"]) == ("vanishing (severe)", "ERROR", 600_000)
    name = sent.bucket["displayName"]
    assert alert["text"] == (
        f"{name}: vanishing (severe) since step 0: It fades.\nTry: use relu (model.activation=relu).\n"
        "More: diagnostics-explain vanishing"
    )


def test_no_secret_arrives_in_any_file(server: Received, sent: SentRun) -> None:
    assert not [name for name, content in sent.files.items() if b"hunter2" in content]
    (artifact,) = run_logs(server, sent)
    assert not [name for name, content in artifact.files.items() if b"hunter2" in content]
    assert b"task.password=(hidden)" in artifact.files["run.jsonl"]


def test_wandb_s_own_inspector_reads_all_of_it_from_the_offline_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    folder = sick_run("offline", "first")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in told.splitlines()]
    kinds = [one["type"] for one in records]
    assert kinds.count("history") == STEPS + 3
    assert kinds.count("alert") == 1
    assert kinds.count("exit") == 1
    assert "run-log-" in told
    assert "report/heatmap" in told
    assert "media/images/report/heatmap" in told


# ── what is left out ──


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))


def left(folder: Path) -> set[str]:
    """Keys that the close left, and the artifact as ``run log``."""
    found = offline_run(folder)
    keys = {key for row in found.rows for key in row if key.startswith("report/")}
    return keys | ({"run log"} if "run-log-" in found.text else set())


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, AT_CLOSE | {"run log"}),
        ({"media": False}, {"run log"}),
        ({"upload_run_log": False}, AT_CLOSE),
        ({"media": False, "upload_run_log": False}, set()),
    ],
)
def test_what_nobody_wants_is_not_left(options: dict[str, bool], expected: set[str]) -> None:
    folder = sick_run("offline", "first", **options)
    assert left(folder) == expected
    assert (folder / "run.jsonl").exists() == bool(expected)


@pytest.mark.usefixtures("_here")
def test_without_the_plotting_extra_one_sentence_is_said_and_all_else_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError('Figures need x; pip install "training-diagnostics[figures]".')

    monkeypatch.setattr(closing, "_picture", missing)
    monkeypatch.setattr(closing, "_page", missing)
    with pytest.warns(DiagnosticsWarning) as said:
        folder = sick_run("offline", "first")
    (sentence,) = (str(one.message) for one in said)
    assert sentence == (
        'W&B gets no report/heatmap and no report/page (Figures need x; pip install "training-diagnostics[figures]"); '
        "all else is there."
    )
    assert left(folder) == (AT_CLOSE | {"run log"}) - {"report/heatmap", "report/page"}
    assert offline_run(folder).exit_code == 0


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("failing", ["_upload", "_table", "_lines", "_picture", "_page"])
def test_an_object_that_fails_costs_neither_the_others_nor_the_run(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    costs = {
        "_upload": {"run log"},
        "_table": {"report/diagnoses", "report/violations"},
        "_lines": {"report/profile_table"},
        "_picture": {"report/heatmap"},
        "_page": {"report/page"},
    }

    def broken(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(closing, failing, broken)
    with pytest.warns(DiagnosticsWarning, match=r"^W&B gets no .*\(RuntimeError: no\); all else is there\.$"):
        folder = sick_run("offline", "first")
    assert left(folder) == (AT_CLOSE | {"run log"}) - costs[failing]
    assert offline_run(folder).column("eval/loss") == [(STEPS + 2, 0.5)]


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("at", ["opening", "writing"])
def test_a_disk_that_takes_no_run_log_costs_the_objects_and_no_step(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    class Full(history.RunLogWriter):
        def __init__(self, path: Path) -> None:
            if at == "opening":
                raise OSError("No space left on device")
            super().__init__(path)

        def write(self, event: Any) -> None:
            if getattr(event, "step", 0) == 5:
                raise OSError("No space left on device")
            super().write(event)

    monkeypatch.setattr(history, "RunLogWriter", Full)
    with pytest.warns(DiagnosticsWarning, match=r"no run log \(OSError: No space left on device\)"):
        folder = sick_run("offline", "first")
    assert left(folder) == set()
    assert len(offline_run(folder).column("grad/total_norm")) == STEPS + 1


@pytest.mark.usefixtures("_here")
def test_a_run_that_recorded_no_step_leaves_tables_and_no_figure() -> None:
    with open_run(project="ours", directory=".") as run:
        sink = WandbSink(run, own=True)
        sink.write(record(1))
        sink.write(END)
        sink.close()
    assert left(Path(run.dir).parent) == {"run log", "report/diagnoses", "report/violations", "report/page"}


@pytest.mark.usefixtures("_here")
def test_a_sink_that_was_never_told_anything_leaves_nothing_and_can_be_closed_twice() -> None:
    with open_run(project="ours", directory=".") as run:
        sink = WandbSink(run, own=True)
        sink.close()
        sink.close()
    assert left(Path(run.dir).parent) == set()


@pytest.mark.usefixtures("_here")
def test_each_optimizer_has_pictures_of_its_own() -> None:
    with open_run(project="ours", directory=".") as run:
        sink = WandbSink(run, own=True)
        for name in ("generator", "critic"):
            sink.write(record(0, optimizer=name))
        sink.write(END)
        sink.close()
    expected = {f"report/{name}/{one}" for name in ("generator", "critic") for one in ("heatmap", "profile_table")}
    assert left(Path(run.dir).parent) == {"run log", "report/diagnoses", "report/violations", "report/page", *expected}


# ── alerts ──


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("diagnoses", "titles"),
    [
        ([VANISHING, VANISHING], ["vanishing (severe)"]),
        ([NOTICE], []),
        ([Diagnosis("vanishing", 3, 0, 0, {}, "m", confirmed=False), VANISHING], ["vanishing (severe)"]),
        ([Diagnosis("vanishing", 3, 0, 0, {}, "m", cleared=9)], []),
        ([VANISHING, Diagnosis("nonfinite", 4, 3, 0, {}, "m")], ["vanishing (severe)", "nonfinite (non-finite)"]),
    ],
)
def test_an_alert_is_sent_once_for_a_condition_that_is_confirmed_and_severe(
    diagnoses: list[Diagnosis], titles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alerts: list[str] = []
    monkeypatch.setattr(wandb.Run, "alert", lambda _self, title, **_: alerts.append(title))
    for wanted in (True, False):
        with open_run(project="ours", directory=".") as run:
            sink = WandbSink(run, alerts=wanted, media=False, upload_run_log=False)
            for step, diagnosis in enumerate(diagnoses):
                sink.write(record(step, diagnoses=(diagnosis,)))
            sink.close()
        assert alerts == titles  # and none more without alerts
        assert all(len(title) < 64 for title in alerts)


# ── in a run of theirs, with a real Monitor ──


def train(sinks: list[Any], steps: int = 12) -> Monitor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, clip=ClipByNorm(max_norm=0.1), every=5, sinks=sinks) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            monitor.clip_and_step(loss=loss)
    return monitor


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("first", ["run log", "W&B"])
def test_the_run_log_of_another_sink_is_taken_with_its_end_whichever_closes_first(first: str, tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off")) as run:
        log = RunLogSink(tmp_path / "log")
        ours = WandbSink(run, media=False)
        train([log, ours] if first == "run log" else [ours, log])
    folder = Path(run.dir).parent
    assert not (folder / "run.jsonl").exists()
    (staged,) = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    taken, whole = read_run(staged), read_run(log.path)
    assert taken.end is not None
    assert (taken.end, taken.records) == (whole.end, whole.records)


@pytest.mark.usefixtures("_here")
def test_two_monitors_in_one_run_of_theirs_leave_a_log_each(tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off")) as run:
        monitors = [train([ConsoleSink(write=lambda _: None), WandbSink()]) for _ in range(2)]
        folder = Path(run.dir).parent
        logs = [read_run(folder / place / "run.jsonl") for place in ("", "run_2")]
    assert [log.verdict for log in logs] == [monitor.verdict() for monitor in monitors]
    assert offline_run(folder).text.count('type: "run-log"') == 2


@pytest.mark.usefixtures("_here")
def test_who_goes_on_logging_after_the_close_keeps_rows_steps_and_values(tmp_path: Path) -> None:
    def run_of_theirs(folder: Path, *, watched: bool) -> OfflineRun:
        settings = wandb.Settings(silent=True, console="off")
        with wandb.init(mode="offline", dir=str(folder), settings=settings) as run:
            run.log({"mine": 0}, step=3)
            if watched:
                sink = WandbSink(run)
                sink.write(record(0))
                sink.write(END)
                sink.close()
            run.log({"test/accuracy": 0.5}, step=3)
            run.log({"mine": 1}, step=9)
        return offline_run(Path(run.dir).parent)

    plain, watched = (run_of_theirs(tmp_path / name, watched=name == "b") for name in ("a", "b"))
    assert [row["_step"] for row in watched.rows] == [row["_step"] for row in plain.rows] == [3, 9]
    for key in ("mine", "test/accuracy"):
        assert watched.column(key) == plain.column(key)
    assert watched.rows[0].keys() >= AT_CLOSE


def test_at_no_step_is_anything_heavier_than_a_histogram_logged(tmp_path: Path) -> None:
    heavy: list[list[str]] = []

    def loop(run: Any, clip_and_step: Any) -> None:
        for step in range(STEPS):
            clip_and_step(step)
            heavy.append(sorted(path.name for path in (Path(run.dir) / "media").rglob("*") if path.is_file()))
            run.log({"mine": step})

    found = in_a_run_of_theirs(tmp_path, loop, profile_every=1)
    assert heavy == [[]] * STEPS
    assert len(found.column("depth/profile")) == STEPS // EVERY


def test_a_run_that_was_finished_before_the_monitor_closes_leaves_no_file_open(tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off")) as run:
        sink = WandbSink(run)
        sink.write(record(0))
    with pytest.raises(Exception, match="finished"):
        sink.write(END)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del sink


@pytest.mark.usefixtures("_here")
def test_a_run_says_its_name_its_group_and_how_it_gets_to_the_server(tmp_path: Path) -> None:
    with open_run(project="ours", name="depth=3", group="a sweep", directory=tmp_path) as run:
        said = describe(run)
    folder = Path(run.dir).parent
    expected = f"W&B run depth=3 of group a sweep in project ours: offline, wandb sync {folder} sends it."
    assert said == expected


@pytest.mark.usefixtures("_here")
def test_the_name_of_a_multirun_stands_in_the_config_beside_what_the_sink_adds(tmp_path: Path) -> None:
    with open_run(project="ours", multirun="2026-11-25", directory=tmp_path) as run:
        sink = WandbSink(run, own=True)
        sink.write(INFO)
        sink.close()
    found = offline_run(Path(run.dir).parent).config["run_info"]
    assert (found["multirun"], found["seed"]) == ("2026-11-25", 0)
