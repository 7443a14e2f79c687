"""A figure: a Vega-Lite specification and its data, drawn by vl-convert as SVG, PNG or PDF, in a page by the browser.

Text and frames have the colour of the text around them. The other colours can be told apart by the colour-blind, and no
mark is told by its colour alone.
"""

# ruff: noqa: PLC0415 -- vl-convert is loaded when a figure is drawn

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from struct import pack, unpack_from
from textwrap import wrap
from typing import Any
from zlib import compress, crc32, decompress

Specification = dict[str, Any]
Data = Mapping[str, Sequence[Mapping[str, Any]]]

INK = "currentColor"
PRINTED = "#202226"
GREY = "#7b7f87"
BLUE, ORANGE, GREEN, ALARM, BLACK = "#3a86d0", "#d9730d", "#1f9e78", "#e5174f", "#000000"
SERIES = (BLUE, ORANGE, GREEN, "#b05cc2", "#8c6d1f", "#d1548a", "#5b6bd6", GREY)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")
POINTS_PER_CM = 72 / 2.54
PRINT_DPI = 300
LETTER = 6.3  # points that a letter of a title takes
FLATNESS = 0.62  # the most that a plot's height may be of the width that is asked for
_BLANK: Specification = {"width": 420, "height": 120}
FORMATS = ("pdf", "svg", "png")


@contextmanager
def figures_extra() -> Iterator[None]:
    """Says what to install where a package is missing that comes with the extra ``figures``."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'Figures and pages need {error.name}; pip install "training-diagnostics[figures]".'
        raise ModuleNotFoundError(message, name=error.name) from error


def look(ink: str = INK, width: float = 420) -> Specification:
    """The Vega-Lite configuration that all figures share.

    Args:
        ink: Colour of text and frames.
        width: Of the figure in points, to which the labels of its legend are cut.

    Example:
        >>> look("black")["axis"]["labelColor"]
        'black'
    """
    words = {
        "labelColor": ink,
        "titleColor": ink,
        "labelFontSize": 10,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    return {
        "aria": False,
        "background": None,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "title": {"color": ink, "subtitleColor": ink, "fontSize": 12, "subtitleFontSize": 10, "anchor": "start"},
        "axis": {
            **words,
            "domainColor": GREY,
            "tickColor": GREY,
            "gridColor": GREY,
            "gridOpacity": 0.25,
            "labelLimit": 220,
        },
        "axisX": {"grid": False},
        "legend": {
            **words,
            "orient": "bottom",
            "direction": "vertical",
            "labelLimit": max(width - 75, 120),
            "titleLimit": max(width - 75, 120),
            "symbolSize": 50,
            "layout": {"bottom": {"direction": "vertical", "anchor": "start", "margin": 4}},
        },
        "range": {"category": list(SERIES), "symbol": list(SHAPES)},
        "rule": {"color": ink},
        "text": {"color": ink, "fontSize": 10},
        "line": {"strokeWidth": 1.5},
    }


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure that shows itself in a notebook and is drawn without a display, a network or global state.

    Attributes:
        name: The kind of figure, as the function that makes it is called; also its file's name.
        title: What it shows.
        specification: Vega-Lite without data, size and colours of text; depends on the kind alone.
        data: Named tables of plain numbers and text, as the specification wants them.
        note: What the reader has to know about these data: that they are thinned, that something is missing.
        words: The same as the picture in a sentence, for who cannot see it.
        height: In points, where it depends on the data; the specification's if None.

    Example:
        >>> bars = {"data": {"name": "bars"}, "mark": "bar", "encoding": {"x": {"field": "size"}}}
        >>> Figure("bars", "Sizes", bars, {"bars": [{"size": 3}]}).svg().startswith("<svg")
        True
    """

    name: str
    title: str
    specification: Specification = field(repr=False)
    data: Data = field(repr=False)
    note: str = ""
    words: str = ""
    height: int | None = None

    def full(self, width: float | None = None, ink: str = INK) -> Specification:
        """The whole Vega-Lite specification, data included, for other tools that draw it.

        Args:
            width: Of the whole figure in points; its own if None.
            ink: Colour of text and frames.
        """
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "config": look(ink) if width is None else look(ink, width),
            "background": None,
            "padding": 4,
            **self.view(width),
        }

    def svg(self, width_cm: float | None = None) -> str:
        """The figure as an SVG element, transparent, in the colour of the text around it."""
        drawn: str = _draw("svg", self.full(_points(width_cm)))
        return drawn

    def png(self, width_cm: float | None = None, scale: float = 2.0) -> bytes:
        """The figure as a PNG on white.

        Args:
            width_cm: Width in print, at 300 dots per inch; the figure's own if None.
            scale: Pixels per point where no width is given.
        """
        scale = scale if width_cm is None else PRINT_DPI / 72
        return _smaller(_draw("png", {**self.full(_points(width_cm), PRINTED), "background": "white"}, scale=scale))

    def pdf(self, width_cm: float | None = None) -> bytes:
        """The figure as a PDF of one page, text as text."""
        drawn: bytes = _draw("pdf", self.full(_points(width_cm), PRINTED))
        return drawn

    def save(self, path: str | Path, width_cm: float | None = None) -> Path:
        """Writes the figure in the format that the file's ending names: ``.pdf``, ``.svg`` or ``.png``.

        Raises:
            ValueError: Another ending.
        """
        path = Path(path)
        if path.suffix == ".svg":
            path.write_text(self.svg(width_cm), encoding="utf-8")
        elif path.suffix in (".pdf", ".png"):
            path.write_bytes(self.pdf(width_cm) if path.suffix == ".pdf" else self.png(width_cm))
        else:
            raise ValueError(f"A figure's file must end in .pdf, .svg or .png; got {path.name!r}.")
        return path

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"image/svg+xml": self.svg(), "text/plain": self.words or self.title}

    def view(self, width: float | None = None) -> Specification:
        """The view with its data and title, as it can also stand in a grid."""
        letters = int((width or 420) / LETTER)
        title: Specification = {"title": {"text": wrap(self.title, letters), "subtitle": wrap(self.note, letters)}}
        size: Specification = {} if self.height is None else {"height": self.height}
        if width is not None:
            size = {"height": min(self.specification.get("height", 0), round(FLATNESS * width)), **size}
            size |= {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}}
        drawn = with_data(self.specification, self.data)
        if drawn.get("layer") == []:
            drawn = {"mark": "text", "data": {"values": [{}]}, "encoding": {"text": {"value": self.note}}, **_BLANK}
        return {**(title if self.title else {}), **drawn, **size}


