"""Figures show what the records hold: what is drawn is read from the data of the figure, and from its pixels."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_records import HARD, INFO, VIOLATION, diagnosed, fading, record
from test_page import summary
from test_runlog import write
from torch import nn

from diagnostics.monitor import Monitor
from diagnostics.records import ClipRecord, Diagnosis, Layers, StepRecord
from diagnostics.reports import drawing, overlays, thinning
from diagnostics.reports.comparison import Comparison, Side
from diagnostics.reports.drawing import Figure
from diagnostics.reports.figures import (
    clipping,
    depth_profile,
    findings,
    gain,
    heatmap,
    norms,
    overview,
    share,
    update_ratio,
    what_if,
)
from diagnostics.reports.figures.numbers import rounded
from diagnostics.reports.fleet import assemble
from diagnostics.reports.history import History, histories
from diagnostics.reports.specifications import BY_NAME
from diagnostics.reports.whatif import what_if as answers
from diagnostics.runlog import read_run
from diagnostics.sinks.runlog import RunLogSink

VANISHING = Diagnosis("vanishing", 3, 2, 0, {}, "it fades")


def of(records: list[StepRecord]) -> History:
    return histories(records)["optimizer"]


def grid(figure: Figure) -> list[list[Any]]:
    """The heatmap's cells: a list per column, a cell per depth."""
    return [column["log10"] for column in figure.data["columns"]]


def series(figure: Figure) -> dict[str, dict[str, Any]]:
    return {one["series"]: one for one in figure.data["series"]}


def edges(figure: Figure, field: str) -> dict[str, list[int]]:
    return {one["what"]: one[field] for one in figure.data["edges"]}


def pixels(figure: Figure, **options: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png(**options))).convert("RGB"))


