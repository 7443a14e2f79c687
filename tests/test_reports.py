"""Figures show what the records hold, and the page tells it to a person and to nobody's browser but as text."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from browser import Browser, needs_chromium
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from PIL import Image
from test_runlog import ends, infos, steps, write

from diagnostics.diagnosis import diagnose, fit_depth
from diagnostics.records import (
    ClipRecord,
    Diagnosis,
    GradientStats,
    Layer,
    LayerRecord,
    Layers,
    Remedy,
    RunEnd,
    RunInfo,
    StepRecord,
    Verdict,
    Violation,
)
from diagnostics.reports import drawing
from diagnostics.reports.figures import depth_profile, heatmap, norms, overview
from diagnostics.reports.page import write_page
from diagnostics.runlog import read_run

FIGURES = (heatmap, depth_profile, norms)
ATTACK = "<img src=x onerror=\"document.title='owned';alert(1)\">"
VIOLATION = Violation("missing_zero_grad", 1, ("0.weight",), "Step 1 spent them again.", "Call zero_grad().", 9)


def record(
    step: int, rms: list[float | None], *, norm: float = 0.5, names: list[str] | None = None, **changes: Any
) -> StepRecord:
    """A recorded step with one layer per rms; a layer that was not called has None; every third normalises."""
    rows = []
    for depth, value in enumerate(rms):
        kind = "LayerNorm" if depth % 3 == 1 else "Linear"
        layer = Layer(depth, names[depth] if names else f"body.{depth}", kind, (f"{depth}.weight",), kind == "Linear")
        stats = None if value is None else GradientStats(16, 4 * value, value)
        rows.append(LayerRecord(layer, stats, stats, 2.0, 1e-3))
    applied = math.isfinite(norm) and norm > 1
    after = 1.0 if applied else norm
    shares = tuple([1 / len(rms)] * len(rms))
    clip = ClipRecord("norm", 2.0, 1.0, norm, 1 / (norm + 1e-6), applied, after, 1.0, shares)
    made = StepRecord(step, clip, layers=Layers(rows), recorded=True, skipped=not math.isfinite(norm))
    return replace(made, fit=fit_depth(rows), **changes)


def fading(count: int, slope: float = -0.9, depths: int = 10) -> list[StepRecord]:
    """Steps of a net whose gradient changes by exactly ``slope`` decades per layer of the trunk on the way back."""
    trunk = [depth for depth in range(depths) if depth % 3 != 1]
    place = [sum(other > depth for other in trunk) for depth in range(depths)]
    return [record(step, [10 ** (-1 + slope * steps_back) for steps_back in place]) for step in range(count)]


def diagnosed(records: list[StepRecord], info: RunInfo | None = None) -> list[StepRecord]:
    """The records with what diagnosis.py makes of them, as a Monitor writes them."""
    return [*records[:-1], replace(records[-1], diagnoses=diagnose(records, run=info))]


def mesh(figure: Any) -> np.ndarray:
    """The colours of the heatmap's cells: depth, column, RGBA."""
    (cells,) = figure.axes[0].collections
    return np.asarray(cells.get_array())


def lines(figure: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in figure.axes[0].lines}


def words(figure: Any) -> str:
    legend = figure.axes[0].get_legend()
    return "\n".join([legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())])


# figures


def test_a_heatmap_has_a_row_per_depth_and_a_column_per_step_in_the_order_of_size() -> None:
    cells = mesh(heatmap([record(step, [1e-6, 1e-4, 1e-2]) for step in (0, 1, 5)]))
    scale = mpl.colormaps["viridis"]
    for column in range(3):
        assert cells[:, column] == pytest.approx(np.array([scale(0.0), scale(0.5), scale(1.0)]), abs=0.01)


