"""Recipes: what is read, what is refused and how, and who wins."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from tightship.api import _recipe
from tightship.errors import UsageError
from tightship.recipe import Calibration, Recipe, Step, parse_target, schema
from tightship.settings import Settings, parse_size
from tightship.strict_yaml import load
from tightship.target import Target
from tightship.validators.gates import MEASURES

CONTRACT_EXAMPLE = """
source: org/model@abc123
seed: 0
threads: 2
calibration: {text: self, tokens: 65536, sequence: 512}
passes:
  - {use: prune, id: p, with: {method: sparsegpt, sparsity: 0.7, schedule: log-kmeans}}
  - {use: distill, inputs: {teacher: source}, with: {alpha: 0.5, temperature: 2}}
targets:
  - {to: gguf}
  - {to: gguf, scheme: q4_k_m, with: {solver: gptq, include: [embeddings]}}
  - {to: onnx, with: {profile: portable}}
  - {to: safetensors}
gates: {kl_mean: 0.05, top1: 0.9, task: {metric: f1, data: file.jsonl, min: 0.8}}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_contracts_example_is_read(tmp_path: Path) -> None:
    recipe = Recipe.from_file(write(tmp_path, CONTRACT_EXAMPLE))
    assert recipe.source == "org/model@abc123"
    assert recipe.calibration == Calibration("self", 65536, 512)
    assert recipe.passes[0] == Step(
        "prune", "p", {}, {"method": "sparsegpt", "sparsity": 0.7, "schedule": "log-kmeans"}
    )
    assert recipe.passes[1].inputs == {"teacher": "source"}
    assert [t.id for t in recipe.targets] == ["gguf", "gguf-q4_k_m", "onnx", "safetensors"]
    assert recipe.targets[2] == Target("onnx", None, {"profile": "portable"})
    assert recipe.gates["task"] == {"metric": "f1", "data": "file.jsonl", "min": 0.8}


def test_json_form_is_read_back() -> None:
    recipe = Recipe.from_json(load(CONTRACT_EXAMPLE, "x"))
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sorce: x", ["'sorce'", "did you mean 'source'"]),
        ("passes: [{use: prune, wiht: {}}]", ["passes[0]", "'wiht'", "did you mean 'with'"]),
        ("targets: [{too: gguf}]", ["targets[0]"]),
        ("gates: {top_1: 0.9}", ["gates", "'top_1'", "did you mean 'top1'"]),
        ("calibration: {text: a, token: 3}", ["calibration", "'token'", "did you mean 'tokens'"]),
        ("seed: 1\nseed: 2", ["line 2", "'seed'", "twice"]),
        ("a: &x 1\nsource: *x", ["line 2", "anchors"]),
        ("source: !!python/object/apply:os.getcwd []", ["tag"]),
        ("- source", ["mapping"]),
        ("", ["mapping"]),
        ("source: [", ["line 1"]),
        ("targets: [{to: ggml}]", ["targets[0].to", "ggml"]),
        ("targets: [{to: gguf}, {to: gguf}]", ["gguf", "twice"]),
        ("passes: [{use: prune, id: a}, {use: prune, id: a}]", ["'a'", "twice"]),
        ("seed: -1", ["seed"]),
        ("threads: 0", ["threads"]),
    ],
)
def test_refusals_name_the_place_and_the_nearest_word(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_file(write(tmp_path, text))
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe .*absent\.yaml"):
        Recipe.from_file(tmp_path / "absent.yaml")


def test_scalars_are_those_of_json() -> None:
    """YAML 1.1 would read 124, False, text, 8 and a date."""
    text = "{a: 2:4, b: no, c: 1e-3, d: 010, e: 2026-01-01, f: true, g: null, h: -0.5}"
    assert load(text, "x") == {
        "a": "2:4",
        "b": "no",
        "c": 0.001,
        "d": "010",
        "e": "2026-01-01",
        "f": True,
        "g": None,
        "h": -0.5,
    }


def test_a_quantizing_scheme_after_quantization_is_refused() -> None:
    with pytest.raises(UsageError, match="gguf-q4_k_m"):
        Recipe.from_flags("m", quantize="int4", to=["gguf:q4_k_m"])
    assert Recipe.from_flags("m", quantize="int4", to=["gguf", "onnx"]).passes[0].options == {"layout": "int4"}
    assert Recipe.from_flags("m", quantize="int4", to=["onnx:fp16"]).targets[0].id == "onnx-fp16"


def test_widths_follow_the_widest_block_that_is_asked_for() -> None:
    for to, multiple in (("gguf:q4_k_m", 256), ("gguf:iq2_xs", 256), ("gguf:iq4_nl", 32), ("gguf:q8_0", 32)):
        assert Recipe.from_flags("m", to=[to, "onnx"]).width_multiple() == multiple
    assert Recipe.from_flags("m", quantize="q6_k", to=["onnx"]).width_multiple() == 256


def test_include_needs_quantize() -> None:
    with pytest.raises(UsageError, match="--include"):
        Recipe.from_flags("m", include=["head"], to=["gguf"])


def test_flags_win_over_environment_over_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "{source: a, seed: 1, threads: 3, targets: [{to: gguf}]}")
    flags = dict.fromkeys(("source", "quantize", "solver", "seed", "threads", "calibration"), None)
    flags |= {"to": (), "include": ()}
    assert _recipe(path, flags).seed == 1
    monkeypatch.setenv("TIGHTSHIP_SEED", "5")
    monkeypatch.setenv("TIGHTSHIP_CALIBRATION", "self")
    assert _recipe(path, flags).seed == 5
    assert _recipe(path, flags).calibration == Calibration("self")
    asked = _recipe(path, {**flags, "seed": 0, "source": "b", "to": ["onnx"]})
    assert (asked.seed, asked.source, asked.threads) == (0, "b", 3)
    assert [t.id for t in asked.targets] == ["onnx"]
    monkeypatch.setenv("TIGHTSHIP_SEED", "five")
    with pytest.raises(UsageError, match="TIGHTSHIP_SEED"):
        _recipe(path, flags)


