"""Keeps secrets out of what leaves the machine: values whose key says that they are nobody's business."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diagnostics.records import RunInfo

HIDDEN = "(hidden)"
_SECRET = {"password", "passwords", "passwd", "pwd", "passphrase", "secret", "secrets", "credential", "credentials"}
_SECRET |= {"apikey", "authtoken", "accesstoken"}
_SECRET_AT_THE_END = {"key", "keys", "token", "tokens"}
_TRAILING = {"id", "value", "string", "pem"}
_NO_SECRET = {"pad", "eos", "bos", "unk", "cls", "sep", "mask", "sort", "primary"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_KEYS_IN_BRACES = re.compile(r"[{,]\s*['\"]?([\w.-]+)['\"]?\s*:")
_LOGIN_IN_URL = re.compile(r"://[^/\s@]+:[^/\s@]+@")


def is_secret(key: str, value: object = "") -> bool:
    """Whether a key's name says that its value is nobody's business.

    A word like password, secret or credential says so anywhere in it. ``key`` and ``token`` say so only at its end
    (``api_key`` and ``hfToken``, not ``key_size`` or ``tokenizer``), only of a text (not ``max_tokens=512``) and not
    with a word like ``pad`` before them.

    Example:
        >>> [is_secret(key) for key in ("api_key", "db.password", "key_size", "num_key_value_heads", "pad_token")]
        [True, True, False, False, False]
    """
    words = [word.lower() for word in _WORDS.findall(key.rsplit(".", maxsplit=1)[-1])]
    if not _SECRET.isdisjoint(words):
        return True
    while words and words[-1] in _TRAILING:
        words.pop()
    at_the_end = bool(words) and words[-1] in _SECRET_AT_THE_END and _NO_SECRET.isdisjoint(words)
    return at_the_end and not isinstance(value, (int, float))


def hide_secrets(value: Any, key: str = "") -> Any:
    """A copy of plain containers with ``"(hidden)"`` for all that stands under a secret key, and no login in a URL.

    Example:
        >>> hide_secrets({"login": {"password": 1234, "user": "me"}, "max_tokens": 512, "api_key": "0f"})
        {'login': {'password': '(hidden)', 'user': 'me'}, 'max_tokens': 512, 'api_key': '(hidden)'}
    """
    if isinstance(value, Mapping):
        return {name: hide_secrets(item, key if is_secret(key) else str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(item, key) for item in value]
    if value not in (None, "") and not isinstance(value, bool) and is_secret(key, value):
        return HIDDEN
    return _LOGIN_IN_URL.sub(f"://{HIDDEN}@", value) if isinstance(value, str) else value


def hide_in_arguments(arguments: Sequence[str]) -> list[str]:
    """The same for a command line: ``key=value``, ``--key=value``, ``--key value`` and ``group={key:value}``.

    Example:
        >>> hide_in_arguments(["train.py", "optimizer.lr=0.1", "task.password=x", "--token", "x"])
        ['train.py', 'optimizer.lr=0.1', 'task.password=(hidden)', '--token', '(hidden)']
    """
    hidden: list[str] = []
    awaited = False
    for argument in arguments:
        key, equals, text = argument.partition("=")
        within = any(is_secret(word) for word in _KEYS_IN_BRACES.findall(text))
        if awaited and not argument.startswith("-"):
            hidden.append(HIDDEN)
        elif equals and (within or is_secret(key, _number_or_text(text))):
            hidden.append(f"{key}={HIDDEN}")
        else:
            hidden.append(_LOGIN_IN_URL.sub(f"://{HIDDEN}@", argument))
        awaited = argument.startswith("--") and not equals and is_secret(argument)
    return hidden


def hide_in_line(line: str) -> str:
    """The same for a command in one line, or a name made of overrides; a line without secrets stays as it is.

    Example:
        >>> hide_in_line("model.depth=4 db.password='a b'")
        'model.depth=4 db.password=(hidden)'
    """
    try:
        arguments = shlex.split(line)
    except ValueError:  # a quote that is never closed
        arguments = line.split()
    hidden = hide_in_arguments(arguments)
    return line if hidden == arguments else " ".join(hidden)


def hide_in_info(info: RunInfo) -> RunInfo:
    """The same for where a run comes from; equal to what was given if there is nothing to hide.

    Example:
        >>> hide_in_info(RunInfo("mlp", command="train.py api_key=0f", config={"api_key": "0f"})).config
        {'api_key': '(hidden)'}
    """
    hidden = replace(
        info,
        name=hide_in_line(info.name),
        command=hide_in_line(info.command),
        overrides=tuple(hide_in_arguments(info.overrides)),
        config=hide_secrets(info.config),
        git=hide_secrets(info.git),
    )
    return info if _text(hidden) == _text(info) else hidden


def _text(info: RunInfo) -> str:
    """All that may hold a secret; as text, in which a tuple is a list and NaN is equal to itself."""
    parts = (info.name, info.command, info.overrides, info.config, info.git)
    return json.dumps(parts, default=lambda value: dict(value) if isinstance(value, Mapping) else str(value))


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
