# ruff: noqa: PLR0917  kernels take positional arguments only
"""The inner loops of solvers that go column by column, compiled: one run of columns over rows [first, last).

A column of a run changes all that follow it, row by row for itself. So few rows go through the whole run at a time that
what changes (a run of 128 columns, `ROWS` rows, float64: 32 KiB) stays in the cache next to the core; taken one column
after the other over all rows, the same arithmetic waits for memory.

Arrays are (columns, rows), so that rows lie side by side for vector units. Grids: codes of affine ones are numbers in
[low, high]; those of others index `table`, which is empty for affine ones.
"""

from __future__ import annotations

import numpy as np

from tightship.formats.jit import kernel

ROWS = 32


@kernel
def feed_back(  # type: ignore[no-untyped-def]
    first, last, weights, factor, zeros, scale, offset, low, high, table, codes, errors
) -> None:
    """GPTQ on one run: `weights` are changed in place, `codes` and `errors` filled; see `feedback`.

    `factor` (columns, columns) upper; `zeros`: weights that stay 0, or (0, 0).
    """
    columns = len(weights)
    tile, found, error = np.zeros((columns, ROWS)), np.empty(ROWS), np.zeros(ROWS)
    for start in range(first, last, ROWS):
        rows = min(ROWS, last - start)
        tile[:, :rows] = weights[:, start : start + rows]
        for j in range(columns):
            found[:] = tile[j]
            if zeros.size > 0:
                for r in range(rows):
                    found[r] = 0.0 if zeros[j, start + r] else found[r]
            _nearest(found, rows, scale[j, start:], offset[j, start:], low, high, table, codes[j, start:])
            for r in range(rows):
                error[r] = (tile[j, r] - found[r]) / factor[j, j]
            errors[j, start : start + rows] = error[:rows]
            _spread(error, factor[j], tile, j + 1, -1.0)
        weights[:, start : start + rows] = tile[:, :rows]


@kernel
def descend(  # type: ignore[no-untyped-def]
    first, last, values, slope, moments, fixed, scale, offset, low, high, table, codes, change
) -> None:
    """One run of a sweep: `values` and `codes` are brought up to date, `change` filled; see `descent`.

    `slope` (columns, rows) and `moments` (columns, columns) are read; `fixed`: weights that stay, or (0, 0).
    """
    columns = len(values)
    tile, found, said, moved = np.zeros((columns, ROWS)), np.empty(ROWS), np.empty(ROWS), np.zeros(ROWS)
    for start in range(first, last, ROWS):
        rows = min(ROWS, last - start)
        tile[:, :rows] = slope[:, start : start + rows]
        for j in range(columns):
            now, code = values[j, start : start + rows], codes[j, start : start + rows]
            for r in range(rows):
                found[r] = now[r] - tile[j, r] / moments[j, j]
            _nearest(found, rows, scale[j, start:], offset[j, start:], low, high, table, said)
            if fixed.size > 0:
                for r in range(rows):
                    if fixed[j, start + r]:
                        found[r], said[r] = now[r], code[r]
            for r in range(rows):
                moved[r] = found[r] - now[r]
                now[r], code[r] = found[r], said[r]
            change[j, start : start + rows] = moved[:rows]
            _spread(moved, moments[j], tile, j + 1, 1.0)


@kernel
def _spread(error, factor, tile, first, sign) -> None:  # type: ignore[no-untyped-def]
    """tile[k] += sign * factor[k] * error for all columns k from `first` on."""
    for k in range(first, len(tile)):
        share = sign * factor[k]
        for r in range(ROWS):
            tile[k, r] += share * error[r]


@kernel
def _nearest(values, rows, scale, offset, low, high, table, codes) -> None:  # type: ignore[no-untyped-def]
    """Put `values[:rows]` on their grid and say by which codes. A zero scale says code 0, clamped."""
    for r in range(rows):
        wanted = (values[r] - offset[r]) / (np.inf if scale[r] == 0 else scale[r])
        if len(table) == 0:
            code = min(max(np.rint(wanted), low), high)
            values[r] = scale[r] * code + offset[r]
        else:
            code = 0.0
            for entry in range(1, len(table)):
                if abs(wanted - table[entry]) < abs(wanted - table[int(code)]):
                    code = float(entry)
            values[r] = scale[r] * table[int(code)]
        codes[r] = code
