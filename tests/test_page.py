"""The page of a run says what the run log holds, and carries other people's text as text only."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from run_records import ATTACK, HARD, INFO, VIOLATION, diagnosed, end, fading, record
from test_runlog import ends, infos, steps, write

from diagnostics.records import Diagnosis, Layers, Remedy, RunEnd, RunInfo, StepRecord, Verdict, Violation
from diagnostics.reports.fleet import Summary, assemble
from diagnostics.reports.page import write_fleet, write_page
from diagnostics.reports.view import columns_for, describe
from diagnostics.runlog import read_run


class Reader(HTMLParser):
    """Tags, attributes, and the data that a page carries, by the identifier of their element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self._id = self._open = ""
        self.title = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._open = tag
        self._id = dict(attributes).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script" and self._id:
            self.data[self._id] = json.loads(data)
        elif self._open == "script":
            self.scripts.append(data)
        elif self._open == "title":
            self.title += data


def page_of(folder: Path, *events: Any) -> Path:
    return write_page(write(folder, *events))


def shown(folder: Path, *events: Any) -> dict[str, Any]:
    """What the page of a run shows."""
    run: dict[str, Any] = Reader(page_of(folder, *events)).data["run-0"]
    return run


def facts(list_: list[dict[str, Any]]) -> dict[str, str]:
    return {fact["name"]: " ".join(fact["values"]) for fact in list_}


def test_the_page_says_what_was_run_and_how_it_ended(tmp_path: Path) -> None:
    run = shown(tmp_path, INFO, *fading(5, 0.0), end(status="failed", error="ValueError: too bad"))
    found = facts(run["facts"])
    assert (found["command"], found["device"], found["seed"]) == (INFO.command, "cuda:0", "3")
    assert (found["versions"], found["git"]) == ("torch 2.13.0", "1a2b3c4d, with uncommitted changes")
    assert run["ending"] == "Failed on 2026-01-02 03:05:00+00:00 after 5 steps: ValueError: too bad"
    assert run["badges"] == [["healthy", "calm"], ["failed", "severe"]]


def test_the_page_names_the_verdict_in_a_word_as_well_as_in_a_colour(tmp_path: Path) -> None:
    page = page_of(tmp_path, INFO, *fading(5), end(Verdict("vanishing", 3, "vanishing since step 0")))
    reader = Reader(page)
    run = reader.data["run-0"]
    assert run["badges"] == [["vanishing · severe", "severe"]]
    assert run["headline"] == "Vanishing since step 0"
    assert reader.title == "mlp: vanishing · severe"


def test_a_run_whose_loop_broke_a_rule_is_never_shown_as_calm(tmp_path: Path) -> None:
    records = [replace(one, violations=(VIOLATION,)) for one in fading(3, 0.0)]
    unlawful = Verdict("healthy", 0, "healthy gradients, unlawful loop (missing_zero_grad)")
    run = shown(tmp_path, *records, end(unlawful))
    assert run["badges"] == [["unlawful loop · warning", "warning"]]
    (trouble,) = run["troubles"]
    assert (trouble["title"], trouble["when"]) == ("missing_zero_grad", "first at step 1, 9 times")
    assert trouble["remedies"] == [{"text": "Call zero_grad().", "override": None, "tried": None}]


def test_a_diagnosis_stands_with_its_onset_and_with_overrides_to_copy(tmp_path: Path) -> None:
    run = shown(tmp_path, INFO, *diagnosed(fading(5), INFO), end())
    (trouble,) = run["troubles"]
    assert (trouble["title"], trouble["when"]) == ("vanishing · severe", "since step 0, worst at depth 0")
    assert "model.norm=layer model.residual=true" in [remedy["override"] for remedy in trouble["remedies"]]


def test_a_diagnosis_that_cleared_says_when(tmp_path: Path) -> None:
    cleared = Diagnosis("vanishing", 2, 3, 0, {}, "the gradient fades.", (Remedy("wait"),), cleared=40)
    records = fading(3, 0.0)
    run = shown(tmp_path, *records[:-1], replace(records[-1], diagnoses=(cleared,)), end())
    (trouble,) = run["troubles"]
    assert (trouble["when"], trouble["tone"]) == ("steps 3–40, cleared, worst at depth 0", "calm")
    assert trouble["message"] == "The gradient fades."


