"""Verdicts and records show themselves in a notebook, and other people's names stay text."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from run_records import ATTACK, VIOLATION, fading, record

from diagnostics.records import Diagnosis, Remedy, Verdict


def texts(html: str) -> list[str]:
    """The texts of well-formed markup; a tag that is not closed fails."""
    found: list[str] = []
    open_: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            assert not attributes
            open_.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_.pop() == tag

        def handle_data(self, data: str) -> None:
            found.append(data.strip())

    Reader().feed(html)
    assert open_ == []
    return found


def test_a_verdict_says_its_word_its_severity_and_its_sentence() -> None:
    assert texts(Verdict("vanishing", 3, "vanishing since step 0")._repr_html_()) == [
        "vanishing (severe)",
        "vanishing since step 0",
    ]
    assert texts(Verdict("healthy", 0, "healthy")._repr_html_())[0] == "healthy"


def test_a_step_shows_its_numbers_and_its_layers_by_depth() -> None:
    shown = texts(replace(fading(1)[0], loss=0.25, violations=(VIOLATION,))._repr_html_())
    assert shown[:2] == ["step 0", "of optimizer"]
    numbers = dict(zip(shown[2:8], shown[8:14], strict=True))
    assert numbers["loss"] == "0.25"
    assert numbers["slope, decades per layer"] == "-0.9"
    assert "body.9" in shown
    assert "missing_zero_grad at step 1, 9 times:" in shown


def test_a_diagnosis_lists_its_remedies() -> None:
    found = Diagnosis("vanishing", 2, 7, 0, {}, "It fades.", (Remedy("normalise", "model.norm=layer"),))
    assert texts(found._repr_html_()) == [
        "vanishing (warning) since step 7:",
        "It fades.",
        "normalise (model.norm=layer)",
    ]


@pytest.mark.parametrize(
    "shown",
    [
        Verdict(ATTACK, 0, ATTACK),
        replace(VIOLATION, rule=ATTACK, message=ATTACK, remedy=ATTACK),
        Diagnosis(ATTACK, 1, 0, 0, {}, ATTACK, (Remedy(ATTACK, ATTACK),)),
        replace(record(0, [1.0], names=[ATTACK]), optimizer=ATTACK),
    ],
    ids=lambda one: type(one).__name__,
)
def test_names_stay_text(shown: Any) -> None:
    assert ATTACK in " ".join(texts(shown._repr_html_()))
