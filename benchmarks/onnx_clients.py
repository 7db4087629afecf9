"""The same greedy text from every client of one ONNX model that writes.

    python benchmarks/onnx_clients.py ARTIFACT [--tokens 64] [--optimum PYTHON] [--transformers-js DIR] [--out DIR]

ARTIFACT is a directory with config.json and a graph, at its root or in `onnx/`: `model.onnx`, or an encoder and its
decoder. Or it is a class of tests/data/onnx_models.json (BartForConditionalGeneration), a random model of which is
exported first, to `onnx/` in a temporary directory. Three prompts of different lengths are continued (of an encoder and
its decoder: answered) greedily, end tokens ignored, by

| client             | how                                                                                            |
|--------------------|------------------------------------------------------------------------------------------------|
| ours               | one prompt at a time, our own loop over ONNX Runtime                                           |
| onnxruntime-genai  | one prompt at a time, its loop and its cache; it has no encoders with decoders of text         |
| optimum            | ORTModelForCausalLM or ORTModelForSeq2SeqLM of the interpreter PYTHON (transformers 4.57,      |
|                    | optimum-onnx): generate one prompt at a time, and once more as one batch padded on the left    |
|                    | (on the right for an encoder: BART counts places over padding, transformers' own does so too)  |
| transformers.js    | AutoModelForCausalLM or AutoModelForSeq2SeqLM in Node, from the package in DIR/node_modules    |

Tokens must be equal, all of them. Writes onnx_clients-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_candidates.skeleton import DECODER, MAIN
from tightship.modelview import start_token

LENGTHS = (5, 9, 14)
TOKENS = 64
OPTIMUM = """
import json, sys, torch
import transformers, optimum.onnxruntime as o
from importlib.metadata import version
job = json.load(open(sys.argv[1]))
kind = o.ORTModelForSeq2SeqLM if job["two"] else o.ORTModelForCausalLM
model = kind.from_pretrained(job["artifact"], use_io_binding=False, subfolder=job["folder"] if job["two"] else "")
options = dict(max_new_tokens=job["tokens"], min_new_tokens=job["tokens"], do_sample=False, pad_token_id=0)
def go(ids, mask):
    out = model.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    return out[:, 1 if job["two"] else len(ids[0]):].tolist()
alone = [go([p], [[1] * len(p)])[0] for p in job["prompts"]]
wide = max(map(len, job["prompts"]))
def wider(p, real):
    pad = [0] * (wide - len(p))
    return real + pad if job["two"] else pad + real
padded = go([wider(p, p) for p in job["prompts"]], [wider(p, [1] * len(p)) for p in job["prompts"]])
versions = {n: version(n) for n in ("transformers", "optimum-onnx", "onnxruntime")}
print(json.dumps({"alone": alone, "padded": padded, "versions": versions}))
"""
JAVASCRIPT = """
import fs from "node:fs";
import { AutoModelForCausalLM, AutoModelForSeq2SeqLM, Tensor, env } from "@huggingface/transformers";
const job = JSON.parse(fs.readFileSync(process.argv[2]));
env.allowRemoteModels = false;
env.localModelPath = job.parent;
const how = { dtype: "fp32", subfolder: job.folder, device: "cpu" };
const model = await (job.two ? AutoModelForSeq2SeqLM : AutoModelForCausalLM).from_pretrained(job.name, how);
const found = [];
for (const p of job.prompts) {
  const ids = new Tensor("int64", BigInt64Array.from(p.map(BigInt)), [1, p.length]);
  const mask = new Tensor("int64", BigInt64Array.from(p.map(() => 1n)), [1, p.length]);
  const out = await model.generate({ inputs: ids, attention_mask: mask, max_new_tokens: job.tokens,
                                     min_new_tokens: job.tokens, do_sample: false });
  found.push(out.tolist()[0].slice(job.two ? 1 : p.length).map(Number));
}
console.log(JSON.stringify({ alone: found, versions: { "transformers.js": env.version } }));
process.exit(0);
"""


def ours(graph: Path, prompts: list[list[int]], count: int, first: tuple[int, ...]) -> list[list[int]]:
    from tightship.validators.runtimes.onnx_runtime import open_graph

    opened = open_graph(graph, "shipped")
    return [opened.greedy(np.array(prompt), count, *first).tolist() for prompt in prompts]


def genai(artifact: Path, prompts: list[list[int]], count: int, eos: set[int]) -> list[list[int]]:
    """Tokens up to where genai ends; it cannot be told to go on, so the rest counts as equal to nothing."""
    from tightship.validators.runtimes import genai as client

    job = {"artifact": str(artifact), "want": "generate", "tokens": count}
    found = [client.run(job, {"input_ids": np.array([prompt])})[1]["tokens"][0].tolist() for prompt in prompts]
    return [[t for t in row if t != -1] if any(t in eos for t in row) else row for row in found]


def child(command: list[str], code: str, suffix: str, job: dict[str, Any], where: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        script, order = Path(folder) / f"client{suffix}", Path(folder) / "job.json"
        script.write_text(code)
        order.write_text(json.dumps(job))
        found = subprocess.run([*command, str(script), str(order)], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{command[0]} failed: {found.stderr[-3000:]}")
    return dict(json.loads(found.stdout.splitlines()[-1]))


def random_model(kind: str) -> Checkpoint:
    """A random model of a class: the last of those in the data whose heads fill the stream."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
    import onnx_models

    from tightship.validators import parity_model

    parity_model.CONTEXT = 2 * max(LENGTHS) + TOKENS
    model = next(m for m in reversed(onnx_models.models()) if m.kind == kind and m.config.get("decoder_layers") != 1)
    narrow = {"d_kv": parity_model.HEAD_DIM} if "d_kv" in model.config else {}
    small = parity_model.small_checkpoint(onnx_models.outline(replace(model, config={**model.config, **narrow})))
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None}
    return small.replace(config={**small.config, **ends} if small.config.get("is_encoder_decoder") else small.config)


