"""How each figure is drawn: Vega-Lite specifications without data. One per kind of figure; nothing in them comes from a run.

A row of a table may hold arrays, which the specification flattens: so data stay small in a page and are the same text
everywhere. A name of a layer or a run is only ever a value of a field, never part of an expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diagnostics.reports.drawing import ALARM, BLACK, BLUE, GREY, ORANGE, SERIES, SHAPES, Specification

WIDTH, HEIGHT = 420, 240
STEP, DEPTH, RELATIVE = "optimizer step", "depth (in call order)", "relative depth (0 first, 1 last)"
RMS = "log10 rms (loss per output)"
NOT_FINITE, IS_ZERO, SKIPPED = "NaN or infinite", "exactly zero", "step skipped"
SEVERITIES = ("notice", "warning", "severe", "non-finite", "rule of the loop")
SEVERITY_COLOURS = ("#c9a400", ORANGE, ALARM, "#8e3ccb", BLUE)


def heatmap() -> Specification:
    """Depth × step. Tables: ``columns``, ``layers``, ``onsets``."""
    cell = {"type": "rect", "x2Offset": 0.4, "y2Offset": 0.4}
    special = {"domain": [IS_ZERO, NOT_FINITE], "range": [BLACK, ALARM]}
    return {
        **_size(),
        "view": {"fill": GREY, "fillOpacity": 0.3},
        "layer": [
            {
                "data": {"name": "columns"},
                "transform": [
                    _flatten("log10"),
                    {"window": [{"op": "row_number", "as": "place"}], "groupby": ["x"]},
                    {"calculate": "(datum.place - 1) * datum.per", "as": "depth"},
                    {"calculate": "datum.depth - 0.5", "as": "top"},
                    {"calculate": "datum.depth + datum.per - 0.5", "as": "bottom"},
                    *_named_layers(),
                ],
                "encoding": {
                    "x": _quantity("x", STEP, tickMinStep=1, format="~s", zero=False, nice=False),
                    "x2": {"field": "x2"},
                    "y": _quantity("top", DEPTH, tickMinStep=1, grid=False, zero=False, nice=False, reverse=True),
                    "y2": {"field": "bottom"},
                    "tooltip": [_told("layer", "layer"), _told("steps", "step"), _told("log10", "log10 rms")],
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
                        "encoding": {"color": _category("log10", special, columns=2, symbolType="square")},
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
                    "color": _category("what", {"range": list(SERIES[1:])}, sort=None),
                    "shape": _category("what", {"range": ["triangle-down", "diamond", "cross", "square"]}, sort=None),
                    "tooltip": [_told("what", "found")],
                },
            },
        ],
        "resolve": {"scale": {"color": "independent", "shape": "independent"}},
    }


def depth_profile() -> Specification:
    """log10 rms over depth at some steps. Tables: ``profiles``, ``layers``, ``edges``, ``frame``."""
    return {
        **_size(),
        "encoding": {
            "x": _quantity("depth", DEPTH, tickMinStep=1, zero=False, nice=False, padding=8),
        },
        "layer": [
            _frame("log10", RMS, zero=False),
            {
                "data": {"name": "profiles"},
                "transform": [_flatten("depth", "log10", "fitted", "line"), *_named_layers()],
                "layer": [
                    {
                        "transform": [{"filter": "isValid(datum.line)"}],
                        "mark": {"type": "line", "strokeDash": [5, 3]},
                        "encoding": {"y": _y("line"), "stroke": _unlisted("label")},
                    },
                    {
                        "transform": [{"filter": "isValid(datum.log10)"}],
                        "mark": {"type": "point", "size": 36, "strokeWidth": 1.2, "opacity": 1},
                        "encoding": {
                            "y": _y("log10"),
                            "stroke": _unlisted("label"),
                            "fill": _category("label", {"range": list(SERIES)}, sort=None),
                            "shape": _category("label", {"range": list(SHAPES)}, sort=None),
                            "fillOpacity": {"condition": {"test": "datum.fitted", "value": 1}, "value": 0},
                            "tooltip": [_told("layer", "layer"), _told("log10", "log10 rms"), _told("label", "at")],
                        },
                    },
                ],
            },
            *_edges("depth"),
        ],
    }


def by_depth(title: str, scale: str, reading: str = "~g") -> Specification:
    """One number of each layer: the run's median, its spread, and the last step. Tables: ``spread``, ``layers``, ``level``."""
    y = _quantity("median", title, format=reading, type=scale, nice=scale != "log")
    names = ["where the middle 80 % of the steps lie", "median", "last recorded step"]
    told = [_told("layer", "layer"), *(_told(name, name) for name in ("low", "median", "high", "last"))]
    return {
        **_size(),
        "layer": [
            {"data": {"name": "level"}, "mark": {"type": "rule", "strokeDash": [2, 3]}, "encoding": {"y": _y("level")}},
            {
                "data": {"name": "spread"},
                "transform": [_flatten("depth", "low", "median", "high", "last"), *_named_layers()],
                "encoding": {
                    "x": _quantity("depth", DEPTH, tickMinStep=1, zero=False, nice=False, padding=8),
                    "tooltip": told,
                },
                "layer": [
                    {
                        "mark": {"type": "rule", "strokeWidth": 4, "opacity": 0.45, "strokeCap": "round"},
                        "encoding": {"y": _y("low"), "y2": {"field": "high"}, **_key(names, 0)},
                    },
                    {
                        "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 40, "opacity": 1},
                        "encoding": {"y": y, **_key(names, 1)},
                    },
                    {
                        "mark": {"type": "point", "shape": "circle", "size": 40, "opacity": 1},
                        "encoding": {"y": _y("last"), **_key(names, 2)},
                    },
                ],
            },
        ],
    }


