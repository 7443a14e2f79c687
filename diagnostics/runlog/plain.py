"""Records ↔ plain dicts for JSON: what is said once, as where a run comes from, a violation, a diagnosis, the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from diagnostics.records import Diagnosis, Remedy, RunEnd, RunInfo, Verdict, Violation

RecordType = TypeVar("RecordType")

_NESTED: dict[str, type] = {
    "violations": Violation,
    "diagnoses": Diagnosis,
    "remedies": Remedy,
    "verdict": Verdict,
}
_DEFAULTS: dict[type, tuple[tuple[str, Any], ...]] = {
    cls: tuple(
        (field.name, field.default if field.default_factory is MISSING else field.default_factory())
        for field in fields(cls)
    )
    for cls in (RunInfo, RunEnd, *_NESTED.values())
}


def plain(value: Any) -> Any:
    """A record as a dict without the fields that are at their default; anything else as it is.

    Example:
        >>> plain(RunInfo(name="mlp", seed=1))
        {'name': 'mlp', 'seed': 1}
    """
    if type(value) is tuple:
        return [plain(item) for item in value]
    if type(value) not in _DEFAULTS:
        return value
    content = ((name, getattr(value, name), default) for name, default in _DEFAULTS[type(value)])
    return {name: plain(item) for name, item, default in content if item is not default and item != default}


def foreign(value: Any) -> Any:
    """What json does not know in its nearest plain form: a configuration holds paths, a metric another's number."""
    if isinstance(value, Mapping):
        return dict(value)
    return float(value) if hasattr(value, "__float__") else str(value)


def record(cls: type[RecordType], content: Mapping[str, Any]) -> RecordType:
    """A record from its plain form; keys that this version does not know are ignored.

    Example:
        >>> record(Remedy, {"text": "wait", "added_later": 1})
        Remedy(text='wait', override=None)
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: _value(name, value) for name, value in content.items() if name in known})


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(name, item) for item in value)
    return record(_NESTED[name], value) if name in _NESTED and value is not None else value
