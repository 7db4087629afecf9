"""gpt-oss' attention in GroupQueryAttention, which knows sinks, against standard operators: which is faster on the CPU?

    python benchmarks/onnx_sinks.py [--layers 4] [--prompts 128 512 1024] [--sittings 3] [--out DIR]

A random gpt-oss (512 wide, 16 heads over 4 of 64, windows of 128 in every other layer, four experts, two a token; small
ones, so that attention counts) is written in float32 in both forms. They run as in benchmarks/onnx_fusions.py: opened
anew for each sitting in one process of one thread, in turns pass by pass; GroupQueryAttention has past and present in
one buffer, the other form appends by Concat. Ratios are medians over sittings of the fastest passes' processor time:
above 1 the fused graph is faster than that of standard operators; `again` is the latter against itself. Writes
onnx_sinks.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from onnx_fusions import measured

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.fused import FusedCandidate
from tightship.validators.parity import write_candidate
from tightship.validators.parity_model import random_tensor
from tightship.weights import Dense

HEAD = 64
FORMS = {"standard": DirectCandidate(), "fused": FusedCandidate(DirectCandidate())}


def gpt_oss(layers: int) -> Checkpoint:
    """Random weights; the config as transformers resolves it."""
    from transformers import GptOssConfig

    sizes = {
        "vocab_size": 512, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": layers, "head_dim": HEAD,
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 128,
    }  # fmt: skip
    config = {**GptOssConfig(**sizes).to_dict(), "architectures": ["GptOssForCausalLM"]}
    architecture, rng = architecture_for(config), np.random.default_rng(0)
    weights = {name: Dense.of(random_tensor(i, rng)) for name, i in architecture.lookup(config).items()}
    return Checkpoint("gpt-oss", config, weights, {}, architecture, Source("random", None, ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--sittings", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    model = gpt_oss(options.layers)
    lines = ["# Sinks in GroupQueryAttention against standard operators", ""]
    lines += [f"Written by `python benchmarks/onnx_sinks.py`; onnxruntime {version('onnxruntime')}, one thread, load "]
    lines += ["", "| form | prompt | prefill | decode |", "|---|---|---|---|"]
    seconds: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="onnx-sinks-") as folder:
        graphs = {}
        for form, candidate in FORMS.items():
            (Path(folder) / form).mkdir()
            graphs[form] = write_candidate(candidate, model, Path(folder) / form)
        graphs["again"] = graphs["standard"]
        for prompt in options.prompts:
            seconds[str(prompt)] = [measured(graphs, prompt, HEAD) for _ in range(options.sittings)]
    for form in ("fused", "again"):
        for prompt, sittings in seconds.items():
            ratios = {
                part: statistics.median(found["standard"][part] / found[form][part] for found in sittings)
                for part in ("prefill", "decode")
            }
            lines.append(f"| {form} | {prompt} | {ratios['prefill']:.2f}x | {ratios['decode']:.2f}x |")
    lines[2] += f"{os.getloadavg()[0]:.0f} at the end. Above 1 the form is faster than standard operators."
    (options.out / "onnx_sinks.md").write_text("\n".join(lines) + "\n")
    (options.out / "onnx_sinks.json").write_text(json.dumps({"seconds": seconds}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
