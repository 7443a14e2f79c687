"""What all figures share: paper, ink, marks, legends, and how a long time line is thinned.

Text and frames have one neutral grey that can be read on white and on black; a page may replace it by its own colour.
The other colours can be told apart by the colour-blind, and no mark is told by its colour alone.
"""

# ruff: noqa: PLC0415 -- matplotlib and numpy are loaded when a figure is drawn

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

INK = "#7b7f87"
BLUE, ORANGE, GREEN, ALARM, BLACK = "#3a86d0", "#d9730d", "#1f9e78", "#e5174f", "#000000"
COLUMNS = 400  # about the pixels that a page has for them
TOP, BOTTOM = 1.025, 0.0


@contextmanager
def figures_extra() -> Iterator[None]:
    """Says what to install where a package is missing that comes with the extra ``figures``."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'Figures and pages need {error.name}; pip install "training-diagnostics[figures]".'
        raise ModuleNotFoundError(message, name=error.name) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure on no window: transparent, inches wide and high."""
    with figures_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def name(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles the axes, names both axes, and gives the frame its look."""
    axes.set_title(title, color=INK, loc="left", fontsize="medium", fontweight="bold", pad=26)
    axes.set_xlabel(x, color=INK, fontsize="small")
    axes.set_ylabel(y, color=INK, fontsize="small")
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, which="both", labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)


def short(text: str, longest: int = 24) -> str:
    """A name as a figure can hold it: not too long, and no character that the font has no glyph for."""
    shown = "".join(one if one.isprintable() and one < "\u0250" else "?" for one in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def say(axes: Axes, sentence: str) -> None:
    """Puts a sentence where there is nothing to draw."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, sentence, color=INK, ha="center", va="center", transform=axes.transAxes)


def mark(axes: Axes, x: Sequence[float] | NDArray[Any], y: float, marker: str, label: str, **look: Any) -> None:
    """Markers at ``x``, the fraction ``y`` of the way up the frame, drawn over it."""
    if len(x):
        look = {"color": ALARM, "markersize": 6, **look}
        across = axes.get_xaxis_transform()
        axes.plot(x, [y] * len(x), marker, label=label, transform=across, clip_on=False, zorder=5, **look)


def at_least_a_decade(low: float, high: float) -> tuple[float, float]:
    """Limits of a scale of log10 values that is never so narrow that it shows noise as structure.

    Example:
        >>> at_least_a_decade(-3.0, -3.0)
        (-3.5, -2.5)
    """
    wider = max(0.0, 1.0 - (high - low)) / 2
    return low - wider, high + wider


def legend(axes: Axes, note: str = "") -> None:
    """A legend below the axes, under a note; in two columns if its labels are short."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if any(len(label) > 24 for label in labels) else 2
    below = ScaledTranslation(0, -34 / 72, axes.figure.dpi_scale_trans)
    box = axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=axes.transAxes + below, ncols=columns,
        frameon=False, labelcolor=INK, fontsize="small", title=note or None, title_fontsize="small", alignment="left",
        borderpad=0, borderaxespad=0,
    )  # fmt: skip
    box.get_title().set_color(INK)
    for text in box.get_texts():
        text.set_parse_math(False)


def stretches(steps: NDArray[np.int64]) -> list[NDArray[np.intp]]:
    """Positions in ``steps`` (ascending) grouped by equal stretches of the time line, at most COLUMNS of them."""
    import numpy as np

    stretch = (steps - steps[0]) * COLUMNS // (steps[-1] - steps[0] + 1)
    return np.split(np.arange(len(steps)), np.flatnonzero(np.diff(stretch)) + 1)


def extremes(steps: NDArray[np.int64], *series: NDArray[np.float64]) -> NDArray[np.intp]:
    """Positions to draw: in every stretch the first, the last, and where a series is smallest and largest."""
    import numpy as np

    kept: set[np.intp] = set()
    for group in stretches(steps):
        kept.update((group[0], group[-1]))
        for values in series:
            inside = values[group]
            inside = np.where(np.isfinite(inside), inside, np.median(inside))
            kept.update((group[inside.argmin()], group[inside.argmax()]))
    return np.array(sorted(kept))


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for a page: transparent, text as text, no identifier that another figure may have.

    Args:
        figure: What to write.
        title: Tells two figures of one page apart.

    Returns:
        ``<svg …>…</svg>``; the same for the same figure and title.

    Example:
        >>> to_svg(new_figure(4, 3), "empty").startswith("<svg")
        True
    """
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", dpi=160, metadata=nothing)
    svg = text.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).strip()
