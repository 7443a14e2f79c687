"""Figures whose axis is the time line or the threshold."""

from __future__ import annotations

from diagnostics.reports.drawing import ALARM, BLUE, GREY, ORANGE, SERIES, SHAPES, Specification
from diagnostics.reports.specifications.parts import (
    STEP,
    category,
    edges,
    flatten,
    frame,
    position,
    quantity,
    size,
    told,
    unlisted,
)

SEVERITIES = ("notice", "warning", "severe", "non-finite", "rule of the loop")
SEVERITY_COLOURS = ("#c9a400", ORANGE, ALARM, "#8e3ccb", BLUE)


def norms() -> Specification:
    """Total norm over steps. Tables: ``series``, ``dots``, ``edges``, ``frame``."""
    return {
        **size(),
        "encoding": {"x": quantity("step", STEP, tickMinStep=1, format="~s", zero=False, nice=False)},
        "layer": [
            frame("norm", "total gradient norm (loss per parameter)", type="log", format="~g"),
            {
                "data": {"name": "series"},
                "transform": [flatten("step", "norm")],
                "mark": {"type": "line", "strokeWidth": 1.2},
                "encoding": {
                    "y": position("norm"),
                    "color": category("series", {"range": [BLUE, ORANGE, GREY]}, sort=None),
                    "strokeDash": category("series", {"range": [[1, 0], [1, 0], [5, 3]]}, sort=None),
                },
            },
            {
                "data": {"name": "dots"},
                "transform": [flatten("step", "norm")],
                "mark": {"type": "circle", "size": 16, "opacity": 1},
                "encoding": {
                    "y": position("norm"),
                    "fill": unlisted("series", [BLUE, ORANGE, GREY]),
                    "tooltip": [told("step", "step"), told("norm", "norm"), told("series", "which")],
                },
            },
            *edges("step"),
        ],
    }


def clipping() -> Specification:
    """How many steps were clipped, by stretches and so far. Tables: ``stretches``, ``so_far``."""
    names = {"domain": ["in each stretch of steps", "of all steps so far"], "range": [BLUE, ORANGE]}
    color = {"type": "nominal", "scale": names, "legend": {"title": None, "symbolType": "square"}}
    share: Specification = quantity("share", "share of steps clipped", format=".0%", domain=[0, 1])
    return {
        **size(height=150),
        "layer": [
            {
                "data": {"name": "stretches"},
                "transform": [flatten("x", "x2", "share")],
                "mark": {"type": "bar", "opacity": 0.6, "x2Offset": 0.4},
                "encoding": {
                    "x": quantity("x", STEP, tickMinStep=1, format="~s", zero=False, nice=False),
                    "x2": {"field": "x2"},
                    "y": share,
                    "y2": {"datum": 0},
                    "color": {**color, "datum": names["domain"][0]},
                    "tooltip": [told("x", "from step"), told("share", "clipped", ".1%")],
                },
            },
            {
                "data": {"name": "so_far"},
                "transform": [flatten("step", "share")],
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {
                    "x": {"field": "step", "type": "quantitative"},
                    "y": share,
                    "color": {**color, "datum": names["domain"][1]},
                },
            },
        ],
    }


def findings() -> Specification:
    """Diagnoses from onset to clearing and broken rules, on the time line. Tables: ``findings``, ``ends``."""
    severity = {"domain": list(SEVERITIES), "range": list(SEVERITY_COLOURS)}
    return {
        **size(),
        "data": {"name": "findings"},
        "encoding": {
            "y": {"field": "what", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 150}},
            "x": quantity("start", STEP, tickMinStep=1, format="~s", zero=False, nice=False),
            "color": category("severity", severity, columns=2, symbolType="square"),
            "tooltip": [told("what", "what"), told("severity", "severity"), told("when", "when")],
        },
        "layer": [
            {
                "data": {"name": "ends"},
                "mark": {"type": "point", "opacity": 0, "tooltip": None},
                "encoding": {"y": {"value": 0}, "color": {"value": GREY}, "tooltip": None},
            },
            {  # every row, so that rows stand in the order of the table
                "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"opacity": {"condition": {"test": "isValid(datum.end)", "value": 0}, "value": 1}},
            },
            {
                "transform": [{"filter": "isValid(datum.end)"}],
                "mark": {"type": "bar", "height": 14, "opacity": 0.85},
                "encoding": {"x2": {"field": "end"}},
            },
        ],
    }


def what_if() -> Specification:
    """Share of steps that each max_norm would have clipped. Tables: ``norms``, ``current``."""
    return {
        **size(height=170),
        "encoding": {"x": quantity("max_norm", "max_norm (loss per parameter)", type="log", format="~g", nice=False)},
        "layer": [
            {"data": {"name": "current"}, "mark": {"type": "rule", "strokeDash": [5, 3]}},
            {
                "data": {"name": "norms"},
                "transform": [flatten("max_norm", "clipped", "coefficient")],
                "encoding": {"y": quantity("clipped", "share of steps clipped", format=".0%", domain=[0, 1])},
                "layer": [
                    {"mark": "line", "encoding": {"stroke": unlisted("norm")}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 36, "opacity": 1},
                        "encoding": {
                            "color": category("norm", {"range": list(SERIES)}, sort=None),
                            "shape": category("norm", {"range": list(SHAPES)}, sort=None),
                            "tooltip": [
                                told("max_norm", "max_norm"),
                                told("clipped", "clipped", ".1%"),
                                told("coefficient", "median coefficient"),
                            ],
                        },
                    },
                ],
            },
        ],
    }
