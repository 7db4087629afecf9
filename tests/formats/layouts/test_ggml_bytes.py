"""Every GGML search against libggml: the same bytes, on all kinds of weights, with and without importance."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from tightship.errors import Unsupported
from tightship.formats import libggml
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import pack_ggml
from tightship.formats.threads import threads
from tightship.layout import Context

TYPES = [
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "tq1_0", "tq2_0", "mxfp4", "nvfp4",
]  # fmt: skip
ROWS, COLS = 5, 1280  # 25 super-blocks: one full turn of sixteen lanes and a part of one

needs_libggml = pytest.mark.skipif(not libggml.available(), reason="no libggml installed")


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(11)
    normal = rng.normal(0, 0.02, (ROWS, COLS))
    made = {
        "gaussian": lambda: normal,
        "heavy-tailed": lambda: rng.standard_t(3, (ROWS, COLS)) * 0.02,
        "positive": lambda: np.abs(normal),
        "negative": lambda: -1 - np.abs(normal),
        "sparse": lambda: np.where(rng.random((ROWS, COLS)) < 0.9, 0, normal),
        "zero": lambda: np.zeros((ROWS, COLS)),
        "negative zero": lambda: np.where(rng.random((ROWS, COLS)) < 0.5, 0.0, -0.0),
        "constant": lambda: np.full((ROWS, COLS), 0.37),
        "negative constant": lambda: np.full((ROWS, COLS), -0.37),
        "huge": lambda: normal * 1e5,
        "tiny": lambda: normal * 1e-7,
        "vanishing": lambda: normal * 1e-15,
        "mixed magnitudes": lambda: normal * 10.0 ** rng.integers(-6, 3, (ROWS, COLS // 16)).repeat(16, 1),
        "ties": lambda: np.round(normal * 200) / 200,
    }
    return made[kind]().astype(np.float32)


KINDS = [
    "gaussian", "heavy-tailed", "positive", "negative", "sparse", "zero", "negative zero", "constant",
    "negative constant", "huge", "tiny", "vanishing", "mixed magnitudes", "ties",
]  # fmt: skip


def importances() -> dict[str, np.ndarray | None]:
    usual = np.random.default_rng(12).gamma(1, 1, COLS).astype(np.float32)
    holes = usual.copy()
    holes[::7], holes[:64] = 0, 0
    return {"none": None, "usual": usual, "zeros among them": holes, "ones": np.ones(COLS, np.float32)}


def our_bytes(word: str, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    layout = parse_layout(word)
    return pack_ggml(word.upper(), layout.quantize(w, importance), layout)


@needs_libggml
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", TYPES)
def test_same_bytes_as_libggml(word: str, kind: str) -> None:
    w = weights(kind)
    for name, importance in importances().items():
        expected = libggml.quantize_chunk(word.upper(), w, importance)
        assert np.array_equal(our_bytes(word, w, importance), expected), f"importance: {name}"


@needs_libggml
@pytest.mark.parametrize("word", TYPES)
def test_same_bytes_on_many_blocks(word: str) -> None:
    """Enough uniform weights for the rare ways of a search, such as a descent of five sweeps."""
    rng = np.random.default_rng(1)
    w = rng.uniform(-1, 1, (64, 4096)).astype(np.float32)
    for importance in (None, rng.gamma(1, 1, 4096).astype(np.float32)):
        assert np.array_equal(our_bytes(word, w, importance), libggml.quantize_chunk(word.upper(), w, importance))


@needs_libggml
@pytest.mark.parametrize("word", TYPES)
def test_narrow_and_single_blocks(word: str) -> None:
    layout = parse_layout(word)
    w = np.random.default_rng(3).normal(0, 1, (1, layout.block)).astype(np.float32)
    importance = np.arange(1, layout.block + 1, dtype=np.float32)
    assert np.array_equal(our_bytes(word, w, importance), libggml.quantize_chunk(word.upper(), w, importance))


@pytest.mark.parametrize("word", TYPES)
def test_threads_do_not_change_bytes(word: str) -> None:
    w = np.tile(weights("heavy-tailed"), (3, 1))
    importance = importances()["usual"]
    with threads(1):
        expected = our_bytes(word, w, importance)
    for count in (2, 4):
        with threads(count):
            assert np.array_equal(our_bytes(word, w, importance), expected), f"{count} threads"


@pytest.mark.parametrize("word", ["q4_0", "q5_0", "q4_1", "q5_1"])
def test_context_knows_the_whole_row(word: str) -> None:
    """Half the columns, searched with the mean square of the row, give half the bytes."""
    layout, w, importance = parse_layout(word), weights("heavy-tailed"), importances()["usual"]
    half = COLS // 2
    squares = np.cumsum(w * w, axis=1, dtype=np.float32)[:, -1] / np.float32(COLS)
    whole = layout.fit(w, importance)
    part = layout.fit(w[:, :half], importance[:half], Context(row_mean_square=squares))
    for key, value in part.items():
        assert np.array_equal(value, whole[key][:, : value.shape[1]])
    alone = layout.fit(w[:, :half], importance[:half])
    assert any(not np.array_equal(alone[key], part[key]) for key in part)


@pytest.mark.parametrize("word", ["q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs", "tq2_0"])
def test_a_step_beyond_float16_is_refused(word: str) -> None:
    w = weights("gaussian") * np.float32(1e12)
    with pytest.raises(Unsupported, match="overflows float16"):
        parse_layout(word).fit(w)


def digest() -> str:
    """One hash of the bytes of every type, with and without importance."""
    total = hashlib.sha256()
    for word in TYPES:
        for importance in importances().values():
            for kind in ("heavy-tailed", "sparse", "mixed magnitudes"):
                total.update(our_bytes(word, weights(kind), importance).tobytes())
    return total.hexdigest()


@pytest.mark.slow
def test_same_bytes_on_a_plain_cpu() -> None:
    """Compiled for the baseline of the architecture, without AVX and FMA."""
    command = [sys.executable, "-P", __file__]
    plain = subprocess.run(
        command,
        env={**os.environ, "NUMBA_CPU_NAME": "generic"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert plain.stdout.strip() == digest()


if __name__ == "__main__":
    print(digest())
