"""A user's labelled examples, one JSON object a line.

| keys                   | for                                                 | the model should                |
|------------------------|-----------------------------------------------------|---------------------------------|
| prompt, choices, label | decoders; `label` is the index of the right choice  | find the right choice likeliest |
| prompt, reference      | decoders                                            | write the reference             |
| text, label            | classifiers; `label` is a class number or name      | name the class                  |
| text, label            | masked language models; `text` has the mask token   | guess the hidden word, `label`  |

Other keys are ignored, since data sets carry ids and sources; all lines of a file are of one kind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship.errors import Malformed


@dataclass(frozen=True)
class Choice:
    """Which of `choices` continues `prompt`? `label` is an index."""

    line: int
    prompt: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Writing:
    """What continues `prompt`? Compared with `reference`."""

    line: int
    prompt: str
    reference: str


@dataclass(frozen=True)
class Labelled:
    """Which class, or which hidden word, has this text?"""

    line: int
    text: str
    label: str | int


Example = Choice | Writing | Labelled


def keys_of(kind: type[Example]) -> str:
    """What a line of this kind has to say, for messages."""
    return " + ".join(name for name in kind.__dataclass_fields__ if name != "line")


def read_examples(path: Path) -> list[Example]:
    """Every example of a JSON lines file, in order.

    Raises:
        Malformed: naming the line: not JSON, keys missing, values of the wrong kind, or another kind than line one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Malformed(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from error
    examples = [_example(path.name, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise Malformed(f"{path.name} holds no examples")
    for example in examples:
        if type(example) is not type(examples[0]):
            raise Malformed(f"{path.name}, line {example.line}: another kind of example than line {examples[0].line}")
    return examples


def _example(name: str, number: int, line: str) -> Example:
    where = f"{name}, line {number}"
    try:
        data = json.loads(line)
    except ValueError as error:
        raise Malformed(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise Malformed(f"{where}: needs a JSON object, found {type(data).__name__}")
    if {"prompt", "choices", "label"} <= data.keys():
        return _choice(where, number, data)
    if {"prompt", "reference"} <= data.keys():
        return Writing(number, _text(where, data, "prompt"), _text(where, data, "reference"))
    if {"text", "label"} <= data.keys():
        label = data["label"]
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise Malformed(f"{where}: label is {label!r}, needs a class number or a word")
        return Labelled(number, _text(where, data, "text"), label)
    wanted = ", or ".join(keys_of(kind) for kind in (Choice, Writing, Labelled))
    raise Malformed(f"{where}: needs {wanted}; found {', '.join(sorted(map(str, data))) or 'nothing'}")


def _choice(where: str, number: int, data: dict[str, Any]) -> Choice:
    choices, label = data["choices"], data["label"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise Malformed(f"{where}: choices needs a list of at least two texts")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise Malformed(f"{where}: label is {label!r}, needs the index of a choice, 0 to {len(choices) - 1}")
    return Choice(number, _text(where, data, "prompt", empty=True), tuple(choices), label)


def _text(where: str, data: dict[str, Any], key: str, *, empty: bool = False) -> str:
    value = data[key]
    if not isinstance(value, str) or not (value or empty):
        raise Malformed(f"{where}: {key} is {value!r}, needs a text")
    return value
