"""Figures whose axis is the depth of the network."""

from __future__ import annotations

from typing import Any

from diagnostics.reports.drawing import ALARM, BLACK, GREY, SERIES, SHAPES, Specification
from diagnostics.reports.specifications.parts import (
    DEPTH,
    IS_ZERO,
    NOT_FINITE,
    RELATIVE,
    RMS,
    STEP,
    category,
    edges,
    flatten,
    frame,
    key,
    named_layers,
    position,
    quantity,
    size,
    told,
    unlisted,
)


def heatmap() -> Specification:
    """Depth × step. Tables: ``columns``, ``layers``, ``onsets``."""
    cell = {"type": "rect", "x2Offset": 0.4, "y2Offset": 0.4}
    special = {"domain": [IS_ZERO, NOT_FINITE], "range": [BLACK, ALARM]}
    return {
        **size(),
        "view": {"fill": GREY, "fillOpacity": 0.3},
        "layer": [
            {
                "data": {"name": "columns"},
                "transform": [
                    flatten("log10"),
                    {"window": [{"op": "row_number", "as": "place"}], "groupby": ["x"]},
                    {"calculate": "(datum.place - 1) * datum.per", "as": "depth"},
                    {"calculate": "datum.depth - 0.5", "as": "top"},
                    {"calculate": "datum.depth + datum.per - 0.5", "as": "bottom"},
                    *named_layers(),
                ],
                "encoding": {
                    "x": quantity("x", STEP, tickMinStep=1, format="~s", zero=False, nice=False),
                    "x2": {"field": "x2"},
                    "y": quantity("top", DEPTH, tickMinStep=1, grid=False, zero=False, nice=False, reverse=True),
                    "y2": {"field": "bottom"},
                    "tooltip": [told("layer", "layer"), told("steps", "step"), told("log10", "log10 rms")],
                },
                "layer": [
                    {
                        "transform": [{"filter": "isNumber(datum.log10)"}],
                        "mark": cell,
                        "encoding": {
                            "color": {
                                "field": "log10",
                                "type": "quantitative",
                                "scale": {"scheme": "viridis", "zero": False},
                                "legend": {"title": RMS, "direction": "horizontal", "gradientThickness": 10},
                            }
                        },
                    },
                    {
                        "transform": [{"filter": "isString(datum.log10)"}],
                        "mark": cell,
                        "encoding": {"color": category("log10", special, columns=2, symbolType="square")},
                    },
                ],
                "resolve": {"scale": {"color": "independent"}},
            },
            {
                "data": {"name": "onsets"},
                "mark": {"type": "point", "filled": True, "size": 60, "clip": False, "opacity": 1},
                "encoding": {
                    "x": {"field": "step", "type": "quantitative"},
                    "y": {"value": -7},
                    "color": category("what", {"range": list(SERIES[1:])}, sort=None),
                    "shape": category("what", {"range": ["triangle-down", "diamond", "cross", "square"]}, sort=None),
                    "tooltip": [told("what", "found")],
                },
            },
        ],
        "resolve": {"scale": {"color": "independent", "shape": "independent"}},
    }


def depth_profile() -> Specification:
    """log10 rms over depth at some steps. Tables: ``profiles``, ``layers``, ``edges``, ``frame``."""
    named = {
        "fill": category("label", {"range": list(SERIES)}, sort=None, symbolOpacity=1, symbolStrokeWidth=0),
        "shape": category("label", {"range": list(SHAPES)}, sort=None, symbolOpacity=1, symbolStrokeWidth=0),
    }
    return {
        **size(),
        "encoding": {
            "x": quantity("depth", DEPTH, tickMinStep=1, zero=False, nice=False, padding=8),
        },
        "layer": [
            frame("log10", RMS, zero=False),
            {  # drawn by nobody: a step whose gradients are all zero has its line in the legend, too
                "data": {"name": "profiles"},
                "mark": {"type": "point", "opacity": 0, "tooltip": None},
                "encoding": {"x": {"value": 0}, "y": {"value": 0}, **named},
            },
            {
                "data": {"name": "profiles"},
                "transform": [flatten("depth", "log10", "fitted", "line"), *named_layers()],
                "layer": [
                    {
                        "transform": [{"filter": "isValid(datum.line)"}],
                        "mark": {"type": "line", "strokeDash": [5, 3]},
                        "encoding": {"y": position("line"), "stroke": unlisted("label")},
                    },
                    {
                        "transform": [{"filter": "isValid(datum.log10)"}],
                        "mark": {"type": "point", "size": 36, "strokeWidth": 1.2, "opacity": 1},
                        "encoding": {
                            "y": position("log10"),
                            "stroke": unlisted("label"),
                            **named,
                            "fillOpacity": {"condition": {"test": "datum.fitted", "value": 1}, "value": 0},
                            "tooltip": [told("layer", "layer"), told("log10", "log10 rms"), told("label", "at")],
                        },
                    },
                ],
            },
            *edges("depth"),
        ],
    }


