"""Decoders in onnxruntime-genai, all open in one process of one thread, taking turns pass by pass.

    python benchmarks/onnx_turns.py ARTIFACT ARTIFACT ... [--prompt 128] [--decode 32] [--turns 8]

Processes of the same artifact lie up to a fifth apart, and so do the same passes a minute later; passes that follow
each other do not. In every turn each artifact computes the prompt and then single tokens, in another order than in the
turn before; the first turn is not counted. Prints JSON: artifact -> prefill, decode -> processor seconds a token, one
figure a turn. benchmarks/onnx_end_to_end.py runs several sittings of it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tightship.validators.runtimes.speed import ENGINES, Engine

Figures = dict[str, dict[str, list[float]]]


def turns(artifacts: list[Path], prompt: int, decoded: int, count: int) -> Figures:
    """artifact's name -> part -> processor seconds a token of each turn."""
    make = ENGINES["onnxruntime-genai"]()
    job = {"threads": 1, "prompt": prompt, "decode": decoded}
    opened = {path.name: make({**job, "artifact": str(path)}) for path in random.sample(artifacts, len(artifacts))}
    ids = np.random.default_rng(0).integers(5, 100, (1, prompt))
    found: Figures = {path.name: {"prefill": [], "decode": []} for path in artifacts}
    for turn in range(count + 1):
        for name in random.sample([*opened], len(opened)):
            for part, seconds in one_turn(opened[name], ids, decoded).items():
                found[name][part] += [seconds] if turn else []
    return found


def one_turn(engine: Engine, ids: np.ndarray, decoded: int) -> dict[str, float]:
    """Part -> processor seconds a token."""
    prefill = spent(lambda: engine.prefill(ids)) / ids.shape[1]
    decode = engine.decode
    assert decode is not None, "a decoder is expected"
    return {"prefill": prefill, "decode": spent(lambda: decode(decoded)) / decoded}


def spent(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    print(json.dumps(turns(options.artifacts, options.prompt, options.decode, options.turns)))


if __name__ == "__main__":
    main()
