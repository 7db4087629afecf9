"""Task metrics: answers against transformers, figures against scikit-learn, sacrebleu and arithmetic by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from sklearn.metrics import f1_score, roc_auc_score
from tokenizers import Tokenizer

from tightship.checkpoint import Checkpoint
from tightship.errors import GateFailed, Malformed, Unsupported, UsageError
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.validators.gates import TaskGate
from tightship.validators.task_answers import Logits
from tightship.validators.task_data import Choice, Labelled, Writing
from tightship.validators.tasks import task_check, task_score

EXAMPLES = Path(__file__).parents[2] / "examples"
EMBER = Tokenizer.from_file(str(EXAMPLES / "ember" / "tokenizer.json"))
BERT = Tokenizer.from_file(str(EXAMPLES / "ember-bert" / "tokenizer.json"))


@pytest.fixture(scope="module")
def ember() -> ModelView:
    return ModelView(open_checkpoint(EXAMPLES / "ember"))


@pytest.fixture(scope="module")
def bert() -> ModelView:
    return ModelView(open_checkpoint(EXAMPLES / "ember-bert"))


@pytest.fixture
def classifier(bert: ModelView) -> Checkpoint:
    """A checkpoint whose task is classification; only its tokenizer and config are looked at."""
    family = dataclasses.replace(bert.checkpoint.architecture, task="text-classification")
    config = {**bert.checkpoint.config, "id2label": {"0": "sad", "1": "glad"}}
    return bert.checkpoint.replace(architecture=family, config=config)


def runs(view: ModelView) -> Logits:
    return lambda ids, mask: view.outputs(ids, mask)["logits"]


def likes(tokens: dict[str, float], tokenizer: Tokenizer = EMBER) -> Logits:
    """A model without context: the given words have these logits, all others -30."""
    vocabulary = np.full(tokenizer.get_vocab_size(), -30.0, np.float32)
    for word, value in tokens.items():
        (token,) = tokenizer.encode(word, add_special_tokens=False).ids
        vocabulary[token] = value
    return lambda ids, _: np.broadcast_to(vocabulary, (*ids.shape, len(vocabulary)))


def one_by_one(scores: Sequence[Sequence[float]]) -> Logits:
    """A classifier that gives these logits, a row a call or many."""
    left = iter(scores)
    return lambda ids, _: np.array([next(left) for _ in ids], np.float32)


CHOICES = [
    Choice(1, "He went to the", (" door", " the", " house of"), 0),
    Choice(2, '"I am', (" very glad", " of", " not"), 2),
    Choice(3, "It was", (" a long time ago", " the of", " a"), 1),
]


def test_choices_are_scored_like_transformers_would(ember: ModelView) -> None:
    """Sum of log-probabilities of each continuation, one text at a time, without padding."""
    likelihoods = []
    for example in CHOICES:
        for choice in example.choices:
            prompt, whole = EMBER.encode(example.prompt).ids, EMBER.encode(example.prompt + choice).ids
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                logs = ember.module()(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            places = range(len(prompt), len(whole))
            likelihoods.append(sum(logs[p - 1, whole[p]].item() for p in places))
    scores = np.array(likelihoods).reshape(3, 3)
    labels = [example.label for example in CHOICES]
    found = {m: task_score(m, CHOICES, ember.checkpoint, runs(ember)) for m in ("accuracy", "f1", "roc_auc")}
    assert found["accuracy"] == np.mean(scores.argmax(1) == labels)
    assert found["f1"] == f1_score(labels, scores.argmax(1), average="macro")
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert 0 < found["roc_auc"] < 1


def test_two_choices_by_hand(ember: ModelView) -> None:
    """Always ` a` before ` the`: right for label 0 and wrong for label 1, so recall of class 1 is 0."""
    examples = [Choice(i, "x", (" a", " the"), label) for i, label in enumerate([0, 0, 1])]
    model = likes({" a": 1.0, " the": 0.0})
    assert task_score("accuracy", examples, ember.checkpoint, model) == pytest.approx(2 / 3)
    assert task_score("f1", examples, ember.checkpoint, model) == 0
    assert task_score("f1", examples, ember.checkpoint, likes({" a": 0.0, " the": 1.0})) == pytest.approx(0.5)
    assert task_score("roc_auc", examples, ember.checkpoint, model) == 0.5


def test_a_choice_of_several_tokens_is_their_product(ember: ModelView) -> None:
    """` a` has twice the chance of ` the`, but ` a a` has less than either."""
    model = likes({" a": np.log(0.6), " the": np.log(0.3)})
    examples = [Choice(1, "x", (" a a", " the"), 0), Choice(2, "x", (" the", " a"), 1)]
    assert 0.6 * 0.6 > 0.3  # the product is still likelier
    assert task_score("accuracy", examples, ember.checkpoint, model) == 1
    longer = [Choice(1, "x", (" a a a", " the"), 0), Choice(2, "x", (" the", " a"), 1)]
    assert 0.6**3 < 0.3
    assert task_score("accuracy", longer, ember.checkpoint, model) == 0.5


def test_generation_is_greedy_and_scored_by_sacrebleu(ember: ModelView) -> None:
    prompts = ["He went to the", '"I am very', "It was a long"]
    written = []
    for prompt in prompts:
        ids = EMBER.encode(prompt).ids
        start = len(ids)
        while len(ids) < start + 64:
            with torch.no_grad():
                ids.append(int(ember.module()(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        written.append(EMBER.decode(ids[start:]).strip().split("\n")[0])
    references = ["door of the house.", "glad to see you.", "time ago."]
    examples = [Writing(i, p, r) for i, (p, r) in enumerate(zip(prompts, references, strict=True))]
    expected = sacrebleu.corpus_bleu(written, [references]).score
    assert task_score("bleu", examples, ember.checkpoint, runs(ember)) == pytest.approx(expected)
    perfect = [Writing(i, p, w) for i, (p, w) in enumerate(zip(prompts, written, strict=True))]
    assert task_score("bleu", perfect, ember.checkpoint, runs(ember)) == pytest.approx(100)


def test_an_end_token_ends_a_text(ember: ModelView) -> None:
    calls = []

    def ends_after_three(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        calls.append(mask.sum())
        out = np.zeros((*ids.shape, 1024), np.float32)
        out[..., 0 if len(calls) == 3 else EMBER.encode(" the").ids[0]] = 1
        return out

    examples = [Writing(1, "x", "the the")]
    assert task_score("bleu", examples, ember.checkpoint, ends_after_three) == pytest.approx(
        sacrebleu.corpus_bleu(["the the"], [["the the"]]).score
    )
    assert len(calls) == 3


def test_hidden_words(bert: ModelView) -> None:
    examples = [
        Labelled(1, "He opened the [MASK] of the house.", "door"),
        Labelled(2, "[MASK] looked at him with her eyes.", "she"),
        Labelled(3, "He opened the [MASK] of the house.", "of"),
    ]
    hits = []
    for example in examples:
        ids = torch.tensor([BERT.encode(example.text).ids])
        with torch.no_grad():
            logits = bert.module()(ids).logits[0]
        guess = BERT.id_to_token(int(logits[ids[0].tolist().index(4)].argmax()))
        hits.append(guess == example.label)
    assert any(hits)
    assert not all(hits)
    assert task_score("accuracy", examples, bert.checkpoint, runs(bert)) == np.mean(hits)


def test_classes_by_name_and_number(classifier: Checkpoint) -> None:
    examples = [Labelled(1, "a", "sad"), Labelled(2, "b", 1), Labelled(3, "c", "glad"), Labelled(4, "d", 0)]
    scores = [[1, 0], [0, 2], [0.2, 0], [0, 0.5]]
    chosen, expected = [0, 1, 0, 1], [0, 1, 1, 0]
    found = {m: task_score(m, examples, classifier, one_by_one(scores)) for m in ("accuracy", "f1", "roc_auc")}
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx(f1_score(expected, chosen))
    assert found["roc_auc"] == pytest.approx(roc_auc_score(expected, [b - a for a, b in scores])) == 0.75
    with pytest.raises(Malformed, match="line 1: label 'bad' is not one of the model's: sad, glad"):
        task_score("accuracy", [Labelled(1, "a", "bad")], classifier, one_by_one(scores))
    with pytest.raises(Malformed, match="line 1: label 2 is not"):
        task_score("accuracy", [Labelled(1, "a", 2)], classifier, one_by_one(scores))
    with pytest.raises(Malformed, match=r"there is none of \[1\]"):
        task_score("roc_auc", [Labelled(1, "a", 0), Labelled(2, "b", 0)], classifier, one_by_one(scores))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Labelled(4, "no word is hidden", "x"), "line 4: the text needs \\[MASK\\] once, found 0"),
        (Labelled(4, "[MASK] and [MASK]", "x"), "found 2"),
        (Labelled(4, "the [MASK] ran", "hippopotamus"), "line 4: 'hippopotamus' is not a single token"),
        (Labelled(4, "the [MASK] ran " + "on " * 200, "man"), r"line 4: \d+ tokens, the model reads 128"),
    ],
)
def test_texts_that_cannot_be_asked(bert: ModelView, example: Labelled, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        task_score("accuracy", [example], bert.checkpoint, runs(bert))


def test_choices_that_cannot_be_asked(ember: ModelView) -> None:
    mixed = [Choice(1, "x", ("a", "b"), 0), Choice(2, "x", ("a", "b", "c"), 0)]
    with pytest.raises(Malformed, match="same number of choices"):
        task_score("accuracy", mixed, ember.checkpoint, runs(ember))
    with pytest.raises(Malformed, match="line 5: a choice adds no token"):
        task_score("accuracy", [Choice(5, "x", (" a", " a the"), 0)], ember.checkpoint, runs(ember))
    with pytest.raises(Malformed, match=r"line 6: \d+ tokens, the model reads 512"):
        task_score("accuracy", [Choice(6, "x" * 2000, (" a", " the"), 0)], ember.checkpoint, runs(ember))


def test_examples_and_metrics_have_to_fit_the_model(ember: ModelView, bert: ModelView) -> None:
    with pytest.raises(UsageError, match="needs examples with prompt \\+ choices \\+ label or prompt \\+ reference"):
        task_score("accuracy", [Labelled(1, "a", "b")], ember.checkpoint, runs(ember))
    with pytest.raises(UsageError, match="bleu does not fit"):
        task_score("bleu", CHOICES, ember.checkpoint, runs(ember))
    with pytest.raises(UsageError, match="roc_auc does not fit"):
        task_score("roc_auc", [Labelled(1, "a [MASK]", "b")], bert.checkpoint, runs(bert))
    family = dataclasses.replace(bert.checkpoint.architecture, task="feature-extraction")
    with pytest.raises(Unsupported, match="no task metrics for feature-extraction"):
        task_score("accuracy", CHOICES, bert.checkpoint.replace(architecture=family), runs(bert))


def test_nan_is_no_answer(ember: ModelView) -> None:
    def broken(ids: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.full((*ids.shape, 1024), np.nan, np.float32)

    with pytest.raises(GateFailed, match="NaN"):
        task_score("accuracy", CHOICES, ember.checkpoint, broken)


@pytest.mark.parametrize(("minimum", "verdict"), [(0.6, "pass"), (0.7, "fail")])
def test_the_gate_judges_the_artifact_and_tells_the_original(
    ember: ModelView, tmp_path: Path, minimum: float, verdict: str
) -> None:
    lines = [f'{{"prompt": "x", "choices": [" a", " the"], "label": {label}}}' for label in (0, 0, 1)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    check = task_check(
        TaskGate("accuracy", tmp_path / "a.jsonl", minimum),
        ember.checkpoint,
        original=likes({" a": 0.0, " the": 1.0}),
        artifact=likes({" a": 1.0, " the": 0.0}),
        target="gguf",
        runtime="llama.cpp",
    )
    assert (check.verdict, check.metric, check.kind) == (verdict, "accuracy", "loss")
    assert check.value == pytest.approx(2 / 3)
    assert check.extra == {"original": pytest.approx(1 / 3), "examples": 3, "data": "a.jsonl"}
