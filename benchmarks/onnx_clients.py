"""The same greedy text from every client of one ONNX decoder.

    python benchmarks/onnx_clients.py ARTIFACT [--tokens 64] [--optimum PYTHON] [--transformers-js DIR] [--out DIR]

ARTIFACT is a directory with config.json and `model.onnx` or `onnx/model.onnx`. Three prompts of different lengths are
continued greedily, end tokens ignored, by

| client             | how                                                                                            |
|--------------------|------------------------------------------------------------------------------------------------|
| ours               | one prompt at a time, our own loop over ONNX Runtime                                           |
| onnxruntime-genai  | one prompt at a time, its loop and its cache                                                   |
| optimum            | ORTModelForCausalLM.generate of the interpreter PYTHON (transformers 4.57, optimum-onnx), one  |
|                    | prompt at a time, and once more as one batch padded on the left                                |
| transformers.js    | AutoModelForCausalLM.generate in Node, from the package in DIR/node_modules                    |

Tokens must be equal, all of them. Writes onnx_clients-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (5, 9, 14)
OPTIMUM = """
import json, sys, torch
import transformers, optimum.onnxruntime as o
from importlib.metadata import version
job = json.load(open(sys.argv[1]))
model = o.ORTModelForCausalLM.from_pretrained(job["artifact"], use_io_binding=False)
options = dict(max_new_tokens=job["tokens"], min_new_tokens=job["tokens"], do_sample=False, pad_token_id=0)
def go(ids, mask):
    out = model.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    return out[:, len(ids[0]):].tolist()
alone = [go([p], [[1] * len(p)])[0] for p in job["prompts"]]
wide = max(map(len, job["prompts"]))
padded = go([[0] * (wide - len(p)) + p for p in job["prompts"]],
            [[0] * (wide - len(p)) + [1] * len(p) for p in job["prompts"]])
versions = {n: version(n) for n in ("transformers", "optimum-onnx", "onnxruntime")}
print(json.dumps({"alone": alone, "padded": padded, "versions": versions}))
"""
JAVASCRIPT = """
import fs from "node:fs";
import { AutoModelForCausalLM, Tensor, env } from "@huggingface/transformers";
const job = JSON.parse(fs.readFileSync(process.argv[2]));
env.allowRemoteModels = false;
env.localModelPath = job.parent;
const how = { dtype: "fp32", subfolder: job.folder, device: "cpu" };
const model = await AutoModelForCausalLM.from_pretrained(job.name, how);
const found = [];
for (const p of job.prompts) {
  const ids = new Tensor("int64", BigInt64Array.from(p.map(BigInt)), [1, p.length]);
  const mask = new Tensor("int64", BigInt64Array.from(p.map(() => 1n)), [1, p.length]);
  const out = await model.generate({ inputs: ids, attention_mask: mask, max_new_tokens: job.tokens,
                                     min_new_tokens: job.tokens, do_sample: false });
  found.push(out.tolist()[0].slice(p.length).map(Number));
}
console.log(JSON.stringify({ alone: found, versions: { "transformers.js": env.version } }));
process.exit(0);
"""


def ours(graph: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    from tightship.validators.runtimes.onnx_runtime import Graph, open_session

    opened = Graph(open_session(graph, "shipped"))
    return [opened.greedy(np.array(prompt), count).tolist() for prompt in prompts]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--optimum", help="an interpreter with optimum-onnx")
    parser.add_argument(
        "--transformers-js", type=Path, help="a folder whose node_modules hold @huggingface/transformers"
    )
    parser.add_argument("--name", help="in the result's file name; default: the artifact's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    artifact = options.artifact.absolute()
    config = json.loads((artifact / "config.json").read_text())
    graph = next(p for p in (artifact / "model.onnx", artifact / "onnx/model.onnx") if p.is_file())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, config["vocab_size"], n).tolist() for n in LENGTHS]
    eos = config.get("eos_token_id")
    ends = set(eos if isinstance(eos, list) else [eos])
    job = {
        "artifact": str(artifact), "parent": str(artifact.parent), "name": artifact.name, "prompts": prompts,
        "tokens": options.tokens, "folder": "onnx" if graph.parent != artifact else "",
    }  # fmt: skip
    expected = ours(graph, prompts, options.tokens)
    texts = {"onnxruntime-genai": genai(artifact, prompts, options.tokens, ends)}
    versions = {}
    if options.optimum:
        answer = child([options.optimum], OPTIMUM, ".py", job, None)
        texts |= {"optimum": answer["alone"], "optimum, padded on the left": answer["padded"]}
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
