"""AutoRound in an environment that has it: `python autoround.py quantize|logits|reload JOB.json`.

Its light recipe (50 iterations of signed gradient descent a block at rate 5e-3) and its default (200 at 5e-3, four
times as long), the same calibration windows as everybody. Its own loader computes the logits, since its files are its
own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job: dict) -> None:
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    rows = [torch.from_numpy(row)[None] for row in np.load(job["windows"])]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["source"]),
        scheme={"bits": job["bits"], "group_size": job["group"], "sym": job["symmetric"], "data_type": "int"},
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        iters=job["iterations"],
        lr=5e-3,
        nsamples=len(rows),
        seqlen=rows[0].shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(job["out"], format="auto_round")


def logits(job: dict) -> None:
    found = next(p for p in [Path(job["artifact"]), *Path(job["artifact"]).rglob("*")] if (p / "config.json").exists())
    model = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32, device_map="cpu").eval()
    with torch.inference_mode():
        rows = [model(torch.from_numpy(row)[None]).logits[0].float().numpy() for row in np.load(job["tests"])]
    np.save(job["logits"], np.stack(rows))


def reload(job: dict) -> None:
    """A GPTQ file of somebody else's through AutoRound's kernels: what it lacks, what is left over, and its logits."""
    from transformers import AutoRoundConfig

    model, told = AutoModelForCausalLM.from_pretrained(
        job["artifact"], dtype=torch.float32, device_map="cpu", quantization_config=AutoRoundConfig(),
        output_loading_info=True,
    )  # fmt: skip
    kernels = sorted({type(m).__module__ for m in model.modules() if "QuantLinear" in type(m).__name__})
    with torch.inference_mode():
        np.save(job["logits"], model.eval()(torch.from_numpy(np.load(job["tests"]))).logits.float().numpy())
    told = {key: sorted(told[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    Path(job["report"]).write_text(json.dumps({**told, "kernels": kernels}))


if __name__ == "__main__":
    what, file = sys.argv[1:]
    settings = json.loads(Path(file).read_text())
    torch.set_num_threads(settings["threads"])
    {"quantize": quantize, "logits": logits, "reload": reload}[what](settings)
