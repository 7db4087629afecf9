"""YAML as JSON with less punctuation: one meaning for every document, no tags, no anchors, no surprises.

YAML 1.1 reads `2:4` as 124, `no` as false and `1e-3` as text. Here scalars are those of JSON: null, true, false,
integers, numbers; everything else is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from tightship.errors import UsageError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe, with JSON's scalars; duplicate keys and anchors are refused."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: anchors and aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {line}: keys are text, found {key!r}")
            if key in seen:
                raise yaml.YAMLError(f"line {line}: the key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"-?(0|[1-9][0-9]*)", list("-0123456789")),
    (
        "float",
        r"-?(0|[1-9][0-9]*)?(\.[0-9]+)([eE][-+]?[0-9]+)?|-?(0|[1-9][0-9]*)([eE][-+]?[0-9]+)",
        list("-.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def load(text: str, name: str) -> Any:
    """The document's value: mappings, lists, text, numbers, booleans, null.

    Raises:
        UsageError: too large, not YAML, a key twice, a tag, an anchor; the message names the line.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{name} has {len(text)} characters; the limit is {MAX_BYTES}")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{name} is not a recipe: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark is not None else " ".join(str(problem).split())
