"""The page in a real browser: it draws, sorts, filters, opens, prints, and runs and fetches nothing but its own."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_chromium
from PIL import Image
from run_records import ATTACK, INFO, VIOLATION, diagnosed, end, fading, record
from test_page import attacked, page_of
from test_runlog import write

from diagnostics.records import RunInfo, Verdict
from diagnostics.reports import drawing
from diagnostics.reports.comparison import Comparison, Side
from diagnostics.reports.fleet import assemble
from diagnostics.reports.gather import gather, summarize
from diagnostics.reports.page import write_fleet
from diagnostics.reports.view import columns_for, describe
from diagnostics.runlog import read_run

pytestmark = needs_chromium
SICK = Verdict("vanishing", 3, "vanishing since step 0")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


def story(folder: Path) -> Path:
    """A run in which every figure has something to show."""
    records = [
        record(step, [10 ** (-7 + depth) for depth in range(7)], norm=10 ** (step % 5 - 2)) for step in range(60)
    ]
    records[30] = record(30, [math.nan, 0.0, *[1e-3] * 5], norm=math.nan)
    records[3] = replace(records[3], violations=(VIOLATION,))
    return page_of(folder, INFO, *diagnosed(records, INFO), end(SICK))


def sweep(folder: Path) -> Path:
    """The page of nine runs: four settings with two seeds each, one of them sick, and a run that is named to attack."""
    for setting, slope in enumerate((-0.9, -0.1, 0.0, 0.05)):
        for seed in range(2):
            overrides = (f"model.slope={slope}", f"trainer.seed={seed}")
            info = RunInfo(f"slope{setting}", overrides=overrides, seed=seed)
            records = [replace(one, loss=float(setting)) for one in fading(5, slope, 10 + setting)]
            write(folder / f"{setting}_{seed}", info, *records, end(SICK if slope < -0.5 else end().verdict))
    write(
        folder / "attack",
        RunInfo(ATTACK, overrides=(f"x={ATTACK}",)),
        record(0, [1.0, 1.0], names=[ATTACK, "b"]),
        end(),
    )
    found = gather([folder], page=True)
    sides = tuple(Side(name, 1, 0, {}, None, None, *[(-2.0, -1.0)] * 3) for name in ("before", ATTACK))
    return write_fleet(folder / "report.html", found.fleet, found.described, Comparison((0.0, 1.0), sides, ATTACK))


def rows(browser: Browser) -> list[str]:
    """What the rows of the table are called, as shown."""
    names: list[str] = browser.evaluate(
        "[...document.querySelectorAll('#runs tbody tr td.name')].map(e => e.textContent)"
    )
    return [name.lstrip("▸▾ \u00a0") for name in names]


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def type_into(browser: Browser, selector: str, text: str) -> None:
    browser.evaluate(
        f"(e => {{ e.value = {json.dumps(text)};"
        "e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input')); })"
        f"(document.querySelector({json.dumps(selector)}))"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_runs_nothing_asks_for_nothing_and_complains_of_nothing(
    tmp_path: Path, browser: Browser, dark: bool
) -> None:
    visit = browser.open(attacked(tmp_path), dark=dark)
    browser.settle()
    assert visit.complaints == []
    assert visit.requests == []
    assert browser.evaluate("document.title").startswith(ATTACK)
    assert browser.evaluate("document.querySelectorAll('img, iframe').length") == 0
    assert browser.evaluate("document.querySelector('td.name').textContent") == ATTACK
    assert browser.evaluate("document.querySelector('.chart svg').textContent.includes('<img src=x')")


def test_a_script_that_is_not_the_pages_own_does_not_run(tmp_path: Path, browser: Browser) -> None:
    page = story(tmp_path)
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace(
            "</main>", "</main><script>document.title='owned'</script><img src='x.png' onerror='document.title=1'>"
        )
    )
    visit = browser.open(page)
    browser.settle()
    assert browser.evaluate("document.title") == "mlp: vanishing · severe"
    assert len(visit.complaints) > 0


@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_is_drawn_in_the_colours_of_the_page(tmp_path: Path, browser: Browser, dark: bool) -> None:
    visit = browser.open(story(tmp_path), dark=dark)
    browser.settle()
    assert visit.complaints == []
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 3 * 128) is dark
    kinds = browser.evaluate("[...document.querySelectorAll('figure')].map(e => e.dataset.kind)")
    assert len(kinds) == 9
    ink = browser.evaluate("getComputedStyle(document.body).color")
    for kind in kinds:
        chart = f"figure[data-kind={kind}] .chart svg"
        assert browser.evaluate(f"getComputedStyle(document.querySelector('{chart} text')).fill") == ink
        assert len(np.unique(pixels(browser.screenshot(chart)), axis=0)) > 20, kind
    seen = {tuple(pixel) for pixel in pixels(browser.screenshot("figure[data-kind=heatmap] svg")).tolist()}
    wanted = [
        tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
        for colour in (drawing.ALARM, drawing.BLACK, "#440154", "#fde725")
    ]
    assert set(wanted) <= seen


@pytest.mark.parametrize("width", [400, 900, 1500])
def test_the_page_fits_its_window(tmp_path: Path, browser: Browser, width: int) -> None:
    names = ["a" * 300, "encoder.layers.11.self_attention.out_projection", "c"]
    browser.open(page_of(tmp_path / "one", INFO, record(0, [1e-3, 1e-2, 1e-1], names=names), end()), width=width)
    browser.settle()
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.open(sweep(tmp_path / "many"), width=width)
    browser.settle()
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_a_dark_page_is_printed_in_black_on_white_with_the_whole_table(tmp_path: Path, browser: Browser) -> None:
    browser.open(page_of(tmp_path, *fading(3, depths=120), end()), dark=True, media="print")
    browser.settle()
    assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.chart text')).fill") == "rgb(0, 0, 0)"
    hidden = "(box => box.scrollHeight - box.clientHeight)(document.querySelector('.scroll'))"
    assert browser.evaluate(hidden) == 0
    assert browser.evaluate("document.querySelectorAll('.scroll tbody tr').length") == 120
    assert browser.pdf().startswith(b"%PDF")


def test_the_steps_of_a_profile_can_be_chosen(tmp_path: Path, browser: Browser) -> None:
    browser.open(story(tmp_path))
    browser.settle()
    texts = "[...document.querySelectorAll('figure[data-kind=depth_profile] svg text')].map(e => e.textContent)"
    legend = f"{texts}.filter(text => text.startsWith('step ')).length"
    assert browser.evaluate(legend) == 3
    assert browser.evaluate("document.querySelectorAll('.steps input').length") == 7
    browser.evaluate("document.querySelectorAll('.steps input')[1].click()")
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    assert browser.evaluate(legend) == 4


def test_an_override_is_copied_by_its_button(tmp_path: Path, browser: Browser) -> None:
    browser.open(story(tmp_path))
    browser.settle()
    browser.evaluate("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    wanted = browser.evaluate("document.querySelector('.card li code').textContent")
    click(browser, ".card li button.copy")
    assert browser.evaluate("window.copied") == wanted
    assert browser.evaluate("document.querySelector('.card li button.copy').textContent") == "copied"


def test_the_table_sorts_by_its_headings_and_says_how(tmp_path: Path, browser: Browser) -> None:
    visit = browser.open(sweep(tmp_path))
    browser.settle()
    assert rows(browser)[0] == "model.slope=-0.9"
    loss = "#runs th:nth-last-child(2)"
    click(browser, f"{loss} button")
    ordered = [f"model.slope={slope}" for slope in (-0.9, -0.1, 0.0, 0.05)]
    assert rows(browser) == [*ordered, ATTACK]  # what has no loss comes last, whatever the order
    assert browser.evaluate(f"document.querySelector('{loss}').ariaSort") == "ascending"
    click(browser, f"{loss} button")
    assert rows(browser) == [*reversed(ordered), ATTACK]
    assert browser.evaluate(f"document.querySelector('{loss}').ariaSort") == "descending"
    assert visit.complaints == []


def test_the_table_filters_by_words_and_by_health(tmp_path: Path, browser: Browser) -> None:
    browser.open(sweep(tmp_path))
    browser.settle()
    type_into(browser, "input[type=search]", "slope=0 healthy")
    assert sorted(rows(browser)) == ["model.slope=0.0", "model.slope=0.05"]
    assert browser.evaluate("document.querySelector('[role=status]').textContent") == "2 of 5 rows"
    type_into(browser, "input[type=search]", "")
    type_into(browser, "select", "sick")
    assert rows(browser) == ["model.slope=-0.9"]


def test_seeds_are_one_row_that_opens_and_a_run_opens_by_the_keyboard_alone(tmp_path: Path, browser: Browser) -> None:
    visit = browser.open(sweep(tmp_path))
    browser.settle()
    browser.evaluate("document.querySelector('#runs tbody button').focus()")
    browser.press("Enter", "\r")
    assert browser.evaluate("document.querySelectorAll('#runs tr.member').length") == 2
    assert browser.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    browser.evaluate("document.querySelector('#runs tr.member button').focus()")
    browser.press("Enter", "\r")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    browser.settle()
    assert browser.evaluate("document.querySelector('h1').textContent") == "Vanishing since step 0"
    assert browser.evaluate("document.activeElement.tagName") == "H1"
    assert len(np.unique(pixels(browser.screenshot("figure[data-kind=heatmap] svg")), axis=0)) > 20
    browser.evaluate("history.back()")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    browser.settle()
    assert browser.evaluate("document.querySelector('#runs') !== null")
    assert visit.complaints == []
    assert visit.requests == []


def test_rows_that_are_chosen_are_laid_over_each_other_by_relative_depth(tmp_path: Path, browser: Browser) -> None:
    browser.open(sweep(tmp_path))
    browser.settle()
    overlay = "figure[data-kind^=overlay].wide"
    assert browser.evaluate(f"document.querySelector('{overlay}').dataset.kind") == "overlay_relative"
    before = browser.screenshot(f"{overlay} svg")
    browser.evaluate(
        "document.querySelectorAll('#runs input[type=checkbox]:checked').forEach((box, at) => at && box.click())"
    )
    browser.settle()
    assert browser.evaluate(f"document.querySelector('{overlay}').dataset.kind") == "overlay"
    assert browser.screenshot(f"{overlay} svg") != before


def test_names_and_overrides_of_runs_stay_text_in_the_table_and_in_figures(tmp_path: Path, browser: Browser) -> None:
    visit = browser.open(sweep(tmp_path))
    browser.settle()
    type_into(browser, "input[type=search]", "onerror")
    assert rows(browser) == [ATTACK]
    click(browser, "#runs input[type=checkbox]:not(:checked), #runs input[type=checkbox]")
    browser.settle()
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.title") == "2 of 9 runs are sick"
    assert visit.complaints == []


@pytest.mark.slow
def test_five_hundred_runs_are_one_page_that_answers_a_click(tmp_path: Path, browser: Browser) -> None:
    """All rows are there and any run opens; how long that takes is measured elsewhere."""
    runs = [read_run(write(tmp_path / str(one), INFO, *fading(60, -0.02 * (one % 50), 60), end())) for one in range(25)]
    described, rows_ = {}, []
    for number in range(500):
        run = runs[number % 25]
        path = tmp_path / f"{number}" / "run.jsonl"
        described[path] = describe(run, columns_for(500))
        summary = summarize(run)
        rows_.append(replace(summary, path=path, name=f"run{number}", overrides=(f"lr={number}",)))
    page = write_fleet(tmp_path / "report.html", assemble(rows_), described)
    assert page.stat().st_size < 25e6
    visit = browser.open(page)
    browser.settle()
    assert browser.evaluate("document.querySelectorAll('#runs tbody tr').length") == 500
    browser.evaluate("document.querySelector('#runs tbody tr:last-child button.name').click()")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    browser.settle()
    assert browser.evaluate("document.querySelectorAll('figure .chart.drawn').length") >= 7
    assert visit.complaints == []


def test_the_browser_of_these_tests_does_see_complaints_dialogs_and_requests(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='missing.png'><script>alert('hello'); nowhere();</script>")
    visit = browser.open(page)
    assert any("dialog: hello" in complaint for complaint in visit.complaints)
    assert any("nowhere is not defined" in complaint for complaint in visit.complaints)
    assert any(request.endswith("missing.png") for request in visit.requests)