def test_zeros_and_what_is_not_finite_stand_out_and_what_was_not_called_is_not_drawn() -> None:
    records = [record(0, [1e-2, 1e-1, 1e-1, 1e-1]), record(1, [0.0, math.nan, math.inf, None])]
    figure = heatmap(records)
    cells = mesh(figure)
    assert tuple(cells[0, 1]) == to_rgba(drawing.BLACK)
    assert tuple(cells[1, 1]) == tuple(cells[2, 1]) == to_rgba(drawing.ALARM)
    assert cells[3, 1, 3] == 0
    assert "NaN or infinite" in words(figure)
    assert "exactly zero" in words(figure)
    assert list(lines(figure)["NaN or infinite (red)"].get_xdata()) == [1]


def test_a_count_of_nonfinite_elements_is_shown_even_where_the_rms_is_finite() -> None:
    broken = record(0, [1e-2, 1e-2])
    rows = [replace(row, output=replace(row.output, nonfinite=1)) for row in broken.layers]
    assert tuple(mesh(heatmap([replace(broken, layers=Layers(rows))]))[0, 0]) == to_rgba(drawing.ALARM)


def test_a_long_run_keeps_its_extremes_and_says_that_it_is_thinned() -> None:
    records = [record(step, [1e-3, 1e-2]) for step in range(3000)]
    records[1234] = record(1234, [1e3, 1e-2], norm=1e6)
    records[2345] = record(2345, [math.nan, 0.0], norm=1e-9)
    figure = heatmap(records)
    cells = mesh(figure)
    assert cells.shape[1] <= drawing.COLUMNS
    assert (cells[0] == mpl.colormaps["viridis"](1.0)).all(axis=1).sum() == 1
    assert (cells[0] == to_rgba(drawing.ALARM)).all(axis=1).sum() == 1
    assert (cells[1] == to_rgba(drawing.BLACK)).all(axis=1).sum() == 1
    assert "most extreme of up to 8 recorded steps" in words(figure)
    figure = norms(records)
    drawn = lines(figure)["before clipping"].get_ydata()
    assert len(drawn) < 2000
    assert {1e6, 1e-9} <= set(drawn)
    assert "of 3,000 steps drawn, extremes kept" in words(figure)


def test_a_short_run_is_not_thinned_and_does_not_say_so() -> None:
    assert mesh(heatmap(fading(400))).shape[1] == 400
    assert "extreme" not in words(heatmap(fading(400)))
    assert "extremes" not in words(norms(fading(100)))


def test_the_time_line_is_true_where_steps_are_recorded_sparsely() -> None:
    (cells,) = heatmap([record(step, [1e-2, 1e-2]) for step in (0, 1, 2, 10, 20)]).axes[0].collections
    assert list(cells.get_coordinates()[0, :, 0]) == pytest.approx([-0.5, 0.5, 1.5, 6, 15, 20.5])


def test_onsets_of_diagnoses_and_of_broken_rules_are_marked_on_the_time_line() -> None:
    records = diagnosed(fading(6))
    records[3] = replace(records[3], violations=(VIOLATION,))
    drawn = lines(heatmap(records))
    assert list(drawn["vanishing from step 0"].get_xdata()) == [0]
    assert list(drawn["missing_zero_grad from step 1"].get_xdata()) == [1]


@pytest.mark.parametrize("slope", [-0.9, 0.4])
def test_the_fitted_line_runs_through_a_profile_that_is_a_line(slope: float) -> None:
    """The oracle is the closed form: layers of the trunk lie on the line, normalisation between them does not count."""
    figure = depth_profile(fading(1, slope))
    dashed = next(line for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata()) > 1)
    full = next(line for line in figure.axes[0].lines if line.get_fillstyle() == "full" and line.get_marker() == "o")
    assert list(dashed.get_xdata()) == list(full.get_xdata()) == [0, 2, 3, 5, 6, 8, 9]
    assert dashed.get_ydata() == pytest.approx(full.get_ydata())
    assert dashed.get_ydata()[-1] == pytest.approx(-1)
    assert f"step 0: {slope:+.3g} decades per layer back" in words(figure)


