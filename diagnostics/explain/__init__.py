"""What every condition and every rule of the loop means: a page each under pages/, read and shown. No torch.

A page is a Markdown file with the sections Measure, Source, Bad, Good, Figure and Try. Its examples stand between
:data:`AROUND` and :data:`LOOP` and are run by the tests: a bad one shows what the page is about, a good one does not.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from diagnostics.diagnosis.conditions import CONDITIONS

PAGES = Path(__file__).resolve().parent / "pages"
HEALTHY = "healthy"
SECTIONS = ("Measure", "Source", "Bad", "Good", "Figure", "Try")
AROUND = """import torch
from torch import nn
from diagnostics import ClipByNorm, Monitor

batches = [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(60)]
loss_function, clip = nn.functional.cross_entropy, None
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
"""What an example finds there."""
LOOP = """with Monitor(model, optimizer, clip=clip) as monitor:
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_function(model(inputs), targets)
        loss.backward()
        monitor.clip_and_step(loss=loss)
"""
"""What is run behind an example that has no loop of its own."""


@dataclass(frozen=True, slots=True)
class Page:
    """One explanation.

    Attributes:
        name: A condition's or a rule's.
        what: What it is, in a few sentences.
        sections: The others by title, code without its fence.
    """

    name: str
    what: str
    sections: dict[str, str]

    @property
    def summary(self) -> str:
        """The first sentence, on one line."""
        return re.split(r"(?<=[.:])\s", " ".join(self.what.split()), maxsplit=1)[0].rstrip(".:")


def names() -> tuple[list[str], list[str]]:
    """The conditions, worst first and ``healthy`` at the end, and the rules of the loop in alphabetical order.

    Example:
        >>> conditions, rules = names()
        >>> conditions[-1], rules[0]
        ('healthy', 'clip_after_step')
    """
    conditions = [*CONDITIONS, HEALTHY]
    return conditions, sorted(path.stem for path in PAGES.glob("*.md") if path.stem not in conditions)


def page(name: str) -> Page:
    """The page about a condition or a rule.

    Args:
        name: As messages write it; blanks and hyphens stand for underscores.

    Raises:
        ValueError: There is none; the message names what is close.

    Example:
        >>> page("vanishing").summary
        'The gradient fades on its way back'
        >>> page("vanishig")
        Traceback (most recent call last):
        ValueError: There is no condition or rule 'vanishig'; did you mean vanishing?
    """
    known = [one for some in names() for one in some]
    wanted = re.sub(r"[\s-]+", "_", name.strip().lower())
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else "diagnostics-explain lists all."
        raise ValueError(f"There is no condition or rule {name!r}; {advice}")
    head, *parts = re.split(r"^## ", (PAGES / f"{wanted}.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    title, _, what = head.partition("\n")
    sections = dict(part.split("\n", maxsplit=1) for part in parts)
    bare = {heading: re.sub(r"^```\w*\n|^```$", "", text, flags=re.MULTILINE) for heading, text in sections.items()}
    return Page(title.removeprefix("# "), what.strip(), {heading: text.strip("\n") for heading, text in bare.items()})


def explain(name: str) -> str:
    """The whole page as text for a terminal.

    Args:
        name: As :func:`page` takes it.

    Raises:
        ValueError: There is no such page.

    Example:
        >>> print(explain("missing_zero_grad").splitlines()[0])
        missing_zero_grad
    """
    found = page(name)
    lines = [found.name, "=" * len(found.name), "", found.what]
    for heading, text in found.sections.items():
        shown = _indented(text) if heading in _CODE else text
        lines += ["", _TITLES.get(heading, heading).upper(), "", shown]
    around = f"{AROUND}\n# the example stands here, and behind one without a loop of its own comes:\n\n{LOOP}"
    return "\n".join([*lines, "", "AROUND THE EXAMPLES", "", _indented(around)])


def contents() -> str:
    """All pages, a line each."""
    conditions, rules = names()
    width = max(map(len, [*conditions, *rules]))
    lines = ["diagnostics-explain <name> tells what it is, how it is measured, a bad and a good example, what to try."]
    for title, some in (("Conditions of the gradients", conditions), ("Rules of the training loop", rules)):
        lines += ["", f"{title}:", *(f"  {one:{width}}  {page(one).summary}" for one in some)]
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


_CODE = ("Bad", "Good", "Figure")
_TITLES = {"Measure": "How it is measured", "Bad": "A bad example", "Good": "A good example", "Try": "What to try"}


def main() -> None:
    """The command ``diagnostics-explain``: prints a page, or without a name which there are."""
    parser = argparse.ArgumentParser(description="What a condition of the gradients or a rule of the loop means.")
    parser.add_argument("name", nargs="*", help="as a message names it, e.g. vanishing; without, all are listed")
    wanted = " ".join(parser.parse_args().name)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal knows fewer characters than a figure has
    try:
        sys.stdout.write((explain(wanted) if wanted else contents()) + "\n")
    except ValueError as error:
        sys.exit(str(error))
