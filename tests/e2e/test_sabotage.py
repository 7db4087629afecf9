"""Damage done between export and proof, in every container: the build fails, publishes nothing and names the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship import pipeline
from tightship.cli import main
from tightship.formats.gguf_file import read_gguf
from tightship.formats.safetensors_file import read_header

O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741 - 64 by 64
V = "model.layers.0.self_attn.v_proj.weight"
BIAS = "model.layers.1.self_attn.k_proj.bias"
GGUF = {O: "blk.1.attn_output.weight", V: "blk.0.attn_v.weight", BIAS: "blk.1.attn_k.bias"}
CONTAINERS = ("gguf", "onnx", "safetensors")
Bytes = Callable[[np.ndarray], np.ndarray]


def place(directory: Path, main_file: str, name: str) -> tuple[Path, int, int]:
    """File, offset and size of a tensor."""
    path = directory / main_file
    if path.suffix == ".gguf":
        tensor = read_gguf(path).tensors[name]
        return path, tensor.offset, tensor.nbytes
    if path.suffix == ".safetensors":
        entry = read_header(path).entries[name]
        return path, entry.begin, entry.end - entry.begin
    import onnx

    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    data = {entry.key: entry.value for entry in tensor.external_data}
    if data:
        return directory / data["location"], int(data["offset"]), int(data["length"])
    return path, path.read_bytes().index(tensor.raw_data), len(tensor.raw_data)


def edit(artifact: Any, name: str, change: Bytes, dtype: Any = np.uint8) -> None:
    """Rewrite a stored tensor in place; `change` maps its 1-D array to another of its size."""
    path, offset, size = place(artifact.directory, artifact.exported.main, name)
    data = bytearray(path.read_bytes())
    array = np.frombuffer(bytes(data[offset : offset + size]), dtype).copy()
    changed = np.ascontiguousarray(change(array)).astype(dtype).tobytes()
    assert changed != bytes(data[offset : offset + size])
    data[offset : offset + size] = changed
    path.write_bytes(data)


def flip(place_: int) -> Bytes:
    def change(array: np.ndarray) -> np.ndarray:
        array[place_] ^= 1
        return array

    return change


def swap_tokens(artifact: Any) -> None:
    """The letters e and t change their ids."""
    if artifact.plan.target.container == "gguf":
        path = artifact.directory / artifact.exported.main
        data = bytearray(path.read_bytes())
        first, second = b"\x01\0\0\0\0\0\0\0e", b"\x01\0\0\0\0\0\0\0t"
        places = data.index(first), data.index(second)
        for at, piece in zip(places, (second, first), strict=True):
            data[at : at + len(piece)] = piece
        path.write_bytes(data)
        return
    path = artifact.directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def damage_floats(artifact: Any) -> None:
    """A square matrix transposed, a bias dropped, two tokens swapped."""
    names = GGUF if artifact.plan.target.container == "gguf" else {O: O, BIAS: BIAS}
    edit(artifact, names[O], lambda a: a.reshape(64, 64).T.reshape(-1), np.float32)
    edit(artifact, names[BIAS], np.zeros_like, np.float32)
    swap_tokens(artifact)


def damage_integers(artifact: Any) -> None:
    """One scale off by its last bit, one packed matrix zeroed."""
    container = artifact.plan.target.container
    if container == "gguf":
        edit(artifact, GGUF[V], flip(9 * 18))  # Q4_0: the low byte of the tenth block's float16 scale
        edit(artifact, GGUF[O], np.zeros_like)
    elif container == "onnx":
        edit(artifact, f"{V}.scales", flip(9), np.uint32)
        edit(artifact, f"{O}.B", np.zeros_like)
    else:
        edit(artifact, f"{V}_scale", flip(9), np.uint16)
        edit(artifact, f"{O}_packed", np.zeros_like)


@pytest.fixture
def sabotaged(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Builds with damage behind every export; the error, and the checks that did not pass by id."""

    def run(damage: Callable[[Any], None], *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
        export = pipeline._Build._export

        def damaged(self: Any, *arguments: Any) -> Any:
            artifact = export(self, *arguments)
            damage(artifact)
            return artifact

        monkeypatch.setattr(pipeline._Build, "_export", damaged)
        to = [word for container in CONTAINERS for word in ("--to", container)]
        place_ = ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--threads", "1", "--json"]
        assert main(["build", str(qwen), *options, *to, *place_]) == 1
        body = json.loads(capsys.readouterr().out)
        assert [p.name for p in tmp_path.iterdir()] == ["work"]
        report = json.loads(next((tmp_path / "work").glob("runs/*/report.json")).read_text())
        assert report["verdict"] == "fail"
        found = {c["id"]: c for target in report["targets"] for c in target["checks"] if c["verdict"] != "pass"}
        return body["error"], found

    return run


def named(checks: dict[str, Any], metric: str) -> dict[str, set[str]]:
    """Tensors that failed checks of values name, by container."""
    return {
        container: {c.get("tensor") for c in checks.values() if c["target"] == container and c["metric"] == metric}
        - {None}
        for container in CONTAINERS
    }


@pytest.mark.slow
def test_transposed_matrix_dropped_bias_swapped_tokens(sabotaged: Callable[..., Any]) -> None:
    error, checks = sabotaged(damage_floats)
    assert error["code"] == "gate_failed"
    assert error["tensor"] in {O, BIAS}
    assert named(checks, "mismatches") == {container: {O, BIAS} for container in CONTAINERS}
    for container in CONTAINERS:
        tokenizer = [c for c in checks.values() if c["target"] == container and c["kind"] == "tokenizer"]
        assert tokenizer, container
        assert {c["kind"] for c in checks.values() if c["target"] == container} >= {"values", "graph"}


@pytest.mark.slow
def test_scale_off_by_a_bit_and_zeroed_matrix(sabotaged: Callable[..., Any]) -> None:
    error, checks = sabotaged(damage_integers, "--quantize", "int4")
    assert error["tensor"] in {O, V}
    assert named(checks, "mismatches") == {container: {O, V} for container in CONTAINERS}
    assert all(V in tensors for tensors in named(checks, "integers").values())
    assert {c["target"] for c in checks.values() if c["metric"] == "integers_unlike_other_targets"} <= {
        "onnx",
        "safetensors",
    }
