"""What a run leaves in W&B when it ends, made from its run log: the log itself, tables, pictures and its page.

Nothing of this is on a step's path. Each object is tried alone: one that cannot be made costs neither the others nor
the run. The cheapest and most valuable come first, for a run that is being killed.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from diagnostics.records import SEVERITY_NAMES, DiagnosticsWarning
from diagnostics.runlog import FILE_NAME, Event, Run, RunLogWriter, read_run
from diagnostics.sinks.secrets import hide_in_info
from diagnostics.sinks.wandb.values import within

if TYPE_CHECKING:
    import wandb

ARTIFACT = "run-log"
DIAGNOSES = ("condition", "severity", "since step", "cleared at step", "depth", "message", "remedies", "evidence")
VIOLATIONS = ("rule", "first step", "count", "parameters", "message", "remedy")


def leave(
    run: wandb.Run, log: Path, log_value: Callable[[str, Any], None], *, media: bool, upload: bool
) -> dict[str, str]:
    """Leaves the run log and what is made of it in a W&B run.

    Args:
        run: The run, still open.
        log: The run log, with its end.
        log_value: Logs a value under a key.
        media: Whether to leave tables, pictures and the page.
        upload: Whether to leave the run log.

    Returns:
        What could not be left, and why.
    """
    troubles: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ModuleNotFoundError as error:
            troubles[name] = str(error)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the other objects and the run are more important
            troubles[name] = f"{type(error).__name__}: {error}"

    with TemporaryDirectory(prefix="diagnostics-", ignore_cleanup_errors=True) as folder:
        try:
            read = _without_secrets(read_run(log), Path(folder))
        except (OSError, ValueError) as error:
            return {"run log": f"{type(error).__name__}: {error}"}
        if upload:
            attempt("run log", partial(_upload, run, read))
        for key, make in _objects(read, Path(folder)) if media else ():
            attempt(key, partial(_make_and_log, key, make, log_value))
    return troubles


def _make_and_log(key: str, make: Callable[[], Any], log_value: Callable[[str, Any], None]) -> None:
    log_value(key, make())


def warn(troubles: Mapping[str, str]) -> None:
    """Says in one warning what W&B does not get."""
    reasons: dict[str, list[str]] = {}
    for name, reason in troubles.items():
        reasons.setdefault(reason.rstrip("."), []).append(name)
    if reasons:
        said = "; ".join(f"no {' and no '.join(names)} ({reason})" for reason, names in reasons.items())
        warnings.warn(f"W&B gets {said}; all else is there.", DiagnosticsWarning, stacklevel=3)


def _without_secrets(run: Run, folder: Path) -> Run:
    """The run as it may leave the machine: itself, or a copy of its log in which secrets are hidden."""
    hidden = run.info and hide_in_info(run.info)
    if hidden is None or hidden == run.info:
        return run
    writer = RunLogWriter(folder / run.path.name)
    events: list[Event] = [hidden, *run.records, *run.violations]
    for event in events if run.end is None else [*events, run.end]:
        writer.write(event)
    writer.close()
    return read_run(writer.path)


def _upload(run: wandb.Run, read: Run) -> None:
    import wandb  # noqa: PLC0415 -- loaded already, since there is a run

    verdict = {} if read.verdict is None else {"verdict": read.verdict.condition, "severity": read.verdict.severity}
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", f"{ARTIFACT}-{run.id}"), type=ARTIFACT, metadata=verdict)
    artifact.add_file(str(read.path), name=FILE_NAME)
    run.log_artifact(artifact)


def _objects(run: Run, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The keys in W&B, and how to make what stands under them."""
    yield "report/diagnoses", partial(_table, DIAGNOSES, _diagnoses(run))
    yield "report/violations", partial(_table, VIOLATIONS, _violations(run))
    recorded: dict[str, list[int]] = {}
    for place, record in enumerate(run.records):
        if record.recorded and any(norm is not None for norm in record.layers.values("output.norm")):
            recorded.setdefault(record.optimizer, []).append(place)
    for optimizer, places in recorded.items():
        yield f"report/{within(optimizer)}profile", partial(_lines, run, places)
        yield f"report/{within(optimizer)}heatmap", partial(_picture, run, optimizer)
    yield "report/page", partial(_page, run, folder / "page.html")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> wandb.Table:
    import wandb  # noqa: PLC0415 -- as above

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _diagnoses(run: Run) -> list[tuple[Any, ...]]:
    return [
        (
            one.condition,
            SEVERITY_NAMES[one.severity],
            one.step,
            one.cleared,
            one.depth,
            one.message,
            "; ".join(map(str, one.remedies)),
            json.dumps(dict(one.evidence), default=str),
        )
        for one in run.diagnoses
    ]


def _violations(run: Run) -> list[tuple[Any, ...]]:
    return [
        (one.rule, one.step, one.count, ", ".join(one.parameters), one.message, one.remedy) for one in run.violations
    ]


def _lines(run: Run, places: Sequence[int]) -> Any:
    """log10 rms of the output gradient over depth at the first, the middle and the last recorded step.

    A logarithm knows neither zero nor NaN; how many layers have such a gradient stands in the line's name.
    """
    import wandb  # noqa: PLC0415 -- as above

    some = (run.records[place] for place in (places[0], places[len(places) // 2], places[-1]))
    chosen = {record.step: record for record in some}
    xs, ys, names = [], [], []
    for step, record in chosen.items():
        sizes = [(row.layer.depth, row.output.rms) for row in record.layers if row.output is not None]
        drawn = [(depth, math.log10(rms)) for depth, rms in sizes if 0 < rms < math.inf]
        left_out = len(sizes) - len(drawn)
        names.append(f"step {step}" + (f" ({left_out} layers zero or not finite)" if left_out else ""))
        xs.append([depth for depth, _ in drawn])
        ys.append([size for _, size in drawn])
    title = "Output gradient over depth: log10 rms (loss per output)"
    return wandb.plot.line_series(xs, ys, keys=names, title=title, xname="depth")


def _picture(run: Run, optimizer: str) -> wandb.Image:
    import wandb  # noqa: PLC0415 -- as above

    # Reports know sinks, not the other way round; and what they need is an extra.
    from diagnostics.reports.drawing import figures_extra  # noqa: PLC0415

    with figures_extra():
        from PIL import Image  # noqa: PLC0415 -- W&B takes no PNG as bytes

        from diagnostics.reports.figures import heatmap  # noqa: PLC0415
        from diagnostics.reports.history import histories  # noqa: PLC0415
    return wandb.Image(Image.open(BytesIO(heatmap(histories(run.records)[optimizer]).png())))


def _page(run: Run, file: Path) -> wandb.Html:
    import wandb  # noqa: PLC0415 -- as above

    from diagnostics.reports.page import write_page  # noqa: PLC0415 -- reports know sinks; the page needs an extra

    with write_page(run, file).open(encoding="utf-8") as page:
        return wandb.Html(page, inject=False)
