"""What the GGML layouts promise apart from their bytes: arrays, grids, zeros, JSON."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from tightship.errors import UsageError
from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.mx import NVFP4, ScaledNVFP4, to_ue4m3, ue4m3_values
from tightship.formats.packings.ggml import pack_ggml
from tightship.layout import AffineGrid, Layout

GGML = [
    "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4", "nvfp4",
]  # fmt: skip


def gaussian(rows: int = 3, cols: int = 512) -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.02, (rows, cols)).astype(np.float32)


@pytest.mark.parametrize("word", GGML)
def test_arrays_are_those_announced(word: str) -> None:
    layout, w = parse_layout(word), gaussian()
    layout.check(layout.quantize(w), w.shape)
    layout.check(layout.quantize(w, np.ones(512, np.float32)), w.shape)


@pytest.mark.parametrize("word", GGML)
def test_values_are_what_gguf_decodes(word: str) -> None:
    layout, w = parse_layout(word), gaussian()
    arrays = layout.quantize(w)
    decoded = dequantize(pack_ggml(word.upper(), arrays, layout), GGMLQuantizationType[word.upper()])
    np.testing.assert_allclose(layout.values(arrays), decoded, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("word", GGML)
def test_the_grid_says_the_values(word: str) -> None:
    layout, w = parse_layout(word), gaussian()
    arrays = layout.quantize(w)
    grid = layout.grid(arrays)
    codes = arrays["codes"]
    if isinstance(grid, AffineGrid):
        said = grid.scale.astype(np.float64) * codes + grid.offset.astype(np.float64)
        assert grid.lo <= codes.min()
        assert codes.max() <= grid.hi
    else:
        said = grid.scale.astype(np.float64) * grid.table.astype(np.float64)[codes]
    np.testing.assert_array_equal(np.broadcast_to(said, w.shape), layout.values(arrays))


@pytest.mark.parametrize("word", [*GGML, "q8_0", "q5_0", "q4_0"])
@pytest.mark.parametrize("importance", [None, np.ones(512, np.float32)], ids=["plain", "importance"])
def test_keeps_zero_tells_the_truth(word: str, importance: np.ndarray | None) -> None:
    layout, w = parse_layout(word), gaussian(8)
    w[:, ::2] = 0
    kept = layout.values(layout.quantize(w, importance))[:, ::2] == 0
    assert kept.all() if layout.keeps_zero else kept.mean() < 0.1


@pytest.mark.parametrize("word", GGML)
def test_json_and_name_come_back(word: str) -> None:
    layout = parse_layout(word)
    assert layout.name == word
    assert Layout.from_json(layout.to_json()) == layout


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean q4_k"):
        parse_layout("q4k")


def test_ue4m3_bytes_are_the_nearest() -> None:
    """Every byte from 0 to 240 and 448 comes back; ties go up, as in ggml-impl.h."""
    used = np.array([*range(0x78), 0x7E], np.uint8)
    values = ue4m3_values(used)
    assert np.array_equal(to_ue4m3(values.astype(np.float32)), used)
    assert values[[1, 8, 0x38, 0x77, 0x78]].tolist() == [2.0**-9, 2.0**-6, 1.0, 240.0, 448.0]
    ties = (values[:-2] + values[1:-1]) / 2
    upper = used[1:-1].copy()
    upper[7] = 7  # between the largest subnormal and the smallest normal number GGML goes down
    assert np.array_equal(to_ue4m3(ties.astype(np.float32)), upper)


def test_nvfp4_with_a_scale_for_the_tensor() -> None:
    """Scaling the weights by a power of two moves the divisor alone; small weights fit better than with one level."""
    w = gaussian() / 16
    layout, plain = ScaledNVFP4(), NVFP4()
    arrays, larger = layout.quantize(w), layout.quantize(w * np.float32(1024))
    assert all(np.array_equal(arrays[key], larger[key]) for key in ("codes", "scale"))
    assert np.array_equal(arrays["divisor"], larger["divisor"] * 1024)
    assert 120 < ue4m3_values(arrays["scale"]).max() <= 240
    error = np.square(layout.values(arrays) - w).mean()
    assert error < 0.6 * np.square(plain.values(plain.quantize(w)) - w).mean()
    assert Layout.from_json(layout.to_json()) == layout