def test_what_was_never_confirmed_is_shown_only_where_the_verdict_rests_on_it(tmp_path: Path) -> None:
    doubtful = Diagnosis("vanishing", 2, 0, 0, {}, "the gradient fades.", confirmed=False)
    records = [replace(one, diagnoses=(doubtful,)) for one in fading(1)]
    assert shown(tmp_path / "a", *records, end())["troubles"] == []
    judged = shown(tmp_path / "b", *records, end(Verdict("vanishing", 2, "vanishing; unconfirmed (1 record)")))
    assert judged["troubles"][0]["when"] == "since step 0, unconfirmed, worst at depth 0"


def test_the_table_has_the_numbers_of_the_last_recorded_step(tmp_path: Path) -> None:
    later = replace(fading(8)[7], recorded=False, layers=Layers(), fit=None)
    run = shown(tmp_path, record(0, [1e-3]), record(3, [2.5e-7, 4e-3], norm=7.0), later, end())
    table = run["parts"][0]["table"]
    columns = dict(zip(table["headings"], table["columns"], strict=True))
    assert table["step"] == 3
    assert table["kinds"] == ["Linear", "LayerNorm (not fitted)"]
    assert columns["output gradient rms"] == ["2.50e-07", "4.00e-03"]
    assert columns["weight gradient norm"] == ["1.00e-06", "1.60e-02"]
    assert columns["share of total norm"] == ["50.0%", "50.0%"]
    assert columns["gain"] == [None, "5.00e-01"]


def test_the_page_sums_up_what_clipping_did(tmp_path: Path) -> None:
    numbers = (0.5, 2.0, 4.0, math.inf)
    run = shown(tmp_path, *[record(i, [1.0], norm=norm) for i, norm in enumerate(numbers)], end())
    assert facts(run["parts"][0]["clipping"]) == {
        "rule": "by norm, threshold 1, norm_type 2",
        "clipped": "2 of 4 steps (50.0%)",
        "coefficient": "median 0.375, smallest 0.25",
        "total norm": "median 2, largest 4",
        "not finite": "1 steps, the first is step 3",
        "skipped": "1 steps left the weights as they were",
    }


def test_what_if_says_what_it_cannot_know(tmp_path: Path) -> None:
    run = shown(tmp_path, *[record(i, [1.0], norm=norm) for i, norm in enumerate((0.5, 0.5, 4.0, 4.0))], end())
    (answer, *_) = run["parts"][0]["what_if"]
    assert ["1", "50.0%", "0.25", True] in answer["candidates"]
    assert "cannot be known" in answer["caveat"]


def test_a_run_that_was_killed_has_a_page_with_the_verdict_so_far(tmp_path: Path) -> None:
    run = shown(tmp_path, INFO, *diagnosed(fading(5), INFO))
    assert run["badges"] == [["vanishing · severe", "severe"], ["no end", "unknown"]]
    assert "was killed after step 4" in run["ending"]


def test_a_run_without_a_step_or_even_a_name_has_a_page(tmp_path: Path) -> None:
    run = shown(tmp_path / "nameless")
    assert (run["name"], run["badges"][0][0], run["parts"]) == ("nameless", "unknown", [])


def test_several_optimizers_each_have_their_own_part(tmp_path: Path) -> None:
    both = [replace(one, optimizer=name) for one in fading(2) for name in ("generator", "critic")]
    run = shown(tmp_path, *both)
    assert [part["name"] for part in run["parts"]] == ["generator", "critic"]
    assert all(
        [figure["kind"] for figure in part["figures"]][:3] == ["heatmap", "depth_profile", "norms"]
        for part in run["parts"]
    )


def test_every_figure_of_the_page_is_told_in_words_and_has_a_specification(tmp_path: Path) -> None:
    reader = Reader(page_of(tmp_path, INFO, *diagnosed(fading(60), INFO), end()))
    figures = reader.data["run-0"]["parts"][0]["figures"]
    kinds = [figure["kind"] for figure in figures]
    assert {
        "heatmap",
        "depth_profile",
        "norms",
        "findings",
        "clipping",
        "gain",
        "share",
        "update_ratio",
        "what_if",
    } == set(kinds)
    assert set(kinds) <= set(reader.data["specifications"])
    assert all(figure["words"].endswith(".") for figure in figures)


