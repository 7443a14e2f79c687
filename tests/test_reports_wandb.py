"""Reports that begin or end in W&B: run logs fetched from there, and Reports saved there; the server is on loopback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sinks_wandb import END, record
from wandb_graphql import Received, SentRun
from wandb_server import wandb_server

from diagnostics import RunLogSink, read_run
from diagnostics.records import RunInfo
from diagnostics.reports.fleet import Fleet, Separation, Summary, assemble, flatten
from diagnostics.reports.wandb import building, fetch, publish, specification, sync_command
from diagnostics.reports.wandb.building import _literal
from diagnostics.reports.wandb.markdown import verdicts
from diagnostics.sinks.fanout import Fanout
from diagnostics.sinks.wandb import WandbSink, open_run
from diagnostics.sinks.wandb.place import Place, read_place

expr = pytest.importorskip("wandb_workspaces.expr")

GROUP = "lr=0.1, (it's) <b>"  # a multirun's folder may be called so
JOBS = [
    {"model.depth": 4, "model.activation": "relu", "optimizer.lr": 0.001},
    {"model.depth": 4, "model.activation": "sigmoid", "optimizer.lr": 0.001},
    {"model.depth": 16, "model.activation": "sigmoid", "optimizer.lr": 0.001},
]
COMMON = {"clip": {"max_norm": 1.0}, "x": {"expression": "a>=b (c)"}}

SWEEP = """
import sys
from test_reports_wandb import job, sweep
sweep(*sys.argv[1:])
"""
PUBLISH = """
import sys
from pathlib import Path
from test_reports_wandb import fleet_of
from diagnostics.reports.wandb import publish
print(*publish(fleet_of(Path(sys.argv[1])), "."), sep="\\n")
"""
FETCH = """
import sys
from diagnostics.reports import wandb
from diagnostics.reports.wandb import fetch
wandb.SECONDS = 1
try:
    print(*fetch(sys.argv[1], sys.argv[2]), sep="\\n")
except (ConnectionError, FileNotFoundError) as error:
    print(type(error).__name__, error)
"""


def job(folder: Path, number: int, values: dict[str, Any], mode: str, **options: Any) -> None:
    """A job of a multirun: a run log in its folder, W&B's files in the sweep's."""
    config: dict[str, Any] = {**COMMON}
    for key, value in values.items():
        section, name = key.split(".")
        config[section] = {**config.get(section, {}), name: value}
    name = " ".join(f"{key}={value}" for key, value in values.items())
    log = RunLogSink(folder / str(number))
    with open_run(
        project="digits", name=name, group=GROUP, multirun=GROUP, config=config, directory=folder, mode=mode
    ) as run:
        sinks = Fanout([log, WandbSink(run, own=True, media=False, **options)])
        info = RunInfo(name, overrides=tuple(name.split(" ")), config=config, seed=0)
        failed = [one for event in (info, *map(record, range(3)), END) for one in sinks.write(event)]
        assert not [*failed, *sinks.close()]


def sweep(folder: str, mode: str) -> None:
    for number, values in enumerate(JOBS):
        job(Path(folder), number, values, mode)
    job(Path(folder) / "other", 0, JOBS[0], mode, upload_run_log=False)


def summary(log: Path) -> Summary:
    run = read_run(log)
    assert run.info is not None
    severity = 0 if "relu" in run.info.name else 3
    return Summary(
        path=log,
        place=log.parent.parent,
        name=run.info.name,
        overrides=run.info.overrides,
        config=dict(flatten(run.info.config)),
        seed=0,
        condition="vanishing" if severity else "healthy",
        severity=severity,
        slope=-0.9,
        decades=2.7,
        clip_fraction=0.25,
        violations=(),
        loss=1.5,
        steps=3,
        status="finished",
    )


def fleet_of(folder: Path) -> Fleet:
    """The fleet of a sweep's three jobs."""
    return assemble(map(summary, sorted(folder.glob("[0-9]/run.jsonl"))))