def norms() -> Specification:
    """Total norm over steps. Tables: ``series``, ``dots``, ``edges``, ``frame``."""
    return {
        **_size(),
        "encoding": {"x": _quantity("step", STEP, tickMinStep=1, format="~s", zero=False, nice=False)},
        "layer": [
            _frame("norm", "total gradient norm (loss per parameter)", type="log", format="~g"),
            {
                "data": {"name": "series"},
                "transform": [_flatten("step", "norm")],
                "mark": {"type": "line", "strokeWidth": 1.2},
                "encoding": {
                    "y": _y("norm"),
                    "color": _category("series", {"range": [BLUE, ORANGE, GREY]}, sort=None),
                    "strokeDash": _category("series", {"range": [[1, 0], [1, 0], [5, 3]]}, sort=None),
                },
            },
            {
                "data": {"name": "dots"},
                "transform": [_flatten("step", "norm")],
                "mark": {"type": "circle", "size": 16, "opacity": 1},
                "encoding": {
                    "y": _y("norm"),
                    "fill": _unlisted("series", [BLUE, ORANGE, GREY]),
                    "tooltip": [_told("step", "step"), _told("norm", "norm"), _told("series", "which")],
                },
            },
            *_edges("step"),
        ],
    }


def clipping() -> Specification:
    """How many steps were clipped, by stretches and so far. Tables: ``stretches``, ``so_far``."""
    names = {"domain": ["in each stretch of steps", "of all steps so far"], "range": [BLUE, ORANGE]}
    color = {"type": "nominal", "scale": names, "legend": {"title": None, "symbolType": "square"}}
    share: Specification = _quantity("share", "share of steps clipped", format=".0%", domain=[0, 1])
    return {
        **_size(height=150),
        "layer": [
            {
                "data": {"name": "stretches"},
                "transform": [_flatten("x", "x2", "share")],
                "mark": {"type": "bar", "opacity": 0.6, "x2Offset": 0.4},
                "encoding": {
                    "x": _quantity("x", STEP, tickMinStep=1, format="~s", zero=False, nice=False),
                    "x2": {"field": "x2"},
                    "y": share,
                    "y2": {"datum": 0},
                    "color": {**color, "datum": names["domain"][0]},
                    "tooltip": [_told("x", "from step"), _told("share", "clipped", ".1%")],
                },
            },
            {
                "data": {"name": "so_far"},
                "transform": [_flatten("step", "share")],
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
    """Diagnoses from onset to clearing and broken rules, on the time line. Tables: ``findings``."""
    severity = {"domain": list(SEVERITIES), "range": list(SEVERITY_COLOURS)}
    return {
        **_size(),
        "data": {"name": "findings"},
        "encoding": {
            "y": {"field": "what", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 150}},
            "x": _quantity("start", STEP, tickMinStep=1, format="~s", zero=False, nice=False),
            "color": _category("severity", severity, columns=2, symbolType="square"),
            "tooltip": [_told("what", "what"), _told("severity", "severity"), _told("when", "when")],
        },
        "layer": [
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


def overlay(*, relative: bool) -> Specification:
    """Profiles of several runs or groups of seeds, with their range. Tables: ``runs``, ``frame``."""
    place, title = ("relative", RELATIVE) if relative else ("depth", DEPTH)
    extra: dict[str, Any] = {} if relative else {"tickMinStep": 1}
    return {
        **_size(width=640, height=320),
        "encoding": {
            "x": _quantity(place, title, zero=False, nice=False, padding=8, **extra),
            "tooltip": [_told("run", "run"), _told("depth", "depth"), *(_told(one, one) for one in ("low", "median", "high"))],
        },
        "layer": [
            _frame("log10", RMS, zero=False),
            {
                "data": {"name": "runs"},
                "transform": [_flatten("depth", "relative", "low", "median", "high")],
                "layer": [
                    {
                        "mark": {"type": "area", "opacity": 0.18},
                        "encoding": {"y": _y("low"), "y2": {"field": "high"}, "fill": _unlisted("run")},
                    },
                    {"mark": "line", "encoding": {"y": _y("median"), "stroke": _unlisted("run")}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
                        "encoding": {
                            "y": _y("median"),
                            "color": _category("run", {"range": list(SERIES)}, sort=None),
                            "shape": _category("run", {"range": list(SHAPES)}, sort=None),
                        },
                    },
                ],
            },
        ],
    }


def differences() -> Specification:
    """Decades between two profiles. Tables: ``differences``."""
    return {
        **_size(height=170),
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [2, 3]}, "data": {"values": [{}]}, "encoding": {"y": {"datum": 0}}},
            {
                "data": {"name": "differences"},
                "transform": [_flatten("relative", "decades")],
                "encoding": {
                    "x": _quantity("relative", RELATIVE, zero=False, nice=False, padding=8),
                    "y": _quantity("decades", "decades above the first"),
                },
                "layer": [
                    {"mark": "line", "encoding": {"stroke": _unlisted("side", SERIES[1:])}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 36, "opacity": 1},
                        "encoding": {
                            "color": _category("side", {"range": list(SERIES[1:])}, sort=None),
                            "shape": _category("side", {"range": list(SHAPES[1:])}, sort=None),
                            "tooltip": [_told("side", "runs"), _told("relative", "depth"), _told("decades", "decades")],
                        },
                    },
                ],
            },
        ],
    }


