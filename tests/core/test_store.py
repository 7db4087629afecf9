"""The stage store: whole stages or none, the same weights back, damage noticed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tightship.activations import Activations
from tightship.checkpoint import Checkpoint
from tightship.formats.layouts import parse_layout
from tightship.spool import Spool
from tightship.store import Store, stage_key
from tightship.weights import Alias, Dense, Factored, Quantized, Sum

KEY = "a" * 64


def changed(parent: Checkpoint) -> Checkpoint:
    """Every kind of weight, and everything else that a pass may change."""
    rng = np.random.default_rng(0)
    down, up, gate = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("down", "up", "gate"))
    grid = Quantized.of(parse_layout("int4-asym"), parse_layout("int4-asym").quantize(parent.weights[up].value()))
    left, right = (Dense.of(rng.normal(size=s).astype(np.float16)) for s in ((64, 3), (3, 96)))
    weights = {
        down: Factored(left, right),
        up: grid,
        gate: Sum(grid, Factored(Dense.of(np.ones((96, 2), np.float32)), Dense.of(np.ones((2, 64), np.float32)))),
        "lm_head.weight": Alias("model.embed_tokens.weight"),
        "model.norm.weight": Dense.of(rng.normal(size=64).astype(np.float32)),
    }
    return parent.with_weights(weights, dropped=["model.layers.1.input_layernorm.weight"]).replace(
        config={**parent.config, "num_hidden_layers": 7},
        files={"tokenizer.json": b"new", "kept.json": b"old"},
        adapters={"lora.safetensors": b"\x00\x01"},
        activations={"model.layers.0.mlp": Activations("int8", 0.5, 3)},
        history=(*parent.history, {"note": "chosen by the pass"}),
    )


def same(first: Checkpoint, second: Checkpoint) -> None:
    assert list(first.weights) == list(second.weights)
    for name, weight in first.weights.items():
        assert type(weight) is type(second.weights[name])
        if isinstance(weight, Alias):
            assert weight == second.weights[name]
        else:
            assert second.weights[name].dtype == weight.dtype  # type: ignore[union-attr]
            np.testing.assert_array_equal(second.weights[name].value(), weight.value())  # type: ignore[union-attr]
    for field in ("config", "files", "adapters", "activations", "history"):
        assert getattr(first, field) == getattr(second, field)
    assert list(first.config) == list(second.config)


def make_once(store: Store, parent: Checkpoint) -> tuple[Checkpoint, str]:
    found, how, _ = store.get_or_make(KEY, parent, lambda _: changed(parent), about={"use": "test"})
    return found, how


@pytest.fixture
def parent(tiny: Callable[[str], Checkpoint]) -> Checkpoint:
    return tiny("llama").replace(files={"tokenizer.json": b"before", "kept.json": b"old"})


def test_everything_comes_back(tmp_path: Path, parent: Checkpoint) -> None:
    store = Store(tmp_path)
    made, how = make_once(store, parent)
    assert how == "made"
    same(changed(parent), made)

    def never(_: Path) -> Checkpoint:
        raise AssertionError("an unchanged stage is not computed again")

    again, how, about = Store(tmp_path).get_or_make(KEY, parent, never, about={})
    assert (how, about) == ("reused", {"use": "test"})
    same(made, again)


def test_only_changed_weights_are_stored(tmp_path: Path, parent: Checkpoint) -> None:
    store = Store(tmp_path)
    make_once(store, parent)
    assert len(list((tmp_path / "stages" / KEY / "weights").iterdir())) == 4
    found, _ = make_once(store, parent)
    assert found.weights["model.embed_tokens.weight"] is parent.weights["model.embed_tokens.weight"]


def files_of(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "stages" / KEY).rglob("*") if p.is_file())


def test_damage_anywhere_is_noticed_and_repaired(tmp_path: Path, parent: Checkpoint) -> None:
    store = Store(tmp_path)
    made, _ = make_once(store, parent)
    count = len(files_of(tmp_path))
    for number in range(count):
        path = files_of(tmp_path)[number]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        found, how = make_once(store, parent)
        assert how == "redone", path
        same(made, found)
    files_of(tmp_path)[0].unlink()
    assert make_once(store, parent)[1] == "redone"


def test_the_same_stage_is_the_same_bytes(tmp_path: Path, parent: Checkpoint) -> None:
    make_once(Store(tmp_path / "a"), parent)
    make_once(Store(tmp_path / "b"), parent)
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_pass_that_dies_leaves_its_scratch_and_no_stage(tmp_path: Path, parent: Checkpoint) -> None:
    store = Store(tmp_path)

    def die(scratch: Path) -> Checkpoint:
        (scratch / "block-0").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make(KEY, parent, die, about={})
    assert [s["state"] for s in store.ls()] == ["unfinished"]

    def resume(scratch: Path) -> Checkpoint:
        assert (scratch / "block-0").read_text() == "done"
        return changed(parent)

    _, how, _ = store.get_or_make(KEY, parent, resume, about={"use": "test"})
    assert how == "made"
    assert [s["state"] for s in store.ls()] == ["finished"]
    assert not (tmp_path / "stages" / KEY / "scratch").exists()


def test_gc_frees_what_nobody_needs(tmp_path: Path, parent: Checkpoint) -> None:
    store = Store(tmp_path)
    make_once(store, parent)
    assert store.gc() == 0
    (tmp_path / "stages" / f"{'b' * 64}.partial").mkdir()
    (tmp_path / "stages" / f"{'b' * 64}.partial" / "x").write_bytes(b"12345")
    with (tmp_path / "stages" / f"{'b' * 64}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert store.gc() == 0  # a build is at work on it
    assert store.gc() == 5
    os.utime(tmp_path / "stages" / KEY, (0, 0))
    store.pin(KEY)
    os.utime(tmp_path / "stages" / KEY, (0, 0))
    assert store.gc() == 0
    size = store.ls()[0]["bytes"]
    assert store.gc(everything=True) == size
    assert store.ls() == []


def test_gc_frees_long_unused_stages(tmp_path: Path, parent: Checkpoint) -> None:
    store = Store(tmp_path)
    make_once(store, parent)
    os.utime(tmp_path / "stages" / KEY, (0, 0))
    assert store.gc() > 0


def test_every_ingredient_changes_the_key() -> None:
    base = {"step": {"use": "prune"}, "inputs": {"t": "1"}, "seed": 0, "conditions": {"threads": 1}}
    keys = {stage_key("p", **base), stage_key("q", **base)}  # type: ignore[arg-type]
    for name, other in {"step": {"use": "x"}, "inputs": {}, "seed": 1, "conditions": {}}.items():
        keys.add(stage_key("p", **{**base, name: other}))  # type: ignore[arg-type]
    assert len(keys) == 6


def test_a_spooled_weight_is_solved_once(tmp_path: Path, parent: Checkpoint) -> None:
    solved = []
    name = "model.layers.0.mlp.up_proj.weight"
    layout = parse_layout("int4")
    w = parent.weights[name].value()

    def solve() -> dict[str, np.ndarray]:
        solved.append(name)
        return layout.quantize(w)

    checkpoint = parent.with_weights({name: Quantized(layout, (96, 64), solve)})
    spool = Spool(tmp_path / "spool")
    through = spool.through(checkpoint)
    for _ in range(3):
        arrays = through.weights[name].read()  # type: ignore[union-attr]
        assert all(np.array_equal(arrays[key], value) for key, value in layout.quantize(w).items())
    assert spool.through(checkpoint).weights[name] is through.weights[name]
    assert solved == [name]
    shutil.rmtree(tmp_path / "spool")


def test_digests_tell_weights_apart(tmp_path: Path, parent: Checkpoint) -> None:
    spool = Spool(tmp_path / "spool")
    before, after = spool.digests(spool.through(parent)), spool.digests(spool.through(changed(parent)))
    assert set(before) == set(parent.weights)
    different = {name for name in after if after[name] != before.get(name)}
    assert different == {
        *(f"model.layers.0.mlp.{n}_proj.weight" for n in ("down", "up", "gate")),
        "lm_head.weight",
        "model.norm.weight",
    }
    again = Spool(tmp_path / "again")
    assert again.digests(again.through(changed(parent))) == after