def has(image: np.ndarray, colour: str) -> bool:
    """Whether more than a few pixels have about this colour."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((abs(image.astype(int) - wanted).max(axis=2) < 12).sum()) > 20


def test_a_heatmap_has_a_row_per_depth_and_a_column_per_step() -> None:
    figure = heatmap(of([record(step, [1e-6, 1e-4, 1e-2]) for step in (0, 1, 5)]))
    assert grid(figure) == [[-6, -4, -2]] * 3
    assert [column["steps"] for column in figure.data["columns"]] == ["0", "1", "5"]


def test_a_larger_gradient_is_brighter_and_depth_0_is_the_upper_row() -> None:
    image = pixels(heatmap(of([record(step, [1e-6, 1e-4, 1e-2]) for step in range(3)]))).astype(int)
    middle = image[:, image.shape[1] // 2].sum(axis=1)
    plot = middle[(middle < 3 * 250)]
    rows = plot[10 : 10 + 2 * 240]  # two pixels per point
    upper, lower = rows[80], rows[400]
    assert upper < lower


def test_zeros_and_what_is_not_finite_stand_out_and_what_was_not_called_is_not_drawn() -> None:
    figure = heatmap(of([record(0, [1e-2, 1e-1, 1e-1, 1e-1]), record(1, [0.0, math.nan, math.inf, None])]))
    assert grid(figure)[1] == ["exactly zero", "NaN or infinite", "NaN or infinite", None]
    assert "2 values are NaN or infinite" in figure.words
    image = pixels(figure)
    assert has(image, drawing.ALARM)
    assert has(image, drawing.BLACK)
    clean = pixels(heatmap(of([record(step, [1e-2, 1e-1]) for step in range(2)])))
    assert has(clean[:500], drawing.ALARM) is False


def test_a_long_run_keeps_its_extremes_and_says_that_it_is_thinned() -> None:
    records = [record(step, [1e-3, 1e-2]) for step in range(3000)]
    records[1234] = record(1234, [1e3, 1e-2], norm=1e6)
    records[2345] = record(2345, [math.nan, 0.0], norm=1e-9)
    figure = heatmap(of(records))
    cells = grid(figure)
    assert len(cells) == thinning.COLUMNS
    assert [column[0] for column in cells if column[0] != -3] == [3, "NaN or infinite"]
    assert [column[1] for column in cells if column[1] != -2] == ["exactly zero"]
    assert "the most extreme of up to 19 recorded steps" in figure.note
    figure = norms(of(records))
    drawn = series(figure)["before clipping"]["norm"]
    assert len(drawn) < 1000
    assert {1e6, 1e-9} <= set(drawn)
    assert f"{len(drawn):,} of 3,000 steps drawn, extremes kept" in figure.note


def test_a_deep_net_keeps_its_extremes_and_says_that_layers_are_merged() -> None:
    rms = [1e-3] * 250
    rms[123], rms[200] = 1e4, math.nan
    figure = heatmap(of([record(step, rms) for step in range(4)]))
    (column, *_) = grid(figure)
    assert len(column) == 84
    assert column[123 // 3] == 4
    assert column[200 // 3] == "NaN or infinite"
    assert "up to 3 layers" in figure.note


def test_a_short_run_is_not_thinned_and_does_not_say_so() -> None:
    assert len(grid(heatmap(of(fading(160))))) == 160
    assert "extreme" not in heatmap(of(fading(160))).note
    assert norms(of(fading(100))).note == ""


def test_the_time_line_is_true_where_steps_are_recorded_sparsely() -> None:
    figure = heatmap(of([record(step, [1e-2, 1e-2]) for step in (0, 1, 2, 10, 20)]))
    assert [column["x"] for column in figure.data["columns"]] == [-0.5, 0.5, 1.5, 6, 15]
    assert figure.data["columns"][-1]["x2"] == 20.5


def test_onsets_of_diagnoses_and_of_broken_rules_are_marked_on_the_time_line() -> None:
    doubtful = replace(VANISHING, condition="exploding", confirmed=False)
    figure = heatmap(of(fading(6)), [VANISHING, VIOLATION, doubtful])
    assert [one["what"] for one in figure.data["onsets"]] == [
        "missing_zero_grad from step 1",
        "vanishing from step 2",
    ]


def test_what_was_found_runs_from_its_onset_until_it_cleared_or_to_the_end() -> None:
    found = [VANISHING, replace(VANISHING, condition="dead", step=3, cleared=7), VIOLATION]
    rows = {row["what"]: row for row in findings(of(fading(10)), found).data["findings"]}
    assert (rows["vanishing"]["start"], rows["vanishing"]["end"]) == (1.5, 9.5)
    assert (rows["dead"]["start"], rows["dead"]["end"]) == (2.5, 7.5)
    assert (rows["missing_zero_grad"]["start"], rows["missing_zero_grad"]["end"]) == (1, None)
    assert rows["missing_zero_grad"]["when"] == "first at step 1, 9 times"


@pytest.mark.parametrize("slope", [-0.9, 0.4])
def test_the_fitted_line_runs_through_a_profile_that_is_a_line(slope: float) -> None:
    """The oracle is the closed form: layers of the trunk lie on the line, normalisation between them does not count."""
    (profile,) = depth_profile(of(fading(1, slope))).data["profiles"]
    trunk = [depth for depth, fitted in enumerate(profile["fitted"]) if fitted]
    assert trunk == [0, 2, 3, 5, 6, 8, 9]
    assert [profile["line"][depth] for depth in trunk] == pytest.approx(
        [profile["log10"][depth] for depth in trunk], abs=2e-3
    )
    assert [profile["line"][depth] for depth in (1, 4, 7)] == [None] * 3
    assert profile["log10"][9] == -1
    assert profile["label"] == f"step 0: {slope:+.3g} decades per layer"


def test_a_profile_shows_the_first_the_middle_and_the_last_recorded_step_or_those_asked_for() -> None:
    history = of(fading(9))
    assert [one["step"] for one in depth_profile(history).data["profiles"]] == [0, 4, 8]
    assert [one["step"] for one in depth_profile(history, [3, 5]).data["profiles"]] == [3, 5]
    assert len(depth_profile(of(fading(1))).data["profiles"]) == 1
    with pytest.raises(ValueError, match="steps must be recorded ones; got 9, which was not recorded"):
        depth_profile(history, [9])


def test_a_profile_marks_on_its_edges_what_has_no_logarithm_and_says_how_much() -> None:
    figure = depth_profile(of([record(0, [0.0, 1e-2, math.inf, 1e-1])]))
    assert edges(figure, "depth") == {"NaN or infinite": [2], "exactly zero": [0]}
    assert "triangles on the lower edge: exactly zero (1 depth)" in figure.note
    assert "hollow points: recorded, not fitted" in figure.note


def test_norms_show_what_came_in_what_went_out_and_the_threshold() -> None:
    drawn = series(norms(of([record(step, [1.0], norm=norm) for step, norm in enumerate((0.5, 4.0, 2.0))])))
    assert drawn["before clipping"]["norm"] == [0.5, 4.0, 2.0]
    assert drawn["after clipping"]["norm"] == [0.5, 1.0, 1.0]
    assert drawn["threshold"]["norm"] == [1.0, 1.0, 1.0]


def test_norms_mark_what_is_not_finite_what_is_zero_and_what_was_skipped() -> None:
    figure = norms(of([record(step, [1.0], norm=norm) for step, norm in enumerate((1, math.nan, math.inf, 0.0))]))
    assert edges(figure, "step") == {"NaN or infinite": [1, 2], "exactly zero": [3], "step skipped": [1, 2]}
    assert series(figure)["before clipping"]["norm"] == [1, None, None, None]
    assert "crosses on the upper edge: NaN or infinite (2 steps)" in figure.note
    assert has(pixels(figure), drawing.ALARM)


def test_a_norm_between_two_gaps_is_a_dot_where_a_line_would_not_show_it() -> None:
    values = [math.nan if step % 2 else 0.5 for step in range(100)]
    (before, *_) = norms(of([record(step, [1.0], norm=norm) for step, norm in enumerate(values)])).data["dots"]
    assert before["step"] == list(range(0, 100, 2))


def test_norms_without_a_rule_draw_one_line_and_no_threshold() -> None:
    unclipped = ClipRecord("none", 2.0, None, 3.0, None, applied=False, total_norm_after=3.0)
    assert list(series(norms(of([StepRecord(0, unclipped)])))) == ["norm, not clipped"]


def test_the_share_of_clipped_steps_is_counted_by_stretch_and_so_far() -> None:
    records = [record(step, [1.0], norm=4.0 if step < 20 else 0.5) for step in range(80)]
    figure = clipping(of(records), 4)
    (stretches,), (so_far,) = figure.data["stretches"], figure.data["so_far"]
    assert stretches["share"] == [1, 0, 0, 0]
    assert so_far["share"] == [1, 0.5, 0.3333, 0.25]
    assert (stretches["x"][0], stretches["x2"][-1]) == (-0.5, 79.5)


def test_one_number_of_each_layer_has_its_median_its_spread_and_its_last_step() -> None:
    records = [record(step, [1.0, 1.0]) for step in range(11)]
    for step, one in enumerate(records):
        rows = [replace(row, update_ratio=10.0 ** (step - 5)) for row in one.layers]
        records[step] = replace(one, layers=Layers(rows))
    (spread,) = update_ratio(of(records)).data["spread"]
    assert spread["depth"] == [0, 1]
    assert spread["median"] == [1, 1]
    assert spread["low"] == pytest.approx([1e-4] * 2)
    assert spread["high"] == pytest.approx([1e4] * 2)
    assert spread["last"] == [1e5] * 2
    assert gain(of(records)).data["spread"][0]["depth"] == [1]  # the first layer's input needs no gradient
    assert share(of(records)).data["spread"][0]["median"] == [0.5, 0.5]


def test_what_if_draws_the_candidates_and_marks_the_runs_own() -> None:
    found = answers(of([record(step, [1.0], norm=norm) for step, norm in enumerate((0.5, 0.5, 4.0, 4.0))]))
    figure = what_if(found)
    table = {one["norm"]: dict(zip(one["max_norm"], one["clipped"], strict=True)) for one in figure.data["norms"]}
    assert table["p = 2"][1] == 0.5
    assert figure.data["current"] == [{"max_norm": 1.0}]


def test_runs_of_one_depth_are_overlaid_by_depth_and_seeds_have_a_band() -> None:
    figure = overlays.overlay({"a": [[-1.0, -2.0], [-3.0, -2.0]], "b": [[-1.0, None]], "none": [[]]})
    assert figure.name == "overlay"
    first, second = figure.data["runs"]
    assert (first["low"], first["median"], first["high"]) == ([-3, -2], [-2, -2], [-1, -2])
    assert (second["depth"], second["median"]) == ([0], [-1])


def test_runs_of_different_depth_are_overlaid_by_relative_depth() -> None:
    figure = overlays.overlay({"a": [[-1.0, -2.0]], "b": [[-1.0, -1.0, -1.0]]})
    assert figure.name == "overlay_relative"
    assert [one["relative"] for one in figure.data["runs"]] == [[0, 1], [0, 0.5, 1]]


def test_a_fleet_is_drawn_as_sick_rows_beside_sound_ones_named_by_what_tells_them_apart() -> None:
    runs = [
        summary(f"run{n}", 3 * (n < 6), overrides=("a.b=1", f"model.depth={n}", f"task.x=v.{n % 2}")) for n in range(12)
    ]
    fleet = assemble(runs)
    described = {one.path: {"profile": [-1.0, -2.0]} for one in runs}
    (figure,) = overlays.of_fleet(fleet, described)
    names = [one["run"] for one in figure.data["runs"]]
    assert len(names) == 8
    assert figure.note == "depth · x"
    assert names[0] == "0 · v.0"
    assert {int(name.split(" · ")[0]) >= 6 for name in names} == {True, False}


def test_before_and_after_are_drawn_with_their_differences() -> None:
    sides = [
        Side(name, 2, 1, {}, None, None, profile, profile, profile)
        for name, profile in (("before", (-3.0, -1.0)), ("after", (-1.5, -1.0)))
    ]
    both, apart = overlays.compared(Comparison((0.0, 1.0), tuple(sides), "It helped."))
    assert [one["run"] for one in both.data["runs"]] == ["before", "after"]
    assert apart.data["differences"] == [{"side": "after", "relative": [0.0, 1.0], "decades": [1.5, 0.0]}]
    assert apart.title == "Difference to before"


def test_the_overview_has_three_panels_for_each_optimizer() -> None:
    records = fading(5)
    assert len(overview(records).specification["hconcat"]) == 3
    both = [replace(one, optimizer=name) for one in records for name in ("generator", "$critic_{$")]
    rows = overview(both).specification["vconcat"]
    assert [row["title"]["text"] for row in rows] == ["generator", "$critic_{$"]
    assert "critic" in overview(both).svg()


def test_a_run_plots_itself_with_what_was_found(tmp_path: Path) -> None:
    figure = read_run(write(tmp_path, INFO, *diagnosed(fading(5), INFO))).plot()
    assert "vanishing from step 0" in figure.svg()


def test_a_monitor_plots_what_its_run_log_plots(tmp_path: Path) -> None:
    """Two optimizers, a gradient that vanishes, a rule that is broken by the second."""
    halves = [nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()) for _ in range(8)]) for _ in range(2)]
    optimizers = [torch.optim.SGD(half.parameters(), lr=0.1) for half in halves]
    options = {"sinks": [RunLogSink(tmp_path)], "on_violation": "record", "on_diagnosis": "record"}
    with Monitor({"left": halves[0], "right": halves[1]}, optimizers, **options) as monitor:
        for _ in range(6):
            optimizers[0].zero_grad()
            for half, optimizer in zip(halves, optimizers, strict=True):
                half(torch.ones(4, 6)).sum().backward()
                monitor.clip_and_step(optimizer)
    live, read = monitor.plot().full(), read_run(tmp_path).plot().full()
    assert live == read
    assert {"vanishing from step 0", "missing_zero_grad from step 1"} <= set(re.findall(r"\w+ from step \d", str(live)))


def test_a_figure_shows_itself_in_a_notebook_and_is_written_in_three_formats(tmp_path: Path) -> None:
    figure = heatmap(of(fading(5)))
    shown = figure._repr_mimebundle_()
    assert shown["image/svg+xml"].startswith("<svg")
    assert shown["text/plain"].startswith("Heatmap of the output gradient's rms over 10 depths and 5 recorded steps")
    files = drawing.write_figures([figure, figure], tmp_path / "new", width_cm=8.5)
    assert [file.name for file in files] == [
        f"{name}.{kind}" for name in ("heatmap", "heatmap_2") for kind in ("pdf", "svg", "png")
    ]
    assert files[0].read_bytes().startswith(b"%PDF")
    with Image.open(files[2]) as image:
        assert image.width == pytest.approx(8.5 / 2.54 * 300, abs=12)
    with pytest.raises(ValueError, match=r"A figure's file must end in .pdf, .svg or .png; got 'figure.gif'"):
        figure.save(tmp_path / "figure.gif")
    with pytest.raises(ValueError, match="width_cm must be a positive number of centimetres; got 0"):
        figure.png(width_cm=0)


def test_text_of_a_figure_has_the_colour_of_the_text_around_it() -> None:
    svg = heatmap(of(fading(5))).svg()
    assert 'fill="currentColor"' in svg
    assert "white" not in svg


@pytest.mark.parametrize("name", HARD)
def test_every_figure_can_be_drawn_of_any_records(name: str) -> None:
    drawn = [overview(HARD[name])]
    for history in histories(HARD[name]).values():
        drawn += [draw(history) for draw in (heatmap, depth_profile, norms, clipping, gain, share, update_ratio)]
        drawn.append(findings(history, [VANISHING, VIOLATION]))
        drawn.append(what_if(answers(history)))
    for figure in drawn:
        assert 100 < pixels(figure, scale=1.0).shape[1] < 3000, figure.name


def test_the_largest_number_does_not_round_up_to_infinity() -> None:
    largest = np.array([sys.float_info.max, -sys.float_info.max, math.inf])
    assert rounded(largest) == [sys.float_info.max, -sys.float_info.max, None]


def test_no_specification_has_a_text_of_a_run_in_it() -> None:
    name = "layer') + alert(1) + ('"
    records = [record(step, [1e-3, 1e-2], names=[name, "b"]) for step in range(3)]
    drawn = [heatmap(of(records), [replace(VIOLATION, rule=name)]), depth_profile(of(records)), gain(of(records))]
    for figure in drawn:
        assert name in json.dumps(figure.data)
        assert figure.specification is BY_NAME[figure.name]
    assert name not in json.dumps(BY_NAME)


def test_a_net_of_300_layers_over_5000_steps_makes_small_figures() -> None:
    records = [record(step, [10 ** (-depth % 7) for depth in range(300)]) for step in range(0, 5000, 50)]
    for draw in (heatmap, depth_profile, norms):
        assert len(json.dumps(draw(of(records)).data)) < 130_000
        assert len(draw(of(records)).pdf()) < 400_000


def test_figures_need_no_torch_and_pages_load_no_numpy_before_they_are_written() -> None:
    code = (
        "import sys, diagnostics.reports.page\n"
        "assert not {'vl_convert', 'numpy', 'torch'} & set(sys.modules), 'loaded too early'\n"
        "from diagnostics.reports import figures\n"
        "figures.overview([]).svg()\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
