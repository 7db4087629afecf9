"""The integers and scales in the files of all containers are the same, cut out of their bytes here; most after GPTQ.

| GGUF block (ggml-common.h)                    | bytes of a block, in this order                             |
|-----------------------------------------------|-------------------------------------------------------------|
| Q4_0, Q4_1, Q8_0: 32 weights                  | d f16, (m f16,) nibbles (low halves first) or int8          |
| Q2_K: 256, sub-blocks of 16                   | 16 scale and min nibbles, 64 of codes, d, dmin              |
| Q3_K: 256, sub-blocks of 16                   | 32 of high bits, 64 of low bits, 12 of scales, d            |
| Q4_K, Q5_K: 256, sub-blocks of 32             | d, dmin, 12 of scales and mins, (32 of high bits,) 128      |
| Q6_K: 256, sub-blocks of 16                   | 128 of low bits, 64 of high bits, 16 int8 scales, d         |

What is compared is code minus zero point, and the step of every weight.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tightship
from tightship.recipe import Recipe

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}
Integers = dict[str, tuple[np.ndarray, np.ndarray]]
"""Matrix -> (code - zero point, step), both (rows, cols)."""


def half(raw: np.ndarray) -> np.ndarray:
    """(blocks, 2) bytes -> (blocks, 1) float32."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def simple(raw: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    d, body = half(raw[:, :2]), raw[:, 4:] if kind == "Q4_1" else raw[:, 2:]
    if kind == "Q8_0":
        return body.view(np.int8).astype(int), d
    codes = np.concatenate([body & 15, body >> 4], axis=1).astype(int)
    if kind == "Q4_0":
        return codes - 8, d
    zero = -half(raw[:, 2:4]).astype(float) / np.where(d == 0, 1, d)
    assert np.array_equal(zero, np.rint(zero)), "the minimum is no whole number of steps"
    return codes - zero.astype(int), d


def two_bits(bytes_: np.ndarray) -> np.ndarray:
    """(blocks, 64) -> (blocks, 256): each 32 bytes hold 128 codes, 32 for every pair of bits."""
    halves = bytes_.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6])[:, None]
    return (halves & 3).reshape(-1, 256).astype(int)


def six_bit_scales(s: np.ndarray) -> np.ndarray:
    """(blocks, 12) -> (blocks, 8) scales of Q4_K and Q5_K."""
    return np.concatenate([s[:, :4] & 63, (s[:, 8:] & 15) | ((s[:, :4] >> 6) << 4)], axis=1).astype(int)


def q2_k(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return two_bits(raw[:, 16:80]), half(raw[:, 80:82]) * (raw[:, :16] & 15)


def q3_k(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = (raw[:, None, :32] >> np.arange(8)[:, None]) & 1
    low, top = raw[:, 96:104], raw[:, 104:108]
    nibbles = np.concatenate([low & 15, low >> 4], axis=1)
    upper = ((top[:, None, :] >> np.array([0, 2, 4, 6])[:, None]) & 3).reshape(-1, 16)
    scales = (nibbles | (upper << 4)).astype(int) - 32
    return two_bits(raw[:, 32:96]) + 4 * high.reshape(-1, 256).astype(int) - 4, half(raw[:, 108:]) * scales


def q45_k(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    body = raw[:, -128:].reshape(-1, 4, 1, 32)
    codes = ((body >> np.array([0, 4])[:, None]) & 15).astype(int)
    if raw.shape[1] == 176:
        bits = (raw[:, 16:48].reshape(-1, 1, 1, 32) >> np.arange(8).reshape(4, 2, 1)) & 1
        codes += 16 * bits
    return codes.reshape(-1, 256), half(raw[:, :2]) * six_bit_scales(raw[:, 4:16])


def q6_k(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4])[:, None]
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6])[:, None]
    codes = (low & 15).reshape(-1, 256) | ((high & 3).reshape(-1, 256) << 4)
    return codes.astype(int) - 32, half(raw[:, 208:]) * raw[:, 192:208].view(np.int8)


CUTTERS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q45_k, "Q5_K": q45_k, "Q6_K": q6_k}


