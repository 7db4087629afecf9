"""An orthogonal matrix R (n, n) that spreads outliers over all channels, applied without being written out.

    R = diag(signs) (M kron H) P        x R for rows x (..., n), n = m 2^k

H is the Hadamard matrix of size 2^k over 2^(k/2), M an orthogonal (m, m) matrix: for `hadamard` m is the odd part of n,
so that M is 1 for powers of two; for `random` m = n. P is the identity, or, where the mean must survive (LayerNorm
subtracts it), the reflection that makes R keep the vector of ones. Rotations of this kind: QuIP#, arXiv:2402.04396;
QuaRot, arXiv:2404.00456. Arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["hadamard", "random"]


@dataclass(frozen=True)
class Rotation:
    """`signs` (n,), `mixer` (m, m), and `mirror` (n,) the unit normal of the reflection, or None."""

    signs: np.ndarray
    mixer: np.ndarray
    mirror: np.ndarray | None = None

    @classmethod
    def draw(cls, size: int, kind: Kind, rng: np.random.Generator, *, keeps_mean: bool = False) -> Rotation:
        """A rotation of `size` channels from `rng`."""
        odd = size if kind == "random" else size // (size & -size)
        q, r = np.linalg.qr(rng.standard_normal((odd, odd)))
        rotation = cls(rng.choice([-1.0, 1.0], size), q * np.where(np.diagonal(r) < 0, -1.0, 1.0))
        if not keeps_mean:
            return rotation
        off = rotation.rows(np.ones((1, size)))[0] - 1.0
        length = np.linalg.norm(off)
        return rotation if length == 0 else cls(rotation.signs, rotation.mixer, off / length)

    def rows(self, x: np.ndarray) -> np.ndarray:
        """x R, for `x` (..., n)."""
        size, odd = len(self.signs), len(self.mixer)
        turned = (x * self.signs).reshape(-1, odd, size // odd)
        turned = np.einsum("bik,ij->bjk", _hadamard(turned), self.mixer).reshape(-1, size)
        if self.mirror is not None:
            turned = turned - 2.0 * np.outer(turned @ self.mirror, self.mirror)
        return turned.reshape(x.shape)

    def columns(self, w: np.ndarray) -> np.ndarray:
        """R^T w, for `w` (n, ...): what writes to channels, turned as they are."""
        return np.moveaxis(self.rows(np.moveaxis(w, 0, -1)), -1, 0)


def _hadamard(x: np.ndarray) -> np.ndarray:
    """x H / sqrt(n) along the last axis, whose length n is a power of two, by butterflies."""
    size = x.shape[-1]
    half = 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([first + second, first - second], axis=-2).reshape(x.shape)
        half *= 2
    return x / np.sqrt(size)
