"""The weighted search of asymmetric groups against every scale and zero point that can be stored."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.affine import Affine


def storable(bits: int, top: float) -> np.ndarray:
    """Every scale in [top / 4, top * 2] with 11 - bits significant bits."""
    significant = 11 - bits
    mantissas = np.arange(1 << (significant - 1), 1 << significant, dtype=np.float64)
    exponents = np.arange(-40, 20)
    scales = np.sort((mantissas[:, None] * 2.0**exponents).reshape(-1))
    return scales[(scales >= top / 4) & (scales <= top * 2)]


def least_error(x: np.ndarray, v: np.ndarray, bits: int) -> float:
    """By trying all: the least weighted squared error of a group."""
    top = (1 << bits) - 1
    reach = max(x.max(), 0) - min(x.min(), 0)
    scales = storable(bits, reach / top)[:, None, None]
    zeros = np.arange(top + 1)[None, :, None]
    codes = np.clip(np.rint(x / scales + zeros), 0, top)
    return float((v * (scales * (codes - zeros) - x) ** 2).sum(axis=-1).min())


def errors(layout: Affine, w: np.ndarray, v: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """(rows, groups) weighted squared errors."""
    difference = layout.values(layout.quantize(w, importance)) - w
    return (v * difference**2).reshape(len(w), -1, layout.group_size).sum(axis=-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_near_the_best_of_all_that_can_be_stored(bits: int) -> None:
    rng = np.random.default_rng(bits)
    w = rng.standard_t(4, (6, 32)).astype(np.float32) * 0.1 + np.float32(0.02)
    v = np.exp(rng.normal(0, 1, 32)).astype(np.float32)
    layout = Affine(bits=bits, group_size=16, symmetric=False)
    found = errors(layout, w, v, v)
    best = [[least_error(w[r, s], v[s], bits) for s in (slice(0, 16), slice(16, 32))] for r in range(6)]
    assert (found >= np.array(best) * (1 - 1e-5)).all()
    assert found.sum() < 1.05 * np.sum(best)


@pytest.mark.parametrize("word", ["int2-g16-asym", "int4-asym", "int6-g64-asym", "int8-asym", "int4-channel-asym"])
def test_never_worse_than_fitting_the_range(word: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, (16, 128)).astype(np.float32)
    w[3] = 0
    w[4] = np.abs(w[4])
    w[5, :64] = 0.25
    v = rng.random(128).astype(np.float32) ** 4
    v[::9] = 0
    layout = parse_layout(word)
    groups = 128 // (layout.block or 128)
    plain, searched = (
        (v * (layout.values(layout.quantize(w, importance)) - w) ** 2).reshape(16, groups, -1).sum(axis=-1)
        for importance in (None, v)
    )
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < 0.97 * plain.sum()
    assert not layout.values(layout.quantize(w, v))[w == 0].any()


def test_importance_that_is_all_zero_counts_every_channel_alike() -> None:
    w = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    layout = parse_layout("int3-asym")
    nothing, alike = (layout.quantize(w, np.full(64, value, np.float32)) for value in (0, 1))
    for key, array in nothing.items():
        np.testing.assert_array_equal(array, alike[key])
