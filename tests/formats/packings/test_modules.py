"""Every storage of a safetensors module against somebody else's decoder, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.modules import PACKINGS
from tightship.validators.foreign_words import unpacked

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
TILE = {"strategy": "block", "block_structure": [128, 128]}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-e4m3": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8-e4m3-channel": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8-e4m3-block": ("float-quantized", {**FP8, **TILE}),
    "mxfp8": ("mxfp8-quantized", {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    "mxfp4": ("mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16}),
    "nvfp4-scaled": ("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16}),
}


def weights(rows: int = 256, cols: int = 384) -> np.ndarray:
    """Heavy tails, a row and a group of zeros, one outlier."""
    w = np.random.default_rng(0).standard_t(4, (rows, cols)).astype(np.float32) * np.float32(0.02)
    w[3], w[5, 32:64], w[7, 9] = 0, 0, 4
    return w


def tensors_of(word: str, storage: str, w: np.ndarray) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    layout, packing = parse_layout(word), PACKINGS[storage]
    arrays = layout.quantize(w)
    layout.check(arrays, w.shape)
    packed = packing.pack(layout, arrays)
    specs = packing.check(layout, w.shape)
    assert {k: (s.dtype, s.shape) for k, s in specs.items()} == {k: (a.dtype, a.shape) for k, a in packed.items()}
    return layout, arrays, packed


def torch_of(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.ascontiguousarray(array))


@pytest.mark.parametrize("word", THEIRS)
def test_compressed_tensors_reads_our_values(word: str) -> None:
    storage, args = THEIRS[word]
    layout, arrays, packed = tensors_of(word, storage, weights())
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(storage)
    theirs = compressor.decompress({k: torch_of(a) for k, a in packed.items()}, scheme)["weight"].float().numpy()
    expected = layout.values(arrays)
    np.testing.assert_array_equal(theirs, expected.astype(np.float32))
    assert np.square(theirs - weights()).mean() < 0.02 * np.square(weights()).mean()
    assert not theirs[3].any()
    assert not theirs[5, 32:64].any()
    read = parse_layout("nvfp4-scaled") if word == "nvfp4" else layout
    back = PACKINGS[storage].unpack(read, packed)
    np.testing.assert_array_equal(read.values(back), expected)


def test_codes_of_fp8_are_torchs_cast() -> None:
    w = weights()
    arrays = parse_layout("fp8-e4m3-channel").quantize(w)
    theirs = (torch.from_numpy(w) / torch.from_numpy(arrays["scale"])).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(arrays["codes"], theirs.view(torch.uint8).numpy())
    assert arrays["codes"][7, 9] == 0x7E  # 448


def test_every_e4m3_byte_is_torchs() -> None:
    codes = np.arange(256, dtype=np.uint8)[None]
    ours = parse_layout("fp8-e4m3").values({"codes": codes, "scale": np.ones((1, 1), np.float32)})
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(ours[0], theirs)


@pytest.mark.parametrize("shape", [(256, 384), (200, 384)])
def test_transformers_decodes_the_fine_grained_form(shape: tuple[int, int]) -> None:
    layout, arrays, packed = tensors_of("fp8-e4m3-block", "fp8", weights(*shape))
    assert packed["weight_scale_inv"].shape == (2, 3)
    back = PACKINGS["fp8"].unpack(layout, packed)
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)
    if shape[0] % 128 == 0:  # transformers knows whole tiles alone
        theirs = Fp8Dequantize(None).convert({k: torch_of(a) for k, a in packed.items()})["weight"]
        np.testing.assert_array_equal(theirs.numpy(), layout.values(arrays).astype(np.float32))


@pytest.mark.parametrize("word", ["int4-g128", "int4-g32-asym", "int8-g64", "int2-g32-asym"])
@pytest.mark.parametrize("storage", ["gptq", "gptq_v2", "awq"])
def test_genai_unpacks_gptq_and_awq(word: str, storage: str) -> None:
    layout = parse_layout(word)
    if storage == "awq" and layout.bits != 4:
        with pytest.raises(Unsupported, match="AWQ has 4 bits"):
            PACKINGS[storage].check(layout, (256, 384))
        return
    packing, arrays = PACKINGS[storage], layout.quantize(weights())
    if storage == "gptq" and "zero_point" in arrays:  # version 1 cannot say the lowest one
        arrays["zero_point"] = np.maximum(arrays["zero_point"], np.int8(layout.lo + 1))
    packed = packing.pack(layout, arrays)
    specs = packing.check(layout, (256, 384))
    assert {k: (x.dtype, x.shape) for k, x in specs.items()} == {k: (a.dtype, a.shape) for k, a in packed.items()}
    half = 1 << (layout.bits - 1)
    codes, zero = unpacked(storage, packed, layout.bits, layout.group_size)
    np.testing.assert_array_equal(codes, arrays["codes"].astype(int) + half)
    np.testing.assert_array_equal(zero, arrays.get("zero_point", np.zeros_like(zero)).astype(int) + half)
    back = PACKINGS[storage].unpack(layout, packed)
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)


def test_three_bits_cross_words_as_autogptq_packs_them() -> None:
    """AutoGPTQ's `pack`: of 32 values, the tenth keeps two bits in the first word, the rest go to the next."""
    layout = parse_layout("int3-g32")
    codes = (np.arange(32) % 8 - 4).astype(np.int8)[None].repeat(32, axis=0)
    packed = PACKINGS["gptq_v2"].pack(layout, {"codes": codes, "scale": np.ones((32, 1), np.float16)})
    unsigned = np.arange(32) % 8
    stream = sum(int(u) << (3 * i) for i, u in enumerate(unsigned))
    words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(3)]
    np.testing.assert_array_equal(packed["qweight"].view(np.uint32)[:, 0], words)


def test_gptq_version_one_cannot_say_zero() -> None:
    layout = parse_layout("int4-g32-asym")
    arrays = layout.quantize(np.abs(weights()) + np.float32(0.1))
    with pytest.raises(Unsupported, match="cannot say 0"):
        PACKINGS["gptq"].pack(layout, arrays)
    assert PACKINGS["gptq_v2"].pack(layout, arrays)["qzeros"].max() == 0


def test_faults_are_named() -> None:
    layout, arrays, packed = tensors_of("int4-g32-asym", "gptq_v2", weights())
    with pytest.raises(Malformed, match="says symmetric"):
        PACKINGS["gptq_v2"].unpack(parse_layout("int4-g32"), packed)
    tile, arrays, packed = tensors_of("fp8-e4m3-block", "float-quantized", weights())
    arrays["scale"][5] *= 2
    with pytest.raises(Unsupported, match="have different ones"):
        PACKINGS["float-quantized"].pack(tile, arrays)
    packed["weight"].view(np.uint8)[0, 0] = 0xFF
    with pytest.raises(Malformed, match="NaN"):
        PACKINGS["float-quantized"].unpack(tile, packed)
    layout, arrays, packed = tensors_of("nvfp4-scaled", "nvfp4-pack-quantized", weights())
    with pytest.raises(Malformed, match="one positive global scale"):
        PACKINGS["nvfp4-pack-quantized"].unpack(layout, {**packed, "weight_global_scale": np.zeros(1, np.float32)})
