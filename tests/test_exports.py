"""The table for other programs: the same numbers, and no text of a run can be more than text."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_fleet import summary

from diagnostics.reports.exports import COLUMNS, FORMATS, export, latex
from diagnostics.reports.fleet import assemble
from diagnostics.reports.gather import Gathered

EVIL = '=HYPERLINK("http://x","y")|<img src=x onerror=alert(1)>`$\\input{/etc/passwd}$` & 100 % #_^~{}\n[a](b)\x1b[31m'


def gathered(*runs):
    return Gathered(assemble(runs))


def example():
    return gathered(
        summary("a1", "lr=1", "seed=1", severity=3, slope=-0.9, decades=9.1, loss=math.nan, clip_fraction=0.25),
        summary("a2", "lr=1", "seed=2", slope=-0.5, decades=5.0, loss=1e-5, clip_fraction=0.75),
        summary("b", "lr=2", "seed=1", violations=("no_update",), loss=math.inf),
    )


def test_csv_has_a_line_of_plain_numbers_per_row():
    first, second = csv.DictReader(io.StringIO(export(example(), "csv")))
    assert tuple(first) == COLUMNS
    assert (first["run"], first["runs"], first["sick"], first["verdict"], first["severity"]) == (
        "lr=1",
        "2",
        "1",
        "vanishing",
        "3",
    )
    assert (float(first["slope"]), float(first["slope_low"]), float(first["slope_high"])) == (-0.7, -0.9, -0.5)
    assert math.isnan(float(first["loss"]))
    assert (second["run"], second["slope"], second["violations"], second["loss"]) == ("b", "", "1", "inf")


def test_json_has_everything_and_is_json():
    def refuse(name):
        raise AssertionError(name)

    found = json.loads(export(example(), "json"), parse_constant=refuse)
    assert [row["run"] for row in found["rows"]] == ["lr=1", "b"]
    assert [run["loss"] for run in found["rows"][0]["members"]] == ["NaN", 1e-5]
    assert found["rows"][0]["members"][0]["path"] == str(Path("sweep/a1/run.jsonl"))
    assert found["comparison"] is None


def test_markdown_and_latex_are_the_table_of_the_terminal():
    assert export(example(), "md").splitlines()[:3] == [
        "| run | overrides that differ | verdict | n | sick | slope | clipped | violations | loss | status |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| lr=1 | lr=1 | vanishing (severe) | 2 | 1 | -0.70 (-0.90 … -0.50) | 50% (25% … 75%) | 0 | NaN | finished |",
    ]
    shown = export(example(), "latex").splitlines()
    assert shown[1:5] == [
        r"\begin{tabular}{lllrrrrrrl}",
        r"\toprule",
        r"run & overrides that differ & verdict & n & sick & slope & clipped & violations & loss & status \\",
        r"\midrule",
    ]
    assert shown[5] == (
        r"lr=1 & lr=1 & vanishing (severe) & $2$ & $1$ & $-0.70$ ($-0.90$ \dots{} $-0.50$) & "
        r"$50$\% ($25$\% \dots{} $75$\%) & $0$ & NaN & finished \\"
    )
    assert shown[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert r"$1\cdot10^{-5}$" in export(gathered(summary("a", loss=1e-5)), "latex")


@pytest.mark.parametrize("form", FORMATS[1:])
def test_no_control_character_leaves_by_any_way(form):
    said = export(gathered(summary(EVIL, f"name={EVIL}"), summary("b", "name=b")), form)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)


def test_a_spreadsheet_takes_no_text_for_a_formula():
    for start in ("=", "+", "-", "@", "\t=", " =", "＝"):
        first, *_ = csv.DictReader(io.StringIO(export(gathered(summary(f"{start}1+1")), "csv")))
        assert first["run"].startswith("'")
    (only,) = csv.DictReader(io.StringIO(export(gathered(summary('a,"b"\n\nc', slope=-1.0)), "csv")))
    assert only["run"] == 'a,"b"  c'
    assert only["slope"] == "-1.0"  # a number is no formula


@given(st.text(max_size=20))
def test_a_name_stays_in_its_cell_of_a_markdown_table(name):
    said = export(gathered(summary(name or "x")), "md").split("\n")
    assert len(said) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", said[2])) == len(re.findall(r"\|", said[1]))
    assert not re.search(r"<|(?<!\\)(?:\\\\)*[`*_\[\]]", said[2])


@given(st.text(max_size=20))
def test_a_name_is_only_text_in_latex(name):
    """What is left without the escapes holds no character that TeX reads as more than itself."""
    said = latex(name)
    plain = re.sub(
        r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|dots)\{\}|\\[&%$#_{}]",
        "",
        said,
    )
    plain = re.sub(r"\$(?:\\infty|-|\\geq|\\leq)\$", "", plain)
    assert not re.search(r"[\\&%$#_{}~^\n]", plain)