def what_if() -> Specification:
    """Share of steps that each max_norm would have clipped. Tables: ``norms``, ``current``."""
    return {
        **_size(height=170),
        "encoding": {"x": _quantity("max_norm", "max_norm (loss per parameter)", type="log", format="~g", nice=False)},
        "layer": [
            {"data": {"name": "current"}, "mark": {"type": "rule", "strokeDash": [5, 3]}},
            {
                "data": {"name": "current"},
                "mark": {"type": "text", "align": "left", "baseline": "top", "dx": 4, "text": "this run"},
                "encoding": {"y": {"value": 0}},
            },
            {
                "data": {"name": "norms"},
                "transform": [_flatten("max_norm", "clipped", "coefficient")],
                "encoding": {"y": _quantity("clipped", "share of steps clipped", format=".0%", domain=[0, 1])},
                "layer": [
                    {"mark": "line", "encoding": {"stroke": _unlisted("norm")}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 36, "opacity": 1},
                        "encoding": {
                            "color": _category("norm", {"range": list(SERIES)}, sort=None),
                            "shape": _category("norm", {"range": list(SHAPES)}, sort=None),
                            "tooltip": [
                                _told("max_norm", "max_norm"),
                                _told("clipped", "clipped", ".1%"),
                                _told("coefficient", "median coefficient"),
                            ],
                        },
                    },
                ],
            },
        ],
    }


