"""JSON lines of examples: each kind, and each mistake with its line number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tightship.errors import Malformed
from tightship.validators.task_data import Choice, Labelled, Writing, read_examples


def test_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"prompt": "", "choices": ["a", "b"], "label": 1, "id": 7}\n\n'
        '{"prompt": "x", "choices": ["c", "d"], "label": 0}\n'
    )
    assert read_examples(file) == [Choice(1, "", ("a", "b"), 1), Choice(3, "x", ("c", "d"), 0)]
    file.write_text('{"prompt": "x", "reference": "y"}')
    assert read_examples(file) == [Writing(1, "x", "y")]
    file.write_text('{"text": "x", "label": "y"}\n{"text": "z", "label": 3}')
    assert read_examples(file) == [Labelled(1, "x", "y"), Labelled(2, "z", 3)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: needs a JSON object, found list"),
        ("{}", "line 2: needs prompt + choices + label, or prompt + reference, or text + label; found nothing"),
        ('{"prompt": "a", "label": 1}', "found label, prompt"),
        ('{"prompt": "a", "choices": ["a"], "label": 0}', "line 2: choices needs a list of at least two texts"),
        ('{"prompt": "a", "choices": ["a", ""], "label": 0}', "line 2: choices needs"),
        (
            '{"prompt": "a", "choices": ["a", "b"], "label": 2}',
            "label is 2, needs the index of a choice, 0 to 1",
        ),
        ('{"prompt": "a", "choices": ["a", "b"], "label": true}', "line 2: label is True"),
        ('{"prompt": "a", "choices": ["a", "b"], "label": "a"}', "line 2: label is 'a'"),
        ('{"prompt": 1, "reference": "b"}', "line 2: prompt is 1, needs a text"),
        ('{"prompt": "a", "reference": ""}', "line 2: reference is '', needs a text"),
        ('{"text": "a", "label": 0.5}', "line 2: label is 0.5, needs a class number or a word"),
        ('{"text": "a", "label": "b"}', "line 2: another kind of example than line 1"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, second: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "x", "reference": "y"}\n' + second)
    with pytest.raises(Malformed, match=re.escape(message)):
        read_examples(file)


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "not UTF-8"), (b"\n \n", "holds no examples")])
def test_files_without_examples(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(Malformed, match=message):
        read_examples(tmp_path / "a.jsonl")
