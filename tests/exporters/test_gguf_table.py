"""docs/gguf-families.md: every family with a GGUF form, its file in float32, Q8_0 and Q4_K_M through llama.cpp.

`pytest tests/exporters/test_gguf_table.py --write-docs` writes the page from what it measures; without the option the
page is held to it. All parameters are random, rows are long enough for K-quants, and 2 x 40 positions are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.architecture import all_architectures
from tightship.exporters.to_gguf import GgufExporter
from tightship.exporters.to_onnx import reference_graph
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.llama_gelu import llama_gelus
from tightship.validators.parity import judge
from tightship.validators.runtimes.onnx_runtime import Graph, open_session
from tightship.validators.stored import open_stored
from tightship.validators.structure import structure_checks

PAGE = Path(__file__).parents[2] / "docs" / "gguf-families.md"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
PADDED = {**GROUPED, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
LATENT = {
    **PADDED,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 256}
ROUTED |= {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0}
SPECIAL = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
SHARED = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("BertModel", SIZES),
    "bloom": ("BloomForCausalLM", {"vocab_size": 512, "hidden_size": 256, "n_layer": 2, "n_head": 8}),
    "cohere": ("CohereForCausalLM", {**GROUPED, "logit_scale": 0.3}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "dots1": (
        "Dots1ForCausalLM",
        {**SIZES, **ROUTED, "num_key_value_heads": 8, "head_dim": 32, "sliding_window": None},
    ),
    "falcon": ("FalconForCausalLM", {key: SIZES[key] for key in SIZES if key not in {"intermediate_size"}}),
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 6}),
    "glm4": ("Glm4ForCausalLM", {**PADDED, "head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 512, "n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "granite": ("GraniteForCausalLM", GROUPED),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {**GROUPED, "head_dim": 32}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**GROUPED, "head_dim": 32, "num_experts": 4, "moe_topk": 2}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mamba": ("MambaForCausalLM", {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "modernbert": ("ModernBertModel", {**SIZES, **SPECIAL, "local_attention": 12}),
    "mpt": ("MptForCausalLM", {"vocab_size": 512, "d_model": 256, "n_layers": 2, "n_heads": 8, "max_seq_len": 128}),
    "nomic_bert": ("NomicBertModel", SIZES),
    "olmo": ("OlmoForCausalLM", {**GROUPED, "eos_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "olmoe": ("OlmoeForCausalLM", {**SIZES, **EXPERTS, "num_key_value_heads": 8}),
    "phi": ("PhiForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", {**PADDED, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, **SHARED}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, **EXPERTS, "head_dim": 32, "moe_intermediate_size": 256, "norm_topk_prob": True},
    ),
    "seed_oss": ("SeedOssForCausalLM", {**GROUPED, "head_dim": 32, "attention_out_bias": False}),
    "smollm3": ("SmolLM3ForCausalLM", PADDED),
    "stablelm": ("StableLmForCausalLM", GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 512, "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8},
    ),
    "umt5": (
        "UMT5ForConditionalGeneration",
        {"vocab_size": 512, "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8}
        | {"feed_forward_proj": "relu"},
    ),
}
HEAD = """# Families in GGUF

Written by `pytest tests/exporters/test_gguf_table.py --write-docs`, held to what the tests measure. Random models of
two layers, relative L2 distance over 80 positions; llama.cpp through cyllama.

- **graph**: the float32 file in llama.cpp against transformers, at the worst position. Where llama.cpp reads GELU from
  a table of float16 values, weights are such that GELU's inputs lie outside that table.
- **GELU from a table**: the same with ordinary weights, over all positions: what the table costs.
- **weights**: the decoded file against the original, both in transformers. Random models lose more than trained ones.
- **runtime**: llama.cpp as shipped against the decoded file.

