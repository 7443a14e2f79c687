"""A run log as a data frame: one row per step and layer, null where nothing was measured."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
from test_runlog import step, write

from diagnostics.records import DepthFit, GradientStats, Layer, LayerRecord, Layers
from diagnostics.runlog import Run, frame, read_run

ONE, TWO = Layer(0, "in", "Linear", ("in.weight",)), Layer(1, "out", "Linear", trunk=False)
FIT = DepthFit(-0.9, -1.0, 0.1, depths=4, points=4)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    measured = LayerRecord(ONE, GradientStats(4, 2.0, 1.0), GradientStats(9, math.nan, math.nan), gain=None)
    other = LayerRecord(TWO, None, None, gain=math.inf)
    return read_run(
        write(
            tmp_path,
            step(0, loss=None, lr=(0.1, 0.2)),
            step(1, loss=0.5, lr=(0.1, 0.2), layers=Layers([measured, other]), metrics={"accuracy": 0.9}, fit=FIT),
        )
    )


@pytest.mark.parametrize("library", ["polars", "pandas"])
def test_rows_are_steps_and_layers_and_null_is_not_nan(run: Run, library: str) -> None:
    made = run.to_frame(library)
    assert type(made).__module__.split(".")[0] == library
    assert made.shape[0] == 3
    assert column(made, "step") == [0, 1, 1]
    assert column(made, "loss") == [None, 0.5, 0.5]
    assert column(made, "lr.1") == [0.2] * 3
    assert column(made, "metrics.accuracy") == [None, 0.9, 0.9]
    assert column(made, "fit.slope") == [None, -0.9, -0.9]
    assert column(made, "clip.applied") == [True] * 3
    assert column(made, "clip.rule") == ["norm"] * 3
    assert column(made, "depth") == [None, 0, 1]
    assert column(made, "layer") == [None, "in", "out"]
    assert column(made, "trunk") == [None, True, False]
    assert column(made, "output.norm") == [None, 2.0, None]
    assert column(made, "output.rms") == [None, 1.0, None]
    assert column(made, "gain") == [None, None, math.inf]
    norms = column(made, "weight.norm")
    assert math.isnan(norms[1])
    assert (norms[0], norms[2]) == (None, None)


@pytest.mark.parametrize("library", ["polars", "pandas"])
def test_without_layers_a_step_is_one_row(run: Run, library: str) -> None:
    made = run.to_frame(library, layers=False)
    assert column(made, "step") == [0, 1]
    assert not {"layer", "output.norm", "share"} & {*made.columns}


@pytest.mark.parametrize("library", ["polars", "pandas"])
def test_a_run_without_a_step_is_an_empty_frame(tmp_path: Path, library: str) -> None:
    assert read_run(write(tmp_path)).to_frame(library).shape[0] == 0


def test_steps_of_all_shapes_stand_in_their_order(tmp_path: Path) -> None:
    layer = Layers([LayerRecord(ONE, GradientStats(4, 2.0, 1.0), None)])
    write(tmp_path, *(step(i, layers=layer if i % 3 == 0 else Layers(), loss=0.1 * i) for i in range(20)))
    made = read_run(tmp_path).to_frame("polars")
    assert column(made, "step") == list(range(20))
    assert column(made, "loss") == [0.1 * i for i in range(20)]
    assert [value is None for value in column(made, "output.norm")] == [i % 3 != 0 for i in range(20)]


def test_polars_comes_before_pandas_and_neither_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(run.to_frame()).__module__.startswith("polars")
    for name in ("polars", "pandas"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(frame, "find_spec", lambda name: importlib.util.find_spec(name) if name == "pandas" else None)
    with pytest.raises(ModuleNotFoundError, match=r"^to_frame needs polars; pip install polars\.$"):
        run.to_frame("polars")
    monkeypatch.setattr(frame, "find_spec", lambda _name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^to_frame needs polars or pandas; pip install polars\.$"):
        run.to_frame()


def test_what_is_no_library_or_no_log_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=r"library must be polars, pandas or None; got 'arrow'\."):
        run.to_frame("arrow")
    with pytest.raises(TypeError, match=r"to_frame needs the records of a run log; use read_run\(path\)\.to_frame"):
        Run(None, (), (), None, Path("run.jsonl")).to_frame()


def column(made, name: str) -> list:
    """A column of either library, nulls as None."""
    if hasattr(made, "to_dicts"):
        return made[name].to_list()
    missing = made[name].isna()
    return [None if hole else value for value, hole in zip(made[name].tolist(), missing, strict=True)]
