"""One artifact by llm-compressor's GPTQ: `python llm_compressor.py JOB.json`, in an environment that has it.

Its defaults (static activation order, damping 0.01, blocks of 128 columns), the same calibration windows as everybody.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    rows = [torch.from_numpy(row)[None] for row in np.load(job["windows"])]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["symmetric"],
        "strategy": "group",
        "group_size": job["group"],
    }
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    loader = DataLoader(batches, batch_size=None)
    oneshot(
        model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(batches), pipeline="sequential",
        shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
