"""What the pass puts on a grid, what it leaves alone, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.quantize import rtn
from tightship.weights import Alias, Dense, Factored, Quantized


def quantized(checkpoint: Checkpoint, **options: object) -> Checkpoint:
    step = pass_for("quantize", options)
    step.requires(checkpoint)
    return step.apply(checkpoint, Run())


def on_grid(checkpoint: Checkpoint) -> set[str]:
    return {name for name, weight in checkpoint.weights.items() if isinstance(weight, Quantized)}


def test_linears_of_the_blocks_and_nothing_else(tiny: Callable[[str], Checkpoint]) -> None:
    before = tiny("llama")
    after = quantized(before, layout="int4")
    linears = {info.name for info in before.linears()}
    assert on_grid(after) == linears
    assert all(after.weights[n] is before.weights[n] for n in before.weights if n not in linears)


@pytest.mark.parametrize(("layout", "kind"), [("int4", "Q4_0"), ("int8", "Q8_0"), ("int5", "Q5_0")])
def test_values_are_those_of_gguf(tiny: Callable[[str], Checkpoint], layout: str, kind: str) -> None:
    before = tiny("llama")
    after = quantized(before, layout=layout)
    number = getattr(gguf.GGMLQuantizationType, kind)
    for info in before.linears():
        w = before.weights[info.name].value()
        expected = gguf.quants.dequantize(gguf.quants.quantize(w, number), number)
        np.testing.assert_array_equal(after.weights[info.name].value(), expected)


def test_runs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tightship.formats.layouts import parse_layout

    w = np.random.default_rng(1).normal(size=(37, 256)).astype(np.float32)
    for word in ("int4", "int8-channel", "q4_k", "q6_k"):
        layout = parse_layout(word)
        whole = layout.quantize(w)
        monkeypatch.setattr(rtn, "_CHUNK", 5 * 256)
        parts = rtn.quantize("w", Dense.of(w), layout)
        assert whole.keys() == parts.keys()
        assert all(np.array_equal(whole[key], parts[key]) for key in whole)


def test_outline_says_what_apply_makes(tiny: Callable[[str], Checkpoint]) -> None:
    before = tiny("llama")
    step = pass_for("quantize", {"layout": "int4-g16-asym", "include": ["embeddings", "head"]})
    outlined, made = step.outline(before), step.apply(before, Run())
    assert on_grid(outlined) == on_grid(made)
    for name in on_grid(made):
        assert outlined.weights[name].layout == made.weights[name].layout  # type: ignore[union-attr]
        assert outlined.weights[name].shape == made.weights[name].shape  # type: ignore[union-attr]


def tied(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint.with_weights({"lm_head.weight": Alias("model.embed_tokens.weight")})


def test_a_borrowed_head_follows_the_embeddings(tiny: Callable[[str], Checkpoint]) -> None:
    after = quantized(tied(tiny("llama")), layout="int8", include=["embeddings"])
    assert isinstance(after.weights["model.embed_tokens.weight"], Quantized)
    assert after.weights["lm_head.weight"] == Alias("model.embed_tokens.weight")


def test_a_borrowed_head_alone_is_refused(tiny: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(UsageError, match="shares its data"):
        quantized(tied(tiny("llama")), layout="int8", include=["head"])


def test_layouts_of_single_tensors_win_and_may_cast(tiny: Callable[[str], Checkpoint]) -> None:
    before = tiny("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    after = quantized(before, layout="int4", layouts={name: "int8", "model.norm.weight": "f16"})
    assert after.weights[name].layout.name == "int8-g32"  # type: ignore[union-attr]
    assert after.weights["model.norm.weight"].dtype == "f16"
    expected = before.weights["model.norm.weight"].value().astype(np.float16)
    np.testing.assert_array_equal(after.weights["model.norm.weight"].value(), expected.astype(np.float32))


def test_a_tensor_that_is_not_there(tiny: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'model\.norm\.weight'"):
        quantized(tiny("llama"), layouts={"model.norm.weigth": "f16"})


def test_a_cast_beyond_the_range_is_refused(tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny("llama").with_weights({"model.norm.weight": Dense.of(np.full(64, 1e6, np.float32))})
    after = quantized(checkpoint, layouts={"model.norm.weight": "f16"})
    with pytest.raises(Unsupported, match="1e\\+06") as caught:
        after.weights["model.norm.weight"].read()  # type: ignore[union-attr]
    assert caught.value.tensor == "model.norm.weight"


def test_columns_must_fill_blocks(tiny: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(Unsupported, match="blocks of 128") as caught:
        quantized(tiny("llama"), layout="int4-g128")
    assert caught.value.tensor in {info.name for info in tiny("llama").linears()}
    assert caught.value.exit_code == 3


def test_a_layout_without_zero_is_refused_after_pruning(tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny("llama")
    history = ({"use": "prune", "makes": ["mask"]},)
    quantized(checkpoint, layout="q4_1")
    quantized(checkpoint.replace(history=history), layout="int4")
    with pytest.raises(Unsupported, match="undo the pruning") as caught:
        quantized(checkpoint.replace(history=history), layout="q4_1")
    assert caught.value.tensor is not None


def test_a_second_grid_is_refused_and_the_same_kept(tiny: Callable[[str], Checkpoint]) -> None:
    once = quantized(tiny("llama"), layout="int4")
    again = quantized(once, layout="int4-g32")
    assert all(again.weights[name] is once.weights[name] for name in once.weights)
    with pytest.raises(Unsupported, match="int4-g32 already"):
        quantized(once, layout="int8")


def test_factors_are_solved_one_by_one(tiny: Callable[[str], Checkpoint]) -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.down_proj.weight"
    left, right = (rng.normal(size=s).astype(np.float32) for s in ((64, 32), (32, 96)))
    checkpoint = tiny("llama").with_weights({name: Factored(Dense.of(left), Dense.of(right))})
    found = quantized(checkpoint, layout="int8").weights[name]
    assert isinstance(found, Factored)
    number = gguf.GGMLQuantizationType.Q8_0
    for part, w in ((found.left, left), (found.right, right)):
        expected = gguf.quants.dequantize(gguf.quants.quantize(w, number), number)
        np.testing.assert_array_equal(part.value(), expected)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_and_infinity_name_the_tensor(tiny: Callable[[str], Checkpoint], bad: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    values = np.ones((96, 64), np.float32)
    values[95, 63] = bad
    after = quantized(tiny("llama").with_weights({name: Dense.of(values)}), layout="int4")
    with pytest.raises(Malformed, match=r"\(95, 63\)") as caught:
        after.weights[name].read()  # type: ignore[union-attr]
    assert caught.value.tensor == name