def _size(width: int = WIDTH, height: int = HEIGHT) -> Specification:
    return {"width": width, "height": height}


def _flatten(*fields: str) -> Specification:
    return {"flatten": list(fields)}


def _named_layers() -> list[Specification]:
    """Gives each row the name of its layer."""
    return [{"lookup": "depth", "from": {"data": {"name": "layers"}, "key": "depth", "fields": ["layer"]}}]


def _quantity(field: str, title: str, *, type: str = "linear", **options: Any) -> Specification:  # noqa: A002 -- Vega-Lite's word
    """A position: what belongs to its axis and what to its scale are told apart by name."""
    of_axis = {key: options.pop(key) for key in ("tickMinStep", "format", "grid") if key in options}
    return {
        "field": field,
        "type": "quantitative",
        "axis": {"title": title, **of_axis},
        "scale": {"type": type, **options},
    }


def _y(field: str) -> Specification:
    return {"field": field, "type": "quantitative"}


def _category(field: str, scale: Specification, *, sort: Any = "ascending", **legend: Any) -> Specification:
    ordered = {} if sort == "ascending" else {"sort": sort}
    return {"field": field, "type": "nominal", "scale": scale, "legend": {"title": None, **legend}, **ordered}


def _unlisted(field: str, colours: Sequence[str] = SERIES) -> Specification:
    """Colours by name without a line in the legend: another layer's says the same."""
    return {**_category(field, {"range": list(colours)}, sort=None), "legend": None}


def _key(names: list[str], index: int) -> Specification:
    """Colour and shape of one of three layers, and its line in the legend."""
    looks = {"color": [GREY, BLUE, ORANGE], "shape": ["stroke", "diamond", "circle"]}
    return {
        channel: {
            "datum": names[index],
            "type": "nominal",
            "scale": {"domain": names, "range": looks[channel]},
            "legend": {"title": None, "symbolOpacity": 1},
        }
        for channel in looks
    }


def _told(field: str, title: str, form: str = "") -> Specification:
    """A line of the tooltip."""
    return {"field": field, "title": title, **({"format": form} if form else {})}


def _frame(field: str, title: str, **options: Any) -> Specification:
    """Points that nobody sees: they keep the axis wide enough not to show noise as structure."""
    return {
        "data": {"name": "frame"},
        "mark": {"type": "point", "opacity": 0, "tooltip": None},
        "encoding": {
            "x": {"value": 0},
            "y": _quantity(field, title, nice=False, **options),
            "tooltip": None,
        },
    }


def _edges(place: str) -> list[Specification]:
    """Marks on the upper edge for what is not finite, on the lower one for zeros and skipped steps."""
    top, bottom = {"value": 0}, {"value": {"expr": "height"}}
    marks = ((NOT_FINITE, top, "cross", ALARM), (IS_ZERO, bottom, "triangle-down", BLUE), (SKIPPED, bottom, "square", GREY))
    return [
        {
            "data": {"name": "edges"},
            "transform": [_flatten(place), {"filter": {"field": "what", "equal": what}}],
            "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1, "shape": shape, "color": colour},
            "encoding": {
                "x": {"field": place, "type": "quantitative"},
                "y": y,
                "tooltip": [_told("what", "what"), _told(place, place)],
            },
        }
        for what, y, shape, colour in marks
    ]


BY_NAME: dict[str, Specification] = {
    "heatmap": heatmap(),
    "depth_profile": depth_profile(),
    "gain": by_depth("gradient norm, input / output", "log"),
    "update_ratio": by_depth("‖update‖ / ‖weight‖", "log"),
    "share": by_depth("share of (total norm) ** p", "linear", ".0%"),
    "norms": norms(),
    "clipping": clipping(),
    "findings": findings(),
    "what_if": what_if(),
    "overlay": overlay(relative=False),
    "overlay_relative": overlay(relative=True),
    "differences": differences(),
}
"""Every kind of figure by its name."""
