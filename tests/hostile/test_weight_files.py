"""Hostile `.bin` files and shard indexes: a typed error, exit code 5, and no code run."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tightship.errors import Malformed, TightshipError, Unsupported
from tightship.formats.torch_bin import read_bin
from tightship.opening import open_checkpoint

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"


class Payload:
    """Writes a file when it is unpickled by a full reader."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.trace, "run"))


def saved(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def changed_archive(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive of one tensor with its entries passed through `change(name, data)`."""
    saved({"w": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"
    path = saved({"w": Payload(trace)}, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(Malformed, match="not a plain dict of tensors") as caught:
        read_bin(path)
    assert caught.value.exit_code == 5
    assert not trace.exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "m.bin").write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(Malformed):
        read_bin(tmp_path / "m.bin")
    assert not trace.exists()


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a plain dict"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
    "web page": (b"<html>denied</html>", "HTML"),
    "noise": (bytes(range(256)) * 4, "not a plain dict"),
    "zip without an end": (b"PK\x03\x04" + bytes(200), "damaged archive"),
}


@pytest.mark.parametrize("case", FILES)
def test_not_a_checkpoint(case: str, tmp_path: Path) -> None:
    data, message = FILES[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    with pytest.raises(Malformed, match=message):
        read_bin(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated(share: float, tmp_path: Path) -> None:
    path = saved({"w": torch.ones(4096)}, tmp_path / "m.bin")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Malformed):
        read_bin(path)


def test_a_compressed_archive_could_unfold(tmp_path: Path) -> None:
    path = changed_archive(tmp_path / "m.bin", lambda _n, d: d, zipfile.ZIP_DEFLATED)
    with pytest.raises(Malformed, match="compressed entries"):
        read_bin(path)


def test_a_storage_shorter_than_its_tensor(tmp_path: Path) -> None:
    path = changed_archive(tmp_path / "m.bin", lambda n, d: d[:16] if n.endswith("data/0") else d)
    with pytest.raises(Malformed):
        read_bin(path)["w"].read()


def test_an_archive_without_a_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(Malformed):
        read_bin(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([torch.ones(2)], Malformed, "holds a list"),
        ({"state_dict": {"w": torch.ones(2)}}, Malformed, "holds a dict under this name"),
        ({"epoch": 3, "w": torch.ones(2)}, Malformed, "holds a int under this name"),
        ({3: torch.ones(2)}, Malformed, "not a tensor name"),
        ({"a\nb": torch.ones(2)}, Malformed, "not a tensor name"),
        ({"w": torch.ones(2, 2).to_sparse()}, Malformed, "plain dense"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, Unsupported, "complex64"),
    ],
)
def test_other_contents(value: Any, error: type[TightshipError], message: str, tmp_path: Path) -> None:
    path = saved(OrderedDict(value) if isinstance(value, dict) else value, tmp_path / "m.bin")
    with pytest.raises(error, match=message):
        read_bin(path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(EMBER, tmp_path / "ember"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    write_index(folder, where)
    return folder


def write_index(folder: Path, where: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def read_index(folder: Path) -> dict[str, str]:
    where: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return where


def test_the_shards_themselves_are_sound(sharded: Path) -> None:
    assert len(open_checkpoint(sharded).weights) == 21


def test_a_shard_is_missing(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Malformed, match="not here: model-00002"):
        open_checkpoint(sharded)


def test_a_shard_is_left_over(sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00003-of-00003.safetensors")
    with pytest.raises(Malformed, match="does not name: model-00003"):
        open_checkpoint(sharded)


def test_a_single_file_beside_the_index(sharded: Path) -> None:
    shutil.copy(EMBER / "model.safetensors", sharded)
    with pytest.raises(Malformed, match=r"both model\.safetensors and"):
        open_checkpoint(sharded)


def test_the_index_puts_a_tensor_into_the_wrong_shard(sharded: Path) -> None:
    where = read_index(sharded)
    where["model.norm.weight"] = "model-00001-of-00002.safetensors"
    write_index(sharded, where)
    with pytest.raises(Malformed, match="it does not") as caught:
        open_checkpoint(sharded)
    assert caught.value.tensor == "model.norm.weight"


def test_the_index_forgets_a_tensor(sharded: Path) -> None:
    where = read_index(sharded)
    del where["model.norm.weight"]
    write_index(sharded, where)
    with pytest.raises(Malformed, match="does not know it there"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", 3, None])
def test_the_index_names_no_plain_file(sharded: Path, file: Any) -> None:
    write_index(sharded, {**read_index(sharded), "model.norm.weight": file})
    with pytest.raises(Malformed, match="plain file names"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"a": 1, "a": 2}'])
def test_the_index_is_no_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(Malformed):
        open_checkpoint(sharded)
