"""Pruned weights stay zero or are refused; files rebuilt with other metadata, templates and shards keep their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import read_gguf
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.recipe import Recipe
from tightship.stages import for_container, outline, scheme_stage
from tightship.target import Exported, Target, TargetPlan

EMBER = Path(__file__).parents[2] / "examples" / "ember"


def pruned() -> Checkpoint:
    work = pass_for("prune", {"method": "magnitude", "sparsity": 0.6})
    after = work.apply(open_checkpoint(EMBER), Run())
    return after.replace(history=({"use": "prune", "makes": sorted(work.makes)},))


def export(checkpoint: Checkpoint, target: Target, folder: Path) -> tuple[TargetPlan, Exported]:
    """Solve and export as a build does."""
    exporter, recipe = GgufExporter(), Recipe()
    stage = scheme_stage(checkpoint, target, exporter, recipe)
    if stage is not None:
        outline(checkpoint, stage)
        checkpoint = stage.work.apply(checkpoint, Run())
    plan = exporter.plan(checkpoint, for_container(target, recipe))
    folder.mkdir()
    return plan, exporter.export(checkpoint, plan, folder)


def shares_of_zeros(path: Path) -> dict[str, float]:
    """Name -> share of exact zeros, by gguf's own decoders."""
    tensors = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk") and len(t.shape) == 2]
    return {t.name: float(np.mean(gguf.dequantize(t.data, t.tensor_type) == 0)) for t in tensors}


@pytest.mark.parametrize("scheme", ["q4_k_m", "q2_k", "iq4_xs", "q5_1"])
def test_schemes_that_undo_pruning_are_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="undo the pruning") as caught:
        export(pruned(), Target("gguf", scheme), tmp_path / "out")
    assert "sparse: steer" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("scheme", "types"),
    [("q4_k_m", {"Q4_0", "Q6_K"}), ("q5_k_s", {"Q5_0"}), ("q2_k", {"Q3_K"}), ("iq4_xs", {"Q4_0"}), ("q4_1", {"Q5_0"})],
)
def test_steered_types_keep_every_zero(scheme: str, types: set[str], tmp_path: Path) -> None:
    checkpoint = pruned()
    plan, exported = export(checkpoint, Target("gguf", scheme, {"sparse": "steer"}), tmp_path / "out")
    shares = shares_of_zeros(tmp_path / "out" / exported.main)
    assert len(shares) == len(checkpoint.linears())
    assert min(shares.values()) >= 0.6 - 1e-3
    linears = {info.name for info in checkpoint.linears()}
    assert {p.storage for p in plan.tensors if p.name in linears} == types
    assert exported.details["steered"] == sum("keeps the zeros" in p.reason for p in plan.tensors) > 0
    assert any("keep their zeros" in note for note in plan.notes)


def test_what_was_not_pruned_is_not_steered(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    plan, _ = export(checkpoint, Target("gguf", "q4_k_m", {"sparse": "steer"}), tmp_path / "out")
    plain = GgufExporter().layout_for(checkpoint, Target("gguf", "q4_k_m"))
    assert {p.name: p.layout for p in plan.tensors if p.name in plain and not isinstance(plain[p.name], str)} == {
        name: layout.name for name, layout in plain.items() if not isinstance(layout, str)
    }
    with pytest.raises(UsageError, match="refuse or steer"):
        export(checkpoint, Target("gguf", "q4_k_m", {"sparse": "drop"}), tmp_path / "none")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "out"
    return folder / export(open_checkpoint(EMBER), Target("gguf", "q4_k_m"), folder)[1].main


def tensor_digests(*paths: Path) -> dict[str, tuple[str, str]]:
    return {
        t.name: (t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest())
        for path in paths
        for t in gguf.GGUFReader(path).tensors
    }


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_rebuilt_with_other_template_and_metadata(old: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    metadata = {"general.license": "mit", "general.name": None, "mine.score": 3, "general.tags": ["a", "b"]}
    options = {"chat_template": str(tmp_path / "chat.jinja"), "metadata": metadata}
    _, exported = export(open_checkpoint(old), Target("gguf", None, options), tmp_path / "new")
    new = tmp_path / "new" / exported.main
    assert tensor_digests(new) == tensor_digests(old)
    before, after = fields(old), fields(new)
    assert after["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert (after["general.license"], after["mine.score"], after["general.tags"]) == ("mit", 3, ["a", "b"])
    assert "general.name" not in after
    model = [key for key in before if key.startswith(("llama.", "tokenizer.ggml"))]
    assert {key: after[key] for key in model} == {key: before[key] for key in model}


def test_split_and_merged_again(old: Path, tmp_path: Path) -> None:
    _, exported = export(open_checkpoint(old), Target("gguf", None, {"shard_bytes": 400_000}), tmp_path / "split")
    shards = sorted((tmp_path / "split").glob("*.gguf"))
    assert len(shards) > 2
    assert tensor_digests(*shards) == tensor_digests(old)
    _, merged = export(open_checkpoint(tmp_path / "split" / exported.main), Target("gguf"), tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.gguf"))) == 1
    assert tensor_digests(tmp_path / "merged" / merged.main) == tensor_digests(old)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": 3}, "follows from the model"),
        ({"tokenizer.ggml.pre": "x"}, "follows from the model"),
        ({"general.architecture": "gpt2"}, "follows from the model"),
        ({"general.name": 3}, "is str"),
        ({"mine.key": {"a": 1}}, "found"),
    ],
)
def test_metadata_that_would_lie(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export(open_checkpoint(EMBER), Target("gguf", None, {"metadata": metadata}), tmp_path / "out")
    with pytest.raises(UsageError, match="cannot be read"):
        export(open_checkpoint(EMBER), Target("gguf", None, {"chat_template": "missing.jinja"}), tmp_path / "none")


def test_the_file_says_which_passes_made_it(tmp_path: Path) -> None:
    checkpoint, exporter, target = open_checkpoint(EMBER), GgufExporter(), Target("gguf")
    pruned = {"use": "prune", "revision": 1, "with": {"method": "magnitude", "sparsity": 0.5, "steps": None}}
    scheme = {"use": "quantize", "revision": "1.1", "with": {"solver": "rtn", "layout": None, "layouts": {"a": "q8_0"}}}
    found = []
    for number, history in enumerate([(), (pruned, {"dropped": [3]}, scheme)]):  # one is a pass's own note
        folder, made = tmp_path / str(number), checkpoint.replace(history=history)
        folder.mkdir()
        main = exporter.export(made, exporter.plan(made, target), folder).main
        found.append(read_gguf(folder / main).metadata.get("tightship.recipe"))
    assert found == [None, '[{"use":"prune","with":{"method":"magnitude","sparsity":0.5}}]']