def of_gguf(path: Path) -> Integers:
    """llama.cpp wants the halves of every rotated head interleaved; rows come back in the order of transformers."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = tensor.name.split(".")[-2]
        if kind not in NAMES:
            continue
        cols, rows = (int(n) for n in tensor.shape)
        word = tensor.tensor_type.name
        raw = np.asarray(tensor.data).reshape(-1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
        codes, steps = CUTTERS[word](raw) if word in CUTTERS else simple(raw, word)
        pair = codes, np.repeat(steps, codes.shape[1] // steps.shape[1], axis=1)
        heads = HEADS.get(kind)
        whole = [a.reshape(rows, cols) for a in pair]
        if heads:
            whole = [a.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols) for a in whole]
        found[f"model.layers.{tensor.name.split('.')[1]}.{NAMES[kind]}"] = (whole[0], whole[1])
    return found


def of_onnx(directory: Path) -> Integers:
    """MatMulNBits, by ContribOperators.md: first column in the lowest bits, zero points as the codes."""
    import onnx

    model = onnx.load(directory / "model.onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    joined = {node.output[0]: list(node.input) for node in model.graph.node if node.op_type == "Concat"}
    products = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    matrices = [(n, names) for n in products for names in zip(*(joined.get(i, [i]) for i in n.input[1:]), strict=True)]
    found = {}
    for node, names in matrices:
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        bits, block = said["bits"], said["block_size"]

        def spread(packed: np.ndarray, count: int, bits: int = bits) -> np.ndarray:
            shifts = np.arange(0, 8, bits)
            codes = (packed.reshape(len(packed), -1, 1) >> shifts) & ((1 << bits) - 1)
            return codes.reshape(len(packed), -1)[:, :count].astype(int)

        rows = len(constants[names[0]])
        codes, steps = spread(constants[names[0]], said["K"]), constants[names[1]].reshape(rows, -1)
        zero = np.full(steps.shape, 1 << (bits - 1))
        if len(names) > 2 and names[2]:
            zero = spread(constants[names[2]].reshape(rows, -1), steps.shape[1])
        name = names[0].removesuffix(".weight.B")
        zero, steps = (np.repeat(a, block, axis=1)[:, : said["K"]] for a in (zero, steps))  # the last block may be cut
        found[name] = (codes - zero, steps)
    return found


def of_safetensors(directory: Path) -> Integers:
    """compressed-tensors' own unpacking."""
    from compressed_tensors.compressors.pack_quantized.base import unpack_from_int32
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    bits = group["weights"]["num_bits"]
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for name in (n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")):
        part = {key: tensors.get(f"{name}.weight_{key}") for key in ("packed", "scale", "zero_point", "shape")}
        shape = tuple(part["shape"].tolist())
        width = group["weights"]["group_size"] or shape[1]
        codes = unpack_from_int32(part["packed"], bits, shape).numpy().astype(int)
        if part["zero_point"] is not None:
            zero = unpack_from_int32(part["zero_point"], bits, (shape[0], shape[1] // width), packed_dim=0)
            codes = codes - np.repeat(zero.numpy().astype(int), width, axis=1)
        found[name] = (codes, np.repeat(part["scale"].float().numpy(), width, axis=1))
    return found


def solved(folder: Path, options: dict[str, Any], to: list[str]) -> Path:
    """Built by GPTQ, and told so of every matrix."""
    (folder / "text.txt").write_text(TEXT)
    step = {"use": "quantize", "with": {"solver": "gptq", **options}}
    calibration = {"text": str(folder / "text.txt"), "tokens": 1024, "sequence": 128}
    recipe = Recipe.from_json({"calibration": calibration, "passes": [step], "targets": [{"to": t} for t in to]})
    tightship.build(EMBER, recipe=recipe, output=folder / "out", work=folder / "work", threads=1)
    (stage,) = json.loads((folder / "out" / "report.json").read_text())["stages"]
    assert sum(f["solver"].startswith("gptq") for f in stage["figures"].values()) == 14
    return folder / "out"


@pytest.mark.slow
@pytest.mark.usefixtures("without_proof")
@pytest.mark.parametrize("layout", ["int4-channel", "int4-channel-asym", "int8-channel", "int8-g16", "int3-g32"])
def test_groups_that_end_in_the_middle_of_a_block(
    layout: str, tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rows of 96 columns in blocks of 64: ONNX cuts the last block, compressed-tensors has one scale a row or group."""
    to = ["onnx", "safetensors"]
    build = {"quantize": layout, "to": to, "work": tmp_path / "work", "threads": 1}
    tightship.build(tiny_directory("llama"), output=tmp_path / "out", **build)
    found = of_onnx(tmp_path / "out" / "onnx")
    assert_same(found, of_safetensors(tmp_path / "out" / "safetensors"))
    assert {codes.shape[1] for codes, _ in found.values()} == {64, 96}
    assert all(len(np.unique(codes)) > 4 for codes, _ in found.values())


def assert_same(one: Integers, other: Integers) -> None:
    assert one.keys() == other.keys()
    assert len(one) == 14
    for name, (codes, steps) in one.items():
        np.testing.assert_array_equal(codes, other[name][0], err_msg=name)
        np.testing.assert_array_equal(steps, other[name][1], err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("without_proof")
@pytest.mark.parametrize("layout", ["int4", "int4-asym", "int8"])
def test_integers_are_the_same_in_all_three(layout: str, tmp_path: Path) -> None:
    out = solved(tmp_path, {"layout": layout}, ["gguf", "onnx", "safetensors"])
    found: list[Any] = [
        of_gguf(out / "gguf" / "ember.gguf"),
        of_onnx(out / "onnx"),
        of_safetensors(out / "safetensors"),
    ]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.slow
@pytest.mark.usefixtures("without_proof")
def test_k_quants_are_the_same_in_gguf_and_onnx(tmp_path: Path) -> None:
    """All five in one model, one after the other."""
    words = itertools.cycle(["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
    places = itertools.product(range(2), NAMES.values())
    layouts = {f"model.layers.{i}.{name}.weight": next(words) for i, name in places}
    out = solved(tmp_path, {"layouts": layouts}, ["gguf", "onnx"])
    assert_same(of_gguf(out / "gguf" / "ember.gguf"), of_onnx(out / "onnx"))