def test_paths_start_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = Recipe.from_file(write(tmp_path, "source: model"))
    assert recipe.path("model") == str(tmp_path / "model")
    assert recipe.path("org/model") == "org/model"


def test_the_solver_follows_calibration() -> None:
    assert Recipe.from_flags("m", to=["gguf:q4_k_m"]).default_solver() == "rtn"
    assert Recipe.from_flags("m", to=["gguf:q4_k_m"], calibration="self").default_solver() == "importance"
    assert Recipe.from_flags("m", to=["gguf:q4_k_m"], calibration="self", solver="gptq").default_solver() == "gptq"


@pytest.mark.parametrize("word", ["ggfu", "gguf:", "onnx:a b", ""])
def test_misspelt_targets(word: str) -> None:
    with pytest.raises(UsageError):
        parse_target(word)


def test_target_words_ignore_case() -> None:
    assert parse_target("GGUF:Q4_K_M") == Target("gguf", "q4_k_m")


def test_ids_are_made_where_none_is_given() -> None:
    recipe = Recipe.from_json({"passes": [{"use": "prune"}, {"use": "prune"}, {"use": "prune", "id": "prune-2"}]})
    assert [step.id for step in recipe.passes] == ["prune", "prune-3", "prune-2"]


def test_the_schema_is_one_and_knows_every_gate() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert set(schema()["properties"]["gates"]["properties"]) == {*MEASURES, "task"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8G", 8 << 30), ("500MB", 500_000_000), ("1.5KiB", 1536), ("123", 123), (77, 77)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_settings_refuse_what_they_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="size"):
        Settings.resolve(max_memory="a lot")
    with pytest.raises(UsageError, match="device"):
        Settings.resolve(device="tpu")
    monkeypatch.setenv("TIGHTSHIP_MAX_MEMORY", "1GiB")
    assert Settings.resolve().max_memory == 1 << 30
    assert Settings.resolve(max_memory="2GiB").max_memory == 2 << 30
