"""What a JSON document must look like, said by Python types: dataclasses, TypedDicts, lists, numbers, text."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

_SHOWN = 60  # characters of a wrong value in a message
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    dict: "an object",
    list: "a list",
}


def problem(value: Any, shape: Any, where: str = "") -> str | None:
    """The first thing in a JSON value that is not of the shape, with its key; None when there is nothing.

    A dataclass or TypedDict is an object of its fields: those with a default (NotRequired) may be left out; other keys
    are wrong in a dataclass and left alone in a TypedDict. A class with an attribute JSON is written as that shape.
    """
    return next(_problems(value, shape, where), None)


def construct(value: Any, shape: Any) -> Any:
    """A JSON value of the shape (see `problem`) as dataclasses and tuples; keys that a dataclass lacks are left out."""
    origin, given = get_origin(shape), get_args(shape)
    if origin in (Union, types.UnionType):
        return value if value is None else construct(value, next(one for one in given if one is not type(None)))
    if hasattr(shape, "JSON"):
        return shape.from_json(value)
    if isinstance(shape, type) and dataclasses.is_dataclass(shape):
        shapes = _fields(shape)[0]
        return shape(**{name: construct(part, shapes[name]) for name, part in value.items() if name in shapes})
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: construct(part, given[1]) for name, part in value.items()}
    return tuple(construct(part, given[0]) for part in value) if origin is tuple else value


def _problems(value: Any, shape: Any, where: str) -> Iterator[str]:
    shape = getattr(shape, "JSON", shape)
    origin, given = get_origin(shape), get_args(shape)
    if shape is Any:
        return
    if origin in (Union, types.UnionType):
        if all(problem(value, one, where) for one in given):
            yield from _one_of(value, given, where)
    elif origin is Literal:
        if not any(value is one or (type(value) is type(one) and value == one) for one in given):
            yield _wrong(value, "one of " + ", ".join(map(repr, given)), where)
    elif dataclasses.is_dataclass(shape) or is_typeddict(shape):
        yield from _object(value, *_fields(shape), where)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from _mapping(value, given[1], where)
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        yield from _list(value, given, where)
    elif not _is(value, shape):
        yield _wrong(value, _WORDS[shape], where)


def _one_of(value: Any, shapes: Sequence[Any], where: str) -> Iterator[str]:
    """What is wrong with a value that is none of several, but for null the only one where there is one."""
    (first, *others) = [shape for shape in shapes if shape is not type(None)]
    if others:
        wanted = (_WORDS.get(get_origin(shape) or shape, "an object") for shape in (first, *others))
        yield _wrong(value, " or ".join(wanted), where)
    else:
        yield from _problems(value, first, where)


def _object(value: Any, fields: Mapping[str, Any], needed: frozenset[str], closed: bool, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _wrong(value, "an object", where)
        return
    for name in sorted(needed - value.keys()):
        yield f"{_at(where, name)} is missing"
    for name, part in value.items():
        if name not in fields:
            yield from (f"{_at(where, name)} is unknown",) if closed else ()
        else:
            yield from _problems(part, fields[name], _at(where, name))


def _mapping(value: Any, shape: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _wrong(value, "an object", where)
        return
    for name, part in value.items():
        yield from _problems(part, shape, _at(where, name))


def _list(value: Any, shapes: tuple[Any, ...], where: str) -> Iterator[str]:
    """A list of one shape (`tuple[X, ...]`, `list[X]`), or of as many items as there are shapes."""
    if not isinstance(value, list):
        yield _wrong(value, "a list", where)
        return
    endless = len(shapes) == 1 or shapes[1:] == (...,)
    if not endless and len(value) != len(shapes):
        yield f"{where or 'the file'} has {len(value)} items instead of {len(shapes)}"
        return
    for index, part in enumerate(value):
        yield from _problems(part, shapes[0 if endless else index], f"{where}[{index}]")


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


@functools.cache
def _fields(shape: Any) -> tuple[Mapping[str, Any], frozenset[str], bool]:
    """Shape of each field, the names of those that must be there, and whether there may be no other."""
    hints = get_type_hints(shape, include_extras=True)
    if is_typeddict(shape):
        needed = frozenset(name for name, hint in hints.items() if get_origin(hint) is not NotRequired)
    else:
        plain = (dataclasses.MISSING, dataclasses.MISSING)
        needed = frozenset(
            each.name for each in dataclasses.fields(shape) if (each.default, each.default_factory) == plain
        )
        hints = {each.name: hints[each.name] for each in dataclasses.fields(shape)}
    shapes = {name: get_args(hint)[0] if get_origin(hint) is NotRequired else hint for name, hint in hints.items()}
    return shapes, needed, not is_typeddict(shape)


def _at(where: str, name: str) -> str:
    shown = name if name.isidentifier() else repr(name[:_SHOWN])
    return f"{where}.{shown}" if where else shown


def _wrong(value: Any, wanted: str, where: str) -> str:
    kind = type(value)
    shown = _WORDS[kind] if kind in (dict, list) else repr(value)[:_SHOWN]
    return f"{where or 'the file'} is {shown}, not {wanted}"