def by_depth(title: str, scale: str, reading: str = "~g") -> Specification:
    """One number of each layer: median, spread, last step. Tables: ``spread``, ``layers``, ``level``."""
    y = quantity("median", title, format=reading, type=scale, nice=scale != "log")
    names = ["middle 80 % of the steps", "median", "last recorded step"]
    lines = [told("layer", "layer"), *(told(name, name) for name in ("low", "median", "high", "last"))]
    return {
        **size(),
        "layer": [
            {
                "data": {"name": "level"},
                "mark": {"type": "rule", "strokeDash": [2, 3]},
                "encoding": {"y": position("level")},
            },
            {
                "data": {"name": "spread"},
                "transform": [flatten("depth", "low", "median", "high", "last"), *named_layers()],
                "encoding": {
                    "x": quantity("depth", DEPTH, tickMinStep=1, zero=False, nice=False, padding=8),
                    "tooltip": lines,
                },
                "layer": [
                    {
                        "mark": {"type": "rule", "strokeWidth": 4, "opacity": 0.45, "strokeCap": "round"},
                        "encoding": {"y": position("low"), "y2": {"field": "high"}, **key(names, 0)},
                    },
                    {
                        "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 40, "opacity": 1},
                        "encoding": {"y": y, **key(names, 1)},
                    },
                    {
                        "mark": {"type": "point", "shape": "circle", "size": 40, "opacity": 1},
                        "encoding": {"y": position("last"), **key(names, 2)},
                    },
                ],
            },
        ],
    }


def overlay(*, relative: bool) -> Specification:
    """Profiles of several runs or groups of seeds, with their range. Tables: ``runs``, ``frame``."""
    place, title = ("relative", RELATIVE) if relative else ("depth", DEPTH)
    extra: dict[str, Any] = {} if relative else {"tickMinStep": 1}
    return {
        **size(width=640, height=320),
        "encoding": {
            "x": quantity(place, title, zero=False, nice=False, padding=8, **extra),
            "tooltip": [
                told("run", "run"),
                told("depth", "depth"),
                *(told(one, one) for one in ("low", "median", "high")),
            ],
        },
        "layer": [
            frame("log10", RMS, zero=False),
            {
                "data": {"name": "runs"},
                "transform": [flatten("depth", "relative", "low", "median", "high")],
                "layer": [
                    {
                        "mark": {"type": "area", "opacity": 0.18},
                        "encoding": {"y": position("low"), "y2": {"field": "high"}, "fill": unlisted("run")},
                    },
                    {"mark": "line", "encoding": {"y": position("median"), "stroke": unlisted("run")}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
                        "encoding": {
                            "y": position("median"),
                            "color": category("run", {"range": list(SERIES)}, sort=None),
                            "shape": category("run", {"range": list(SHAPES)}, sort=None),
                        },
                    },
                ],
            },
        ],
    }


def differences() -> Specification:
    """Decades between two profiles. Tables: ``differences``."""
    return {
        **size(height=170),
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [2, 3]}, "data": {"values": [{}]}, "encoding": {"y": {"datum": 0}}},
            {
                "data": {"name": "differences"},
                "transform": [flatten("relative", "decades")],
                "encoding": {
                    "x": quantity("relative", RELATIVE, zero=False, nice=False, padding=8),
                    "y": quantity("decades", "decades above the first"),
                },
                "layer": [
                    {"mark": "line", "encoding": {"stroke": unlisted("side", SERIES[1:])}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 36, "opacity": 1},
                        "encoding": {
                            "color": category("side", {"range": list(SERIES[1:])}, sort=None),
                            "shape": category("side", {"range": list(SHAPES[1:])}, sort=None),
                            "tooltip": [told("side", "runs"), told("relative", "depth"), told("decades", "decades")],
                        },
                    },
                ],
            },
        ],
    }
