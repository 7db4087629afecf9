"""Task metrics on a user's examples, for the original and for every artifact, in any runtime.

accuracy   share of right answers
f1         of class 1 where there are two classes, else the mean over classes (scikit-learn's binary and macro)
roc_auc    area under the ROC curve of the probabilities; with more than two classes one against the rest, mean
bleu       corpus BLEU of greedy continuations, 0 to 100 (sacrebleu's default tokenisation)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.report import Check, judge
from tightship.texts import codec_of
from tightship.validators.gates import TaskGate
from tightship.validators.task_answers import Answers, Logits, Written, choose, classify, fill, write
from tightship.validators.task_data import Choice, Example, Labelled, Writing, keys_of, read_examples

_CLASS_METRICS = ("accuracy", "f1", "roc_auc")
# (the model's task, kind of example) -> how it is asked, and the metrics that its answers allow
_WAYS: Mapping[tuple[str, type[Example]], tuple[Callable[..., Any], tuple[str, ...]]] = {
    ("text-generation", Choice): (choose, _CLASS_METRICS),
    ("text-generation", Writing): (write, ("bleu",)),
    ("fill-mask", Labelled): (fill, ("accuracy",)),
    ("text-classification", Labelled): (classify, _CLASS_METRICS),
}


def task_score(metric: str, examples: Sequence[Example], checkpoint: Checkpoint, logits: Logits) -> float:
    """The metric of one model on the examples.

    Args:
        checkpoint: gives tokenizer, config and task; its weights are not used.
        logits: runs the model.

    Raises:
        Unsupported: no way to ask a model of this task.
        UsageError: this kind of example does not fit the model's task, or the metric does not fit the examples.
        Malformed: an example that the model cannot be asked, by line number; or a class without examples (ROC).
    """
    task, kind = checkpoint.architecture.task, type(examples[0])
    kinds = [k for t, k in _WAYS if t == task]
    if not kinds:
        raise Unsupported(f"there are no task metrics for {task} models")
    if kind not in kinds:
        wanted = " or ".join(map(keys_of, kinds))
        raise UsageError(f"a {task} model needs examples with {wanted}; found {keys_of(kind)}")
    ask, allowed = _WAYS[task, kind]
    if metric not in allowed:
        raise UsageError(f"{metric} does not fit examples with {keys_of(kind)}; {' or '.join(allowed)} would")
    return _METRICS[metric](ask(examples, checkpoint, codec_of(checkpoint), logits))


def task_check(
    gate: TaskGate,
    checkpoint: Checkpoint,
    *,
    original: Logits,
    artifact: Logits,
    target: str,
    runtime: str,
) -> Check:
    """The gate's check of one artifact in one runtime; the original's score stands beside it.

    Raises:
        As `read_examples` and `task_score`.
    """
    examples = read_examples(gate.data)
    before = task_score(gate.metric, examples, checkpoint, original)
    return judge(
        target=target,
        runtime=runtime,
        kind="loss",
        metric=gate.metric,
        value=task_score(gate.metric, examples, checkpoint, artifact),
        op=">=",
        threshold=gate.minimum,
        source="recipe",
        extra={"original": before, "examples": len(examples), "data": gate.data.name},
    )


def _accuracy(answers: Answers) -> float:
    return float((answers.chosen == answers.expected).mean())


def _f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    average = "binary" if answers.classes == 2 else "macro"
    return float(f1_score(answers.expected, answers.chosen, average=average, zero_division=0))


def _roc_auc(answers: Answers) -> float:
    from sklearn.metrics import roc_auc_score

    present = set(answers.expected.tolist())
    missing = [number for number in range(answers.classes) if number not in present]
    if missing:
        raise Malformed(f"the area under the ROC curve needs an example of every class; there is none of {missing}")
    if answers.classes == 2:
        return float(roc_auc_score(answers.expected, answers.probabilities[:, 1]))
    return float(roc_auc_score(answers.expected, answers.probabilities, multi_class="ovr", average="macro"))


def _bleu(written: Written) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(written.texts), [list(written.references)]).score)


_METRICS: Mapping[str, Callable[[Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "roc_auc": _roc_auc,
    "bleu": _bleu,
}