def test_a_page_is_the_same_each_time_it_is_written_and_stands_where_it_was_asked_for(tmp_path: Path) -> None:
    log = write(tmp_path, *fading(9), end())
    assert write_page(log).read_bytes() == write_page(log, tmp_path / "other.html").read_bytes()
    assert write_page(tmp_path) == tmp_path / "page.html"


@pytest.mark.parametrize("name", HARD)
def test_every_hard_run_has_a_page(name: str, tmp_path: Path) -> None:
    assert Reader(page_of(tmp_path, INFO, *HARD[name])).data["run-0"]["name"] == "mlp"


@settings(max_examples=10, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(infos, st.lists(steps.map(lambda one: replace(one, step=one.step % 10**6)), max_size=3), st.none() | ends)
def test_every_run_log_that_can_be_written_has_a_page(
    tmp_path_factory: pytest.TempPathFactory, info: RunInfo, records: list[StepRecord], ending: RunEnd | None
) -> None:
    page = page_of(tmp_path_factory.mktemp("any"), info, *records, *([ending] if ending else []))
    assert "run-0" in Reader(page).data


@pytest.mark.parametrize("package", ["vl_convert", "numpy"])
def test_a_missing_extra_is_named_in_one_sentence(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = write(tmp_path, *fading(1))
    for module in [name for name in sys.modules if name.split(".")[0] == package or ".reports." in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    from diagnostics.reports.page import _library, write_page

    _library.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=rf'need {package}; pip install "training-diagnostics\[figures\]"\.'):
        write_page(log)


# all runs on one page


def summary(name: str, severity: int = 0, *, seed: int = 0, overrides: tuple[str, ...] = (), **changes: Any) -> Summary:
    made = Summary(
        path=Path(f"sweep/{name}_{seed}/run.jsonl"),
        place=Path("sweep"),
        name=name,
        overrides=(*overrides, f"trainer.seed={seed}"),
        config={},
        seed=seed,
        condition="vanishing" if severity else "healthy",
        severity=severity,
        slope=-0.5 if severity else 0.01 * seed,
        decades=None,
        clip_fraction=0.25,
        violations=(),
        loss=1.0 + seed,
        steps=5,
        status="finished",
    )
    return replace(made, **changes)


def fleet_page(folder: Path, *runs: Summary, described: dict[Path, Any] | None = None) -> dict[str, Any]:
    page = write_fleet(folder / "report.html", assemble(runs, ["one.jsonl is damaged."]), described or {})
    fleet: dict[str, Any] = Reader(page).data["fleet"]
    return fleet


def test_runs_that_differ_in_their_seed_are_one_row_with_median_and_range(tmp_path: Path) -> None:
    runs = [summary("relu", seed=seed, overrides=("act=relu",)) for seed in range(3)]
    runs += [summary("sigmoid", 3, seed=seed, overrides=("act=sigmoid",)) for seed in range(3)]
    fleet = fleet_page(tmp_path, *runs)
    sick, sound = fleet["rows"]
    assert fleet["headline"] == "3 of 6 runs are sick"
    assert (sick["label"], sick["badge"], sick["sick"], sick["runs"]) == (
        "act=sigmoid",
        ["vanishing · severe", "severe"],
        3,
        3,
    )
    assert sound["loss"] == {"median": 2.0, "shown": "2", "range": "1 to 3"}
    assert sound["slope"]["range"] == "+0.00 to +0.02"
    assert [member["label"] for member in sound["members"]] == ["relu"] * 3
    assert [member["overrides"] for member in sound["members"]] == [[f"trainer.seed={seed}"] for seed in range(3)]


def test_what_separates_the_sick_from_the_sound_is_ranked_with_counts(tmp_path: Path) -> None:
    runs = [
        summary(f"{act}{n}", 3 * (act == "tanh"), overrides=(f"act={act}", f"n={n}"))
        for act in ("relu", "tanh")
        for n in range(3)
    ]
    fleet = fleet_page(tmp_path, *runs)
    (best, *_) = fleet["separations"]
    assert (best["key"], best["right"], best["runs"]) == ("act", "6", 6)
    assert best["groups"] == [{"value": "tanh", "runs": 3, "sick": 3}, {"value": "relu", "runs": 3, "sick": 0}]
    assert fleet["troubles"] == ["one.jsonl is damaged."]


def test_a_run_can_be_opened_only_where_the_page_has_it_and_seeds_have_a_band(tmp_path: Path) -> None:
    runs = [summary("a", seed=seed, overrides=("x=1",)) for seed in range(2)]
    described = {}
    for seed, one in enumerate(runs):
        log = write(tmp_path / str(seed), INFO, *fading(3, -0.5 - seed), end())
        described[one.path] = describe(read_run(log), columns_for(2))
    other = summary("b", overrides=("x=2",))
    page = write_fleet(tmp_path / "report.html", assemble([*runs, other]), described)
    reader = Reader(page)
    rows = {row["label"]: row for row in reader.data["fleet"]["rows"]}
    assert rows["b"]["run"] is None
    assert rows["b"]["band"] is None
    assert [member["run"] for member in rows["x=1"]["members"]] == [0, 1]
    assert {"run-0", "run-1"} <= set(reader.data)
    band = rows["x=1"]["band"]
    assert (band["low"][0], band["median"][0], band["high"][0]) == (-10, -7, -4)


def test_a_loss_that_is_not_a_number_is_shown_and_sorts_last(tmp_path: Path) -> None:
    (row,) = fleet_page(tmp_path, summary("a", loss=math.nan, slope=None))["rows"]
    assert row["loss"] == {"median": None, "shown": "NaN", "range": ""}
    assert row["slope"] is None


def test_the_more_runs_a_page_has_the_narrower_are_their_heatmaps(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, *fading(300)))
    (one, many) = (
        len(describe(run, columns_for(runs))["parts"][0]["figures"][0]["data"]["columns"]) for runs in (1, 500)
    )
    assert (one, many) == (160, 40)


# other people's text


def attacked(folder: Path) -> Path:
    """A page of a run in which every text is an attack."""
    attack = RunInfo(ATTACK, ATTACK, ATTACK, (ATTACK, "</code>"), {}, 0, ATTACK, {ATTACK: ATTACK}, {"commit": ATTACK})
    names = [ATTACK, "</script ><script>alert(3)</script>", "<!--<script >"]
    found = Diagnosis(ATTACK, 3, 0, 0, {}, ATTACK, (Remedy(ATTACK, ATTACK),))
    broken = Violation(ATTACK, 0, (ATTACK,), ATTACK, ATTACK)
    records = [
        record(step, [1e-3, 1e-2, 1e-1], names=names, optimizer=name, diagnoses=(found,), violations=(broken,))
        for step in range(3)
        for name in (ATTACK, "</style><script>alert(2)</script>")
    ]
    return page_of(folder, attack, *records, end(Verdict(ATTACK, 3, ATTACK), "failed", ATTACK))


def test_whatever_a_run_is_called_it_stays_text(tmp_path: Path) -> None:
    reader = Reader(attacked(tmp_path))
    assert reader.tags.count("script") == len(reader.data) + 2
    assert not {"img", "link", "iframe", "object", "base"} & set(reader.tags)
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert reader.title.startswith(ATTACK)
    assert json.dumps(reader.data).count(json.dumps(ATTACK)[1:-1]) > 20


def test_only_the_scripts_of_the_page_itself_may_run_and_nothing_may_be_fetched(tmp_path: Path) -> None:
    reader = Reader(attacked(tmp_path))
    policy = next(
        value for _, name, value in reader.attributes if name == "content" and value and "script-src" in value
    )
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in reader.scripts]
    assert f"script-src {' '.join(f'{chr(39)}sha256-{one}{chr(39)}' for one in hashes)};" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe-eval|script-src[^;]*unsafe-inline|connect-src", policy)


def test_a_name_that_is_no_unicode_does_not_stop_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, replace(INFO, name="file\udcff"))
    assert Reader(page).title.startswith("file?")
