"""Codebooks against scikit-learn's k-means and by hand; shared blocks and embeddings; what the containers store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters import exporter_for
from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.codebook import Codebook, cluster
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target
from tightship.weights import Alias, Quantized

EMBER = Path(__file__).parents[2] / "examples" / "ember"
Tiny = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EMBER)


def share(checkpoint: Checkpoint, **options: object) -> Checkpoint:
    step = pass_for("share", options)
    step.requires(checkpoint)
    return step.apply(checkpoint, Run(threads=1))


def test_centres_are_as_good_as_scikit_learns() -> None:
    """A centre pinned at 0 costs next to nothing on weights that lie around it."""
    values = np.random.default_rng(0).standard_normal(4000)
    ours = cluster(values, None, 16)
    theirs = KMeans(16, n_init=3, random_state=0).fit(values[:, None])
    error = np.square(values[:, None] - ours).min(axis=1).sum()
    assert error < 1.05 * theirs.inertia_
    assert (np.diff(ours) > 0).all()
    assert 0.0 in ours


def test_clusters_by_hand() -> None:
    values = np.array([-5.0, -5.0, -1.0, 0.0, 0.0, 8.0, 10.0])
    np.testing.assert_allclose(cluster(values, None, 4), [-5, -1, 0, 9])
    weighted = cluster(values, np.array([1, 1, 1, 1, 1, 1, 3.0]), 4)
    np.testing.assert_allclose(weighted, [-5, -1, 0, 9.5])


def test_the_layout_says_its_table_and_keeps_zeros() -> None:
    layout = parse_layout("codebook-16")
    assert layout == Codebook(size=16)
    w = np.random.default_rng(1).standard_normal((24, 40)).astype(np.float32)
    w[np.abs(w) < 0.4] = 0
    arrays = layout.quantize(w)
    layout.check(arrays, w.shape)
    decoded = layout.values(arrays)
    assert len(np.unique(decoded)) <= 16
    assert not decoded[w == 0].any()
    table = arrays["table"][0]
    nearest = table[np.abs(w[..., None] - table).argmin(axis=-1)]
    np.testing.assert_array_equal(decoded, nearest)


def test_a_codebook_is_smaller_than_int8_and_refused_where_it_does_not_fit(ember: Checkpoint) -> None:
    coded = share(ember, codebook=16)
    for info in coded.linears():
        weight = coded.weights[info.name]
        assert isinstance(weight, Quantized)
        assert len(np.unique(weight.value())) <= 16
    onnx = exporter_for("onnx").plan(coded, Target("onnx"))
    int8 = exporter_for("onnx").plan(pass_for("quantize", {"layout": "int8"}).outline(ember), Target("onnx"))
    of_linears = [
        sum(t.nbytes for t in plan.tensors if t.name in {i.name for i in ember.linears()}) for plan in (onnx, int8)
    ]
    assert of_linears[0] < 0.46 * of_linears[1]  # 4 bits and one table, against 9 bits
    for container in ("gguf", "safetensors"):
        with pytest.raises(Unsupported, match="codebook-16"):
            exporter_for(container).plan(coded, Target(container))


def test_blocks_of_a_run_share_everything(ember: Checkpoint) -> None:
    shared = share(ember, layers=1)
    names = [n for n in ember.weights if ".layers.1." in n]
    assert names
    for name in names:
        owner = name.replace(".layers.1.", ".layers.0.")
        assert shared.weights[name] == Alias(owner)
        mean = (ember.weights[name].value() + ember.weights[owner].value()) / 2  # type: ignore[union-attr]
        np.testing.assert_allclose(shared.resolve(owner).value(), mean, rtol=2**-8, atol=1e-6)
    module = ModelView(shared).module()
    first, second = (block.mlp.up_proj.weight for block in module.model.layers)
    assert first.data_ptr() == second.data_ptr()
    bytes_of = {c: exporter_for(c).plan(shared, Target(c)).file_bytes for c in ("onnx", "gguf", "safetensors")}
    assert bytes_of["onnx"] < 0.6 * min(bytes_of["gguf"], bytes_of["safetensors"])  # stored once there


def test_runs_are_neighbours_and_first_blocks_stay(tiny: Tiny) -> None:
    llama = tiny("llama")
    assert all(share(llama, layers=2).weights[n] is llama.weights[n] for n in llama.weights)
    first = share(llama, layers=1, start="first")
    name = "model.layers.0.mlp.up_proj.weight"
    assert first.weights[name] is llama.weights[name]
    with pytest.raises(UsageError, match="cannot fall into 3 runs"):
        share(llama, layers=3)


def test_a_head_becomes_the_embeddings(tiny: Tiny) -> None:
    llama = tiny("llama")
    tied = share(llama, embeddings=True)
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    mean = (llama.weights[head].value() + llama.weights[table].value()) / 2  # type: ignore[union-attr]
    np.testing.assert_allclose(tied.resolve(head).value(), mean, rtol=1e-6)
    assert tied.config["tie_word_embeddings"] is True
    module = ModelView(tied).module()
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    with pytest.raises(Unsupported, match="no head of its own"):
        share(tied, embeddings=True)


def test_something_has_to_be_said() -> None:
    for options in ({}, {"codebook": 1}, {"codebook": 17}):
        with pytest.raises(UsageError):
            pass_for("share", options)
