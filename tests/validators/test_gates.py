"""The recipe's `gates`: typed, in range, and helpful when misspelt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tightship.errors import UsageError
from tightship.validators.gates import Gate, TaskGate, parse_gates


def test_the_contracts_example(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text("")
    data = {"kl_mean": 0.05, "top1": 0.9, "task": {"metric": "f1", "data": "file.jsonl", "min": 0.8}}
    gates = parse_gates(data, lambda path: str(tmp_path / path))
    assert gates.measures == {"kl_mean": Gate("kl_mean", "<=", 0.05), "top1": Gate("top1", ">=", 0.9)}
    assert gates.task == TaskGate("f1", tmp_path / "file.jsonl", 0.8)
    assert gates.has_budget


def test_no_gates_is_no_budget(tmp_path: Path) -> None:
    assert not parse_gates({}).has_budget
    (tmp_path / "a").write_text("")
    assert parse_gates({"task": {"metric": "bleu", "data": str(tmp_path / "a"), "min": 20}}).has_budget


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kl_men": 0.1}, "gate 'kl_men' is unknown; did you mean 'kl_mean'"),
        ({"top_1": 0.1}, "'top1'"),
        ({"top1": 1.5}, "gate top1 is 1.5; it is share of tokens with the same first choice, so between 0 and 1"),
        ({"kl_max": -1}, "so zero or more"),
        ({"kl_mean": float("nan")}, "needs a finite number"),
        ({"kl_mean": True}, "needs a finite number"),
        ({"kl_mean": "0.1"}, "needs a finite number"),
        ({"task": "f1"}, "needs metric, data and min"),
        ({"task": {"metric": "f1", "data": "x"}}, "needs metric, data and min"),
        ({"task": {"metric": "f1", "data": "x", "min": 1, "max": 2}}, "unknown key 'max'"),
        ({"task": {"metric": "acuracy", "data": "x", "min": 1}}, "did you mean 'accuracy'"),
        ({"task": {"metric": "f1", "data": "nowhere.jsonl", "min": 1}}, "'nowhere.jsonl' does not exist"),
    ],
)
def test_mistakes_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_gates(data)
