"""What specifications are put together from: axes, categories, tooltips, marks on the edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diagnostics.reports.drawing import ALARM, BLUE, GREY, ORANGE, SERIES, Specification

WIDTH, HEIGHT = 420, 240
STEP, DEPTH, RELATIVE = "optimizer step", "depth (in call order)", "relative depth (0 first, 1 last)"
RMS = "log10 rms (loss per output)"
NOT_FINITE, IS_ZERO, SKIPPED = "NaN or infinite", "exactly zero", "step skipped"


def size(width: int = WIDTH, height: int = HEIGHT) -> Specification:
    """In points."""
    return {"width": width, "height": height}


def flatten(*fields: str) -> Specification:
    """Makes a row of each element of arrays."""
    return {"flatten": list(fields)}


def named_layers() -> list[Specification]:
    """Gives each row the name of its layer."""
    return [{"lookup": "depth", "from": {"data": {"name": "layers"}, "key": "depth", "fields": ["layer"]}}]


def quantity(field: str, title: str, *, type: str = "linear", **options: Any) -> Specification:  # noqa: A002 -- Vega-Lite's word
    """A position: what belongs to its axis and what to its scale are told apart by name."""
    of_axis = {key: options.pop(key) for key in ("tickMinStep", "format", "grid") if key in options}
    return {
        "field": field,
        "type": "quantitative",
        "axis": {"title": title, **of_axis},
        "scale": {"type": type, **options},
    }


def position(field: str) -> Specification:
    """A position on an axis that another layer names."""
    return {"field": field, "type": "quantitative"}


def category(field: str, scale: Specification, *, sort: Any = "ascending", **legend: Any) -> Specification:
    """Colours or shapes by name, listed in a legend without a title."""
    ordered = {} if sort == "ascending" else {"sort": sort}
    return {"field": field, "type": "nominal", "scale": scale, "legend": {"title": None, **legend}, **ordered}


def unlisted(field: str, colours: Sequence[str] = SERIES) -> Specification:
    """Colours by name without a line in the legend: another layer's says the same."""
    return {**category(field, {"range": list(colours)}, sort=None), "legend": None}


def key(names: list[str], index: int) -> Specification:
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


def told(field: str, title: str, form: str = "") -> Specification:
    """A line of the tooltip."""
    return {"field": field, "title": title, **({"format": form} if form else {})}


def frame(field: str, title: str, **options: Any) -> Specification:
    """Points that nobody sees: they keep the axis wide enough not to show noise as structure."""
    return {
        "data": {"name": "frame"},
        "mark": {"type": "point", "opacity": 0, "tooltip": None},
        "encoding": {
            "x": {"value": 0},
            "y": quantity(field, title, nice=False, **options),
            "tooltip": None,
        },
    }


def edges(place: str) -> list[Specification]:
    """Marks on the upper edge for what is not finite, on the lower one for zeros and skipped steps."""
    top, bottom = {"value": 0}, {"value": {"expr": "height"}}
    marks = (
        (NOT_FINITE, top, "cross", ALARM),
        (IS_ZERO, bottom, "triangle-down", BLUE),
        (SKIPPED, bottom, "square", GREY),
    )
    return [
        {
            "data": {"name": "edges"},
            "transform": [flatten(place), {"filter": {"field": "what", "equal": what}}],
            "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1, "shape": shape, "color": colour},
            "encoding": {
                "x": {"field": place, "type": "quantitative"},
                "y": y,
                "tooltip": [told("what", "what"), told(place, place)],
            },
        }
        for what, y, shape, colour in marks
    ]