def test_a_profile_shows_the_first_the_middle_and_the_last_recorded_step() -> None:
    assert [line.split(":")[0] for line in words(depth_profile(fading(9))).split("\n")[1:]] == [
        "step 0",
        "step 4",
        "step 8",
    ]
    assert words(depth_profile(fading(1))).count("step") == 1


def test_norms_show_what_came_in_what_went_out_and_the_threshold() -> None:
    drawn = lines(norms([record(step, [1.0], norm=norm) for step, norm in enumerate((0.5, 4.0, 2.0))]))
    assert list(drawn["before clipping"].get_ydata()) == [0.5, 4.0, 2.0]
    assert list(drawn["after clipping"].get_ydata()) == [0.5, 1.0, 1.0]
    assert list(drawn["threshold"].get_ydata()) == [1.0, 1.0, 1.0]


def test_norms_mark_what_is_not_finite_what_is_zero_and_what_was_skipped() -> None:
    drawn = lines(norms([record(step, [1.0], norm=norm) for step, norm in enumerate((1, math.nan, math.inf, 0.0))]))
    assert list(drawn["NaN or infinite"].get_xdata()) == [1, 2]
    assert list(drawn["exactly zero"].get_xdata()) == [3]
    assert list(drawn["step skipped"].get_xdata()) == [1, 2]


def test_norms_without_a_rule_draw_one_line_and_no_threshold() -> None:
    unclipped = ClipRecord("none", 2.0, None, 3.0, None, applied=False, total_norm_after=3.0)
    assert list(lines(norms([StepRecord(0, unclipped)]))) == ["norm, not clipped"]


def test_the_overview_has_three_panels_for_each_optimizer() -> None:
    records = fading(5)
    assert len([axes for axes in overview(records).axes if axes.get_title(loc="left")]) == 3
    both = [replace(one, optimizer=name) for one in records for name in ("generator", "$critic_{$")]
    assert len([axes for axes in overview(both).axes if axes.get_title(loc="left")]) == 6
    drawing.to_svg(overview(both), "both")


def test_a_run_plots_itself(tmp_path: Path) -> None:
    assert len(read_run(write(tmp_path, *fading(5))).plot().axes) == len(overview(fading(5)).axes)


HARD = {
    "nothing": [],
    "no step recorded": [replace(one, recorded=False, layers=Layers(), fit=None) for one in fading(3)],
    "one step of one layer": [record(0, [1.0])],
    "all NaN": [record(step, [math.nan] * 3, norm=math.nan) for step in range(3)],
    "all infinite": [record(step, [math.inf] * 3, norm=math.inf) for step in range(3)],
    "all zero": [record(step, [0.0] * 3, norm=0.0) for step in range(3)],
    "both ends of the range": [record(0, [5e-324, 1e308], norm=1e308), record(1, [1e308, 5e-324], norm=5e-324)],
    "a layer that comes later": [record(0, [1.0]), record(1, [1.0, 0.1]), record(7, [None, 0.1, 0.2])],
    "a rule with dollar signs": [record(0, [1.0], violations=(replace(VIOLATION, rule="$x_{$"),))],
}


@pytest.mark.parametrize("name", HARD)
def test_every_figure_can_be_drawn_of_any_records_without_a_warning(name: str) -> None:
    for draw in (*FIGURES, overview):
        assert drawing.to_svg(draw(HARD[name]), "hard").endswith("</svg>")


def test_a_net_of_300_layers_over_5000_steps_makes_small_figures() -> None:
    records = [record(step, [10 ** (-depth % 7) for depth in range(300)]) for step in range(0, 5000, 50)]
    assert max(len(drawing.to_svg(draw(records), "large")) for draw in FIGURES) < 400_000


