"""Structure: what is missing, surplus or contradictory is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tightship.report import Check
from tightship.validators.stored import open_stored
from tightship.validators.structure import structure_checks

UP = "model.layers.1.mlp.up_proj.weight"


def failed(artifact: Any) -> dict[str, Check]:
    stored = open_stored(artifact.compressed, artifact.plan, artifact.directory, artifact.exported)
    checks = structure_checks(artifact.compressed, artifact.plan, artifact.directory, artifact.exported, stored)
    return {check.metric: check for check in checks if check.verdict == "fail"}


@pytest.mark.parametrize("container", ["gguf", "onnx", "safetensors"])
@pytest.mark.parametrize("layout", [None, "int4"])
def test_faithful_artifacts_pass(exports: Callable[..., Any], container: str, layout: str | None) -> None:
    assert failed(exports(container, layout)) == {}


@pytest.mark.parametrize("container", ["gguf", "onnx", "safetensors"])
def test_surplus_file_is_named(staged: Callable[..., Any], container: str) -> None:
    artifact = staged(container)
    (artifact.directory / "notes.txt").write_text("")
    assert failed(artifact)["files"].reason == "notes.txt was not written by the exporter"


def test_missing_file_and_link_are_named(staged: Callable[..., Any]) -> None:
    artifact = staged("gguf")
    (artifact.directory / "Modelfile").unlink()
    (artifact.directory / "Modelfile").symlink_to("elsewhere")
    assert failed(artifact)["files"].value == 2


def test_missing_and_surplus_tensors_are_named(staged: Callable[..., Any]) -> None:
    artifact = staged("safetensors")
    path = artifact.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weigth"] = tensors.pop(UP)
    save_file(tensors, path, metadata={"format": "pt"})
    found = failed(artifact)
    assert found["tensors"].value == 2
    assert found["tensors"].tensor == UP
    assert found["tensors"].reason == f"{UP}: the file has no {UP} (and 1 more)"


def test_tensor_left_out_of_the_plan_is_named(exports: Callable[..., Any]) -> None:
    whole = exports("safetensors")
    tensors = tuple(t for t in whole.plan.tensors if t.name != UP)
    artifact = dataclasses.replace(whole, plan=dataclasses.replace(whole.plan, tensors=tensors))
    assert failed(artifact)["tensors"].value == 2  # not planned, and not stored as far as the plan knows


def test_gguf_metadata_that_contradicts_the_config_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("gguf")
    path = artifact.directory / artifact.exported.main
    data = path.read_bytes()
    key = b"qwen2.attention.head_count_kv" + (4).to_bytes(4, "little") + (4).to_bytes(4, "little")
    assert data.count(key) == 1
    path.write_bytes(data.replace(key, key[:-4] + (2).to_bytes(4, "little")))
    assert failed(artifact)["config"].reason == "qwen2.attention.head_count_kv is 2, config.json says 4"


def test_config_key_lost_on_the_way_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("safetensors")
    path = artifact.directory / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(config))
    assert failed(artifact)["config"].reason == "config.json says rms_norm_eps = 1e-05, the checkpoint 1e-06"


def test_genai_config_that_contradicts_the_graph_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("onnx")
    path = artifact.directory / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["vocab_size"] = 321
    config["model"]["decoder"]["inputs"]["input_ids"] = "tokens"
    path.write_text(json.dumps(config))
    found = failed(artifact)["config"]
    assert found.value == 2
    assert found.reason == "genai_config.json says vocab_size = 321, config.json 320 (and 1 more)"


def test_external_data_out_of_the_directory_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("onnx")
    path = artifact.directory / artifact.exported.main
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    path.write_bytes(model.SerializeToString())
    assert "which is not beside it" in failed(artifact)["config"].reason


def test_index_that_lies_is_named(staged: Callable[..., Any]) -> None:
    artifact = staged("safetensors")
    names = load_file(artifact.directory / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors") | {UP: "other.safetensors"}}
    (artifact.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert failed(artifact)["config"].tensor == UP
