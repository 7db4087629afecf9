"""Helpers that run things at once: order, how far ahead they go, and errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.layouts import parse_layout
from tightship.formats.threads import behind, in_order, threads
from tightship.opening import open_checkpoint
from tightship.passes.base import Run
from tightship.passes.quantize import Quantize
from tightship.passes.quantize.rtn import quantize
from tightship.target import Target
from tightship.weights import Dense

EMBER = Path(__file__).parents[2] / "examples" / "ember"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_results_come_in_order_and_few_ahead(count: int) -> None:
    started: list[int] = []

    def slow_at_first(n: int) -> int:
        started.append(n)
        time.sleep(0.02 if n % 4 == 0 else 0)
        return n * n

    seen = []
    with threads(count):
        for result in in_order(slow_at_first, range(20)):
            seen.append(result)
            assert len(started) <= len(seen) + count
    assert seen == [n * n for n in range(20)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_ends_the_work(count: int) -> None:
    started: list[int] = []

    def fails_at_five(n: int) -> int:
        started.append(n)
        if n == 5:
            raise ValueError("five")
        return n

    with threads(count), pytest.raises(ValueError, match="five"):
        list(in_order(fails_at_five, range(100)))
    assert max(started) <= 5 + 2 * count


def test_a_single_item_stays_on_the_callers_thread() -> None:
    with threads(4):
        assert list(in_order(lambda _: threading.get_ident(), [0])) == [threading.get_ident()]


@pytest.mark.parametrize("count", [1, 2])
def test_things_are_consumed_in_order_behind_the_caller(count: int) -> None:
    taken: list[int] = []
    late: list[int] = []

    def consume(n: int) -> None:
        time.sleep(0.002)
        taken.append(n)

    with threads(count), behind(consume, ahead=3) as put:
        for n in range(20):
            put(n)
            late.append(n + 1 - len(taken))
    assert taken == list(range(20))
    assert max(late) <= (0 if count == 1 else 4)


@pytest.mark.parametrize("count", [1, 2])
def test_what_the_consumer_raises_reaches_the_caller(count: int) -> None:
    def refuse(_: int) -> None:
        raise OSError("disk is full")

    with threads(count), pytest.raises(OSError, match="full"), behind(refuse) as put:
        put(1)


@pytest.mark.parametrize("word", ["q4_k", "iq2_xs", "int3-g128-asym", "fp8-e4m3-block", "nvfp4-scaled"])
def test_runs_of_rows_are_solved_alike_on_any_number_of_threads(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightship.passes.quantize.rtn._CHUNK", 4096)
    rng = np.random.default_rng(0)
    w = Dense.of((rng.standard_t(4, (96, 1024)) * 0.02).astype(np.float32))
    importance = rng.gamma(1, 1, 1024).astype(np.float32) if word.startswith("iq") else None
    found = []
    for count in (1, 2, 4):
        with threads(count):
            found.append(quantize("w", w, parse_layout(word), importance))
    for other in found[1:]:
        assert all(np.array_equal(other[key], array) for key, array in found[0].items())


def test_a_file_is_the_same_on_1_2_and_4_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many runs of rows and chunks, so that threads have something to disorder."""
    monkeypatch.setattr("tightship.passes.quantize.rtn._CHUNK", 4096)
    monkeypatch.setattr("tightship.exporters.gguf_tensors.CHUNK_WEIGHTS", 8192)
    checkpoint, exporter, target = open_checkpoint(EMBER), GgufExporter(), Target("gguf", "q4_k_m")
    files = []
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        with threads(count):
            layouts = exporter.layout_for(checkpoint, target)
            solved = Quantize(layouts=layouts).apply(checkpoint, Run(threads=count))
            made = exporter.export(solved, exporter.plan(solved, target), folder)
            files.append(np.fromfile(folder / made.main, np.uint8))
    assert all(np.array_equal(files[0], other) for other in files[1:])
