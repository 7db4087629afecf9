"""What users get wrong, and what they get told: exit code and message of each, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.cli import main

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
NAN_TENSOR = "model.layers.1.mlp.down_proj.weight"
Place = Callable[[Path], list[str]]


def source(folder: Path) -> Path:
    """A copy of the embedded checkpoint that may be damaged."""
    return Path(shutil.copytree(EMBER, folder / "ember"))


def options(folder: Path, *more: str) -> list[str]:
    return [*more, "-o", str(folder / "out"), "--work", str(folder / "work")]


def build(folder: Path, model: Path, *more: str) -> list[str]:
    return ["build", str(model), *(more or ("--quantize", "int4", "--to", "gguf")), *options(folder)]


def header_of(model: Path) -> tuple[dict[str, Any], bytes]:
    data = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(model: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    (model / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    model = source(folder)
    header, data = header_of(model)
    change(header)
    write(model, json.dumps(header).encode(), data)
    return build(folder, model)


def configured(folder: Path, **changes: Any) -> Path:
    model = source(folder)
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    return model


def missing_file(folder: Path) -> list[str]:
    model = source(folder)
    (model / "model.safetensors").unlink()
    return build(folder, model)


def truncated(folder: Path) -> list[str]:
    model = source(folder)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    return build(folder, model)


def overlapping(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
        header[second]["data_offsets"] = header[first]["data_offsets"]

    return edited(folder, change)


def out_of_range(folder: Path) -> list[str]:
    def change(header: dict[str, Any]) -> None:
        begin, end = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [begin + (1 << 30), end + (1 << 30)]

    return edited(folder, change)


def header_beyond_file(folder: Path) -> list[str]:
    model = source(folder)
    header, data = header_of(model)
    write(model, json.dumps(header).encode(), data, length=50_000_000)
    return build(folder, model)


def duplicate_keys(folder: Path) -> list[str]:
    model = source(folder)
    header, data = header_of(model)
    twice = json.dumps({"model.norm.weight": header["model.norm.weight"]})[1:-1]
    write(model, b"{" + twice.encode() + b"," + json.dumps(header).encode()[1:], data)
    return build(folder, model)


def unknown_architecture(folder: Path) -> list[str]:
    return build(folder, configured(folder, architectures=["ZebraForCausalLM"], model_type="zebra"))


def lfs_pointer(folder: Path) -> list[str]:
    model = source(folder)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3674728\n"
    (model / "model.safetensors").write_text(pointer)
    return build(folder, model)


def nan(folder: Path) -> list[str]:
    model = source(folder)
    header, data = header_of(model)
    changed = np.frombuffer(data, np.uint16).copy()
    changed[header[NAN_TENSOR]["data_offsets"][0] // 2 + 5] = 0x7FC0  # bfloat16 NaN
    write(model, json.dumps(header).encode(), changed.tobytes())
    return build(folder, model)


def existing_output(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return build(folder, EMBER)


def unwritable(folder: Path) -> list[str]:
    (folder / "file").write_text("not a directory")
    return ["build", str(EMBER), "--to", "gguf", "-o", str(folder / "file" / "out"), "--work", str(folder / "work")]


def recipe(folder: Path, text: str) -> list[str]:
    (folder / "recipe.yaml").write_text(text)
    return ["build", str(EMBER), "--recipe", str(folder / "recipe.yaml"), *options(folder)]


def unknown_key(folder: Path) -> list[str]:
    return recipe(folder, "passes:\n  - {use: quantize, wiht: {layout: int4}}\ntargets: [{to: gguf}]\n")


def bad_order(folder: Path) -> list[str]:
    passes = "passes:\n  - {use: quantize, with: {layout: int4}}\n  - {use: prune, with: {sparsity: 0.5}}\n"
    return recipe(folder, passes + "targets: [{to: gguf}]\n")


def without_tokenizer(folder: Path) -> list[str]:
    model = source(folder)
    for file in model.glob("tokenizer*"):
        file.unlink()
    return build(folder, model)


def active_window(folder: Path) -> list[str]:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    return build(folder, configured(folder, **mistral))


def second_target(folder: Path) -> list[str]:
    return build(folder, EMBER, "--to", "gguf", "--to", "gguf")


CASES: dict[str, tuple[Place, int, str]] = {
    "missing source": (lambda folder: build(folder, folder / "nothing"), 2, "nothing"),
    "missing weights": (missing_file, 2, "weights"),
    "truncated shard": (truncated, 5, "model.safetensors"),
    "overlapping offsets": (overlapping, 5, "model.layers"),
    "offsets out of range": (out_of_range, 5, "model.norm.weight"),
    "header larger than the file": (header_beyond_file, 5, "model.safetensors"),
    "duplicate keys": (duplicate_keys, 5, "'model.norm.weight' occurs twice"),
    "unknown architecture": (unknown_architecture, 3, "Zebra"),
    "LFS pointer": (lfs_pointer, 5, "LFS"),
    "NaN": (nan, 5, NAN_TENSOR),
    "existing output": (existing_output, 2, "out exists"),
    "unwritable directory": (unwritable, 4, "file"),
    "unknown key in a recipe": (unknown_key, 2, "did you mean 'with'"),
    "order that undoes work": (bad_order, 2, "prune would destroy the grid"),
    "GGUF without a tokenizer": (without_tokenizer, 3, "tokenizer"),
    "Mistral with an active window to GGUF": (active_window, 3, "sliding"),
    "a target twice": (second_target, 2, "gguf"),
}


@pytest.mark.parametrize("case", CASES)
def test_exit_code_and_message(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, code, words = CASES[case]
    arguments = make(tmp_path)
    before = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert main([*arguments, "--json"]) == code
    said = capsys.readouterr()
    body = json.loads(said.out)
    assert body["exit_code"] == code
    assert words.lower() in f"{body['error']['message']} {body['error']['hint']}".lower()
    after = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if "work" not in p.parts)
    assert after == [name for name in before if "work" not in Path(name).parts]
    if case == "NaN":
        assert body["error"]["tensor"] == NAN_TENSOR


def test_opt_has_no_gguf(
    tiny_directory: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*build(tmp_path, tiny_directory("opt"), "--to", "gguf"), "--json"]) == 3
    assert "opt" in json.loads(capsys.readouterr().out)["error"]["message"].lower()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flush = os.fsync

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".gguf"):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert main([*build(tmp_path, EMBER, "--to", "gguf"), "--json"]) == 4
    assert "disk is full" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """Sent while artifacts lie in the staging directory."""
    arguments = build(tmp_path, EMBER, "--quantize", "int4", "--to", "gguf", "--to", "onnx")
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "tightship", *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list(tmp_path.glob(".out.partial-*/gguf/*.gguf")):
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(sent)
        said = child.communicate(timeout=60)[0]
    finally:
        child.kill()
    assert child.returncode == code
    assert json.loads(said)["exit_code"] == code
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
