"""The models of docs/onnx-models.md: each through the parity check, and the page against the data."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tightship.validators.parity import ParityJudge

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-5
DECODER_CASES, ENCODER_CASES = 8, 4


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("onnx_models_tool", ROOT / "tools" / "onnx_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()
MODELS = TOOL.models()


@pytest.fixture(scope="module")
def judge() -> ParityJudge:
    return ParityJudge()


@pytest.mark.parametrize("model", MODELS, ids=[m.name for m in MODELS])
def test_the_graph_computes_the_model(model: object, judge: ParityJudge) -> None:
    choice = TOOL.judged(model, judge)
    used = choice.judgements[-1]
    assert used.passed, used.reason
    assert 0 < used.margin <= LIMIT
    expected = DECODER_CASES if TOOL.outline(model).architecture.task == "text-generation" else ENCODER_CASES
    modes = {case.split(" ")[0] for case, _ in used.cases}
    assert modes == {"graph", "shipped"}
    assert len({case.rsplit(" ", 1)[0] for case, _ in used.cases}) == 2 * expected


def test_the_page_is_the_data() -> None:
    """Same models, same words, in the same order; margins are the page's own and within the limit."""
    rows = [line for line in TOOL.PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in rows]
    wanted = [(f"`{m.model_type}`", m.kind, m.feature, TOOL.outline(m).architecture.task) for m in MODELS]
    assert [tuple(c[:4]) for c in cells] == wanted
    assert all(0 < float(c[5]) <= LIMIT for c in cells)


def test_forty_model_types_and_the_ones_that_others_get_wrong() -> None:
    types = {model.model_type for model in MODELS}
    assert len(types) >= 40
    assert {"mistral", "gemma3_text", "opt", "bloom", "falcon", "distilbert", "longformer", "mixtral"} <= types
