"""Bit for bit against compressed-tensors' own compressors, both ways, every width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from tightship.errors import Malformed
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.compressed_tensors import (
    pack_codes,
    pack_quantized,
    packed_specs,
    plain_quantized,
    unpack_codes,
    unpack_quantized,
    unplain_quantized,
)

BITS = range(2, 9)


def case(bits: int, symmetric: bool, group: int, shape: tuple[int, int]) -> tuple[Affine, dict[str, np.ndarray]]:
    layout = Affine(bits=bits, group_size=group, symmetric=symmetric)
    rng = np.random.default_rng(bits * 100 + group)
    groups = shape[1] // (group or shape[1])
    arrays = {
        "codes": rng.integers(layout.lo, layout.hi, shape, endpoint=True).astype(np.int8),
        "scale": rng.uniform(-2, 2, (shape[0], groups)).astype(np.float16),
    }
    if not symmetric:
        arrays["zero_point"] = rng.integers(layout.lo, layout.hi, (shape[0], groups), endpoint=True).astype(np.int8)
    return layout, arrays


def scheme(layout: Affine) -> QuantizationScheme:
    strategy = "group" if layout.group_size else "channel"
    args = QuantizationArgs(
        num_bits=layout.bits, symmetric=layout.symmetric, strategy=strategy, group_size=layout.group_size or None
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def theirs(compressor: Any, layout: Affine, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What the library's compressor writes for weights that lie exactly on the grid."""
    weight = torch.from_numpy(layout.values(arrays)).float()
    state = {"weight": weight, "weight_scale": torch.from_numpy(arrays["scale"].astype(np.float32))}
    if not layout.symmetric:
        state["weight_zero_point"] = torch.from_numpy(arrays["zero_point"])
    found: dict[str, torch.Tensor] = compressor.compress(state, scheme(layout))
    return found


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_pack_quantized_is_theirs(bits: int, symmetric: bool, group: int) -> None:
    layout, arrays = case(bits, symmetric, group, (37, 96))
    ours = pack_quantized(layout, arrays)
    expected = theirs(PackedQuantizationCompressor, layout, arrays)
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
        assert ours[name].dtype == tensor.numpy().dtype
    assert {n: (s.dtype, s.shape) for n, s in packed_specs(layout, (37, 96)).items()} == {
        n: (a.dtype, a.shape) for n, a in ours.items()
    }
    back = unpack_quantized(layout, {n: t.numpy() for n, t in expected.items()})
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_their_decompressor_reads_our_values(bits: int, symmetric: bool) -> None:
    layout, arrays = case(bits, symmetric, 32, (24, 64))
    state = {name: torch.from_numpy(a) for name, a in pack_quantized(layout, arrays).items()}
    weight = PackedQuantizationCompressor.decompress(state, scheme(layout))["weight"]
    np.testing.assert_array_equal(weight.numpy(), layout.values(arrays).astype(np.float32))


@pytest.mark.parametrize("cols", [1, 5, 31, 33, 63, 100])
@pytest.mark.parametrize("bits", BITS)
def test_odd_widths(bits: int, cols: int) -> None:
    layout, arrays = case(bits, True, 0, (3, cols))
    expected = theirs(PackedQuantizationCompressor, layout, arrays)["weight_packed"].numpy()
    np.testing.assert_array_equal(pack_codes(arrays["codes"], bits), expected)
    np.testing.assert_array_equal(unpack_codes(expected, bits, cols), arrays["codes"])


def test_by_hand() -> None:
    """Codes -4..3 are 0..7 with 3 bits: 0b111_110_101_100_011_010_001_000 = 0xFAC688."""
    codes = np.arange(-4, 4, dtype=np.int8)[None]
    assert pack_codes(codes, 3).tolist() == [[0xFAC688]]


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = case(5, True, 0, (64, 40))[1]["codes"]
    whole = pack_codes(codes, 5)
    monkeypatch.setattr("tightship.formats.packings.compressed_tensors._CHUNK", 130)
    np.testing.assert_array_equal(pack_codes(codes, 5), whole)
    np.testing.assert_array_equal(unpack_codes(whole, 5, 40), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_is_theirs(symmetric: bool) -> None:
    layout, arrays = case(8, symmetric, 0, (20, 48))
    ours = plain_quantized(layout, arrays)
    expected = theirs(IntQuantizationCompressor, layout, arrays)
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    back = unplain_quantized(layout, ours)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_faults_are_named() -> None:
    layout, arrays = case(4, True, 32, (4, 64))
    packed = pack_quantized(layout, arrays)
    with pytest.raises(Malformed, match="words"):
        unpack_quantized(layout, {**packed, "weight_packed": packed["weight_packed"][:, :-1]})
    with pytest.raises(Malformed, match="not exact in f16"):
        unpack_quantized(layout, {**packed, "weight_scale": packed["weight_scale"] + np.float32(1e-7)})
    with pytest.raises(Malformed, match="array scale"):
        unpack_quantized(layout, {**packed, "weight_scale": packed["weight_scale"][:, :1]})
