"""Options from a YAML file and from the command line, merged and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from compactmlip.errors import InputError, did_you_mean

Options = TypeVar("Options", bound=BaseModel)


def resolve(kind: type[Options], config: Path | None, settings: list[str], **overrides: Any) -> Options:
    """Build options: defaults, then the file, then ``--set``, then the command line's own options.

    Parameters
    ----------
    kind
        Class of the options.
    config
        YAML file with keys of ``kind``, or None.
    settings
        Texts ``key=value``; dots reach into nested options (``distil.lr=0.003``), values are YAML.
    overrides
        Options given on the command line; None means not given.  Dots are written as two underscores.

    Raises
    ------
    InputError
        If the file cannot be read, a key is unknown, or a value is out of range.
    """
    data = _read(config) if config else {}
    for text in settings:
        key, sign, value = text.partition("=")
        if not sign:
            raise InputError(f"--set {text}: expected key=value, for instance --set distil.lr=0.003.")
        _insert(data, key.strip().split("."), yaml.safe_load(value))
    for key, value in overrides.items():
        if value is not None:
            _insert(data, key.split("__"), value)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        where = str(config) if config else "options"
        raise InputError(f"{where}: " + "; ".join(_explain(kind, e) for e in error.errors())) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a YAML mapping of options.")
    return data


def _insert(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"option {key} is not a group of options.")
        data = inner
    data[keys[-1]] = value


def _explain(kind: type[BaseModel], error: Any) -> str:
    *path, last = [str(part) for part in error["loc"]] or [""]
    name = ".".join([*path, last])
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg']}"
    fields = kind.model_fields
    for part in path:
        inner = fields[part].annotation if part in fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            fields = inner.model_fields
    return f"unknown option '{name}'.{did_you_mean(last, fields)}"
