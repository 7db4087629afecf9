"""Pictures for the report as SVG text: no library, and the same bytes for the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 640, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 30


def positions_plot(title: str, series: Sequence[tuple[str, np.ndarray]], *, unit: str = "nats") -> str:
    """A line a series over positions, on a logarithmic scale.

    Args:
        title: one line above the plot.
        series: (name, values (positions,)) each; values are positive, and what is zero or less sits on the floor.
        unit: of the values.

    Returns:
        An SVG document, for a file or for a Markdown page.
    """
    values = [np.asarray(v, np.float64) for _, v in series]
    positive = np.concatenate([np.empty(0), *(v[np.isfinite(v) & (v > 0)] for v in values)])
    low, high = _decades(positive)
    longest = max((len(v) for v in values), default=0)
    body = [_text(_LEFT, 16, title, size=13)]
    for decade in range(low, high + 1):
        y = _y(10.0**decade, low, high)
        body.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(_text(_LEFT - 6, y + 4, f"1e{decade}", anchor="end"))
    for index, ((name, _), points) in enumerate(zip(series, values, strict=True)):
        colour = f"hsl({(210 + 137 * index) % 360},65%,42%)"
        path = " ".join(f"{_x(place, longest):.1f},{_y(v, low, high):.1f}" for place, v in enumerate(points))
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        body.append(_text(_WIDTH - _RIGHT, 16 + 13 * index, name, anchor="end", colour=colour))
    body.append(_text(_LEFT, _HEIGHT - 8, f"position 0 to {max(longest - 1, 0)}; {unit}"))
    return _document(body, _HEIGHT)


def bars_plot(title: str, groups: Sequence[tuple[str, Mapping[str, float | None]]]) -> str:
    """A horizontal bar for each figure of each group, each figure on a scale of its own, from zero.

    Args:
        title: one line above the plot.
        groups: (name, {figure: value or None}) each.
    """
    figures = list(dict.fromkeys(name for _, values in groups for name in values))
    most = {name: max((values.get(name) or 0.0 for _, values in groups), default=0.0) or 1.0 for name in figures}
    wide = (_WIDTH - _LEFT - _RIGHT) * 0.8
    body, y = [_text(_LEFT, 16, title, size=13)], 34.0
    for group, values in groups:
        body.append(_text(_LEFT, y, group))
        for index, name in enumerate(figures):
            value = values.get(name)
            if value is None:
                continue
            y += 14
            colour = f"hsl({(210 + 137 * index) % 360},65%,42%)"
            length = wide * value / most[name]
            body.append(f'<rect x="{_LEFT}" y="{y - 9:.1f}" width="{length:.1f}" height="10" fill="{colour}"/>')
            body.append(_text(_LEFT + length + 5, y, f"{name} {value:.1f}", colour=colour))
        y += 20
    return _document(body, round(y))


def grid_plot(
    title: str, columns: Sequence[str], rows: Sequence[str], shares: np.ndarray, cells: Sequence[Sequence[str]]
) -> str:
    """A table of coloured cells.

    Args:
        title: one line above it.
        columns, rows: their names.
        shares: (rows, columns) from 0 to 1, light to dark between the least and the largest; NaN leaves a cell white.
        cells: what is written in each.

    Returns:
        An SVG document.
    """
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(columns), 1)
    low, high = (np.nanmin(shares), np.nanmax(shares)) if np.isfinite(shares).any() else (0.0, 1.0)
    body = [_text(_LEFT, 16, title, size=13)]
    body += [
        _text(_LEFT + width * (i + 0.5), 34, _short(name, width), anchor="middle") for i, name in enumerate(columns)
    ]
    for row, (name, values) in enumerate(zip(rows, shares, strict=True)):
        y = _TOP + 14 + 18 * row
        body.append(_text(_LEFT - 6, y + 12, name, anchor="end"))
        for column, share in enumerate(values):
            light = 96 - 46 * (share - low) / (high - low or 1.0) if np.isfinite(share) else 100
            x = _LEFT + width * column
            place = f'x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="17"'
            body.append(f'<rect {place} fill="hsl(210,65%,{light:.0f}%)"/>')
            body.append(_text(x + width / 2, y + 12, cells[row][column], size=9, anchor="middle"))
    return _document(body, _TOP + 24 + 18 * len(rows))


def _short(name: str, width: float) -> str:
    """The end of a name, as long as fits."""
    letters = max(4, int(width / 6))
    return name if len(name) <= letters else name[-letters:]


def _document(body: Sequence[str], height: int) -> str:
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _decades(positive: np.ndarray) -> tuple[int, int]:
    """Powers of ten below and above all values, at most eight apart."""
    if not positive.size:
        return -1, 0
    high = math.ceil(math.log10(positive.max()))
    low = min(math.floor(math.log10(positive.min())), high - 1)
    return max(low, high - 8), high


def _x(place: int, longest: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * place / max(longest - 1, 1)


def _y(value: float, low: int, high: int) -> float:
    level = math.log10(value) if math.isfinite(value) and value > 0 else low if value <= 0 else high
    share = (min(max(level, low), high) - low) / (high - low)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "start", colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(words)}</text>'
