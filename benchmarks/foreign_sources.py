"""Checkpoints that other tools wrote, opened by us: every decoded weight against the tool's own decoder.

    TOOLS_PYTHON benchmarks/foreign_sources.py make auto-round CHECKPOINT DIR      # in the tool's own environment
    TOOLS_PYTHON benchmarks/foreign_sources.py make llm-compressor CHECKPOINT DIR
    TOOLS_PYTHON benchmarks/foreign_sources.py make bitsandbytes CHECKPOINT DIR
    TOOLS_PYTHON benchmarks/foreign_sources.py make transformers CHECKPOINT DIR
    python benchmarks/foreign_sources.py compare DIR                               # in ours

`make` writes a checkpoint for every form that the tool has, and beside each `decoded.safetensors`: the weights of all
quantized matrices as the tool's own code decodes them. `compare` opens each and prints the largest difference
over the largest weight; results are written to results/foreign_sources.json and .md. auto-round, llm-compressor and
bitsandbytes quantize CHECKPOINT, a Llama; transformers decodes random stacks of gpt-oss.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "foreign_sources.json"
AUTO_ROUND = [
    ("auto_round", True),
    ("auto_round", False),
    ("auto_round:auto_awq", False),
    ("auto_gptq", True),
    ("auto_awq", False),
]


def gptq_weights(folder: Path, scratch: Path) -> dict[str, Any]:
    """(out, in) float32 of every layer that AutoRound loads: what it makes of the identity."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, scratch)
    config = json.loads((scratch / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    (scratch / "config.json").write_text(json.dumps(config))
    found = {}
    for name, layer in AutoModelForCausalLM.from_pretrained(scratch, device_map="cpu").named_modules():
        if hasattr(layer, "qweight"):
            with torch.no_grad():
                found[f"{name}.weight"] = layer(torch.eye(layer.infeatures, dtype=torch.float16)).float().T.contiguous()
    shutil.rmtree(scratch)
    return found


def awq_weights(folder: Path) -> dict[str, Any]:
    """(out, in) float32 by AutoRound's copy of AutoAWQ's decoder, with scales in float32."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    found = {}
    for module in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        words, zeros, scales = (tensors[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales"))
        found[f"{module}.weight"] = dequantize_gemm(words, zeros, scales.float(), 4, 32).T.contiguous()
    return found


def save_decoded(folder: Path, weights: dict[str, Any], tool: str, versions: list[str]) -> None:
    from safetensors.torch import save_file

    assert weights, f"{tool} decoded nothing"
    save_file(weights, folder / "decoded.safetensors")
    (folder / "tool.json").write_text(json.dumps({"tool": tool, "versions": {n: version(n) for n in versions}}))


def auto_round(source: str, target: Path) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for word, symmetric in AUTO_ROUND:
        folder = target / f"{word.replace(':', '-')}-{'sym' if symmetric else 'asym'}"
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        how = {"scheme": "W4A16", "bits": 4, "group_size": 32, "sym": symmetric, "iters": 0, "disable_opt_rtn": True}
        AutoRound(model, tokenizer, device_map="cpu", **how).quantize_and_save(str(folder / "made"), format=word)
        for file in next((folder / "made").iterdir()).iterdir():
            shutil.move(file, folder / file.name)
        shutil.rmtree(folder / "made")
        made = json.loads((folder / "config.json").read_text())["quantization_config"]
        awq = "awq" in made["quant_method"] + made.get("packing_format", "")
        decoded = awq_weights(folder) if awq else gptq_weights(folder, target / "loaded")
        save_decoded(folder, decoded, word, ["auto-round", "transformers"])


def llm_compressor(source: str, target: Path) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    ids = torch.randint(3, 500, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 64] * 16})
    for word, symmetric in (("sym", True), ("asym", False)):
        folder = target / f"gptq-{word}"
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
        groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, "actorder": "weight"}}}
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
        oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=64, num_calibration_samples=16)
        model.save_pretrained(folder, save_compressed=True)
        plain = CompressedTensorsConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=plain, dtype=torch.float32)
        layers = [(n, m) for n, m in loaded.named_modules() if "layers." in n and n.endswith("proj")]
        named = {f"{name}.weight": layer.weight.float() for name, layer in layers}
        save_decoded(folder, named, word, ["llmcompressor", "compressed-tensors", "transformers"])


def bits_and_bytes(source: str, target: Path) -> None:
    import torch
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    forms = {
        "nf4": {**four, "bnb_4bit_quant_type": "nf4"},
        "nf4-nested": {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {**four, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
    }
    for name, options in forms.items():
        how = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=how, device_map="cpu", dtype=torch.float32
        )
        model.save_pretrained(target / name)
        found = {}
        for path, layer in model.named_modules():
            weight = getattr(layer, "weight", None)
            if hasattr(weight, "quant_state"):
                found[f"{path}.weight"] = functional.dequantize_4bit(weight.data, weight.quant_state).float()
            elif hasattr(weight, "SCB"):
                found[f"{path}.weight"] = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        save_decoded(target / name, found, name, ["bitsandbytes", "transformers"])


def with_transformers(_: str, target: Path) -> None:
    """gpt-oss' stacks of experts in MXFP4, of random bytes, decoded by transformers."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations import mxfp4

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "num_local_experts": 4}
    folder = target / "gpt-oss"
    GptOssForCausalLM(GptOssConfig(**shape, **more)).save_pretrained(folder)
    tensors, decoded = load_file(folder / "model.safetensors"), {}
    decode = getattr(mxfp4, "_convert_moe_packed_tensors", None) or mxfp4.convert_moe_packed_tensors
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, cols // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = decode(blocks, scales).float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    save_decoded(folder, decoded, "gpt-oss", ["transformers"])


MAKERS: dict[str, Callable[[str, Path], None]] = {
    "auto-round": auto_round,
    "llm-compressor": llm_compressor,
    "bitsandbytes": bits_and_bytes,
    "transformers": with_transformers,
}


def compare(target: Path) -> list[dict[str, Any]]:
    """A row for every checkpoint below `target` that has a `decoded.safetensors`."""
    import numpy as np
    from safetensors.numpy import load_file

    from tightship.opening import open_checkpoint
    from tightship.weights import Quantized

    rows = []
    for file in sorted(target.rglob("decoded.safetensors")):
        expected, told = load_file(file), json.loads((file.parent / "tool.json").read_text())
        file.rename(file.parent / "decoded.bin")  # no weight file of the checkpoint
        try:
            ours = open_checkpoint(file.parent)
        finally:
            (file.parent / "decoded.bin").rename(file)
        worst, kinds = 0.0, set()
        for name, value in expected.items():
            weight = ours.resolve(name)
            kinds.add(weight.layout.name if isinstance(weight, Quantized) else f"decoded {weight.dtype}")
            worst = max(worst, float(np.abs(weight.value() - value).max() / np.abs(value).max()))
        form = {"checkpoint": file.parent.name, **told, "matrices": len(expected), "layouts": sorted(kinds)}
        rows.append({**form, "worst": worst})
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "# Checkpoints of other tools, our decoding against theirs",
        "",
        "Largest difference over the largest weight.",
        "",
    ]
    lines += ["| checkpoint | written and decoded by | matrices | opened as | worst |", "|---|---|---|---|---|"]
    for row in rows:
        tools = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        cells = (row["checkpoint"], tools, row["matrices"], ", ".join(row["layouts"]), f"{row['worst']:.1e}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    make = steps.add_parser("make")
    make.add_argument("tool", choices=MAKERS)
    make.add_argument("checkpoint")
    make.add_argument("dir", type=Path)
    steps.add_parser("compare").add_argument("dir", type=Path)
    options = parser.parse_args()
    if options.step == "make":
        options.dir.mkdir(parents=True, exist_ok=True)
        MAKERS[options.tool](options.checkpoint, options.dir)
        return
    rows = compare(options.dir)
    write(rows)
    print(json.dumps([{row["checkpoint"]: row["worst"]} for row in rows]))


if __name__ == "__main__":
    main()
