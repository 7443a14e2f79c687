"""What Hydra is told: the types of all keys, and the group ``diagnostics`` for other people. How mistakes are said.

The files under conf/ hold the values and say what they mean, schemas.py their types, so that a wrong key, type or
option is refused while Hydra composes, before anything runs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from diagnostics.clip_schemas import CLIP_SCHEMAS, ClipByGroupConfig, NoClipConfig
from diagnostics.schemas import (
    SCHEMAS,
    ConsoleSinkConfig,
    MonitorConfig,
    MonitorRunLogConfig,
    MonitorWandbConfig,
    TrainConfig,
)

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the folder inside the package, a checkout beside it.
CONF = next((folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()), _PACKAGE / "conf")

LONGEST_FOLDER_NAME = 120  # file systems allow 255 bytes, some sync tools half of that


class ConfigurationError(ValueError):
    """The configuration asks for something that cannot be; the message is one sentence for the person who wrote it."""


def register() -> None:
    """Makes the group ``diagnostics`` known to Hydra, for an app of your own; may be called again.

    Call it before ``@hydra.main``. Then ``defaults: [diagnostics: default]`` gives a section ``diagnostics``, and
    ``instantiate(config.diagnostics)(model, optimizer)`` a Monitor. On the command line: ``diagnostics/clip=norm``
    (or any other rule under conf/clip), ``diagnostics.clip.max_norm=0.5``, ``diagnostics/sink=[console,runlog,wandb]``,
    ``diagnostics.every=1``. No other group is touched. A file of your own, ``conf/diagnostics/mine.yaml`` with
    ``defaults: [default, override clip: norm]``, may change any key; it may not be called ``default``.

    Example:
        >>> from hydra import compose, initialize
        >>> register()
        >>> with initialize(None, version_base="1.3"):
        ...     config = compose(overrides=["+diagnostics=default", "diagnostics/clip=norm"])
        >>> config.diagnostics.clip.max_norm
        1.0
    """
    store = ConfigStore.instance()
    store.store(group="diagnostics", name="default", node=_with_values(MonitorConfig, "diagnostics/standard"))
    store.store(group="diagnostics/clip", name="none", node=NoClipConfig)
    for schema, rule in CLIP_SCHEMAS.items():
        name = schema.removeprefix("clip_")
        if rule not in {NoClipConfig, ClipByGroupConfig}:
            store.store(group="diagnostics/clip", name=name, node=_with_values(rule, f"clip/{name}"))
    store.store(group="diagnostics/clip", name="group", node=_group_of_rules())
    for name, sink in (
        ("console", OmegaConf.structured(ConsoleSinkConfig)),
        ("runlog", _with_values(MonitorRunLogConfig, "sink/runlog")),
        ("wandb", OmegaConf.structured(MonitorWandbConfig)),
    ):
        store.store(group="diagnostics/sink", name=name, node={name: sink})


def _group_of_rules() -> Any:
    """conf/clip/group.yaml with the rule of its groups as a choice of its own, ``diagnostics/clip@…``."""
    node = OmegaConf.create({"defaults": [{"/diagnostics/clip@rule": "norm"}, "_self_"]})
    values = OmegaConf.load(CONF / "clip/group.yaml")
    assert isinstance(values, DictConfig)
    return OmegaConf.merge(
        node, {"_target_": ClipByGroupConfig._target_}, {k: v for k, v in values.items() if k != "defaults"}
    )


def _with_values(schema: type, file: str) -> Any:
    """A schema with the values that a file under conf/ has for its keys, which are those of our own trainers."""
    known = {one.name for one in fields(schema)} - {"defaults"}
    values = {str(key): value for key, value in OmegaConf.load(CONF / f"{file}.yaml").items() if key in known}
    return OmegaConf.merge(OmegaConf.structured(schema), values)


def register_trainers() -> None:
    """Makes the schemas of conf/ and the resolver ``folder_name`` known to Hydra; may be called again.

    Example:
        >>> register_trainers()
        >>> OmegaConf.create({"folder": "${folder_name:3,'model=a/b,lr=0.1'}"}).folder
        '3_model=a_b_lr=0.1'
    """
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=TrainConfig, package="_global_")
    for name, node in SCHEMAS.items():
        store.store(group="schema", name=name, node=node)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)


def _folder_name(number: int, overrides: str) -> str:
    """A job's folder: its number makes it unique, its overrides make it readable."""
    words = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", f"{number}_{overrides}").strip("_.")
    return words[:LONGEST_FOLDER_NAME]


