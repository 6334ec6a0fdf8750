"""From a loose config to frozen dataclasses: names, types and ranges are checked here, before anything runs.

A ConfigDict lets `nan`, `-1` and `True` through as a learning rate; a dataclass built here does not.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from idefics_jax.errors import UserError


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Builds a dataclass from a mapping with exactly its fields.

    Args:
      cls: dataclass whose field types are scalars, tuples, mappings, other dataclasses, or unions with None.
      values: one entry a field; a field with a default may be left out.
      where: name of the mapping in messages.

    Raises:
      UserError: a missing, unknown or mistyped field, or one that the dataclass refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    check_names(values, fields, where)
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name} is missing; add it to the config")
    try:
        return cls(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises UserError for a name that is not known, with the nearest that is; `where` stands before it."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
            raise UserError(f"{where}.{name} is not a setting; {hint}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(option for option in arguments if option is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return build(kind, _expect(value, Mapping, where, "a group of settings"), where)
    if origin is tuple:
        items = _expect(value, (tuple, list), where, "a sequence")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
        if len(items) != len(arguments):
            raise UserError(f"{where} has {len(items)} items; it needs {len(arguments)}")
        return tuple(
            _convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, items, strict=True))
        )
    if kind is float:
        number = _expect(value, (int, float), where, "a number", bool)
        if not math.isfinite(number):
            raise UserError(f"{where} is {value!r}; it must be a finite number")
        return float(number)
    if kind is int:
        return _expect(value, int, where, "a whole number", bool)
    if kind in (str, bool):
        return _expect(value, kind, where, "text" if kind is str else "True or False")
    group = _expect(value, Mapping, where, "a group of settings")
    item = arguments[1] if arguments else Any
    return dict(group) if item is Any else {name: _convert(item, x, f"{where}.{name}") for name, x in group.items()}


def _expect(value: Any, kind: Any, where: str, noun: str, but_not: Any = ()) -> Any:
    if not isinstance(value, kind) or isinstance(value, but_not):
        raise UserError(f"{where} is {value!r}; it must be {noun}")
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns one line for each setting, by its dotted name, that differs between two nested mappings."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return lines
