"""Blocks of unlike widths: silent units are cut out without a trace, config.json says what is where, shares add up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.exporters import exporter_for
from tightship.passes import pass_for
from tightship.passes.allotment import shares_of, step_costs
from tightship.passes.base import Run
from tightship.passes.spaces import Space, space_of
from tightship.passes.structural import cut_silent
from tightship.target import Target
from tightship.weights import Dense

pytest.importorskip("torch")


def silent(checkpoint: Checkpoint, spaces: list[Space], keep: dict[str, list[int]]) -> Checkpoint:
    """Every block's last units made silent, as many as `keep` does not cover."""
    changed = {}
    for space in spaces:
        for info in space.readers(checkpoint):
            w = checkpoint.resolve(info.name).value().copy()
            w[:, space.columns(info, checkpoint.hyper)[keep[space.name][int(info.block or 0)] :].reshape(-1)] = 0
            changed[info.name] = Dense.of(w)
    return checkpoint.with_weights(changed)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "opt", "gpt2", "bert", "falcon"])
def test_blocks_cut_to_unlike_widths_compute_the_same(
    name: str,
    tiny: Callable[[str], Checkpoint],
    assert_lossless: Callable[[Checkpoint, Checkpoint], None],
    calibrated: Run,
) -> None:
    checkpoint = tiny(name)
    wanted = {"ffn": [32, space_of(checkpoint, "ffn").units], "heads": [1, 2]}
    keep = {space: units for space, units in wanted.items() if space in checkpoint.architecture.prunable}
    spaces = [space_of(checkpoint, space) for space in keep]
    quiet = silent(checkpoint, spaces, keep)
    cut = cut_silent(quiet, spaces, keep, uniform=False)
    assert cut.widths("ffn") == keep["ffn"]
    assert_lossless(cut, quiet)
    rest = pass_for("drop-layers", {"layers": [0]}).apply(cut, calibrated)
    whole = pass_for("drop-layers", {"layers": [0]}).apply(quiet, calibrated)
    assert_lossless(rest, whole)


def test_costly_blocks_keep_more_and_the_sum_stays() -> None:
    cheap, dear = np.full(10, 1.0), np.full(10, 100.0)
    assert shares_of([cheap, dear, cheap], keep=10, step=2) == [8, 14, 8]  # no share is more than 0.2 from the mean
    assert sum(shares_of([np.arange(8.0), np.arange(8.0) * 2, np.arange(8.0) * 3], keep=5, step=1)) == 15
    assert shares_of([np.zeros(4), np.full(4, 9.0)], keep=2, step=1) == [1, 3]  # never none


def test_costs_are_measured_around_the_share_asked_for() -> None:
    seen: list[int] = []

    def hurt(keep: int) -> float:
        seen.append(keep)
        return float(100 - keep) ** 2

    costs = step_costs(hurt, units=100, keep=50, step=5)
    assert seen == [70, 60, 50, 40, 30]  # the share and two more on either side
    np.testing.assert_allclose(np.cumsum(costs)[[5, 7, 9, 11, 13]], [900, 1600, 2500, 3600, 4900])
    assert (np.diff(costs) >= 0).all()
    assert len(costs) == 20


def test_a_block_whose_units_matter_little_loses_most(
    tiny: Callable[[str], Checkpoint], outputs: Callable[[Checkpoint], np.ndarray], calibrated: Run
) -> None:
    before = tiny("llama")
    quiet = "model.layers.1.mlp.down_proj.weight"
    before = before.with_weights({quiet: Dense.of(before.weights[quiet].value() * np.float32(0.01))})  # type: ignore[union-attr]
    step = pass_for("prune-structured", {"ffn": 0.5, "width": 0.25, "multiple": 16, "uniform": False})
    step.requires(before)
    outline, after = step.outline(before), step.apply(before, calibrated)
    assert outline.widths("ffn") == [48, 48]
    assert after.widths("ffn") == [64, 32]
    assert after.config["intermediate_size"] == before.config["intermediate_size"]
    assert outputs(after).shape == (2, 12, 96)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([1], Malformed),
        ({"0": 3}, Malformed),
        ({"7": {"intermediate_size": 32}}, Malformed),
        ({"0": {"intermediate_size": 0}}, Malformed),
        ({"0": {"intermediate_size": True}}, Malformed),
        ({"0": {"hidden_act": "relu"}}, Unsupported),
    ],
)
def test_tables_that_are_none_are_refused(
    table: object, error: type[Exception], tiny: Callable[[str], Checkpoint]
) -> None:
    checkpoint = tiny("llama")
    with pytest.raises(error, match="per_layer_config"):
        checkpoint.architecture.check_supported({**checkpoint.config, "per_layer_config": table})


def test_what_cannot_hold_or_make_unlike_blocks(tiny: Callable[[str], Checkpoint]) -> None:
    def refused(name: str, error: type[Exception], **options: object) -> None:
        step = pass_for("prune-structured", {"uniform": False, **options})
        with pytest.raises(error):
            step.requires(tiny(name))

    refused("mixtral", Unsupported, ffn=0.34)
    refused("llama", UsageError, ffn=0.4, multiple=40)  # 96 channels are no whole number of 40
    with pytest.raises(UsageError, match="heads and ffn"):
        pass_for("prune-structured", {"width": 0.5, "uniform": False})
    step = pass_for("prune-structured", {"ffn": 0.34, "uniform": False})
    for name, container in (("llama", "safetensors"), ("qwen2", "gguf")):
        with pytest.raises(Unsupported):
            exporter_for(container).plan(step.outline(tiny(name)), Target(container))
    with pytest.raises(Unsupported, match="already"):
        step.requires(step.outline(tiny("llama")))
