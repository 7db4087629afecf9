"""The grid types: libggml's bytes through our arrays and back, and what their packing refuses."""

import numpy as np
import pytest

from tightship.errors import EnvironmentFailure, Unsupported
from tightship.formats import libggml
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import pack_ggml, unpack_ggml
from tightship.formats.threads import threads

NEED_IMPORTANCE = ["iq1_s", "iq2_xxs", "iq2_xs"]
TYPES = [*NEED_IMPORTANCE, "iq1_m", "iq2_s", "iq3_xxs", "iq3_s"]

needs_libggml = pytest.mark.skipif(not libggml.available(), reason="no libggml installed")


def weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(9)
    return rng.normal(0, 0.02, (3, 512)).astype(np.float32), rng.gamma(1, 1, 512).astype(np.float32)


@needs_libggml
@pytest.mark.parametrize("word", TYPES)
def test_arrays_hold_every_bit(word: str) -> None:
    layout, (w, importance) = parse_layout(word), weights()
    with threads(2):
        arrays = layout.quantize(w, importance)
    layout.check(arrays, w.shape)
    expected = libggml.quantize_chunk(word.upper(), w, importance)
    assert np.array_equal(pack_ggml(word.upper(), arrays, layout), expected)


@needs_libggml
@pytest.mark.parametrize("word", NEED_IMPORTANCE)
def test_importance_is_demanded(word: str) -> None:
    with pytest.raises(Unsupported, match="needs importance"):
        parse_layout(word).quantize(weights()[0])


def test_without_libggml_there_is_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml.importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    libggml._library.cache_clear()
    assert not libggml.available()
    with pytest.raises(EnvironmentFailure, match="libggml"):
        parse_layout("iq3_s").quantize(weights()[0])
    libggml._library.cache_clear()


def arrays_of(word: str) -> dict[str, np.ndarray]:
    data = np.random.default_rng(1).integers(0, 64, (1, {"iq2_s": 82, "iq2_xs": 74, "iq1_s": 50}[word]), np.uint8)
    return unpack_ggml(word.upper(), data, 256)[1]


def test_codes_off_the_grid_are_refused() -> None:
    arrays = arrays_of("iq2_s")
    arrays["codes"][0, 5] = 9
    with pytest.raises(Unsupported, match="1 groups of codes are no points"):
        pack_ggml("IQ2_S", arrays, parse_layout("iq2_s"))


def test_an_odd_number_of_signs_is_refused() -> None:
    arrays = arrays_of("iq2_xs")
    arrays["codes"][0, 5] *= -1
    with pytest.raises(Unsupported, match="even number"):
        pack_ggml("IQ2_XS", arrays, parse_layout("iq2_xs"))


def test_shifts_that_differ_are_refused() -> None:
    arrays = arrays_of("iq1_s")
    first = arrays["codes"][0, 0]
    shift = first - 8 * ((int(first) + 4) >> 3)
    arrays["codes"][0, 0] = first - 2 * shift
    with pytest.raises(Unsupported, match="shifts 32 codes together"):
        pack_ggml("IQ1_S", arrays, parse_layout("iq1_s"))


def test_no_grid_for_single_columns() -> None:
    with pytest.raises(Unsupported, match="span 8 columns"):
        parse_layout("iq2_xxs").grid({})
