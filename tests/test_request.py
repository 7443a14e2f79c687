"""What a person types: folders stay folders whatever their names, and a word that cannot be is told in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from diagnostics.reports.request import Request, parse


def test_the_first_word_is_a_place_whatever_it_looks_like_and_known_keys_are_options_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1,0.2").mkdir()
    assert parse(["lr=0.1,0.2"]) == Request(("lr=0.1,0.2",))
    assert parse(["gone=1"]).places == ("gone=1",)  # find_logs says that it does not exist
    assert parse(["before", "lr=0.1,0.2", "multirun/a=1,b=[2]"]).places == (
        "before",
        "lr=0.1,0.2",
        "multirun/a=1,b=[2]",
    )
    assert parse(["format=md", "before", "after", "figures=out", "page=x=1.html", "wandb=True"]) == Request(
        ("before", "after"), "md", Path("x=1.html"), Path("out"), wandb=True
    )
    assert parse(["a", "page=False"]).page is False
    assert parse(["wandb:me/project/group"]).places == ("wandb:me/project/group",)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Give the folder of a run, of a sweep, or of several: diagnostics-report FOLDER [key=value ...]."),
        (
            ["format=csv"],
            "Give the folder of a run, of a sweep, or of several: diagnostics-report FOLDER [key=value ...].",
        ),
        (["a", "format=xml"], "format must be one of text, json, csv, md, latex; got 'xml'."),
        (["a", "wandb=maybe"], "wandb must be true or false; got 'maybe'."),
        (["a", "page="], "page= needs a file, true or false behind it."),
        (["a", "figures="], "figures= needs a folder behind it."),
        (["a", "formt=csv"], "'formt=csv' is neither an option nor a folder that exists; did you mean format=?"),
        (
            ["a", "x=1"],
            "'x=1' is neither an option nor a folder that exists; the keys are format, page, figures, wandb.",
        ),
    ],
)
def test_a_word_that_cannot_be_is_refused_in_one_sentence(words, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole sentence is compared
        parse(words)
    assert str(error.value) == sentence
