"""README shows the two commands first, and its Python blocks run as they stand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_commands_are_make_run_and_make_test():
    first = re.search(r"```sh\n(.*?)```", README, flags=re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make run", "make test"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_python_blocks_run_and_print_a_verdict(number, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        namespace = {}
        exec(compile(BLOCKS[number], f"README block {number}", "exec"), namespace)
    namespace["monitor"].close()
    assert "healthy" in capsys.readouterr().out


def test_the_loop_to_copy_has_at_most_twelve_lines():
    assert len(BLOCKS[0].strip().splitlines()) <= 12
