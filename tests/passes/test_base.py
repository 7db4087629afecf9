"""Orders of passes that hold, and those that are refused."""

from __future__ import annotations

import pytest

from tightship.errors import UsageError
from tightship.passes import pass_for
from tightship.passes.base import Pass, check_order

PRUNE = ("prune", {"sparsity": 0.5})
QUANTIZE = ("quantize", {"layout": "int4"})
DROP = ("drop-layers", {"layers": [0]})


def made(*steps: tuple[str, dict[str, object]]) -> list[Pass]:
    return [pass_for(use, options) for use, options in steps]


def test_pruning_before_quantization_holds() -> None:
    assert check_order(made(DROP, PRUNE, QUANTIZE)) == []


def test_quantization_first_is_refused_and_explained() -> None:
    with pytest.raises(UsageError) as caught:
        check_order(made(QUANTIZE, PRUNE))
    assert "prune would destroy the grid that quantize made" in str(caught.value)
    assert "--allow-order" in str(caught.value.hint)


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="grid"):
        check_order(made(QUANTIZE, QUANTIZE))


def test_a_bad_order_can_be_allowed_and_is_told() -> None:
    assert check_order(made(QUANTIZE, PRUNE), allow=True) == ["prune would destroy the grid that quantize made"]


def test_pruning_again_keeps_the_first_mask() -> None:
    assert check_order(made(PRUNE, PRUNE, QUANTIZE)) == []


@pytest.mark.parametrize(
    ("use", "options", "words"),
    [
        ("prnue", {}, "did you mean 'prune'"),
        ("prune", {"sparsty": 0.5}, "did you mean 'sparsity'"),
        ("prune", {"sparsity": "half"}, "a number"),
        ("prune", {"sparsity": True}, "a number"),
        ("prune", {"sparsity": 0.5, "scope": "rows"}, "did you mean 'row'"),
        ("prune", {"sparsity": 1.5}, "between 0 and 1"),
        ("prune", {}, "sparsity"),
        ("prune", {"method": "magnitud", "sparsity": 0.5}, "did you mean 'magnitude'"),
        ("prune", {"pattern": "4:2"}, "N:M"),
        ("prune", {"pattern": "2:4", "sparsity": 0.7}, "0.5"),
        ("drop-layers", {}, "layers"),
        ("drop-layers", {"layers": [1], "count": 1}, "either"),
        ("drop-layers", {"layers": [1, 1]}, "twice"),
        ("drop-layers", {"layers": ["one"]}, "an integer"),
        ("quantize", {}, "layout"),
        ("quantize", {"layout": "int9"}, "int9"),
        ("quantize", {"layout": "int4", "include": ["heads"]}, "did you mean 'head'"),
        ("quantize", {"layout": "int4", "solver": "rtm"}, "did you mean 'rtn'"),
    ],
)
def test_options_are_checked(use: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        pass_for(use, options, "passes[0]")
    assert words in str(caught.value)
