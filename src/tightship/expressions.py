"""How architecture files say what they want of a config.json: where a hyper-parameter stands, sums, conditions.

| alternative          | value                                                            |
|----------------------|------------------------------------------------------------------|
| `key` or `a.b`       | the config's, unless absent or null                              |
| `key[]`              | the config's number, or the one that all entries of its list are |
| `#key`               | number of entries under the key                                  |
| `key==word`          | list of 1 and 0, whether each entry of the key's list is `word`  |
| `#key==word`         | number of entries that are `word`                                |
| `@key`               | list of 1 and 0, whether the key's list has the layer's number   |
| `=expression`        | computed from what was already found                             |
| a number             | itself                                                           |
| `none`               | None                                                             |
| any of them`?key`    | only if the config's key is true                                 |
| any of them`?!key`   | only if the config's key is there and false                      |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tightship.errors import Malformed, Unsupported

_FACTOR = re.compile(r"([*/]?)\s*([a-z_0-9]+)")


def alternative(option: str | float, config: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """What a config.json says to an alternative; None where it says nothing. `found`: hyper-parameters so far.

    Raises:
        Unsupported: a list by layer whose entries differ, where one number is wanted.
    """
    if not isinstance(option, str):
        return option
    option, _, condition = option.partition("?")
    if option == "none" or (condition and not _applies(condition, config)):
        return None
    if option.startswith("="):
        return literal(option[1:], found)
    option, by_layer, _ = option.partition("[]")
    key, _, word = option.lstrip("#@").partition("==")
    value = dig(config, key)
    if value is None:
        return None
    if option.startswith("@"):
        value = [int(layer in value) for layer in range(int(found["layers"]))]
    elif word:
        value = [int(entry == word) for entry in value]
    elif by_layer and isinstance(value, list):
        value = _only(value, key)
    if option.startswith("#"):
        return sum(value) if word else len(value)
    return value


def _applies(condition: str, config: Mapping[str, Any]) -> bool:
    said = dig(config, condition.removeprefix("!"))
    return said is not None and bool(said) != condition.startswith("!")


def _only(values: list[Any], key: str) -> Any:
    if not values or any(value != values[0] for value in values):
        raise Unsupported(f"{key} = {values} differs by layer", hint="one number for all layers is supported")
    return values[0]


def literal(expression: str, hyper: Mapping[str, Any]) -> Any:
    """Value of a name, or of a sum of products (`heads*head_dim`, `hidden/heads+2`): the data files' whole arithmetic.

    Raises:
        Malformed: a name that is not a hyper-parameter.
    """
    if expression in hyper:
        return hyper[expression]
    return sum(_product(term, expression, hyper) for term in expression.split("+"))


def _product(term: str, expression: str, hyper: Mapping[str, Any]) -> int:
    value = 1
    for operator, name in _FACTOR.findall(term):
        if not name.isdigit() and name not in hyper:
            raise Malformed(f"architecture expression {expression!r} needs {name!r}, which the config does not give")
        factor = int(name) if name.isdigit() else hyper[name]
        value = value // factor if operator == "/" else value * factor
    return value


def holds(when: Mapping[str, Iterable[Any]], config: Mapping[str, Any]) -> bool:
    """Whether every key (dotted) of `when` has one of its values in the config; an absent key has value None."""
    return all(dig(config, key) in values for key, values in when.items())


def dig(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key; None where there is none."""
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value
