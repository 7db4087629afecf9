"""GGML bytes: what gguf decodes from them, what libggml writes, and blocks derived by hand."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize

from tightship.errors import Malformed, Unsupported
from tightship.formats import libggml
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import (
    BLOCK_TYPES,
    ggml_type_for,
    pack_floats,
    pack_ggml,
    row_bytes,
    unpack_floats,
    unpack_ggml,
)

TYPES = sorted(BLOCK_TYPES)


def random_bytes(name: str, rows: int = 3, blocks: int = 4) -> np.ndarray:
    """Random blocks whose every byte is free, except that no float16 field is NaN or infinite."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.integers(0, 256, (rows, blocks * BLOCK_TYPES[name].nbytes), np.uint8)


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    kind = BLOCK_TYPES[name]
    assert (kind.block, kind.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert row_bytes(name, 2 * kind.block) == 2 * kind.nbytes


@pytest.mark.parametrize("name", TYPES)
def test_random_bytes_decode_as_gguf_decodes_them(name: str) -> None:
    data = random_bytes(name)
    cols = 4 * BLOCK_TYPES[name].block
    layout, arrays = unpack_ggml(name, data, cols)
    layout.check(arrays, (3, cols))
    with np.errstate(invalid="ignore", over="ignore"):
        ours = layout.values(arrays)
        theirs = dequantize(data, GGMLQuantizationType[name])
    finite = np.isfinite(theirs)
    assert finite.mean() > 0.8
    # gguf computes in float32; ours is exact.
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-6, atol=np.abs(theirs[finite]).max() * 1e-7)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "TQ1_0"])
def test_random_bytes_come_back(name: str) -> None:
    data = random_bytes(name)
    layout, arrays = unpack_ggml(name, data, 4 * BLOCK_TYPES[name].block)
    assert np.array_equal(pack_ggml(name, arrays, layout), data)


def test_tq1_0_bytes_come_back() -> None:
    """Not every byte is in use there, so begin from trits."""
    w = np.random.default_rng(1).integers(-1, 2, (3, 1024)).astype(np.float32)
    data = quantize(w, GGMLQuantizationType.TQ1_0)
    layout, arrays = unpack_ggml("TQ1_0", data, 1024)
    assert np.array_equal(layout.values(arrays), w)
    assert np.array_equal(pack_ggml("TQ1_0", arrays, layout), data)


def test_q4_0_block_by_hand() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, 0], codes[0, 16], codes[0, 15], codes[0, 31] = -8, 7, 1, -1
    data = pack_ggml("Q4_0", {"codes": codes, "scale": np.array([[0.5]], np.float16)}, parse_layout("int4"))
    # 0.5 is 0x3800; code + 8 in nibbles: -8 -> 0, 7 -> 15, 1 -> 9, -1 -> 7, 0 -> 8
    assert data.tobytes() == bytes([0x00, 0x38, 0xF0, *[0x88] * 14, 0x79])


def test_q5_1_block_by_hand() -> None:
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 0], codes[0, 9], codes[0, 31] = 16, 31, 17
    arrays = {"codes": codes, "d": np.array([[1.0]], np.float16), "m": np.array([[-2.0]], np.float16)}
    expected = bytearray([0x00, 0x3C, 0x00, 0xC0, 0x01, 0x02, 0x00, 0x80, *[0] * 16])
    expected[8 + 9] = 0x0F
    expected[8 + 15] = 0x10
    assert pack_ggml("Q5_1", arrays, parse_layout("q5_1")).tobytes() == bytes(expected)


def test_q4_k_block_by_hand() -> None:
    scales, mins = [1, 2, 3, 63, 17, 33, 48, 62], [0, 63, 5, 32, 16, 1, 47, 20]
    codes = np.zeros((1, 256), np.uint8)
    codes[0, 0], codes[0, 32], codes[0, 95], codes[0, 255] = 5, 9, 3, 15
    arrays = {
        "codes": codes,
        "d": np.array([[1.0]], np.float16),
        "dmin": np.array([[-0.5]], np.float16),
        "scales": np.array([scales], np.uint8),
        "mins": np.array([mins], np.uint8),
    }
    expected = bytearray([0x00, 0x3C, 0x00, 0xB8])
    # 17 = 1|0001, 33 = 2|0001, 48 = 3|0000, 62 = 3|1110 (upper pair | low nibble), mins 1|0000, 0|0001, 2|1111, 1|0100
    expected += bytes([0x41, 0x82, 0xC3, 0xFF, 0x40, 0x3F, 0x85, 0x60, 0x01, 0x11, 0xF0, 0x4E])
    expected += bytes([0x95, *[0] * 62, 0x03, *[0] * 63, 0xF0])
    assert pack_ggml("Q4_K", arrays, parse_layout("q4_k")).tobytes() == bytes(expected)