def program(folder: Path, url: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, since wandb reads the server's address and the account once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "WANDB_DATA_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_ERROR_REPORTING": "false",
        "HOME": str(folder),
        "NETRC": str(folder / "no netrc"),
    }
    if url is not None:
        environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
    done = subprocess.run(
        list(arguments), cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(folder: Path, url: str | None, code: str, *arguments: str) -> list[str]:
    hangs = "import faulthandler; faulthandler.dump_traceback_later(90, exit=True)\n"  # and says where
    return program(folder, url, sys.executable, "-c", hangs + code, *arguments).stdout.splitlines()


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Received, Path]]:
    """A server that was sent a sweep of three jobs and one run more, and the folder of the sweep."""
    folder = tmp_path_factory.mktemp("online")
    with wandb_server() as server:
        python(folder, server.url, SWEEP, "sweep", "online")
        yield server, folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the same sweep ran offline."""
    folder = tmp_path_factory.mktemp("offline")
    python(folder, None, SWEEP, "sweep", "offline")
    return folder


# ── what is fetched ──


def test_the_run_logs_of_a_group_are_fetched_each_into_the_folder_of_its_run(
    online: tuple[Received, Path], tmp_path: Path
) -> None:
    server, folder = online
    place = f"wandb:me/digits/{GROUP}"
    done = program(tmp_path, server.url, sys.executable, "-c", FETCH, place, "logs")
    logs = [tmp_path / line for line in done.stdout.splitlines()]
    names = {run.id: run.bucket["displayName"] for run in server.runs.values()}
    assert {log.parent.name for log in logs} < names.keys()
    assert len(logs) == 3
    there = {read_run(log).info.name: log.read_bytes() for log in folder.glob("sweep/[0-9]/run.jsonl")}
    assert {read_run(log).info.name: log.read_bytes() for log in logs} == there
    for log in logs:
        assert read_place(log) == Place("digits", log.parent.name, names[log.parent.name], "me", GROUP)
    assert "1 of 4 runs have left no run log in W&B: model.depth=4" in done.stderr


NOBODY = (
    "FileNotFoundError No run of group 'nobody' in me/digits has left its run log in W&B; a run does so when it ends, "
    "unless upload_run_log is false."
)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("wandb:me/nowhere/a", "FileNotFoundError There is no me/nowhere in W&B, or not for this account."),
        ("wandb:me/digits/nobody", NOBODY),
    ],
)
def test_a_place_without_run_logs_is_said(online: tuple[Received, Path], tmp_path: Path, place: str, said: str) -> None:
    assert python(tmp_path, online[0].url, FETCH, place, "logs") == [said]


def test_without_an_account_or_an_answer_one_sentence_is_said_and_nobody_is_asked(tmp_path: Path) -> None:
    (said,) = python(tmp_path, None, FETCH, "wandb:me/digits/a", "logs")
    assert said == "ConnectionError W&B knows no account here; run `wandb login` if you have not."
    (said,) = python(tmp_path, "http://127.0.0.1:9", FETCH, "wandb:me/digits/a", "logs")  # nobody listens there
    assert said.startswith("ConnectionError W&B did not answer (")
    assert said.endswith("); run `wandb login` if you have not.")


def test_a_person_who_is_offline_on_purpose_is_taken_at_his_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConnectionError, match=r"^WANDB_MODE=offline forbids to ask W&B; unset it\.$"):
        fetch("wandb:me/digits/a", tmp_path)


@pytest.mark.parametrize("place", ["wandb:digits", "wandb:me/digits", "wandb:me//a", "wandb:me/digits/a/b"])
def test_a_place_that_is_not_named_in_full_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A place in W&B is wandb:entity/project/group; got 'wandb:"):
        fetch(place, tmp_path)


# ── the Report ──


def selects(run_set: dict[str, Any], run: SentRun) -> bool:
    """W&B's meaning of a run set's filters; one that it does not know is an error."""
    assert run_set["filters"]["filters"], "a run set without filters is every run"
    for one in run_set["filters"]["filters"]:
        assert not one["disabled"]
        assert one.get("connector", "AND") == "AND"
        section, name = one["key"]["section"], one["key"]["name"]
        if section == "config":
            first, value, *rest = name.split(".")
            assert value == "value"
            found: Any = run.config[first]
            for part in rest:
                found = found[part]
        else:
            found = {"group": run.bucket["groupName"], "name": run.id}[name]
        if not {"=": found == one["value"], "IN": one["op"] == "IN" and found in one["value"]}[one["op"]]:
            return False
    return True


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]


def test_a_report_is_saved_whose_run_sets_select_the_runs_that_they_name(online: tuple[Received, Path]) -> None:
    server, folder = online
    server.reports.clear()
    (line,) = python(folder, server.url, PUBLISH, "sweep")
    assert line.startswith(f"W&B Report: {server.url}/me/digits/reports/Gradients-by-depth")
    (sent,) = server.reports
    assert (sent["entityName"], sent["projectName"]) == ("me", "digits")
    assert sent["displayName"] == f"Gradients by depth: {GROUP}"
    assert sent["description"] == "2 of 3 runs are sick."

    everything, by_row = grids(sent["spec"])
    (whole,) = everything["runSets"]
    assert all(selects(whole, run) for run in server.runs.values())
    assert [one["name"] for one in whole["grouping"]] == ["model.value.depth", "model.value.activation"]
    chosen = {
        one["name"]: {run.bucket["displayName"] for run in server.runs.values() if selects(one, run)}
        for one in by_row["runSets"]
    }
    names = [" ".join(f"{key}={value}" for key, value in values.items()) for values in JOBS]
    assert chosen == {name: {name} for name in names}
    assert [one["project"]["entityName"] for one in by_row["runSets"]] == ["me"] * 3


def test_a_report_shows_curves_and_profiles_over_depth_and_the_table_of_verdicts(
    online: tuple[Received, Path],
) -> None:
    server, folder = online
    server.reports.clear()
    python(folder, server.url, PUBLISH, "sweep")
    (sent,) = server.reports
    _, by_row = grids(sent["spec"])
    panels = by_row["panelBankSectionConfig"]["panels"]
    plots = [one["config"] for one in panels if one["viewType"] == "Run History Line Plot"]
    assert {plot["xAxis"] for plot in plots} == {"optim_step"}
    keys = {key for plot in plots for key in plot["metrics"]}
    depths = {f"depth/rms_{percent:03d}" for percent in (0, 25, 50, 75, 100)}
    assert keys == {"depth/backward_slope", "grad/total_norm", "grad/clip_fraction", "train/loss", *depths}
    logged = {key for run in server.runs.values() for row in run.rows for key in row}
    assert keys - {"train/loss", "grad/clip_fraction"} <= logged  # these two were not given to the sink here
    (chart,) = (one["config"] for one in panels if one["viewType"] == "Vega2")
    assert chart["panelDefId"] == "wandb/lineseries/v0"
    assert "report/profile_table" in json.dumps(chart)
    (browser,) = (one["config"] for one in panels if one["viewType"] == "Media Browser")
    assert browser["mediaKeys"] == ["report/heatmap"]
    table = next(block["content"] for block in sent["spec"]["blocks"] if block["type"] == "markdown-block")
    assert table.startswith("2 of 3 runs are sick.\n\n| run | differs in |")
    assert "| model.depth=16 model.activation=sigmoid" in table
    assert "| vanishing (severe) | -0.90 | 25% |" in table


def test_offline_the_report_is_written_down_and_the_runs_are_sent_by_the_command_that_is_printed(
    offline: Path, online: tuple[Received, Path]
) -> None:
    lines = python(offline, None, PUBLISH, "sweep")
    assert lines[0] == (
        "W&B Report, not published: wandb_report.json. W&B knows no account here; run `wandb login` if you have not. "
        "The same command publishes it later."
    )
    written = json.loads((offline / "wandb_report.json").read_text())
    assert written["project"] == {"name": "digits", "entityName": ""}
    _, by_row = grids(written["spec"])
    server, folder = online
    server.reports.clear()
    python(folder, server.url, PUBLISH, "sweep")
    _, saved = grids(server.reports[0]["spec"])
    assert [one["filters"] for one in by_row["runSets"]] == [one["filters"] for one in saved["runSets"]]

    assert lines[1] == "3 of these runs are not in W&B yet. This sends them:"
    assert lines[2].strip() == "wandb sync sweep/wandb/offline-run-*"
    with wandb_server() as other:
        program(offline, other.url, "sh", "-c", lines[2])
        sent = {run.bucket["displayName"] for run in other.runs.values()}
        assert sent == {" ".join(f"{key}={value}" for key, value in values.items()) for values in JOBS}
        assert {run.exit_code for run in other.runs.values()} == {0}
        (line,) = python(offline, other.url, PUBLISH, "sweep")  # and nothing is left to send
        assert line.startswith("W&B Report: http")
        assert len(other.reports) == 1


def test_a_server_that_does_not_know_the_project_gets_no_report_and_the_reason_is_said(offline: Path) -> None:
    with wandb_server() as server:
        lines = python(offline, server.url, PUBLISH, "sweep")
        assert lines[0].startswith("W&B Report, not published: wandb_report.json. W&B did not take it (")
        assert "'me/digits' not found" in lines[0]
        assert not server.reports


@given(value=st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_every_value_of_a_configuration_survives_the_filter_s_own_parser(value: Any) -> None:
    (one,) = filters(f"Config({_literal('a.value.b')}) == {_literal(value)}")
    assert (one["key"], one["op"]) == ({"section": "config", "name": "a.value.b"}, "=")
    assert (one["value"], type(one["value"])) == (value, type(value))


@pytest.mark.parametrize("value", ["a=b", "x < y", "x > y", "Metric('State') within_last 5 days"])
def test_the_filter_s_own_parser_changes_values_that_are_not_escaped(value: str) -> None:
    """Else the escapes could go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says so of < and >
        (one,) = filters(f"Config('a') == {value!r}")
    assert one["value"] != value


