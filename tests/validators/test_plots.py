"""The picture is well-formed, to scale, and harmless."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from tightship.validators.plots import positions_plot

SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = [line.get("points") or "" for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline")]
    pairs = [[pair.split(",") for pair in line.split()] for line in lines]
    return [[(float(x), float(y)) for x, y in line] for line in pairs]


def test_equal_ratios_are_equal_distances() -> None:
    ((a, b, c),) = points(positions_plot("t", [("x", np.array([0.001, 0.01, 0.1]))]))
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.1)
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.1)
    assert a[1] > c[1] + 100  # larger is higher, and the plot is used from floor to ceiling


def test_zeros_sit_on_the_floor_and_what_is_not_finite_at_the_ceiling() -> None:
    values = np.array([0.0, 0.001, 0.1, math.inf, math.nan, -1e-12])
    (line,) = points(positions_plot("t", [("x", values)]))
    floor, ceiling = line[1][1], line[2][1]
    assert [y for _, y in line] == [floor, floor, ceiling, ceiling, ceiling, floor]


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0], [1e-300, 1e3]])
def test_odd_inputs_give_a_picture(values: list[float]) -> None:
    assert len(points(positions_plot("t", [("x", np.array(values)), ("y", np.array(values))]))) == 2


def test_names_cannot_break_out() -> None:
    svg = positions_plot("<script>&", [('"</text><script>', np.array([1.0]))])
    assert not list(ElementTree.fromstring(svg).iter(f"{SVG}script"))
    assert svg == positions_plot("<script>&", [('"</text><script>', np.array([1.0]))])
