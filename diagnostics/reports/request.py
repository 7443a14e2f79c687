"""What a person typed after ``diagnostics-report``: folders, and ``key=value`` words as in Hydra.

Hydra itself does not read them: its folders' names hold ``=`` and ``,``, which its grammar of overrides takes apart,
and a report has four plain keys, nothing to compose.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diagnostics.reports.exports import FORMATS

WANDB = "wandb:"
KEYS = ("format", "page", "figures", "wandb")
USAGE = """\
usage: diagnostics-report FOLDER ... [key=value ...]

One row per run, the sickest first, and one page for all of them. A folder is that of a run or of a sweep, finished,
going on or crashed; or a run log; or wandb:entity/project/group, whose logs are fetched from W&B. Two folders or more
are also compared with the first.

  format=text|json|csv|md|latex   what is printed (text)
  page=FILE|true|false            the page; true puts it into the folder (true)
  figures=FOLDER                  every figure as PDF, SVG and PNG, at the width of a paper's column
  wandb=true|false                a Report in W&B, too (false)
"""


@dataclass(frozen=True, slots=True)
class Request:
    """A report that is asked for.

    Attributes:
        places: Folders, run logs, or ``wandb:entity/project/group``.
        format: One of ``text``, ``json``, ``csv``, ``md`` and ``latex``.
        page: The page's file; True for one at the place itself, False for none.
        figures: The folder that gets the figures; None for none.
        wandb: Whether a Report is made in W&B.
    """

    places: tuple[str, ...]
    format: str = "text"
    page: Path | bool = True
    figures: Path | None = None
    wandb: bool = False


def parse(words: Sequence[str]) -> Request:
    """A report from the command line.

    Args:
        words: A word with a known key before ``=`` is an option, and every other one a place.

    Raises:
        ValueError: In one sentence, what cannot be.

    Example:
        >>> parse(["multirun/lr=0.1,0.2", "format=csv", "page=false"])
        Request(places=('multirun/lr=0.1,0.2',), format='csv', page=False, figures=None, wandb=False)
    """
    places: list[str] = []
    request = Request(())
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in KEYS:
            request = _with(request, key, value)
        elif places and re.fullmatch(r"[A-Za-z_]\w*=[^/]*", word) and not Path(word).exists():
            raise ValueError(_unknown(key, word))
        else:
            places.append(word)
    if not places:
        raise ValueError(
            "Give the folder of a run, of a sweep, or of several: diagnostics-report FOLDER [key=value ...]."
        )
    return replace(request, places=tuple(places))


def place_in_wandb(place: str) -> tuple[str, str, str]:
    """Entity, project and group of a place in W&B; none of them leads out of a folder of its name.

    Raises:
        ValueError: The place is not named in full.

    Example:
        >>> place_in_wandb("wandb:me/digits/depth sweep")
        ('me', 'digits', 'depth sweep')
    """
    parts = place.removeprefix(WANDB).split("/")
    if len(parts) != 3 or not all(re.fullmatch(r"[^/\\]+", part) and part.strip(". ") for part in parts):
        raise ValueError(f"A place in W&B is wandb:entity/project/group; got {place!r}.")
    entity, project, group = parts
    return entity, project, group


def _unknown(key: str, word: str) -> str:
    near = difflib.get_close_matches(key, KEYS, 1)
    hint = f"did you mean {near[0]}=?" if near else f"the keys are {', '.join(KEYS)}."
    return f"{word!r} is neither an option nor a folder that exists; {hint}"


def _with(request: Request, key: str, value: str) -> Request:
    if key == "format":
        if value not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {value!r}.")
        return replace(request, format=value)
    if key == "wandb":
        return replace(request, wandb=_switch(key, value))
    if not value:
        raise ValueError(f"{key}= needs a {'folder' if key == 'figures' else 'file, true or false'} behind it.")
    if key == "figures":
        return replace(request, figures=Path(value))
    return replace(request, page=_switch(key, value) if value.lower() in ("true", "false") else Path(value))


def _switch(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{key} must be true or false; got {value!r}.")
    return value.lower() == "true"
