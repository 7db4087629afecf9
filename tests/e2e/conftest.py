"""Builds of the embedded checkpoints as users make them, for tests that look at them from different sides."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tightship import pipeline
from tightship.report import TargetReport

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 40
SIZES = {"vocab_size": 320, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
DECODER = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
SMALL: dict[str, dict[str, Any]] = {
    "OPTForCausalLM": {**DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {**SIZES, "n_layer": 2, "n_head": 4},
    "MixtralForCausalLM": {**DECODER, "intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4},
}
THREE = ("--to", "gguf", "--to", "onnx", "--to", "safetensors")


@dataclass(frozen=True)
class Job:
    """A finished command: its exit code, the one object on stdout, and the directory it was to publish."""

    code: int
    body: dict[str, Any]
    output: Path

    @property
    def checks(self) -> dict[str, dict[str, Any]]:
        return {c["id"]: c for target in self.body["result"]["targets"] for c in target["checks"]}


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tightship ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "tightship", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def tightship_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    return command


@pytest.fixture(scope="session")
def build_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Runs `tightship build SOURCE ... --json` in a new directory."""

    def run(source: Path, *options: str, **environment: str) -> Job:
        place = tmp_path_factory.mktemp("job")
        work = ("-o", "out", "--work", "work", "--json")
        done = command("build", str(source), *options, *work, cwd=place, **environment)
        assert done.stdout, done.stderr[-3000:]
        return Job(done.returncode, json.loads(done.stdout), place / "out")

    return run


@pytest.fixture(scope="session")
def main_job(build_command: Callable[..., Job]) -> Job:
    """`tightship build examples/ember --quantize int4` to all three containers; not to be changed."""
    return build_command(EMBER, "--quantize", "int4", *THREE)


@pytest.fixture(scope="session")
def random_model(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(class, config, standard deviation) -> directory of a model whose every parameter counts, 320 words.

    A router decides clearly: which expert is asked must not hang on rounded activations.
    """
    import torch
    import transformers

    def make(name: str, config: Mapping[str, Any], std: float = 0.1) -> Path:
        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**config))
        with torch.no_grad():
            for word, parameter in model.state_dict(keep_vars=True).items():
                norm, router = "norm" in word or "ln_" in word, word.endswith("gate.weight")
                parameter.normal_(1 if norm else 0, 1.0 if router else std)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(qwen / file, folder / file)
        return folder

    return make


@pytest.fixture(scope="session", params=SMALL)
def small_family(
    request: pytest.FixtureRequest, random_model: Callable[..., Path]
) -> tuple[str, Path, tuple[str, ...]]:
    """Each of `SMALL` in turn: class, directory, and the containers that hold its family."""
    containers = ("onnx", "safetensors") if request.param == "OPTForCausalLM" else ("gguf", "onnx", "safetensors")
    return request.param, random_model(request.param, SMALL[request.param]), containers


@pytest.fixture
def recipe_in(tmp_path: Path) -> Callable[..., str]:
    """(passes, targets) -> a recipe that calibrates on a little text and asks for hardly any agreement."""

    def write(passes: list[dict[str, Any]], targets: Iterable[str | dict[str, Any]]) -> str:
        (tmp_path / "text.txt").write_text(TEXT)
        content = {
            "calibration": {"text": "text.txt", "tokens": 1024, "sequence": 128},
            "passes": passes,
            "targets": [{"to": target} if isinstance(target, str) else target for target in targets],
            "gates": {"top1": 0.01},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.fixture
def without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of this test publish what they export, unproven: for tests of the bytes alone."""

    def passed(_: Any, artifact: pipeline.Artifact) -> TargetReport:
        return TargetReport(artifact.plan.target.id, 0, artifact.plan.bits_per_weight, 0.0, None, [])

    monkeypatch.setattr(pipeline.Proofs, "of", passed)
