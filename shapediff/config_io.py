"""Configs as plain dictionaries and back, strictly: what YAML, command lines and config.json say becomes typed dataclasses.

No name in a file is ever imported: where a config may be one of several classes, a short type name under the key "name" is
looked up in a table.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from shapediff.errors import ConfigError

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, nested ones too, tuples as lists: what JSON and YAML hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[Config], data: Mapping[str, Any], *, path: str = "") -> Config:
    """Build dataclass `cls` from `data`; missing fields take their defaults.

    Raises ConfigError, naming the setting as `path.field`, for an unknown key, a wrong type or a value that cls refuses.
    """
    where = path or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected settings, found {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(unknown_name(f"{where}: setting", str(key), fields))
    values = {key: _convert(hints[key], value, f"{path}.{key}" if path else key) for key, value in data.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def named_to_dict(table: Mapping[str, type], config: Any) -> dict[str, Any]:
    """`to_dict` with the short type name of the config under "name"."""
    name = next(name for name, cls in table.items() if type(config) is cls)
    return {"name": name, **to_dict(config)}


def named_from_dict(table: Mapping[str, type[Config]], data: Mapping[str, Any], *, path: str) -> Config:
    """`from_dict` for the class that `data["name"]` names in `table`. Raises ConfigError as it does."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: expected settings, found {data!r}")
    name = str(data.get("name"))
    if name not in table:
        raise ConfigError(unknown_name(path, name, table))
    return from_dict(table[name], {key: value for key, value in data.items() if key != "name"}, path=path)


def unknown_name(what: str, found: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: what was found, the closest known one, and all there are."""
    names = sorted(known)
    close = difflib.get_close_matches(found, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{what} {found!r} is unknown{hint} There are: {', '.join(names)}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path=path)
    if origin in (Union, types.UnionType):
        return _convert_optional(arguments, value, path)
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{path}: expected names with values such as {{a: 1}}, found {value!r}")
        return {key: _convert(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise ConfigError(unknown_name(path, str(value), map(str, arguments)))
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(float(value), path)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    # `class_name=3` and `run_dir=2024` reach us as numbers; a text setting keeps what was typed.
    if hint is str and isinstance(value, int | float):
        return str(value)
    raise ConfigError(f"{path}: expected {getattr(hint, '__name__', hint)}, found {value!r}")


def _convert_optional(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    (inner,) = (argument for argument in arguments if argument is not type(None))
    return _convert(inner, value, path)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}: expected a list such as [1, 2], found {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ConfigError(f"{path}: expected {len(arguments)} values, found {len(value)}")
    return tuple(
        _convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _finite(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{path}: expected a finite number, found {value}")
    return value
