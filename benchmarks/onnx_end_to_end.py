"""ONNX of a small decoder: export time, memory and speed, against onnxruntime-genai's builder and torch capture.

    python benchmarks/onnx_end_to_end.py [--layers 30] [--sittings 3] [--prompts 128 512]
                                         [--parts exports memory speed capture] [--scratch DIR] [--out DIR]

A Llama of random bfloat16 weights (576 wide, 9 heads over 3, vocabulary 49152, tied; 30 layers are 135 million) is
written with a small tokenizer. Each export runs in a process of its own and is timed from the open call, imports
excluded, to the SHA-256 of every file written. Memory is the peak of the process above what the imports took.

| artifact            | made by                                                                                    |
|---------------------|--------------------------------------------------------------------------------------------|
| ours-fp32, -int4    | `onnx:fp32`, `onnx:int4` with embeddings and head; with the parity check of the graph       |
| -int4-all           | `logits: all`: onnxruntime-genai opens the graph that gives the logits of every position    |
| ours-fp32-portable  | fp32 without ONNX Runtime's own operators: plain Attention, RMSNormalization, Add           |
| -fp32-portable-all  | the same with the logits of every position: a plain float32 export                          |
| ours-int4-portable  | standard operators and INT4 DequantizeLinear                                                |
| ours-int8-dynamic   | activations rounded by token, standard operators                                            |
| ours-fp16-compute   | products, attention and cache in float16                                                    |
| builder-fp32, -int4 | onnxruntime_genai.models.builder, CPU, block size 32, accuracy level 4 (its defaults)       |
| builder-int4-last   | the same with `prune_lm_head`: logits of the last position alone, as ours are by default    |
| capture-fp32        | torch.onnx.export(dynamo=True) of transformers' module, written by the same writer          |

Speed is measured by benchmarks/onnx_turns.py: in onnxruntime-genai, one thread, all artifacts open in one process and
taking turns pass by pass, a process for every sitting. Ratios are medians over all turns of processor time within a
turn; `again` is ours-int4 once more, so its distance from 1 says what a ratio may mean nothing by. Memory is that of a
process for each artifact (`tightship bench`). Writes onnx_end_to_end.json and .md. With `--scratch` models stay for a
later run, and sittings are added to those in the results: it can be run in pieces.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 576, 1536, 9, 3, 49152
INT4 = {"include": ["embeddings", "head"]}
LAST, ALL = "-last", "-all"


def make_model(folder: Path, layers: int) -> None:
    """Weights, config.json and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


# --- exports, each in a process of its own: import, then return what is timed ------------------------------------


def ours(source: str, target: str, scheme: str) -> Callable[[], None]:
    import mobius  # noqa: F401 - a graph source
    import onnxruntime  # noqa: F401 - the judge's
    import onnxscript.rewriter  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from tightship.exporters.to_onnx import OnnxExporter
    from tightship.opening import open_checkpoint
    from tightship.passes.base import Run
    from tightship.recipe import Recipe
    from tightship.stages import for_container, scheme_stage
    from tightship.target import Target
    from tightship.validators.parity import ParityJudge

    def work() -> None:
        checkpoint, recipe = open_checkpoint(source), Recipe()
        exporter = OnnxExporter(judge=ParityJudge())
        every = {"logits": "all"} if scheme.endswith(ALL) else {}
        wanted = Target("onnx", scheme.removesuffix(ALL), (INT4 if scheme.startswith("int") else {}) | every)
        stage = scheme_stage(checkpoint, wanted, exporter, recipe)
        solved = stage.work.apply(checkpoint, Run(threads=1)) if stage else checkpoint
        exporter.export(solved, exporter.plan(solved, for_container(wanted, recipe)), Path(target))

    return work


def builder(source: str, target: str, precision: str) -> Callable[[], None]:
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    def work() -> None:
        cache = str(Path(target).parent.with_name("cache"))
        arguments = ("", source, target, precision.removesuffix(LAST), "cpu", cache)
        extra = ["int4_block_size=32", *(["prune_lm_head=true"] if precision.endswith(LAST) else [])]
        create_model(*arguments, **parse_extra_options(*arguments, extra))

    return work