def test_q3_k_block_by_hand() -> None:
    codes = np.full((1, 256), -4, np.int8)
    codes[0, 0], codes[0, 33], codes[0, 255] = 3, -1, 0
    scales = np.full((1, 16), -32, np.int8)
    scales[0, 0], scales[0, 8], scales[0, 15] = 31, -31, 0
    arrays = {"codes": codes, "d": np.array([[2.0]], np.float16), "scales": scales}
    hmask, qs, packed = bytearray(32), bytearray(64), bytearray(12)
    hmask[0], hmask[31] = 0x01, 0x80  # stored 7 and 4 have the third bit; weight 255 is 32 * 7 + 31
    qs[0], qs[1] = 0x03, 0x03 << 2  # 7 & 3; -1 is stored 3, weight 33 is the second pair of byte 1
    packed[0], packed[8] = 0x1F, 0x03  # 63 = 3|1111 and, for scale 8, 1 = 0|0001 in the high nibble
    packed[11] = 0x02 << 6  # 32 = 2|0000: scale 15 is j % 4 == 3, j / 4 == 3
    assert pack_ggml("Q3_K", arrays, parse_layout("q3_k")).tobytes() == bytes(hmask + qs + packed + b"\x00\x40")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("int4", "Q4_0"),
        ("int5", "Q5_0"),
        ("int8", "Q8_0"),
        ("int4-g128", "Q4_0"),
        ("int8-channel", "Q8_0"),
        ("int4-asym", "Q4_1"),
        ("int5-g64-asym", "Q5_1"),
        ("q4_1", "Q4_1"),
        ("int8-asym", None),
        ("int3", "Q4_0"),
        ("int4-g16", None),
    ],
)
def test_type_of_a_layout(word: str, name: str | None) -> None:
    assert ggml_type_for(parse_layout(word)) == name


def test_scales_that_are_not_float16_have_no_type() -> None:
    layout = parse_layout("int4")
    assert ggml_type_for(type(layout)(bits=4, scale_dtype="bf16")) is None


@pytest.mark.parametrize("word", ["int4-g64", "int8-channel", "int5-g96-asym", "int4-asym", "int4-channel-asym"])
def test_affine_layouts_keep_every_value(word: str) -> None:
    layout = parse_layout(word)
    w = np.random.default_rng(7).normal(0, 0.03, (5, 192)).astype(np.float32)
    arrays = layout.quantize(w)
    name = ggml_type_for(layout)
    decoded = dequantize(pack_ggml(name, arrays, layout), GGMLQuantizationType[name])
    np.testing.assert_array_equal(decoded, layout.values(arrays).astype(np.float32))


def test_an_offset_that_float16_cannot_hold_is_refused() -> None:
    layout = parse_layout("int4-asym")
    arrays = {
        "codes": np.zeros((1, 32), np.int8),
        "scale": np.array([[1.0009765625]], np.float16),  # 11 significant bits, times 3
        "zero_point": np.array([[-5]], np.int8),
    }
    with pytest.raises(Unsupported, match="float16 minimum"):
        pack_ggml("Q4_1", arrays, layout)


def test_refusals() -> None:
    layout = parse_layout("int4")
    w = np.ones((1, 32), np.float32)
    with pytest.raises(Unsupported, match="cannot carry layout int4-g32"):
        pack_ggml("Q8_0", layout.quantize(w), layout)
    with pytest.raises(Unsupported, match="blocks of 32"):
        row_bytes("Q8_0", 40)
    channel = parse_layout("int8-channel")
    arrays = channel.quantize(w[:, :24])
    with pytest.raises(Unsupported, match="blocks of 32"):
        pack_ggml("Q8_0", arrays, channel)
    with pytest.raises(Unsupported, match="Q9_9"):
        row_bytes("Q9_9", 32)
    with pytest.raises(Malformed, match="34 bytes"):
        unpack_ggml("Q8_0", np.zeros((2, 33), np.uint8), 32)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_match_gguf(name: str) -> None:
    w = np.random.default_rng(3).normal(0, 5, (4, 33)).astype(np.float32)
    kind = GGMLQuantizationType[name]
    expected = np.ascontiguousarray(quantize(w, kind)).view(np.uint8)
    data = pack_floats(name, w)
    assert np.array_equal(data, expected)
    assert data.shape == (4, row_bytes(name, 33))
    np.testing.assert_array_equal(unpack_floats(name, data).astype(np.float32), dequantize(data, kind))


def test_overflowing_floats_are_refused() -> None:
    with pytest.raises(Unsupported, match="1 finite values overflow F16"):
        pack_floats("F16", np.array([[1e5, np.inf]], np.float32))


@pytest.mark.skipif(not libggml.available(), reason="no libggml installed")
@pytest.mark.parametrize("word", ["q8_0", "q4_0", "q5_0", "q4_1", "q5_1"])
def test_round_to_nearest_bytes_are_those_of_libggml(word: str) -> None:
    layout = parse_layout(word)
    w = np.random.default_rng(5).normal(0, 0.02, (16, 256)).astype(np.float32)
    expected = libggml.quantize_chunk(word.upper(), w)
    assert np.array_equal(pack_ggml(word.upper(), layout.quantize(w), layout), expected)
