"""Schemes against llama-quantize itself: the same types for every tensor, and the same bytes of the whole file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import LlamaFileType

from tightship.errors import Unsupported, UsageError
from tightship.exporters import gguf_mixes
from tightship.exporters.gguf_mixes import Matrix, Model, choose
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import read_gguf
from tightship.opening import open_checkpoint
from tightship.target import Target

EMBER = Path(__file__).parents[2] / "examples" / "ember"
WHOLE_FILE = [
    "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k",
]  # fmt: skip
DEEP = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 17, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def llama_quantize(source: Path, target: Path, file_type: str, *, dry: bool = False) -> None:
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    params = library.LlamaModelQuantizeParams()
    params.ftype = int(LlamaFileType[file_type])
    params.nthread = 1
    library.model_quantize(str(source), str(target), params)


@pytest.mark.parametrize("scheme", WHOLE_FILE)
def test_whole_files_are_those_of_llama_quantize(scheme: str, to_file: Callable, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    _, source = to_file(checkpoint)
    _, ours = to_file(checkpoint, scheme)
    assert ours.name == f"ember-{scheme.upper()}.gguf"
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(source, theirs, str(gguf_mixes.scheme(scheme)["file_type"]))
    first, second = read_gguf(ours), read_gguf(theirs)
    assert {n: t.type_name for n, t in first.tensors.items()} == {n: t.type_name for n, t in second.tensors.items()}
    assert ours.read_bytes() == theirs.read_bytes()
