"""Students of every kind, cut from and taught by the embedded checkpoints and tiny models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, check_tensors
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.distill import Distill, _Pupil
from tightship.passes.lessons import lessons
from tightship.passes.logprobs import LogProbs
from tightship.passes.student import make_student
from tightship.stage_codec import read_arrays, write_arrays
from tightship.texts import generated_windows
from tightship.weights import Alias, Dense

torch = pytest.importorskip("torch")
F = torch.nn.functional

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "The old ship lay at anchor in the bay, and nobody on the shore could say whence she had come. " * 60
SMALL = {"tokens": 768, "sequence": 32, "batch": 8, "rate": 2e-3, "snapshot": 4}


def run_with(**more: Any) -> Run:
    return Run(threads=1, texts=(TEXT,), **more)


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EXAMPLES / "ember")


@pytest.fixture(scope="module")
def bert() -> Checkpoint:
    return open_checkpoint(EXAMPLES / "ember-bert")


def parameters(checkpoint: Checkpoint) -> int:
    return sum(p.numel() for p in ModelView(checkpoint).module().parameters())


def distil_config(bert: Checkpoint) -> dict[str, Any]:
    from transformers import DistilBertConfig

    config = DistilBertConfig(
        vocab_size=bert.config["vocab_size"],
        dim=bert.config["hidden_size"],
        hidden_dim=bert.config["intermediate_size"],
        n_heads=4,
        n_layers=1,
        max_position_embeddings=128,
    )
    return {**config.to_dict(), "architectures": ["DistilBertForMaskedLM"]}


def test_every_second_layer_starts_better_than_chance(ember: Checkpoint) -> None:
    student = make_student({"every": 2}, ember, 0)
    assert student.hyper["layers"] == 1
    gone = [i for i in ember.infos().values() if i.block == 1 and i.name in ember.weights]
    assert parameters(student) == parameters(ember) - sum(int(np.prod(i.shape)) for i in gone)
    names = [n for n in student.weights if "layers.0" in n]
    drawn = student.with_weights({n: Dense.of(_noise(student.weights[n])) for n in names if "norm" not in n})
    taken, random = (_loss(c) for c in (student, drawn))
    assert taken < random - 0.5
    other = make_student({"layers": [1]}, ember, 0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert other.weights[name] is ember.weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UsageError, match="layers 0 to 1"):
        make_student({"layers": [2]}, ember, 0)
    with pytest.raises(UsageError, match="one of"):
        make_student({"layers": [0], "every": 2}, ember, 0)


def _noise(weight: Any) -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_normal(weight.shape)).astype(np.float32)


def _loss(checkpoint: Checkpoint) -> float:
    ids = lessons(checkpoint, run_with(), Distill(**SMALL)).windows[0]
    logits = torch.from_numpy(ModelView(checkpoint, threads=1).outputs(ids[None])["logits"][0, :-1])
    return float(F.cross_entropy(logits, torch.from_numpy(ids[1:])))


def test_narrower_students_load_in_transformers(ember: Checkpoint) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    student = make_student({"sizes": sizes}, ember, 0)
    check_tensors(student)
    module = ModelView(student).module()  # missing, surplus or misshapen tensors are errors there
    assert module.config.hidden_size == 128
    assert isinstance(student.weights["lm_head.weight"], Alias)
    drawn = student.resolve("model.layers.0.mlp.up_proj.weight").value()
    assert drawn.std() == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(drawn, student.resolve("model.layers.0.mlp.up_proj.weight").value())
    with pytest.raises(UsageError, match="hiden_size"):
        make_student({"sizes": {"hiden_size": 1}}, ember, 0)


def test_a_distilbert_is_cut_from_a_bert(bert: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(distil_config(bert)))
    student = make_student(str(tmp_path / "config.json"), bert, 0)
    assert student.architecture.family == "distilbert"
    check_tensors(student)
    query = "distilbert.transformer.layer.0.attention.q_lin.weight"
    taken = bert.resolve("bert.encoder.layer.0.attention.self.query.weight").value()
    np.testing.assert_array_equal(student.resolve(query).value(), taken)
    figures: dict[str, Mapping[str, Any]] = {}
    how = Distill(student=str(tmp_path / "config.json"), **SMALL)
    after = how.apply(bert, run_with(report=figures.__setitem__))
    found = figures["student"]
    assert found["held_out_after"] < found["held_out_before"]
    assert found["parameters"] == parameters(student) < found["teacher_parameters"]
    assert ModelView(after).module().config.model_type == "distilbert"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("source", ["ember", "bert"])
def test_the_loss_is_the_weighted_sum_of_torchs(alpha: float, source: str, request: pytest.FixtureRequest) -> None:
    teacher = request.getfixturevalue(source)
    run, how = run_with(), Distill(alpha=alpha, temperature=3.0, student={"every": 2}, **SMALL)
    student = make_student(how.student, teacher, 0)
    pupil = _Pupil(how, student, teacher, None, run)
    batch = lessons(student, run, how).batch(0)
    shown = pupil._grading.inputs(batch)["input_ids"]
    ours, theirs = (
        torch.from_numpy(ModelView(c, threads=1).outputs(shown.numpy())["logits"]) for c in (student, teacher)
    )
    if source == "ember":
        target, ours, theirs = torch.from_numpy(batch.ids[:, 1:]), ours[:, :-1], theirs[:, :-1]
    else:
        hidden = shown.numpy() != batch.ids
        assert 0.05 < hidden.mean() < 0.3
        target, ours, theirs = torch.from_numpy(batch.ids[hidden]), ours[hidden], theirs[hidden]
    ours, theirs, target = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1]), target.reshape(-1)
    soft = 9 * F.kl_div((ours / 3).log_softmax(1), (theirs / 3).softmax(1), reduction="batchmean")
    expected = alpha * soft + (1 - alpha) * F.cross_entropy(ours, target)
    assert float(pupil.loss(batch).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_features_with_learned_projections(ember: Checkpoint) -> None:
    figures: dict[str, Mapping[str, Any]] = {}
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    how = Distill(student={"sizes": sizes}, features={"hidden": 1.0, "attention": 0.5}, map=(1,), **SMALL)
    pupil = _Pupil(how, make_student(how.student, ember, 0), ember, None, run_with())
    shapes = {name: tuple(t.shape) for name, t in pupil.tensors.items() if name.startswith("feature/")}
    assert shapes == {"feature/hidden-0": (256, 128), "feature/attention-0": (4, 2)}
    after = how.apply(ember, run_with(report=figures.__setitem__))
    check_tensors(after)
    assert figures["student"]["held_out_after"] < figures["student"]["held_out_before"]


def test_a_student_of_its_own_teacher_has_no_soft_and_no_feature_loss(ember: Checkpoint) -> None:
    how = Distill(alpha=1.0, features={"hidden": 1.0, "attention": 1.0}, **SMALL)
    pupil = _Pupil(how, ember, ember, None, run_with())
    assert float(pupil.loss(lessons(ember, run_with(), how).batch(0)).detach()) == pytest.approx(0, abs=1e-9)


def test_chains_masks_and_black_boxes(ember: Checkpoint) -> None:
    figures: dict[str, Mapping[str, Any]] = {}
    run = run_with(report=figures.__setitem__)
    pruned = pass_for("prune", {"sparsity": 0.6}).apply(ember, run)
    how = Distill(**SMALL)
    taught = how.apply(pruned, run_with(inputs={"teacher": ember}))
    for info in pruned.linears():
        assert not taught.weights[info.name].value()[pruned.weights[info.name].value() == 0].any()
    black = Distill(alpha=0.0, student={"every": 2}, written=256, **SMALL)
    black.apply(ember, run)
    assert figures["student"]["held_out_after"] < figures["student"]["held_out_before"]
    with pytest.raises(UsageError, match="vocabulary"):
        how.apply(ember, run_with(inputs={"teacher": make_student({"sizes": {"vocab_size": 512}}, ember, 0)}))


def test_without_any_text_the_teacher_writes_it(ember: Checkpoint, tmp_path: Path) -> None:
    how = Distill(alpha=0.0, student={"every": 2}, tokens=64, sequence=16, batch=2)
    how.apply(ember, Run(threads=1, scratch=tmp_path))
    expected = generated_windows(ModelView(ember, threads=1), tokens=64, sequence=16, seed=0)
    np.testing.assert_array_equal(read_arrays(tmp_path / "written.safetensors", ["ids"])["ids"], np.stack(expected))


def test_stored_log_probabilities_teach_like_the_live_teacher(ember: Checkpoint, tmp_path: Path) -> None:
    """At T = 1 the 256 likeliest of 1024 classes give the live loss within 3 %, from below."""
    how = Distill(alpha=1.0, temperature=1.0, student={"every": 2}, **SMALL)
    text = lessons(ember, run_with(), how)
    full = [w for w in text.windows if len(w) == 32]
    scores = ModelView(ember, threads=1).outputs(np.stack(full))["logits"][:, :-1]
    top = torch.log_softmax(torch.from_numpy(scores) / how.temperature, dim=-1).topk(256, dim=-1)
    arrays = {
        "ids": np.stack(full).astype(np.int32),
        "lengths": np.full(len(full), 32, np.int32),
        "classes": top.indices.numpy().astype(np.int32),
        "stored": top.values.numpy(),
        "temperature": np.array([how.temperature], np.float32),
    }
    write_arrays(tmp_path / "cache.safetensors", arrays)
    cache = LogProbs.read(tmp_path / "cache.safetensors", how.temperature)
    student, run = make_student(how.student, ember, 0), run_with()
    live, stored = _Pupil(how, student, ember, None, run), _Pupil(how, student, None, cache, run)
    batch = cache.lessons(how, 0).batch(0)
    ours, theirs = (float(p.loss(batch).detach()) for p in (stored, live))
    assert 0.97 * theirs < ours <= theirs
    after = how.apply(ember, run_with(inputs={"logprobs": tmp_path / "cache.safetensors"}))
    assert after.hyper["layers"] == 1
    with pytest.raises(UsageError, match="temperature 1"):
        LogProbs.read(tmp_path / "cache.safetensors", 2.0)


def test_classifiers_learn_from_labels_and_without(bert: Checkpoint) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    config = BertConfig(**{k: bert.config[k] for k in kept}, num_hidden_layers=2, num_labels=3, hidden_act="gelu")
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    said = {**config.to_dict(), "architectures": ["BertForSequenceClassification"]}
    weights = {n: Dense.of(t.numpy()) for n, t in model.state_dict().items() if "position_ids" not in n}
    teacher = bert.replace(config=said, architecture=architecture_for(said), weights=weights)
    words = ("ship", "the", "bay")
    lines = [{"text": f"{words[n % 3]} lay at anchor {n}", "label": f"LABEL_{n % 3}"} for n in range(60)]
    figures: dict[str, Mapping[str, Any]] = {}
    how = {**SMALL, "student": {"every": 2}, "tokens": 4096, "held_out": 0.2}
    data = "\n".join(json.dumps(line) for line in lines)
    Distill(alpha=0.3, **how).apply(teacher, Run(threads=1, inputs={"data": data}, report=figures.__setitem__))
    assert figures["student"]["held_out_after"] < 0.8 * figures["student"]["held_out_before"]
    bare = "\n".join(json.dumps({"text": line["text"]}) for line in lines)
    unlabelled = Run(threads=1, inputs={"data": bare}, report=figures.__setitem__)
    Distill(alpha=1.0, **how).apply(teacher, unlabelled)
    assert figures["student"]["held_out_after"] < figures["student"]["held_out_before"]
    with pytest.raises(Unsupported, match="labels"):
        Distill(alpha=0.3, **how).apply(teacher, unlabelled)
    with pytest.raises(Malformed, match=r"line 3: label 'LABEL_9'"):
        Distill(**how).apply(teacher, Run(threads=1, inputs={"data": data.replace("LABEL_2", "LABEL_9", 20)}))
