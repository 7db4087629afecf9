"""From a recipe's `with` to the fields of a pass: every name and type is checked, nothing is guessed."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from tightship.errors import UsageError
from tightship.suggest import did_you_mean

Spec = TypeVar("Spec")


def build(cls: type[Spec], options: Mapping[str, Any], where: str) -> Spec:
    """An instance of a keyword-only dataclass from plain JSON values; lists become tuples.

    Args:
        where: how to call it in messages, such as `passes[0] (prune)`.

    Raises:
        UsageError: an option that does not exist (with the nearest that does), is missing, or has another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in options:
        if name not in fields:
            raise UsageError(
                f"{where}: option {name!r} is unknown{did_you_mean(name, fields)}", hint=f"options: {', '.join(fields)}"
            )
    needed = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and n not in options
    ]
    if needed:
        raise UsageError(f"{where}: needs {', '.join(needed)}")
    return cls(**{name: _checked(value, hints[name], f"{where}: {name}") for name, value in options.items()})


def _checked(value: Any, hint: Any, where: str) -> Any:  # noqa: PLR0911 - one return a kind of type
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, arguments, where)
    if origin is Literal:
        if value not in arguments:
            nearest = did_you_mean(str(value), [str(a) for a in arguments])
            raise UsageError(f"{where} is one of {', '.join(map(str, arguments))}; found {value!r}{nearest}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_checked(item, arguments[0], where) for item in items)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} must be a mapping, found {value!r}")
        return {str(k): _checked(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{where} must be {_word(hint)}, found {value!r}")
    return value


def _first_that_fits(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    complaint = None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _checked(value, choice, where)
        except UsageError as error:
            complaint = complaint or error
    raise complaint or UsageError(f"{where}: found {value!r}")


def _word(hint: Any) -> str:
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return words.get(hint, str(hint))