def test_figures_need_no_window_and_modules_load_no_matplotlib() -> None:
    code = (
        "import sys, diagnostics.reports.page\n"
        "assert not {'matplotlib', 'numpy', 'jinja2', 'torch'} & set(sys.modules), 'loaded too early'\n"
        "from diagnostics.reports import figures\n"
        "figures.overview([])\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_leaves_no_setting_behind() -> None:
    before = dict(mpl.rcParams)
    drawing.to_svg(overview(fading(3)), "settings")
    assert dict(mpl.rcParams) == before


# the page


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


INFO = RunInfo(
    name="mlp",
    started="2026-01-02T03:04:05+00:00",
    command="python scripts/train.py model.activation=sigmoid",
    overrides=("model.activation=sigmoid",),
    config={
        "model": {
            "_target_": "diagnostics.trainers.models.MLP",
            "activation": "sigmoid",
            "init": "default",
            "norm": "none",
            "residual": False,
        }
    },
    seed=3,
    device="cuda:0",
    versions={"torch": "2.13.0"},
    git={"commit": "1a2b3c4d", "dirty": True},
)
HEALTHY = Verdict("healthy", 0, "healthy")


def end(verdict: Verdict = HEALTHY, status: str = "finished", error: str | None = None) -> RunEnd:
    return RunEnd(status, "2026-01-02T03:05:00+00:00", 5, verdict, error=error)


def page_of(folder: Path, *events: Any) -> Path:
    return write_page(write(folder, *events))


def test_the_page_says_what_was_run_and_how_it_ended(tmp_path: Path) -> None:
    text = Reader(page_of(tmp_path, INFO, *fading(5, 0.0), end(status="failed", error="ValueError: too bad"))).text
    for said in (INFO.command, "cuda:0", "torch 2.13.0", "1a2b3c4d, with uncommitted changes", "ValueError: too bad"):
        assert said in text
    assert "Failed on 2026-01-02 03:05:00+00:00 after 5 steps: ValueError: too bad" in text


def test_the_page_names_the_verdict_in_a_word_as_well_as_in_a_colour(tmp_path: Path) -> None:
    reader = Reader(page_of(tmp_path, *diagnosed(fading(5)), end(Verdict("vanishing", 3, "vanishing since step 0"))))
    assert ("header", "class", "severe") in reader.attributes
    assert "vanishing · severe Vanishing since step 0" in reader.text


def test_a_run_whose_loop_broke_a_rule_is_never_shown_as_calm(tmp_path: Path) -> None:
    records = [replace(one, violations=(VIOLATION,)) for one in fading(3, 0.0)]
    unlawful = Verdict("healthy", 0, "healthy gradients, unlawful loop (missing_zero_grad)")
    reader = Reader(page_of(tmp_path, *records, end(unlawful)))
    assert "calm" not in [value for _, name, value in reader.attributes if name == "class"]
    assert "unlawful loop · warning Healthy gradients, unlawful loop" in reader.text
    assert "missing_zero_grad first at step 1, 9 times Step 1 spent them again. Call zero_grad()." in reader.text


def test_a_diagnosis_stands_with_its_onset_and_with_overrides_as_code(tmp_path: Path) -> None:
    page = page_of(tmp_path, INFO, *diagnosed(fading(5), INFO), end())
    assert "vanishing · severe since step 0, worst at depth 0" in Reader(page).text
    assert "<code>model.norm=layer model.residual=true</code>" in page.read_text(encoding="utf-8")


def test_a_diagnosis_that_cleared_says_when(tmp_path: Path) -> None:
    cleared = Diagnosis("vanishing", 2, 3, 0, {}, "the gradient fades.", (Remedy("wait"),), cleared=40)
    records = fading(3, 0.0)
    text = Reader(page_of(tmp_path, *records[:-1], replace(records[-1], diagnoses=(cleared,)), end())).text
    assert "vanishing · warning steps 3–40, cleared, worst at depth 0 The gradient fades. wait" in text


def test_what_was_never_confirmed_is_shown_only_where_the_verdict_rests_on_it(tmp_path: Path) -> None:
    doubtful = Diagnosis("vanishing", 2, 0, 0, {}, "the gradient fades.", confirmed=False)
    records = [replace(one, diagnoses=(doubtful,)) for one in fading(1)]
    assert "fades" not in Reader(page_of(tmp_path / "a", *records, end())).text
    judged = Reader(
        page_of(tmp_path / "b", *records, end(Verdict("vanishing", 2, "vanishing; unconfirmed (1 record)")))
    )
    assert "since step 0, unconfirmed, worst at depth 0 The gradient fades." in judged.text


def test_the_table_has_the_numbers_of_the_last_recorded_step(tmp_path: Path) -> None:
    later = replace(fading(8)[7], recorded=False, layers=Layers(), fit=None)
    text = Reader(page_of(tmp_path, record(0, [1e-3]), record(3, [2.5e-7, 4e-3], norm=7.0), later, end())).text
    assert "By depth at step 3" in text
    assert "0 body.0 Linear 2.50e-07 1.00e-06 1.00e-03 50.0%" in text
    assert "1 body.1 LayerNorm (not fitted) 4.00e-03 1.60e-02 1.00e-03 50.0%" in text


def test_the_page_sums_up_what_clipping_did(tmp_path: Path) -> None:
    numbers = (0.5, 2.0, 4.0, math.inf)
    text = Reader(page_of(tmp_path, *[record(i, [1.0], norm=norm) for i, norm in enumerate(numbers)], end())).text
    assert "clipped 2 of 4 steps (50.0%) coefficient median 0.375, smallest 0.25" in text
    assert "total norm median 2, largest 4 not finite 1 steps, the first is step 3 skipped 1 steps" in text


def test_a_run_that_was_killed_has_a_page_with_the_verdict_so_far(tmp_path: Path) -> None:
    text = Reader(page_of(tmp_path, INFO, *fading(5))).text
    assert "vanishing · severe no end Vanishing since step 0" in text
    assert "was killed after step 4" in text


def test_a_run_without_a_step_or_even_a_name_has_a_page(tmp_path: Path) -> None:
    text = Reader(page_of(tmp_path / "nameless")).text
    assert "nameless unknown no end" in text
    assert "No step was recorded." in text


def test_several_optimizers_each_have_their_own_part(tmp_path: Path) -> None:
    both = [replace(one, optimizer=name) for one in fading(2) for name in ("generator", "critic")]
    page = page_of(tmp_path, *both)
    assert page.read_text(encoding="utf-8").count("<svg") == 6
    assert "Optimizer generator" in Reader(page).text


def test_no_two_elements_of_a_page_share_an_identifier(tmp_path: Path) -> None:
    both = [replace(one, optimizer=name) for one in fading(9) for name in ("generator", "critic")]
    found = [value for _, name, value in Reader(page_of(tmp_path, *both)).attributes if name == "id"]
    assert len(found) > 10
    assert len(found) == len(set(found))


def test_a_page_is_the_same_each_time_it_is_written(tmp_path: Path) -> None:
    log = write(tmp_path, *fading(9), end())
    assert write_page(log).read_bytes() == write_page(log).read_bytes()


def test_the_page_stands_where_it_was_asked_for(tmp_path: Path) -> None:
    log = write(tmp_path, *fading(2))
    assert write_page(log, tmp_path / "other.html") == tmp_path / "other.html"
    assert write_page(tmp_path) == tmp_path / "page.html"


@settings(max_examples=10, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(infos, st.lists(steps.map(lambda one: replace(one, step=one.step % 10**6)), max_size=3), st.none() | ends)
def test_every_run_log_that_can_be_written_has_a_page(
    tmp_path_factory: pytest.TempPathFactory, info: RunInfo, records: list[StepRecord], ending: RunEnd | None
) -> None:
    page = page_of(tmp_path_factory.mktemp("any"), info, *records, *([ending] if ending else []))
    assert "</html>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_in_one_sentence(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    log = write(tmp_path, *fading(1))
    with pytest.raises(
        ModuleNotFoundError, match=rf'need {package}.*; pip install "training-diagnostics\[figures\]"\.'
    ):
        write_page(log)


def attacked(folder: Path) -> Path:
    """A page of a run in which every text is an attack."""
    attack = RunInfo(ATTACK, ATTACK, ATTACK, (ATTACK, "</code>"), {}, 0, ATTACK, {ATTACK: ATTACK}, {"commit": ATTACK})
    names = [ATTACK, "</td></tr></table></main>", "$x_{$"]
    found = Diagnosis(ATTACK, 3, 0, 0, {}, ATTACK, (Remedy(ATTACK, ATTACK),))
    broken = Violation(ATTACK, 0, (ATTACK,), ATTACK, ATTACK)
    records = [
        record(step, [1e-3, 1e-2, 1e-1], names=names, optimizer=name, diagnoses=(found,), violations=(broken,))
        for step in range(3)
        for name in (ATTACK, "</style><script>alert(2)</script>")
    ]
    return page_of(folder, attack, *records, end(Verdict(ATTACK, 3, ATTACK), "failed", ATTACK))


def test_whatever_a_run_is_called_it_stays_text(tmp_path: Path) -> None:
    page = attacked(tmp_path)
    reader = Reader(page)
    assert not {"script", "img"} & set(reader.tags)
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert reader.text.count(ATTACK) > 20
    code = [name for name, *_ in reader.attributes if name in ("link", "iframe", "object", "base")]
    assert code == []


def test_a_name_that_is_no_unicode_does_not_stop_the_page(tmp_path: Path) -> None:
    assert "file?" in Reader(page_of(tmp_path, replace(INFO, command="file\udcff"))).text


# the page in a browser


@pytest.fixture(scope="module")
def browser() -> Any:
    with Browser() as one:
        yield one


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_runs_nothing_asks_for_nothing_and_complains_of_nothing(
    tmp_path: Path, browser: Browser, dark: bool
) -> None:
    visit = browser.open(attacked(tmp_path), dark=dark)
    assert visit.complaints == []
    assert visit.requests == []
    assert browser.evaluate("document.title").startswith(ATTACK)
    assert browser.evaluate("document.querySelectorAll('img, script, iframe').length") == 0
    assert browser.evaluate("document.querySelector('td.name').textContent") == ATTACK


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_figures_are_drawn_in_the_colours_of_the_page(tmp_path: Path, browser: Browser, dark: bool) -> None:
    browser.open(page_of(tmp_path, *fading(60), end()), dark=dark)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 3 * 128) is dark
    for number in (1, 2, 3):
        figure = f"figure:nth-of-type({number}) svg"
        ink = f"getComputedStyle(document.querySelector('{figure} text')).fill"
        assert browser.evaluate(ink) == browser.evaluate("getComputedStyle(document.body).color")
        assert len(np.unique(pixels(browser.screenshot(figure)), axis=0)) > 30
    seen = {tuple(pixel) for pixel in pixels(browser.screenshot("figure:nth-of-type(1) svg"))}
    ends_of_scale = [tuple(round(255 * part) for part in mpl.colormaps["viridis"](x)[:3]) for x in (0.0, 1.0)]
    assert set(ends_of_scale) <= seen


@needs_chromium
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_the_page_fits_its_window(tmp_path: Path, browser: Browser, width: int) -> None:
    names = ["a" * 300, "encoder.layers.11.self_attention.out_projection", "c"]
    browser.open(page_of(tmp_path, INFO, record(0, [1e-3, 1e-2, 1e-1], names=names), end()), width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_a_dark_page_is_printed_in_black_on_white_with_the_whole_table(tmp_path: Path, browser: Browser) -> None:
    browser.open(page_of(tmp_path, *fading(3, depths=120), end()), dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "(box => box.scrollHeight - box.clientHeight)(document.querySelector('.scroll'))"
    assert browser.evaluate(hidden) == 0
    assert browser.pdf().startswith(b"%PDF")


@needs_chromium
def test_the_browser_of_these_tests_does_see_complaints_dialogs_and_requests(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='missing.png'><script>alert('hello'); nowhere();</script>")
    visit = browser.open(page)
    assert any("dialog: hello" in complaint for complaint in visit.complaints)
    assert any("nowhere is not defined" in complaint for complaint in visit.complaints)
    assert any(request.endswith("missing.png") for request in visit.requests)