def exported(small: Checkpoint, folder: Path) -> Path:
    """Its artifact, the graph in `onnx/`."""
    from tightship.exporters.to_onnx import OnnxExporter
    from tightship.target import Target
    from tightship.validators.parity import judge

    exporter, target = OnnxExporter(judge=judge), Target("onnx", None, {"folder": "onnx"})
    folder.mkdir()
    exporter.export(small, exporter.plan(small, target), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--optimum", help="an interpreter with optimum-onnx")
    parser.add_argument(
        "--transformers-js", type=Path, help="a folder whose node_modules hold @huggingface/transformers"
    )
    parser.add_argument("--name", help="in the result's file name; default: the artifact's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        named = Path(options.artifact).absolute()
        compare(options, named if named.is_dir() else exported(random_model(named.name), Path(folder) / named.name))


def compare(options: argparse.Namespace, artifact: Path) -> None:
    """Ask every client and write down how many tokens are equal."""
    config = json.loads((artifact / "config.json").read_text())
    two = bool(config.get("is_encoder_decoder"))
    name = DECODER if two else MAIN
    graph = next(p for p in (artifact / name, artifact / "onnx" / name) if p.is_file())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, config["vocab_size"], n).tolist() for n in LENGTHS]
    eos = config.get("eos_token_id")
    ends = set(eos if isinstance(eos, list) else [eos])
    job = {
        "artifact": str(artifact), "parent": str(artifact.parent), "name": artifact.name, "prompts": prompts,
        "tokens": options.tokens, "folder": "onnx" if graph.parent != artifact else "", "two": two,
    }  # fmt: skip
    expected = ours(graph, prompts, options.tokens, (start_token(config),) if two else ())
    texts = {} if two else {"onnxruntime-genai": genai(artifact, prompts, options.tokens, ends)}
    versions = {}
    if options.optimum:
        answer = child([options.optimum], OPTIMUM, ".py", job, None)
        texts |= {"optimum": answer["alone"], "optimum, padded": answer["padded"]}
        versions |= answer["versions"]
    if options.transformers_js:
        answer = child(["node"], JAVASCRIPT, ".mjs", job, options.transformers_js)
        texts["transformers.js"] = answer["alone"]
        versions |= answer["versions"]
    equal = {
        client: [
            sum(a == b for a, b in zip(row, want, strict=False)) for row, want in zip(found, expected, strict=True)
        ]
        for client, found in texts.items()
    }
    result = {"artifact": options.name or artifact.name, "tokens": options.tokens, "equal": equal, "versions": versions}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"onnx_clients-{result['artifact']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
