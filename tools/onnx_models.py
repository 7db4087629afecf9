"""Write docs/onnx-models.md: every model of tests/data/onnx_models.json through the parity check, with its margin.

    python tools/onnx_models.py [CLASS ...]

judges every model, or those of the classes named, prints one line each and writes the page.
`tests/validators/test_onnx_models.py` runs the same functions and holds the page to the data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship.architecture import Architecture, architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.exporters.onnx_candidates import candidates
from tightship.exporters.onnx_candidates.skeleton import Choice
from tightship.validators.parity import ParityJudge
from tightship.weights import Dense

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data" / "onnx_models.json"
PAGE = ROOT / "docs" / "onnx-models.md"
HEADER = """# Models proven in ONNX

One line for each `model_type`, and for each further shape of it that a graph must get right. The margin is the largest
relative L2 distance between transformers (float32, eager; sdpa where eager attention adds Falcon's ALiBi twice)
and the graph in ONNX Runtime, optimisations off and on, over all outputs and cases of the parity check: one token, a
batch, a prompt past window and rope context, right padding; for decoders left padding and token by token through the
cache as well. The limit is 1e-5. Models are random, every parameter of them; how a graph of your model is judged is in
`validation.md`.

Written by `python tools/onnx_models.py`.

"""


@dataclass(frozen=True)
class Model:
    """One line of the data file: the class, the config that differs from the common sizes, what it adds."""

    model_type: str
    kind: str
    feature: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.feature}"


def models() -> list[Model]:
    """The data file."""
    data = json.loads(DATA.read_text())
    return [Model(m["model_type"], m["class"], m["feature"], {**data["sizes"], **m["config"]}) for m in data["models"]]


def outline(model: Model) -> Checkpoint:
    """The checkpoint that transformers would save: its config, names and shapes, no data."""
    import torch
    import transformers

    model_class = getattr(transformers, model.kind)
    resolved = model_class.config_class(**model.config)
    resolved.architectures = [model.kind]
    config = json.loads(resolved.to_json_string(use_diff=False))
    # T5's class writes that tables are tied, whatever it was told and does.
    config |= {key: value for key, value in model.config.items() if key == "tie_word_embeddings"}
    assert config["model_type"] == model.model_type, f"{model.kind} is of type {config['model_type']}"
    architecture = architecture_for(config)
    with torch.device("meta"):
        held = set(model_class(resolved).state_dict())
    weights = {name: Dense(shape, "f32", _no_data) for name, shape in _shapes(architecture, config, held).items()}
    return Checkpoint(model.kind, config, weights, {}, architecture, Source(model.kind, None, ()))


def _shapes(architecture: Architecture, config: Mapping[str, Any], held: set[str]) -> dict[str, tuple[int, ...]]:
    tied = {borrower for borrower, _ in architecture.ties} if architecture.hyper(config)["tied"] else set()
    infos = architecture.lookup(config)
    return {n: i.shape for n, i in infos.items() if n not in tied and (n in held or not i.rule.optional)}


def _no_data() -> Any:
    raise AssertionError("the parity check makes weights of its own")


def judged(model: Model, judge: ParityJudge) -> Choice:
    """The graph source that is used for a model, and its margin; raises Unsupported if none is right."""
    return judge(candidates(), outline(model))


def row(model: Model, choice: Choice) -> str:
    """One line of the page."""
    margin, task = choice.judgements[-1].margin, outline(model).architecture.task
    source = "our blocks" if len(choice.judgements) == 1 else choice.candidate.source.split(" ")[0]
    return f"| `{model.model_type}` | {model.kind} | {model.feature} | {task} | {source} | {margin:.0e} |"


def table(rows: list[str]) -> str:
    """The page's table."""
    head = "| model_type | class | what it adds | task | graph | margin |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def known_rows() -> dict[str, str]:
    """Lines of the page as it is, by what stands in front of the margin."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return {_key(line): line for line in lines if line.startswith("| `")}


def _key(line: str) -> str:
    return "|".join(line.split("|")[:4])


def main(kinds: list[str]) -> None:
    """Judge the models of these classes, or all of them, and write the page; other lines stay as they are."""
    judge, known = ParityJudge(), known_rows()
    rows = []
    for model in models():
        line = f"| `{model.model_type}` | {model.kind} | {model.feature} |"
        if kinds and model.kind not in kinds:
            rows.append(known[_key(line)])
            continue
        rows.append(row(model, judged(model, judge)))
        print(rows[-1], flush=True)
    types = len({model.model_type for model in models()})
    PAGE.write_text(f"{HEADER}{types} model types, {len(rows)} models.\n\n{table(rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
