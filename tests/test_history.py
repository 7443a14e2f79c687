"""A run in columns says what its records say, and the fast way from disk says the same as the slow way."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_runlog import steps, write

from diagnostics.reports.history import histories
from diagnostics.runlog import read_run


def equal(one: Any, other: Any) -> bool:
    """Equality that takes NaN for NaN and looks into dataclasses, mappings and arrays."""
    if is_dataclass(one):
        return type(one) is type(other) and all(
            equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return repr(one) == repr(other)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=5))
def test_the_columns_of_a_log_are_those_of_its_records(tmp_path_factory: pytest.TempPathFactory, records: Any) -> None:
    names = [[layer.layer.name for layer in record.layers] for record in records]
    assume(all(len(set(own)) == len(own) for own in names))  # as in a model
    folder = tmp_path_factory.mktemp("run")
    write(folder, *records)
    run = read_run(folder)
    slow, fast = histories(tuple(run.records)), histories(run.records)
    assert list(slow) == list(fast)
    for name, history in slow.items():
        for one in fields(history):
            assert equal(getattr(history, one.name), getattr(fast[name], one.name)), one.name
