"""Owns the vectors of the index benchmark: a seeded mixture of overlapping clusters.

n vectors come from n / 100 clusters in a space of `LATENT_DIM` dimensions. A cluster is as wide as the centres are
spread, so that clusters overlap and an index has to work for its recall. The latent vectors are rotated into the full
number of dimensions and get noise in all of them. Vectors of real encoders may be easier or harder to search.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LATENT_DIM", "SEED", "mixture"]

LATENT_DIM: Final = 16
NOISE: Final = 0.3
"""Length of the noise in all dimensions, by the standard deviation within a cluster."""
CHUNK_ROWS: Final = 65_536
"""Vectors that are drawn together, to bound memory."""
QUERIES: Final = 1024
SEED: Final = 1


def mixture(
    count: int, dim: int, *, queries: int = QUERIES, seed: int = SEED
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors [count, dim] float32, and queries [queries, dim], new draws of the same mixture."""
    random = np.random.default_rng(seed)
    latent_dim = min(LATENT_DIM, dim)
    centres = random.standard_normal((max(count // 100, 1), latent_dim), dtype=np.float32)
    axes = np.linalg.qr(random.standard_normal((dim, latent_dim)))[0].T.astype(np.float32)
    rows = np.empty((count + queries, dim), np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):
        size = min(CHUNK_ROWS, len(rows) - start)
        latent = centres[random.integers(len(centres), size=size)]
        latent += random.standard_normal((size, latent_dim), dtype=np.float32)
        chunk = latent @ axes
        chunk += NOISE * (latent_dim / dim) ** 0.5 * random.standard_normal((size, dim), dtype=np.float32)
        rows[start : start + size] = chunk / np.linalg.norm(chunk, axis=1, keepdims=True)
    return rows[:count], rows[count:]
