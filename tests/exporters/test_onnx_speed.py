"""What a plan says of slow kernels: the measured ones, in the words under which matrices are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tightship.exporters.onnx_speed import KERNELS, speed_notes
from tightship.exporters.onnx_storage import Style, storage
from tightship.formats.layouts import parse_layout
from tightship.weights import Quantized

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "onnx_kernels.json"


def word_of(layout: str, style: Style) -> str:
    parsed = parse_layout(layout)
    return storage(Quantized(parsed, (256, 512), dict), style).storage


def test_the_table_is_the_committed_measurement() -> None:
    measured = json.loads(RESULTS.read_text())["speed"]
    for (bits, block), told in KERNELS.items():
        rows = measured[f"{bits} bit, block {block}, level 4"]
        assert told == (pytest.approx(rows["1"], abs=0.06), pytest.approx(rows["128"], abs=0.06))


@pytest.mark.parametrize(
    ("layout", "style", "slow"),
    [
        ("int8-g32", Style(), True),
        ("int8-g32", Style(portable=True), True),
        ("int4-g16", Style(), True),
        ("q6_k", Style(), True),
        ("int4-g32", Style(), False),
        ("int4-g32", Style(portable=True), False),
        ("q4_k", Style(), False),
        ("int8-channel", Style(dynamic=True), False),
    ],
)
def test_slow_kernels_are_named(layout: str, style: Style, slow: bool) -> None:
    notes = speed_notes([word_of(layout, style)] * 3)
    assert len(notes) == slow
    assert all("3 matrices" in note and "slower than float32 on prompts" in note for note in notes)
