"""From a Hugging Face directory to one Q4_K_M file: time and memory, ours against llama.cpp's own way.

    python benchmarks/gguf_end_to_end.py [--layers 22] [--threads 2] [--scheme q4_k_m] [--llama-cpp DIR] [--build]

A Llama of random bfloat16 weights (22 layers are 1.1 billion) is written as sharded safetensors with a small tokenizer.
Then, each step in a process of its own:

| step     | what                                                                                               |
|----------|----------------------------------------------------------------------------------------------------|
| ours     | directory -> quantized file; solver and exporter alone, without manifest and proof                 |
| f16      | directory -> f16 file, by our exporter: what llama.cpp's quantizer has to be given                 |
| quantize | f16 file -> quantized file, by llama_model_quantize of the cyllama wheel                           |
| convert  | directory -> f16 file, by convert_hf_to_gguf.py; with --llama-cpp, a built checkout of llama.cpp   |
| tool     | f16 file -> quantized file, by llama-quantize of that checkout                                     |
| build    | directory -> published artifact with its proof, by `tightship build`; with --build                 |

Ratios are ours over `quantize`, and ours over `f16 + quantize`. Memory is the peak of anonymous pages, sampled every
10 ms, since mapped files count for nothing; the resident peak is told beside it. CPU seconds hardly depend on what else
runs, wall seconds do: the load is recorded. Writes gguf_end_to_end.json and .md; scratch files are removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000


def make_model(folder: Path, layers: int) -> int:
    """Write the model; its number of weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Any]] = []
    for shapes in [_outer_shapes(), *(_block_shapes(layer) for layer in range(layers))]:
        noise = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        # Without what float16 cannot hold, so that llama.cpp's way over float16 ends in the same bytes.
        shards.append({name: values.bfloat16().half().bfloat16() for name, values in noise.items()})
        name = f"model-{len(shards):05}-of-{layers + 1:05}.safetensors"
        save_file(shards[-1], folder / name, {"format": "pt"})
        shards[-1] = {key: (name, value.numel()) for key, value in shards[-1].items()}
    placed = {key: value for shard in shards for key, value in shard.items()}
    index = {
        "metadata": {"total_size": 2 * sum(n for _, n in placed.values())},
        "weight_map": {k: n for k, (n, _) in placed.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_config(folder, layers)
    _write_tokenizer(folder)
    return sum(count for _, count in placed.values())


def _outer_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }


def _block_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _write_config(folder: Path, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([str(__doc__)] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


# --- steps, each in a process of its own ------------------------------------------------------------------------


def export(source: str, target: str, scheme: str, threads: int) -> None:
    """Solve and write, as a build does before its proof."""
    from tightship.exporters.to_gguf import GgufExporter
    from tightship.formats.threads import threads as with_threads
    from tightship.opening import open_checkpoint
    from tightship.passes.base import Run
    from tightship.recipe import Recipe
    from tightship.stages import for_container, scheme_stage
    from tightship.target import Target

    checkpoint, exporter, recipe, wanted = open_checkpoint(source), GgufExporter(), Recipe(), Target("gguf", scheme)
    stage = scheme_stage(checkpoint, wanted, exporter, recipe)
    with with_threads(threads):
        solved = stage.work.apply(checkpoint, Run(threads=threads)) if stage else checkpoint
        Path(target).mkdir()
        exporter.export(solved, exporter.plan(solved, for_container(wanted, recipe)), Path(target))


def llama_quantize(source: str, target: str, scheme: str, threads: int) -> None:
    """llama.cpp's own quantizer."""
    import cyllama.llama.llama_cpp as library
    from gguf import LlamaFileType

    library.disable_logging()
    params = library.LlamaModelQuantizeParams()
    params.ftype, params.nthread = int(LlamaFileType[f"MOSTLY_{scheme.upper()}"]), threads
    Path(target).mkdir()
    library.model_quantize(str(next(Path(source).glob("*.gguf"))), str(Path(target) / "model.gguf"), params)


def published(source: str, target: str, scheme: str, threads: int) -> None:
    """A whole build; a failed gate is no failure here (the weights are noise)."""
    from tightship.cli import main

    work = str(Path(target).with_name("work"))
    sys.argv = ["tightship", "build", source, "--to", f"gguf:{scheme}", "-o", target, "--work", work]
    sys.argv += ["--threads", str(threads)]
    main()


STEPS: dict[str, Callable[[str, str, str, int], None]] = {
    "export": export,
    "quantize": llama_quantize,
    "build": published,
}


class AnonymousPeak(threading.Thread):
    """Samples the anonymous pages of a process until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak = 0
        self.resident = 0

    def run(self) -> None:
        while True:
            try:
                text = self.status.read_text()
            except OSError:
                return
            found = dict(line.split()[:2] for line in text.splitlines() if line.startswith(("RssAnon", "VmHWM")))
            if not found:
                return
            self.peak = max(self.peak, int(found["RssAnon:"]) * 1024)
            self.resident = int(found["VmHWM:"]) * 1024
            time.sleep(0.01)


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command: wall and CPU seconds, peaks of memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    sampler = AnonymousPeak(process.pid)
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{command[:4]} ended with {process.returncode}: {errors[-2000:]}")
    return {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "anonymous_mib": round(sampler.peak / 2**20),
        "resident_mib": round(sampler.resident / 2**20),
        "exit": process.returncode,
        "errors": errors[-400:] if process.returncode else "",
        "load": round(os.getloadavg()[0], 1),
    }


def step(name: str, source: Path, target: Path, scheme: str, threads: int) -> dict[str, Any]:
    return measured([sys.executable, "-P", __file__, "--step", name, str(source), str(target), scheme, str(threads)])


def sha256(folder: Path) -> str:
    with next(folder.glob("*.gguf")).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_all(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    source, threads, scheme = scratch / "bench", options.threads, options.scheme
    source.mkdir()
    weights = make_model(source, options.layers)
    step("export", source, scratch / "warm", "q8_0", threads)  # the page cache, and kernels compiled and kept
    shutil.rmtree(scratch / "warm")
    found = {"ours": step("export", source, scratch / "ours", scheme, threads)}
    found["f16"] = step("export", source, scratch / "f16", "f16", threads)
    found["quantize"] = step("quantize", scratch / "f16", scratch / "theirs", scheme, threads)
    same = _same_data(scratch / "ours", scratch / "theirs")
    if options.llama_cpp:
        found |= _checkout(Path(options.llama_cpp), source, scratch, scheme, threads)
    if options.build:
        found["build"] = step("build", source, scratch / "built", scheme, threads)
    return {"weights": weights, "layers": options.layers, "same_bytes": same, "steps": found}


def _checkout(checkout: Path, source: Path, scratch: Path, scheme: str, threads: int) -> dict[str, Any]:
    middle, last = scratch / "their-f16.gguf", scratch / "their.gguf"
    convert = [sys.executable, str(checkout / "convert_hf_to_gguf.py"), str(source), "--outtype", "f16"]
    binary = next(p for p in (checkout / "build/bin/llama-quantize", checkout / "llama-quantize") if p.exists())
    return {
        "convert": measured([*convert, "--outfile", str(middle)]),
        "tool": measured([str(binary), str(middle), str(last), scheme.upper(), str(threads)]),
    }


def _same_data(ours: Path, theirs: Path) -> bool:
    """Whether all tensors hold the same bytes; theirs went by way of f16, which these weights survive or not."""
    from tightship.formats.gguf_file import read_gguf

    first, second = (read_gguf(next(folder.glob("*.gguf"))).tensors for folder in (ours, theirs))
    return all(bool((t.read_rows() == second[name].read_rows()).all()) for name, t in first.items())


def ratios(steps: dict[str, Any]) -> dict[str, Any]:
    ours, middle, last = steps["ours"], steps["f16"], steps["quantize"]
    rows = {}
    for key in ("wall_s", "cpu_s"):
        rows[key] = {
            "of_quantize": round(ours[key] / last[key], 3),
            "of_f16_and_quantize": round(ours[key] / (last[key] + middle[key]), 3),
        }
    for key in ("anonymous_mib", "resident_mib"):
        rows[key] = {"of_quantize": round(ours[key] / last[key], 3)}
    return rows


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gguf_end_to_end.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# {result['scheme'].upper()} of {result['weights'] / 1e9:.2f} billion weights, {result['threads']} threads",
        "",
        f"{result['machine']}; versions {result['versions']}; same bytes as llama.cpp: {result['same_bytes']}.",
        "No proof is part of `ours`.",
        "",
        "| step | wall s | CPU s | anonymous MiB | resident MiB | load |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in result["steps"].items():
        cells = (s["wall_s"], s["cpu_s"], s["anonymous_mib"], s["resident_mib"], s["load"])
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| ratio of ours | to quantize | to f16 + quantize |", "|---|---|---|"]
    for name, row in result["ratios"].items():
        lines.append(f"| {name} | {row['of_quantize']} | {row.get('of_f16_and_quantize', '')} |")
    (folder / "gguf_end_to_end.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scheme", default="q4_k_m")
    parser.add_argument("--llama-cpp", help="a built checkout of llama.cpp")
    parser.add_argument("--build", action="store_true", help="measure a whole build with its proof too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, source, target, scheme, threads = options.step
        STEPS[name](source, target, scheme, int(threads))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="gguf-end-to-end-") as scratch:
        result = run_all(options, Path(scratch))
    versions = {name: version(name) for name in ("tightship", "cyllama", "numba", "numpy")}
    about = {"scheme": options.scheme, "threads": options.threads, "machine": platform.processor() or "x86_64"}
    result = {**about, "versions": versions, **result, "ratios": ratios(result["steps"])}
    write(result, options.out)
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