def filters(expression: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = expr.filters_tree_to_v2(expr.expr_to_filters(expression))["filters"]
    return found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder in which a run was logged to W&B, offline."""
    job(tmp_path, 0, {"model.depth": 4}, "offline", upload_run_log=False)
    return tmp_path


def specified(fleet: Fleet) -> dict[str, Any]:
    places = {run.path: place for run in fleet.runs if (place := read_place(run.path))}
    found: dict[str, Any] = json.loads(specification(fleet, places))["spec"]
    return found


def test_runs_whose_difference_is_not_in_the_config_are_selected_one_by_one(here: Path) -> None:
    job(here, 1, {"model.depth": 4}, "offline", upload_run_log=False)
    whole = summary(here / "0" / "run.jsonl")
    other = summary(here / "1" / "run.jsonl")
    from dataclasses import replace

    fleet = assemble([replace(whole, overrides=("model=mlp",)), replace(other, overrides=("model=cnn",))])
    _, by_row = grids(specified(fleet))
    ids = {read_place(run.path).id for run in fleet.runs}
    chosen = [one["filters"]["filters"][-1] for one in by_row["runSets"]]
    assert [one["key"]["name"] for one in chosen] == ["name", "name"]
    assert {value for one in chosen for value in one["value"]} == ids


def test_more_rows_than_run_sets_that_a_grid_can_show_are_cut_and_said(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(here, 1, {"model.depth": 8}, "offline", upload_run_log=False)
    monkeypatch.setattr(building, "MOST_RUN_SETS", 1)
    spec = specified(fleet_of(here))
    _, by_row = grids(spec)
    assert len(by_row["runSets"]) == 1
    assert any("The 1 sickest of 2 are shown." in block.get("content", "") for block in spec["blocks"])


def test_names_in_the_table_are_text_and_no_markdown(here: Path) -> None:
    from dataclasses import replace

    evil = replace(summary(here / "0" / "run.jsonl"), name="<img src=x> | [a](b) `c`\n# d")
    fleet = replace(assemble([evil]), separations=(Separation("<b>", (), 1.0, 1, 0.5),))
    table = list(verdicts(fleet))
    (row,) = (line for line in table if "img" in line)
    assert r"\<img src=x\> \| \[a\](b) \`c\` \# d" in row
    assert any(r"\<b\> tells" in line for line in table)


def test_runs_that_were_never_logged_to_wandb_make_no_report(here: Path) -> None:
    (here / "0" / "run.wandb.json").unlink()
    (said,) = publish(fleet_of(here), here)
    assert said.startswith("None of these runs was logged to W&B, so there is no Report; sink=[runlog,wandb]")


def test_without_the_extra_one_sentence_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "training-diagnostics\[wandb-report\]"'):
        specified(fleet_of(here))


def test_the_sync_command_names_the_runs_where_a_pattern_would_send_others(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "a b" / f"offline-run-{number}").mkdir(parents=True)
    all_of_them = sorted((tmp_path / "a b").iterdir())
    assert sync_command(all_of_them) == f"wandb sync {shlex.quote(str(tmp_path / 'a b'))}/offline-run-*"
    two = shlex.join(["wandb", "sync", *map(str, all_of_them[:2])])
    assert sync_command(all_of_them[:2]) == two
    assert sync_command(all_of_them[:1]) == shlex.join(["wandb", "sync", str(all_of_them[0])])


def test_a_sweep_that_was_moved_still_finds_the_files_to_send(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = tmp_path_factory.mktemp("elsewhere") / "sweep"
    here.rename(moved)
    log = moved / "0" / "run.jsonl"
    place = read_place(log)
    assert place.waits(log).parent == moved / "wandb"
    (file,) = moved.glob("wandb/offline-run-*/*.wandb")
    Path(f"{file}.synced").touch()
    assert place.waits(log) is None
