"""Structured pruning: perplexity before and after recovery, loading in three runtimes, and speed on a random model.

    python benchmarks/structured.py CHECKPOINT --calibration FILE --test FILE [--shares 0.12 0.25 0.5]
    python benchmarks/structured.py --speed [--shares 0.12 0.25 0.5] [--rounds 3]

Quality: every kind of unit at every share, calibrated on the beginning of FILE, test perplexity before and after
recovery (`distill` from the original, alpha 1) on the text's middle. The rate is the one of `--rates` that is best for
the first smaller model on the last quarter of FILE. Each smaller model is exported to GGUF, ONNX and safetensors (but
for blocks of unlike widths) and run in llama.cpp, ONNX Runtime and transformers; `runs` says in which it did.

Speed: a random Llama of 30 blocks, 576 wide, 9 query and 3 key heads, MLP 1536, vocabulary 49152 (135M), float32,
against itself with a share of the MLP channels and the same share of blocks cut, in llama.cpp and ONNX Runtime.

Writes structured-NAME.json and .md, rewritten after every row, or structured-speed.json and .md. Rows that are there
already are not computed again, so that `--minutes`, after which no new row is begun, cuts the table into short runs.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.errors import TightshipError, UsageError
from tightship.exporters import exporter_for
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.per_layer import has_unlike_layers
from tightship.target import Target
from tightship.texts import read_documents, token_windows
from tightship.validators.bench import Plan, bench, subjects
from tightship.validators.parity import judge
from tightship.weights import Alias, Dense, Weight

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "max_position_embeddings": 2048, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "vocab_size": 49152,
}  # fmt: skip


KINDS = ["ffn", "heads", "layers", "ffn unlike", "width"]
DEMO = Path(__file__).parents[1] / "examples" / "ember"


def variants(checkpoint: Checkpoint, kinds: list[str], shares: list[float]) -> Iterator[tuple[str, Any]]:
    """(label, pass) of everything that is tried; what rounds to nothing, or to the share before, is left out."""
    layers, before = int(checkpoint.hyper["layers"]), None
    for kind in kinds:
        for share in shares:
            if kind == "layers":
                yield f"layers {share:.0%}", pass_for("drop-layers", {"count": max(1, round(share * layers))})
                continue
            unit, _, unlike = kind.partition(" ")
            step = pass_for("prune-structured", {unit: share, "uniform": not unlike})
            try:
                step.requires(checkpoint)
            except UsageError:
                continue
            rounded = (kind, step.counts(checkpoint))  # type: ignore[attr-defined]
            if rounded != before:
                yield f"{kind} {share:.0%}", step
            before = rounded


@dataclass
class Quality:
    """One checkpoint, its texts, and the rows so far."""

    options: argparse.Namespace
    checkpoint: Checkpoint
    report: dict[str, Any]
    deadline: float

    def __post_init__(self) -> None:
        text = "\n".join(read_documents(self.options.calibration))
        quarter = len(text) // 4
        self.early, self.middle, self.late = text[: 2 * quarter], text[2 * quarter : 3 * quarter], text[3 * quarter :]
        self.test = self.windows(read_documents(self.options.test), self.options.test_tokens)

    def windows(self, documents: Any, tokens: int) -> np.ndarray:
        found = token_windows(self.checkpoint, documents, tokens=tokens, sequence=256)
        return np.stack([w for w in found if len(w) == 256])

    def recovered(self, smaller: Checkpoint, rate: float) -> Checkpoint:
        """Taught by the original."""
        options = {"alpha": 1.0, "temperature": 1.0, "batch": 4, "tokens": self.options.recovery, "sequence": 128}
        run = Run(threads=self.options.threads, texts=(self.middle,), inputs={"teacher": self.checkpoint})
        return pass_for("distill", {**options, "rate": rate}).apply(smaller, run)

    def rate(self, smaller: Checkpoint) -> float:
        """The best of the rates on the tuning slice, found once."""
        tried: dict[str, float] = self.report.setdefault("tuning", {})
        late = self.windows((self.late,), self.options.test_tokens // 2)
        for rate in self.options.rates:
            if str(rate) not in tried:
                self.stop_in_time()
                tried[str(rate)] = perplexity(self.recovered(smaller, rate), late, self.options.threads)
                self.save()
        return float(min(tried, key=lambda rate: tried[rate]))

    def smaller(self, step: Any) -> Checkpoint:
        run = Run(threads=self.options.threads, texts=(self.early,), tokens=self.options.tokens, sequence=256)
        return step.apply(self.checkpoint, run) if step else self.checkpoint

    def before(self, what: str, step: Any) -> None:
        """A row without recovery, computed unless it is there."""
        if any(row["what"] == what for row in self.report["rows"]):
            return
        self.stop_in_time()
        found = self.smaller(step)
        row = {"what": what, "parameters": parameters(found) / parameters(self.checkpoint)}
        row["before"] = perplexity(found, self.test, self.options.threads)
        row["runs"] = runs(found) if step else []
        self.report["rows"].append(row)
        self.save()
        print(json.dumps(row), flush=True)

    def after(self, what: str, step: Any) -> None:
        """The row's figure after recovery."""
        row = next(row for row in self.report["rows"] if row["what"] == what)
        if "after" in row:
            return
        self.stop_in_time()
        found = self.smaller(step)
        row["after"] = perplexity(self.recovered(found, self.rate(found)), self.test, self.options.threads)
        self.save()
        print(json.dumps(row), flush=True)

    def stop_in_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise SystemExit("time is up; the next run continues here")

    def save(self) -> None:
        write(self.report, self.options.out / f"structured-{self.checkpoint.name}", quality_table)


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """The first part."""
    checkpoint = open_checkpoint(options.checkpoint)
    report: dict[str, Any] = {"checkpoint": checkpoint.name, "settings": settings(options), "rows": []}
    known = (options.out / f"structured-{checkpoint.name}").with_suffix(".json")
    if known.exists() and json.loads(known.read_text())["settings"] == report["settings"]:
        report = json.loads(known.read_text())
    bench = Quality(options, checkpoint, report, time.monotonic() + 60 * options.minutes)
    bench.before("dense", None)
    tried = list(variants(checkpoint, options.kinds, options.shares))
    for what, step in tried:
        bench.before(what, step)
    for what, step in tried:
        bench.after(what, step)
    return report