def grid(name: str, rows: Sequence[tuple[str, Sequence[Figure]]]) -> Figure:
    """Figures side by side, a row under each heading.

    Args:
        name: Of the whole.
        rows: A heading, empty for none, and the figures of each row.
    """
    apart = {"scale": dict.fromkeys(("color", "shape", "strokeDash", "fill"), "independent")}
    lines = []
    for heading, figures in rows:
        line: Specification = {"hconcat": [one.view() for one in figures], "spacing": 40, "resolve": apart}
        lines.append({**line, "title": {"text": heading, "fontSize": 14}} if heading else line)
    words = " ".join(one.words for _, figures in rows for one in figures)
    return Figure(name, "", {"vconcat": lines, "resolve": apart} if len(lines) > 1 else lines[0], {}, words=words)


def write_figures(figures: Iterable[Figure], folder: str | Path, width_cm: float = 8.5) -> list[Path]:
    """Writes each figure as PDF, SVG and PNG at the width of a paper's column.

    Args:
        figures: Of one name each, else a number is added.
        folder: Made if it is not there; files of the same names are replaced.
        width_cm: Width of each figure.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    taken: set[str] = set()
    for figure in figures:
        name = next(name for name in _names(figure.name) if name not in taken)
        taken.add(name)
        written += [figure.save(folder / f"{name}.{ending}", width_cm) for ending in FORMATS]
    return written


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(2))


def with_data(part: Any, data: Data) -> Any:
    """A specification in which every name of a table is replaced by the table; layers of empty tables are left out.

    Vega cannot lay out a legend that has no entry.

    Example:
        >>> with_data({"data": {"name": "bars"}}, {"bars": [{"size": 3}]})
        {'data': {'values': [{'size': 3}]}}
    """
    if isinstance(part, list):
        return [with_data(one, data) for one in part if not _is_empty(one, data)]
    if not isinstance(part, dict):
        return part
    return {
        key: {"values": data[value["name"]]} if key == "data" and "name" in value else with_data(value, data)
        for key, value in part.items()
    }


def _is_empty(part: Any, data: Data) -> bool:
    """Whether it is a layer of a table without a row."""
    source = part.get("data", {}) if isinstance(part, dict) else {}
    return "name" in source and not data[source["name"]]


def _points(width_cm: float | None) -> float | None:
    if width_cm is None:
        return None
    if not width_cm > 0:
        raise ValueError(f"width_cm must be a positive number of centimetres; got {width_cm}.")
    return round(width_cm * POINTS_PER_CM, 2)


def _draw(ending: str, specification: Specification, **options: Any) -> Any:
    with figures_extra():
        import vl_convert
    return getattr(vl_convert, f"vegalite_to_{ending}")(specification, allowed_base_urls=[], **options)


def _smaller(png: bytes) -> bytes:
    """The same picture, compressed well: a fourth of what vl-convert makes, which is in a hurry."""
    start, place, chunks = png[:8], 8, []
    while place < len(png):
        size, name = unpack_from(">I4s", png, place)
        chunks.append((name, png[place + 8 : place + 8 + size]))
        place += size + 12
    pixels = compress(decompress(b"".join(content for name, content in chunks if name == b"IDAT")), 9)
    kept = [*((name, content) for name, content in chunks[:-1] if name != b"IDAT"), (b"IDAT", pixels), chunks[-1]]
    parts = [pack(">I", len(content)) + name + content + pack(">I", crc32(name + content)) for name, content in kept]
    return start + b"".join(parts)
