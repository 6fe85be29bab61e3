"""Values that come from a file, held against the types that they must have."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from haste.errors import UserError, in_one_line

T = TypeVar("T")


def build(cls: type[T], values: Any, source: str) -> T:
    """A dataclass from plain values, such as JSON or a checkpoint hold them; unknown names are left out.

    Fields may be int, float, str, bool, None, Literal, lists, tuples and dicts of these, unions, and dataclasses of
    the same kind. An int serves where a float is asked for, and a list where a tuple is.
    source: names the file and the part of it, for the sentence.
    Raises UserError naming source and field, what it must be and what it was, also for a field that is missing and for
    values that the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{source} must hold named values, and is {shown(values)}")
    hints = _hints(cls)
    known = {}
    for field in fields(cls):
        if field.name in values:
            known[field.name] = check(values[field.name], hints[field.name], f"{field.name} of {source}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{source} must have {field.name}, and does not")
    try:
        return cls(**known)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source} cannot be used: {in_one_line(error)}") from error


def check(value: Any, wanted: Any, name: str) -> Any:
    """The value, if it is of the wanted type, else UserError; see `build`."""
    if wanted is Any:
        return value
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _check_union(value, arguments, wanted, name)
    if origin is Literal:
        if not any(type(value) is type(known) and value == known for known in arguments):
            raise UserError(f"{name} must be one of {', '.join(map(repr, arguments))}, and is {shown(value)}")
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _check_items(value, origin, arguments, name)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        key_type, value_type = arguments
        return {
            check(key, key_type, f"a key of {name}"): check(item, value_type, f"{key!r} in {name}")
            for key, item in value.items()
        }
    if is_dataclass(wanted):
        return build(wanted, value, name)
    if wanted is float:
        if type(value) in (int, float) and (abs(value) <= _LARGEST or value in (math.inf, -math.inf)):
            return float(value)
    elif isinstance(wanted, type) and type(value) is wanted:
        return value
    raise UserError(f"{name} must be {_type_name(wanted)}, and is {shown(value)}")


_LARGEST = 1.7e308  # a larger int has no float


def _check_union(value: Any, arguments: tuple[Any, ...], wanted: Any, name: str) -> Any:
    for argument in arguments:
        try:
            return check(value, argument, name)
        except UserError:
            continue
    raise UserError(f"{name} must be {_type_name(wanted)}, and is {shown(value)}")


def _check_items(values: Any, origin: type, arguments: tuple[Any, ...], name: str) -> Any:
    if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
        wanted = [arguments[0] if arguments else Any] * len(values)
    else:
        wanted = list(arguments)
        if len(wanted) != len(values):
            raise UserError(f"{name} must have {len(wanted)} values, and has {len(values)}")
    return origin(check(item, kind, f"{name}[{n}]") for n, (item, kind) in enumerate(zip(values, wanted, strict=True)))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _type_name(wanted: Any) -> str:
    arguments = get_args(wanted)
    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if get_origin(wanted) is Literal:
        return ", ".join(map(repr, arguments))
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(wanted, getattr(wanted, "__name__", str(wanted)))


def shown(value: Any) -> str:
    """The value in a few words; its type where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whose repr fails is still to be named
        return type(value).__name__
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:40]}..."