def runs(checkpoint: Checkpoint) -> list[str]:
    """Runtimes that load and run the exported model."""
    with tempfile.TemporaryDirectory() as folder:
        alike = () if has_unlike_layers(checkpoint.config) else ("safetensors",)
        export(checkpoint, Path(folder), ("gguf", "onnx", *alike))
        wanted = [s for s in subjects(Path(folder)) if s.runtime != "onnxruntime-genai"]
        found = bench(Path(folder), Plan(prompt=8, decode=0, passes=1, rounds=1), chosen=wanted)
        return [m.subject.runtime for m in found.measured if m.rounds]


def export(checkpoint: Checkpoint, folder: Path, containers: tuple[str, ...]) -> None:
    """Artifacts of a checkpoint, each in a directory of its container's name."""
    for container in containers:
        exporter = exporter_for(container, judge=judge) if container == "onnx" else exporter_for(container)
        (folder / container).mkdir(parents=True)
        exporter.export(checkpoint, exporter.plan(checkpoint, Target(container)), folder / container)


def parameters(checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(w.shape)) for w in checkpoint.weights.values() if not isinstance(w, Alias))


def perplexity(checkpoint: Checkpoint, windows: np.ndarray, threads: int) -> float:
    """Of the next token, over windows (n, length)."""
    view, total = ModelView(checkpoint, threads=threads), 0.0
    for start in range(0, len(windows), 8):
        ids = windows[start : start + 8]
        logits = view.outputs(ids)["logits"][:, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= float(np.take_along_axis(logits, ids[:, 1:, None], axis=-1).sum())
    return float(np.exp(total / (len(windows) * (windows.shape[1] - 1))))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """The second part."""
    whole = random_model(SHAPE)
    report: dict[str, Any] = {"settings": {"rounds": options.rounds, "threads": options.threads}, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export(whole, folder / "dense", ("gguf", "onnx"))
        sizes = {"dense": 1.0}
        for share in options.shares:
            smaller = pass_for("prune-structured", {"ffn": share}).outline(whole)  # which go does not matter for speed
            count = round(share * int(whole.hyper["layers"]))
            smaller = pass_for("drop-layers", {"count": count}).outline(smaller)
            export(smaller, folder / f"{share:.0%}", ("gguf", "onnx"))
            sizes[f"{share:.0%}"] = parameters(smaller) / parameters(whole)
        found = subjects(folder)
        for runtime in ("llama.cpp", "onnxruntime"):
            chosen = [s for name in sizes for s in found if s.runtime == runtime and s.name.split("/")[0] == name]
            plan = Plan(prompt=64, decode=16, rounds=options.rounds, threads=options.threads)
            for entry in bench(folder, plan, chosen=chosen).to_json()["artifacts"]:
                entry.pop("rounds", None)
                name = entry["name"].split("/")[0]
                report["rows"].append({"what": name, "parameters": sizes[name], **entry})
    write(report, options.out / "structured-speed", speed_table)
    return report


def random_model(config: dict[str, Any]) -> Checkpoint:
    """A checkpoint in memory, float32."""
    architecture, rng = architecture_for(config), np.random.default_rng(0)
    weights: dict[str, Weight] = {}
    for name, info in architecture.lookup(config).items():
        if not info.rule.optional and name != "lm_head.weight":
            scale = 1.0 if info.rule.kind == "norm" else 0.02
            weights[name] = Dense.of(rng.standard_normal(info.shape, np.float32) * np.float32(scale))
    weights["lm_head.weight"] = Alias("model.embed_tokens.weight")
    return Checkpoint("random-135m", config, weights, tokenizer(), architecture, Source("random-135m", None, ()))


def tokenizer() -> dict[str, bytes]:
    """The demo checkpoint's tokenizer, filled up with words that no text has: GGUF wants one of the right size."""
    files = dict(open_checkpoint(DEMO).files)
    data = json.loads(files["tokenizer.json"])
    vocabulary = data["model"]["vocab"]
    taken = {*vocabulary.values(), *(entry["id"] for entry in data["added_tokens"])}
    free = (number for number in range(int(SHAPE["vocab_size"])) if number not in taken)
    vocabulary |= {f"<unused {number}>": number for number in free}
    return {**files, "tokenizer.json": json.dumps(data).encode()}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": f"first half of {options.calibration.name}, {options.tokens} tokens",
        "recovery": f"third quarter, {options.recovery} tokens, distilled from the original",
        "tuning slice": f"last quarter, {options.test_tokens // 2} tokens",
        "test": f"{options.test.name}, {options.test_tokens} tokens in windows of 256",
    }


def quality_table(report: dict[str, Any]) -> str:
    lines = [f"# Structured pruning of {report['checkpoint']}", ""]
    lines += [f"- {key}: {value}" for key, value in report["settings"].items()]
    tried = ", ".join(f"{rate}: {value:.3f}" for rate, value in report.get("tuning", {}).items())
    lines += [f"- rate: perplexity of the first smaller model on the tuning slice: {tried}"]
    head = ["asked to go", "parameters left", "perplexity", "after recovery", "runs in"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in report["rows"]:
        after = f"{row['after']:.2f}" if "after" in row else ""
        cells = [row["what"], f"{row['parameters']:.1%}", f"{row['before']:.2f}", after]
        lines.append("| " + " | ".join([*cells, ", ".join(row.get("runs", []))]) + " |")
    return "\n".join(lines) + "\n"


def speed_table(report: dict[str, Any]) -> str:
    lines = ["# Speed of a 135M Llama with MLP channels and blocks cut", ""]
    lines += [
        "Ratios to the dense model in the same runtime, medians over rounds; float32, prompt of 64, 16 decoded.",
        "",
    ]
    head = ["asked", "parameters left", "runtime", "size", "prefill", "decode"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in report["rows"]:
        cells = [row["what"], f"{row['parameters']:.1%}", row["runtime"], f"{row['bytes'] / 1e6:.0f} MB"]
        rates = [f"{row[key]:.2f}x" if row.get(key) else "-" for key in ("prefill_ratio", "decode_ratio")]
        lines.append("| " + " | ".join([*cells, *rates]) + " |")
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], stem: Path, table: Any) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", nargs="?", default="examples/ember")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.12, 0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--test-tokens", type=int, default=6144)
    parser.add_argument("--recovery", type=int, default=16384)
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-4, 2e-4, 5e-4])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no new row after so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if not options.speed and (options.calibration is None or options.test is None):
        parser.error("quality needs --calibration and --test")
    try:
        report = speed(options) if options.speed else quality(options)
    except TightshipError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(speed_table(report) if options.speed else quality_table(report))


if __name__ == "__main__":
    main()
