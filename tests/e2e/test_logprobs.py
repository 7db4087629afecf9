"""Stored log-probabilities from torch, ONNX Runtime and llama.cpp say the same, and `distill` takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tightship.cli import main
from tightship.errors import UsageError
from tightship.logprobs import write_logprobs
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.passes.distill import Distill
from tightship.pipeline import exporter_of
from tightship.target import Target

torch = pytest.importorskip("torch")

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 8
SMALL = {"top": 32, "temperature": 1.5, "tokens": 128, "sequence": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("logprobs")
    (made / "text.txt").write_text(TEXT)
    return made


def test_the_file_is_torchs_log_softmax(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["logprobs", str(EMBER), "--text", str(folder / "text.txt"), "-o", str(folder / "torch.safetensors")]
    words += [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    arrays = load_file(folder / "torch.safetensors")
    logits = ModelView(open_checkpoint(EMBER), threads=1).outputs(arrays["ids"].astype(np.int64))["logits"][:, :-1]
    top = torch.log_softmax(torch.from_numpy(logits).double() / 1.5, dim=-1).topk(32, dim=-1)
    np.testing.assert_allclose(arrays["stored"], top.values.numpy(), atol=1e-5)
    assert result["kept"] == pytest.approx(float(top.values.exp().sum(-1).mean()), abs=1e-5)
    assert result["tokens"] == arrays["ids"].size == 128
    assert main([*words]) == 2  # never written over
    after = Distill(temperature=1.5, student={"every": 2}, tokens=128, sequence=32, batch=2).apply(
        open_checkpoint(EMBER), Run(threads=1, inputs={"logprobs": folder / "torch.safetensors"})
    )
    assert after.hyper["layers"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("container", ["onnx", "gguf"])
def test_other_runtimes_agree_with_torch(folder: Path, container: str) -> None:
    ember = open_checkpoint(EMBER)
    place = folder / container
    place.mkdir()
    exporter = exporter_of(container)
    exporter.export(ember, exporter.plan(ember, Target(container)), place)
    teacher = place if container == "onnx" else next(place.glob("*.gguf"))
    options = {**SMALL, "top": 1024}
    theirs = write_logprobs(teacher, folder / "text.txt", folder / f"{container}.safetensors", **options)
    ours = write_logprobs(EMBER, folder / "text.txt", folder / f"{container}-torch.safetensors", **options)
    assert theirs.runtime == {"onnx": "onnx_runtime", "gguf": "llama_cpp"}[container]
    rows = []
    for written in (ours, theirs):
        arrays = load_file(written.path)
        whole = np.empty_like(arrays["stored"])
        np.put_along_axis(whole, arrays["classes"].astype(np.int64), arrays["stored"], axis=-1)
        rows.append(whole)
    divergence = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(axis=-1)
    assert np.abs(divergence).mean() < 1e-3  # llama.cpp multiplies bf16 rows


def test_what_cannot_be_written_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="vocabulary of 1024"):
        write_logprobs(EMBER, folder / "text.txt", folder / "x.safetensors", top=2000)
    with pytest.raises(UsageError, match=r"new \.safetensors"):
        write_logprobs(EMBER, folder / "text.txt", folder / "x.bin")
