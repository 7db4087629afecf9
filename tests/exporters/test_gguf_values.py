"""Values that a GGUF type cannot hold: errors that name the tensor, whichever way it takes into the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters.to_gguf import GgufExporter
from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.recipe import Recipe
from tightship.stages import for_container, scheme_stage
from tightship.target import Target
from tightship.weights import Dense

EMBER = Path(__file__).parents[2] / "examples" / "ember"
UP = "model.layers.1.mlp.up_proj.weight"


def exported(value: float, scheme: str | None, folder: Path) -> Path:
    """Ember with one value replaced, as a build makes the file: by way of the scheme's pass."""
    checkpoint, target, exporter, recipe = open_checkpoint(EMBER), Target("gguf", scheme), GgufExporter(), Recipe()
    values = checkpoint.resolve(UP).value().copy()
    values[3, 5] = value
    broken: Checkpoint = checkpoint.with_weights({UP: Dense.of(values)})
    stage = scheme_stage(broken, target, exporter, recipe)
    solved = stage.work.apply(broken, Run()) if stage else broken
    return folder / exporter.export(solved, exporter.plan(solved, for_container(target, recipe)), folder).main


@pytest.mark.parametrize("scheme", [None, "f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite(value: float, scheme: str | None, tmp_path: Path) -> None:
    with pytest.raises(Malformed) as caught:
        exported(value, scheme, tmp_path)
    assert (caught.value.exit_code, caught.value.tensor) == (5, UP)


@pytest.mark.parametrize(("scheme", "value"), [("f16", 1e5), ("q8_0", 1e8), ("q4_0", 1e6), ("q6_k", 1e9)])
def test_what_overflows_float16(scheme: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"overflow|beyond the range") as caught:
        exported(value, scheme, tmp_path)
    assert caught.value.tensor == UP