def resolve(config: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain containers, every interpolation resolved and every number checked.

    Raises:
        ConfigurationError: A value is missing, an interpolation leads nowhere, a key was forced in with ``+`` that
            nobody reads, or a number is not one.

    Example:
        >>> resolve(OmegaConf.create({"optimizer": {"lr": float("nan")}}))
        Traceback (most recent call last):
        diagnostics.configs.ConfigurationError: optimizer.lr must be a finite number of at least 0; got nan.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(sentence(error)) from error
    assert isinstance(plain, dict)
    for message in (*_forced_keys(config, ""), *_bad_numbers(plain, ""), *_paths_outside(plain)):
        raise ConfigurationError(message)
    return {str(key): value for key, value in plain.items()}


def compose_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """What a command line of the training job means, resolved; for a program that starts runs of its own.

    Args:
        overrides: Of the command line.

    Raises:
        ConfigurationError: As :func:`resolve` does; Hydra's own errors where the overrides do not compose.

    Example:
        >>> register_trainers()
        >>> compose_settings(["model.depth=12"])["model"]["depth"]
        12
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("train", overrides=list(overrides)))


def _paths_outside(plain: Mapping[Any, Any]) -> Iterator[str]:
    """A run log belongs into its run's folder: two runs must not meet in another one."""
    log = (plain.get("sink") or {}).get("runlog")
    if log and (Path(log["path"]).is_absolute() or ".." in Path(log["path"]).parts):
        yield f"sink.runlog.path must stay inside the run's folder, which hydra.run.dir moves; got {log['path']!r}."


def _forced_keys(config: DictConfig, prefix: str) -> Iterator[str]:
    schema = OmegaConf.get_type(config)
    known = [one.name for one in fields(schema)] if is_dataclass(schema) else list(config)
    for key, value in ((str(key), value) for key, value in config.items()):
        if key not in known:
            yield _unknown_key(f"{prefix}{key}", known)
        elif isinstance(value, DictConfig):
            yield from _forced_keys(value, f"{prefix}{key}.")


def _bad_numbers(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _bad_numbers(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _bad_numbers(item, key)
    elif isinstance(value, float) and key.startswith("optimizer.") and not 0 <= value < math.inf:
        yield f"{key} must be a finite number of at least 0; got {value}."
    elif isinstance(value, float) and math.isnan(value):
        yield f"{key} must be a number; got nan."


def sentence(error: Exception) -> str:
    """What is wrong with the configuration, in one sentence for the person who wrote it.

    Args:
        error: What Hydra or OmegaConf raised while composing or resolving.

    Example:
        >>> config = OmegaConf.structured(TrainConfig)
        >>> try:
        ...     config.trainer.stepz = 3
        ... except OmegaConfBaseException as error:
        ...     print(sentence(error))
        trainer.stepz is not a key of the configuration; did you mean trainer.steps?
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        return f"An override must have the form key=value, with quotes around special characters; got {error.override}."
    if several := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        return f"{several[1]} has several values; add -m to run them all, or put brackets around a list."
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return _about_a_key(cause) if isinstance(cause, OmegaConfBaseException) else _joined(cause)


def _about_a_key(error: OmegaConfBaseException) -> str:
    schema = error.object_type if is_dataclass(error.object_type) else None
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)) and error.full_key:
        return _unknown_key(error.full_key, [one.name for one in fields(schema)] if schema else [])
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key or error.key} must have a value; got none."
    if isinstance(error, ValidationError) and schema:
        return _wrong_type(error, get_type_hints(schema).get(str(error.key)))
    return _joined(error)


def _missing_option(file: str, known: Sequence[str] | None) -> str:
    group, _, option = file.rpartition("/")
    options = sorted(known or (path.stem for path in (CONF / group).glob("*.yaml")))
    if not group or not options:
        return f"There is no configuration file {file}.yaml."
    return f"{group} must be one of {', '.join(options)}; got {option!r}."


def _unknown_key(key: str, known: list[Any]) -> str:
    section, _, name = key.rpartition(".")
    dot = section and f"{section}."
    names = [str(one) for one in known if not str(one).startswith("_")]
    close = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {dot}{close[0]}?" if close else f"{section or 'it'} has {', '.join(names) or 'no keys'}."
    return f"{key} is not a key of the configuration; {advice}"


def _wrong_type(error: ValidationError, hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    kind = kinds[0] if len(kinds) == 1 else None
    if isinstance(kind, type) and issubclass(kind, Enum):
        expected = f"one of {', '.join(kind.__members__)}"
    elif kind in words:
        expected = words[kind]
    else:
        return _joined(error)
    return f"{error.full_key} must be {expected}; got {'null' if error.value is None else repr(error.value)}."


def _joined(error: BaseException) -> str:
    """The lines of a message that speak of the matter, as one."""
    noise = re.compile(r"See https?:|full_key:|object_type=|reference_type=|Config search path:|provider=")
    lines = [line.strip() for line in str(error).splitlines()]
    said = " ".join(line for line in lines if line and not noise.match(line))
    key = getattr(error, "full_key", None)
    return (f"{key}: {said}" if key and key not in said else said).rstrip(".") + "."
