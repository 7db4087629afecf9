"""Values proof: faithful files of every container pass, one changed bit anywhere is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tightship.checkpoint import Checkpoint
from tightship.exporters.to_gguf import GgufExporter
from tightship.exporters.to_onnx import OnnxExporter
from tightship.formats.gguf_file import read_gguf
from tightship.formats.layouts import parse_layout
from tightship.opening import open_checkpoint
from tightship.report import Check
from tightship.target import Target
from tightship.validators import integers
from tightship.validators.integers import Piece
from tightship.validators.parity import judge
from tightship.validators.stored import open_stored
from tightship.validators.values import ValuesProof, difference, expected_value, prove_values
from tightship.weights import Alias, Dense, Factored, Quantized, Sum

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
Q = "model.layers.0.self_attn.q_proj.weight"
O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
BIAS = "model.layers.1.self_attn.k_proj.bias"
PLACES = [("gguf", None), ("onnx", None), ("onnx", "portable"), ("safetensors", None)]
# Where the plain matrix O, the packed codes of O, its scales, and BIAS lie.
FLOATS = {"gguf": "blk.1.attn_output.weight", "onnx": O, "safetensors": O}
CODES = {"gguf": "blk.1.attn_output.weight", "onnx": f"{O}.B", "safetensors": f"{O}_packed"}
SCALES = {"onnx": f"{O}.scales", "safetensors": f"{O}_scale"}
BIASES = {"gguf": "blk.1.attn_k.bias", "onnx": BIAS, "safetensors": BIAS}


def prove(artifact: Any) -> ValuesProof:
    stored = open_stored(artifact.compressed, artifact.plan, artifact.directory, artifact.exported)
    return prove_values(artifact.compressed, artifact.plan, stored)


def failures(proof: ValuesProof) -> list[Check]:
    return [check for check in proof.checks if check.verdict == "fail"]


@pytest.mark.parametrize(
    ("container", "profile", "layout"),
    [
        *((*place, layout) for place in PLACES for layout in (None, "int4", "int8", "int4-asym", "int4-g64", "int5")),
        *((*place, "q4_1") for place in PLACES if place[0] != "safetensors"),
    ],
)
def test_faithful_files_pass(
    exports: Callable[..., Any], container: str, profile: str | None, layout: str | None
) -> None:
    artifact = exports(container, layout, profile)
    proof = prove(artifact)
    assert failures(proof) == []
    assert len(proof.digests) == (14 if layout else 0)
    every = [t for t in artifact.plan.tensors if t.name in artifact.compressed.weights]
    total = next(c for c in proof.checks if c.metric == "mismatches")
    assert total.extra["elements"] == sum(int(np.prod(t.shape)) for t in every)


@pytest.mark.parametrize("layout", ["int4", "int8", "int4-asym", "int4-channel"])
def test_three_containers_hold_the_same_integers(exports: Callable[..., Any], layout: str) -> None:
    found = [prove(exports(container, layout, profile)).digests for container, profile in PLACES]
    assert all(digests == found[0] for digests in found)
    assert len(set(found[0].values())) == len(found[0])


@pytest.mark.parametrize("container", ["gguf", "onnx", "safetensors"])
def test_transposed_square_matrix_is_named(staged: Callable[..., Any], container: str) -> None:
    artifact = staged(container)
    artifact.edit(FLOATS[container], lambda a: a.reshape(64, 64).T.reshape(-1), np.float32)
    (check,) = failures(prove(artifact))
    assert check.tensor == O
    assert "it is stored transposed" in (check.reason or "")


@pytest.mark.parametrize("container", ["gguf", "onnx", "safetensors"])
def test_dropped_bias_is_named(staged: Callable[..., Any], container: str) -> None:
    artifact = staged(container)
    artifact.edit(BIASES[container], np.zeros_like)
    (check,) = failures(prove(artifact))
    assert check.tensor == BIAS
    assert "all that is stored are zeros" in (check.reason or "")


@pytest.mark.parametrize("container", ["gguf", "onnx", "safetensors"])
def test_zeroed_packed_tensor_is_named(staged: Callable[..., Any], container: str) -> None:
    artifact = staged(container, "int4")
    artifact.edit(CODES[container], np.zeros_like)
    found = failures(prove(artifact))
    assert {check.metric for check in found} == {"mismatches", "integers"}
    assert {check.tensor for check in found} == {O}


@pytest.mark.parametrize("container", ["onnx", "safetensors"])
def test_scale_off_by_its_last_bit_is_named(staged: Callable[..., Any], container: str) -> None:
    artifact = staged(container, "int8")
    artifact.edit(SCALES[container], lambda a: np.concatenate([a[:5], a[5:6] ^ 1, a[6:]]), np.uint32)
    found = failures(prove(artifact))
    assert {check.metric for check in found} == {"mismatches", "integers"}
    assert {check.tensor for check in found} == {O}
    assert 0 < next(c.value for c in found if c.metric == "mismatches") <= 32


def test_scale_in_a_gguf_block_off_by_its_last_bit_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("gguf", "int8")
    artifact.edit("blk.1.attn_output.weight", lambda a: np.concatenate([a[:34], a[34:35] ^ 1, a[35:]]))  # second d
    found = failures(prove(artifact))
    assert {check.tensor for check in found} == {O}


def test_one_code_off_by_one_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("safetensors", "int8")
    artifact.edit(f"{O}_packed", lambda a: np.concatenate([a[:7], a[7:8] ^ 1, a[8:]]))
    found = failures(prove(artifact))
    assert next(c.value for c in found if c.metric == "mismatches") == 1
    assert {check.metric for check in found} == {"mismatches", "integers"}


def test_rows_of_two_heads_swapped_are_named(staged: Callable[..., Any]) -> None:
    """Same numbers, same file size, wrong order: only an element-wise comparison sees it."""
    artifact = staged("gguf", "int4")

    def swap(a: np.ndarray) -> np.ndarray:
        heads = a.reshape(4, -1)
        return heads[[1, 0, 2, 3]].reshape(-1)

    artifact.edit("blk.0.attn_q.weight", swap)
    assert {check.tensor for check in failures(prove(artifact))} == {Q}


def test_nan_scale_is_counted_and_named(staged: Callable[..., Any]) -> None:
    artifact = staged("gguf", "int8")
    artifact.edit("blk.1.attn_output.weight", lambda a: np.concatenate([[0x00, 0x7E], a[2:]]))  # float16 NaN as d
    found = {check.metric: check for check in failures(prove(artifact))}
    assert found["non_finite"].value == 32
    assert found["non_finite"].tensor == O


def test_sparsity_is_counted_in_the_file(staged: Callable[..., Any]) -> None:
    artifact = staged("safetensors")
    assert prove(artifact).sparsity == 0.0
    artifact.edit(O, np.zeros_like)
    assert prove(artifact).sparsity == pytest.approx(1 / 14)


def test_config_that_decodes_otherwise_is_named(staged: Callable[..., Any]) -> None:
    """The bytes are right, and config.json makes every client read them wrongly."""
    artifact = staged("safetensors", "int4")
    path = artifact.directory / "config.json"
    path.write_text(path.read_text().replace('"num_bits": 4', '"num_bits": 8'))
    assert len({check.tensor for check in failures(prove(artifact))} - {None}) >= 14


def test_llama_rows_are_turned_back(tmp_path: Path) -> None:
    """A Llama GGUF has its q and k rows permuted; gguf's values of the file equal the checkpoint's after undoing it."""
    checkpoint = open_checkpoint(EMBER)
    exporter = GgufExporter()
    plan = exporter.plan(checkpoint, Target("gguf"))
    exported = exporter.export(checkpoint, plan, tmp_path)
    stored = open_stored(checkpoint, plan, tmp_path, exported)
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = checkpoint.resolve(name).value()
    raw = (
        read_gguf(tmp_path / exported.main).tensors["blk.0.attn_k.weight"].read_rows().view(bfloat16).astype(np.float32)
    )
    assert not np.array_equal(raw, wanted)
    # llama.cpp rotates neighbours (2j, 2j + 1); transformers rotates j and j + d/2: head 1, pair 3 by hand, d = 64.
    np.testing.assert_array_equal(raw[64 + 6], wanted[64 + 3])
    np.testing.assert_array_equal(raw[64 + 7], wanted[64 + 3 + 32])
    np.testing.assert_array_equal(stored.value(name), wanted)
    assert failures(prove_values(checkpoint, plan, stored)) == []


@pytest.mark.parametrize("profile", [None, "portable"])
def test_shared_table_and_low_rank_in_onnx(original: Checkpoint, tmp_path: Path, profile: str | None) -> None:
    """A quantized embedding that is also the head, a factored matrix, and a packed matrix with a residual."""
    rng = np.random.default_rng(0)
    int8 = parse_layout("int8")
    factors = [Dense.of(rng.normal(size=shape).astype(np.float32)) for shape in ((64, 5), (5, 64))]
    table = original.resolve("model.embed_tokens.weight").value()
    base = Quantized.of(int8, int8.quantize(original.resolve(Q).value()))
    checkpoint = original.replace(config={**original.config, "tie_word_embeddings": True}).with_weights(
        {
            "model.embed_tokens.weight": Quantized.of(int8, int8.quantize(table)),
            "lm_head.weight": Alias("model.embed_tokens.weight"),
            O: Factored(*factors),
            Q: Sum(base, Factored(*factors)),
        }
    )
    exporter = OnnxExporter(judge=judge)
    plan = exporter.plan(checkpoint, Target("onnx", None, {"profile": profile} if profile else {}))
    exported = exporter.export(checkpoint, plan, tmp_path)
    stored = open_stored(checkpoint, plan, tmp_path, exported)
    proof = prove_values(checkpoint, plan, stored)
    assert failures(proof) == []
    assert set(proof.digests) == {"model.embed_tokens.weight", f"{Q}.base"}
    np.testing.assert_array_equal(stored.value(O, ".left"), factors[0].value())
    np.testing.assert_array_equal(stored.value(Q, ".residual.right"), factors[1].value())


def test_expected_value_casts_to_nearest_even() -> None:
    exact = np.array([1.0, 1.00390625, 1.01171875], np.float32)  # the last two lie halfway between bfloat16 values
    assert expected_value(Dense.of(exact), "bf16").tolist() == [1.0, 1.0, 1.015625]
    assert expected_value(Dense.of(exact), "f32").tolist() == exact.tolist()
    assert expected_value(Dense.of(exact), "f32", lambda x: x + 1).tolist() == [2.0, 2.00390625, 2.01171875]


def test_difference_says_how() -> None:
    a = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert difference(a, a.copy()) == (0, "", 0.0)
    assert difference(a, a.T)[:2] == (6, "6 of 9 elements differ, by up to 4; it is stored transposed")
    assert difference(a, a[:2])[1] == "has shape (2, 3), expected (3, 3)"
    wrong, _, largest = difference(a, np.where(a == 4, np.nan, a))
    assert (wrong, largest) == (1, pytest.approx(np.nan, nan_ok=True))


def test_integer_form_says_zero_point_and_minimum_alike() -> None:
    """(code - zero) * s and code * s + m with m = -zero * s are one and the same."""
    q = np.array([[3, 0, 7]])
    s = np.array([[0.5]], np.float32)
    by_zero = integers.digest([Piece(q - 2, s)])
    assert integers.digest([Piece(q, s, np.array([[-1.0]]))]) == by_zero
    assert integers.digest([Piece(q, s, np.array([[-1.1]]))]) != by_zero
    free = [integers.digest([Piece(q, s, np.array([[m]]))]) for m in (-1.1, -1.2)]
    assert free[0] != free[1]
    assert integers.digest([Piece(q - 1, s)]) != by_zero
    assert integers.digest([Piece(q - 2, -s)]) != by_zero


def test_integer_form_does_not_depend_on_pieces_or_groups() -> None:
    rng = np.random.default_rng(0)
    layout = parse_layout("int4-g64")
    arrays = layout.quantize(rng.normal(size=(6, 128)).astype(np.float32))
    whole = integers.digest(integers.pieces_of(layout, arrays))
    halves = [
        piece
        for rows in (slice(0, 4), slice(4, 6))
        for piece in integers.pieces_of(layout, {k: a[rows] for k, a in arrays.items()})
    ]
    assert integers.digest(halves) == whole
    repeated = {"codes": arrays["codes"], "scale": np.repeat(arrays["scale"], 2, axis=1)}
    assert integers.digest(integers.pieces_of(parse_layout("int4-g32"), repeated)) == whole
