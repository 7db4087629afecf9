"""A module over mapped files computes what the module in memory computes, and holds none of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView
from tightship.weights import Alias

Tiny = Callable[[str], Checkpoint]


def test_outputs_are_the_same_to_the_last_bit(family: str, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = tiny(family)
    ids = np.random.default_rng(0).integers(0, 96, (2, 17))
    expected = ModelView(checkpoint).outputs(ids)
    found = ModelView(checkpoint, folder=tmp_path).outputs(ids)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_weights_lie_in_files_that_nobody_has_to_remove(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = tiny("llama")
    weights = ModelView(checkpoint, folder=tmp_path).module().state_dict()
    assert list(tmp_path.iterdir()) == []
    mapped = _mapped(tmp_path)
    assert weights
    for name, tensor in weights.items():
        assert any(start <= tensor.data_ptr() < end for start, end in mapped), name


def test_tied_weights_are_one_file(tiny: Tiny, tmp_path: Path) -> None:
    aliased = tiny("llama-tied").with_weights({"lm_head.weight": Alias("model.embed_tokens.weight")})
    module = ModelView(aliased, folder=tmp_path).module()
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()


def _mapped(folder: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that are shared mappings of files that lay in `folder` (proc(5), maps)."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line and line.split()[1].endswith("s"):
            start, end = line.split()[0].split("-")
            found.append((int(start, 16), int(end, 16)))
    return found
