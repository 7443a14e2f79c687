"""How each figure is drawn: Vega-Lite without data, one specification per kind of figure; nothing comes from a run.

A row of a table may hold arrays, which the specification flattens: so data stay small in a page and are the same text
everywhere. A name of a layer or a run is only ever a value of a field, never part of an expression.
"""

from __future__ import annotations

from diagnostics.reports.drawing import Specification
from diagnostics.reports.specifications import by_depth, by_step

BY_NAME: dict[str, Specification] = {
    "heatmap": by_depth.heatmap(),
    "depth_profile": by_depth.depth_profile(),
    "gain": by_depth.by_depth("gradient norm, input / output", "log"),
    "update_ratio": by_depth.by_depth("‖update‖ / ‖weight‖", "log", "~e"),
    "share": by_depth.by_depth("share of (total norm) ** p", "linear", ".0%"),
    "norms": by_step.norms(),
    "clipping": by_step.clipping(),
    "findings": by_step.findings(),
    "what_if": by_step.what_if(),
    "overlay": by_depth.overlay(relative=False),
    "overlay_relative": by_depth.overlay(relative=True),
    "differences": by_depth.differences(),
}
"""Every kind of figure by its name."""