def capture(source: str, target: str, scheme: str) -> Callable[[], None]:  # noqa: ARG001 - one scheme
    import onnxscript.rewriter  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from tightship.exporters.onnx_assemble import write_graph
    from tightship.exporters.onnx_candidates.capture import CaptureCandidate
    from tightship.exporters.onnx_storage import Style
    from tightship.opening import open_checkpoint

    def work() -> None:
        checkpoint = open_checkpoint(source)
        shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
        skeleton = CaptureCandidate().build(checkpoint.config, checkpoint.architecture, shapes)
        write_graph(skeleton, checkpoint, Path(target), Style())

    return work


MAKERS = {"ours": ours, "builder": builder, "capture": capture}


class AnonymousPeak(threading.Thread):
    """Largest resident and anonymous memory of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.before = self._now()
        self.peak = dict(self.before)

    @staticmethod
    def _now() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return {
            key: int(v.split()[1]) // 1024 for key in ("VmRSS", "RssAnon") for v in lines if v.startswith(f"{key}:")
        }

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.peak = {key: max(value, self.peak[key]) for key, value in self._now().items()}

    def above(self) -> dict[str, int]:
        """MiB on top of the imports."""
        return {key: self.peak[key] - self.before[key] for key in self.peak}


def child(kind: str, source: str, target: str, scheme: str) -> None:
    """One export, measured; prints JSON last."""
    Path(target).mkdir()
    work = MAKERS[kind](source, target, scheme)
    sampler = AnonymousPeak()
    sampler.start()
    start = time.perf_counter(), time.process_time()
    work()
    files = sorted(p for p in Path(target).rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")
    wall, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    sampler.done.set()
    memory = sampler.above()
    print(json.dumps({
        "wall_s": round(wall, 2), "cpu_s": round(processor, 2), "resident_mib": memory["VmRSS"],
        "anonymous_mib": memory["RssAnon"], "file_mib": round(sum(f.stat().st_size for f in files) / 2**20, 1),
        "load": round(os.getloadavg()[0], 1),
    }))  # fmt: skip


def export(kind: str, source: Path, target: Path, scheme: str) -> dict[str, Any]:
    command = [sys.executable, "-P", __file__, "--child", kind, str(source), str(target), scheme]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{kind} {scheme} failed: {found.stderr[-3000:]}")
    return dict(json.loads(found.stdout.splitlines()[-1]))


def speed(paths: list[Path], prompt: int) -> dict[str, dict[str, list[float]]]:
    """artifact -> part -> processor seconds a token of each turn, in one sitting."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("onnx_turns.py")), *map(str, paths)]
    done = subprocess.run([*command, "--prompt", str(prompt)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def memory(artifacts: Path, names: list[str], prompt: int) -> dict[str, int]:
    """artifact -> MiB above the libraries after a prompt and some tokens."""
    from tightship.validators.bench import Plan, bench, subjects

    chosen = [s for s in subjects(artifacts) if s.runtime == "onnxruntime-genai" and s.name in names]
    found = bench(artifacts, Plan(prompt=prompt, decode=4, passes=1, rounds=1), chosen=chosen).measured
    answers = {one.subject.name: one.rounds[0] for one in found}
    return {name: (a["memory"] - a["memory_libraries"]) >> 20 for name, a in answers.items()}


def ratio(found: dict[str, dict[str, list[float]]], ours_name: str, theirs: str, part: str) -> float:
    """How many times as fast ours is: the median over turns of their time over ours."""
    pairs = zip(found[ours_name][part], found[theirs][part], strict=True)
    return round(statistics.median(b / a for a, b in pairs), 3)


PARTS = ("exports", "memory", "speed", "capture")
AGAIN = "again"
PAIRS = (
    (AGAIN, "ours-int4"),
    ("ours-int4", "builder-int4"),
    ("ours-int4", "builder-int4-last"),
    ("ours-int4-all", "builder-int4"),
    ("ours-int4-portable", "builder-int4"),
    ("ours-fp32", "builder-fp32"),
    ("ours-fp32", "ours-fp32-portable"),
    ("ours-int4", "ours-fp32-portable"),
    *((f"ours-{scheme}", "ours-fp32-portable-all") for scheme in ("fp32", "int4", "int4-portable", "int8-dynamic")),
    ("ours-fp16-compute", "ours-fp32"),
)

OURS = (
    "fp32",
    "int4",
    "int4-all",
    "fp32-portable",
    "fp32-portable-all",
    "int4-portable",
    "int8-dynamic",
    "fp16-compute",
)
MADE = (*(("ours", s) for s in OURS), *(("builder", s) for s in ("fp32", "int4", "int4-last")))


def run_all(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    source, artifacts = scratch / "model", scratch / "artifacts"
    artifacts.mkdir(exist_ok=True)
    if not source.exists():
        make_model(source, options.layers)
    result = known(options)
    for kind, scheme in MADE:
        name = f"{kind}-{scheme}"
        if "exports" in options.parts or not (artifacts / name).exists():
            shutil.rmtree(artifacts / name, ignore_errors=True)
            result["exports"][name] = export(kind, source, artifacts / name, scheme)
    if "capture" in options.parts:
        shutil.rmtree(scratch / "capture", ignore_errors=True)
        result["exports"]["capture-fp32"] = export("capture", source, scratch / "capture", "fp32")
    shutil.rmtree(artifacts / AGAIN, ignore_errors=True)
    shutil.copytree(artifacts / "ours-int4", artifacts / AGAIN)
    names = [f"{kind}-{scheme}" for kind, scheme in MADE]
    for prompt in map(str, options.prompts) if "memory" in options.parts else ():
        result["memory_mib"][prompt] = memory(artifacts, names, int(prompt))
    for prompt in map(str, options.prompts) if "speed" in options.parts else ():
        held = result["speeds"].setdefault(prompt, {})
        for _ in range(options.sittings):
            for name, parts in speed([artifacts / name for name in (*names, AGAIN)], int(prompt)).items():
                for part, figures in parts.items():
                    held.setdefault(name, {}).setdefault(part, []).extend(figures)
    result["ratios"] = [
        {"ours": a, "theirs": b, "prompt": prompt, **{part: ratio(found, a, b, part) for part in ("prefill", "decode")}}
        for prompt, found in result["speeds"].items()
        for a, b in PAIRS
    ]
    return result


def known(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run with the same depth and versions has found, to be added to."""
    path = options.out / "onnx_end_to_end.json"
    held = json.loads(path.read_text()) if options.scratch and path.exists() else {}
    if held.get("layers") == options.layers and held.get("versions") == versions():
        return {key: held[key] for key in ("layers", "exports", "memory_mib", "speeds")}
    return {"layers": options.layers, "exports": {}, "memory_mib": {}, "speeds": {}}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("tightship", "onnxruntime", "onnxruntime-genai", "torch", "transformers")}


def write(figures: dict[str, Any], folder: Path) -> None:
    result = {"machine": platform.processor() or "x86_64", "versions": versions(), **figures}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "onnx_end_to_end.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# ONNX of a random Llama, {HIDDEN} wide, {result['layers']} layers", "",
        f"{result['machine']}; versions {result['versions']}. See the docstring of benchmarks/onnx_end_to_end.py.", "",
        "| export | wall s | CPU s | memory above imports, MiB | of it anonymous | files MiB | load |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, e in result["exports"].items():
        cells = (e["wall_s"], e["cpu_s"], e["resident_mib"], e["anonymous_mib"], e["file_mib"], e["load"])
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    about = "Tokens per second of processor time (fastest turn), peak memory above the libraries, and ratios"
    lines += ["", f"{about} (above 1: the first is faster).", ""]
    lines += ["| artifact | prompt | prefill | decode | MiB |", "|---|---|---|---|---|"]
    for prompt, found in result["speeds"].items():
        for name, parts in sorted(found.items()):
            rates = [f"{1 / min(parts[key]):.1f}" for key in ("prefill", "decode")]
            peak = result["memory_mib"].get(prompt, {}).get(name, "")
            lines.append(f"| {name} | {prompt} | {' | '.join(rates)} | {peak} |")
    lines += ["", "| first | second | prompt | prefill | decode |", "|---|---|---|---|---|"]
    for r in result["ratios"]:
        lines.append(f"| {r['ours']} | {r['theirs']} | {r['prompt']} | {r['prefill']} | {r['decode']} |")
    cells = [(r, part) for r in result["ratios"] for part in ("prefill", "decode") if r[part] < 1]
    told = "; ".join(f"{r['ours']} against {r['theirs']}, {part} at {r['prompt']}: {r[part]}" for r, part in cells)
    lines += ["", f"Cells below 1: {told or 'none'}."]
    (folder / "onnx_end_to_end.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sittings", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="where models stay for a later run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory(prefix="onnx-end-to-end-") as folder:
        scratch = options.scratch or Path(folder)
        scratch.mkdir(exist_ok=True)
        result = run_all(options, scratch)
    write(result, options.out)
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
