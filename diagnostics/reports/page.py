"""A run log → one HTML file that opens from disk: no network, no script, light and dark, printable.

Three steps that know nothing of each other's insides: a run is read, ``view.describe`` turns it into what is to be
shown, and the template ``page.html`` turns that into HTML, where every text is escaped and only our drawings are not.
"""

from __future__ import annotations

from pathlib import Path

from diagnostics.reports.drawing import figures_extra
from diagnostics.reports.view import Page, describe
from diagnostics.runlog import Run, read_run

PAGE = "page.html"


def write_page(run_log: str | Path | Run, page: str | Path | None = None) -> Path:
    """Writes the page of one run.

    Args:
        run_log: The run log, its folder, or what was read from it; the run may have crashed or be going on.
        page: The file to write, replaced if it is there; ``page.html`` beside the run log if None.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no run log.
        ModuleNotFoundError: matplotlib or jinja2 is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diagnostics import RunInfo
        >>> from diagnostics.runlog import RunLogWriter
        >>> with TemporaryDirectory() as folder:
        ...     writer = RunLogWriter(folder)
        ...     writer.write(RunInfo(name="mlp"))
        ...     writer.close()
        ...     write_page(folder).name
        'page.html'
    """
    run = run_log if isinstance(run_log, Run) else read_run(run_log)
    path = run.path.with_name(PAGE) if page is None else Path(page)
    path.write_text(render(describe(run)), encoding="utf-8", errors="replace")
    return path


def render(page: Page) -> str:
    """The view as HTML."""
    with figures_extra():
        from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 -- an extra

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)