| family | llama.cpp | graph | GELU from a table | Q8_0 weights | runtime | Q4_K_M weights | runtime |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What is measured of one family; all but the first two are relative L2 distances."""

    family: str
    arch: str
    graph: float
    gelu: float | None
    q8_weights: float
    q8_runtime: float
    q4_weights: float
    q4_runtime: float

    def __str__(self) -> str:
        gelu = "" if self.gelu is None else f"{self.gelu:.0e}"
        shown = [f"{f:.1%}" for f in (self.q8_weights, self.q8_runtime, self.q4_weights, self.q4_runtime)]
        return f"| {self.family} | {self.arch} | {self.graph:.0e} | {gelu} | {' | '.join(shown)} |"

    @classmethod
    def read(cls, line: str) -> Row:
        family, arch, graph, gelu, *shares = (cell.strip() for cell in line.strip("|").split("|"))
        figures = [float(share.rstrip("%")) / 100 for share in shares]
        return cls(family, arch, float(graph), float(gelu) if gelu else None, *figures)


def on_the_page() -> dict[str, Row]:
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(HEAD)
    return {row.family: row for row in map(Row.read, page.removeprefix(HEAD).splitlines())}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def by_position(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Any:
    """Rows as they are measured; the page is written from them at the end where the option says so."""
    measured: dict[str, Row] = {}
    yield measured
    if request.config.getoption("--write-docs") and set(measured) == set(MODELS):
        PAGE.write_text(HEAD + "".join(f"{measured[family]}\n" for family in sorted(measured)), encoding="utf-8")


@pytest.fixture
def measure(  # noqa: PLR0917 - fixtures
    save_model: Callable,
    byte_level: Path,
    to_file: Callable,
    steep: Callable,
    rounded: Callable,
    in_llama_cpp: Callable,
) -> Callable[[str], Row]:
    def run(family: str) -> Row:
        checkpoint = open_checkpoint(save_model(*MODELS[family], byte_level, std=0.06))
        ids = np.random.default_rng(1).integers(3, 500, (2, 40))
        view = ModelView(checkpoint)
        what, found = next(iter(in_llama_cpp(to_file(checkpoint)[1], ids).items()))
        plain = view.outputs(ids)[what]
        with llama_gelus(view.module()):
            tabulated = not np.array_equal(view.outputs(ids)[what], plain)
        graph, gelu = by_position(found, plain).max(), None
        if tabulated:
            sharp = steep(checkpoint)
            sharp_found = in_llama_cpp(to_file(sharp)[1], ids)[what]
            graph, gelu = by_position(sharp_found, ModelView(sharp).outputs(ids)[what]).max(), apart(found, plain)
        figures = []
        for scheme in ("q8_0", "q4_k_m"):
            plan, file = to_file(checkpoint, scheme)
            assert any(tensor.storage == ("Q8_0" if scheme == "q8_0" else "Q4_K") for tensor in plan.tensors)
            decoded = ModelView(rounded(checkpoint, scheme)).outputs(ids)[what]
            figures += [apart(decoded, plain), apart(in_llama_cpp(file, ids, mode="shipped")[what], decoded)]
        arch = (checkpoint.architecture.gguf or {})["arch"]
        return Row(family, arch, float(graph), gelu, *figures)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_the_table_says_what_is_measured(
    family: str, measure: Callable[[str], Row], rows: dict[str, Row], request: pytest.FixtureRequest
) -> None:
    row = rows.setdefault(family, measure(family))
    assert row.graph <= 1e-5
    assert row.gelu is None or row.gelu <= 1e-3
    assert max(row.q8_runtime, row.q4_runtime) < 0.2  # a broken one is near 1; random experts are chosen by a hair
    if request.config.getoption("--write-docs"):
        return
    written = on_the_page()[family]
    assert written.arch == row.arch
    assert written.graph <= 1e-5
    assert (written.gelu is None) == (row.gelu is None)
    for name in ("q8_weights", "q8_runtime", "q4_weights", "q4_runtime"):
        assert getattr(row, name) == pytest.approx(getattr(written, name), rel=0.5, abs=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in MODELS if family not in ("t5", "umt5")])  # two graphs
def test_a_build_finds_all_that_it_proves_with(
    family: str, save_model: Callable, byte_level: Path, tmp_path: Path
) -> None:
    """What a build asks for beside the page's figures: an ONNX graph that computes the model, and a sound file."""
    checkpoint = open_checkpoint(save_model(*MODELS[family], byte_level, std=0.06))
    graph = Graph(open_session(reference_graph(checkpoint, made(tmp_path / "onnx"), judge), "graph"))
    ids = np.random.default_rng(1).integers(3, 500, (2, 40))
    expected = ModelView(checkpoint).outputs(ids)
    for name, found in graph.outputs({"input_ids": ids}).items():
        assert apart(found, expected[name]) <= 1e-5
    exporter, folder = GgufExporter(), made(tmp_path / "gguf")
    plan = exporter.plan(checkpoint, Target("gguf"))
    exported = exporter.export(checkpoint, plan, folder)
    checks = structure_checks(checkpoint, plan, folder, exported, open_stored(checkpoint, plan, folder, exported))
    assert [check.reason for check in checks if check.verdict != "pass"] == []


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_no_family_is_left_out() -> None:
    assert set(MODELS) == {a.family for a in all_architectures() if a.gguf is not None}
    assert list(on_the_page()) == sorted(MODELS)
