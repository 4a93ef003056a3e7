"""Owns vectors for entities without a text: those that are most like them by their facts lend theirs.

Weighted by softmax(cosine / temperature), as the loans of collective knowledge are.
"""

from math import isqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.index import unit_rows
from kar_sidecar.index.faiss import faiss_threads

__all__ = ["LENDERS", "TEMPERATURE", "borrow", "lend", "nearest_by_cosine", "nearest_lenders", "normalised"]

LENDERS: Final = 8
TEMPERATURE: Final = 0.1
EXACT: Final = 1 << 14
"""Among more vectors than these, neighbours are searched in the nearest `PROBES` of 4 x sqrt(vectors) lists."""
PROBES: Final = 8
LIST_POINTS: Final = 64
"""Vectors a list that the lists are learned from."""

CHUNK: Final = 4096
"""Borrowers whose lenders' vectors are in memory together."""


def lend(vectors: NDArray[np.float32], weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """The unit vectors [..., D] of who borrows those of m lenders [..., m, D] with weights [..., m]."""
    mean = (vectors * weights[..., None]).sum(-2)
    return (mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def borrow(
    content: NDArray[np.float32],
    knows: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    *,
    lenders: int = LENDERS,
    temperature: float = TEMPERATURE,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Have those of n entities that know nothing borrow from the nearest that do.

    Args:
        content: Content vectors [n, D] of any length; a row of zeros has no content, lends nothing and borrows nothing.
        knows: [n] whether an entity has knowledge.
        vectors: Knowledge vectors [n, D2]; rows of those that know nothing do not matter.
        lenders: From how many an entity borrows, at most.
        temperature: Of the softmax over cosines.

    Returns:
        Knowledge vectors [n, D2], lent ones of unit length, and [n] which are lent.
    """
    found = np.array(vectors, dtype=np.float32)
    has_content = np.any(content, axis=1)
    able = np.flatnonzero(knows & has_content)
    lent = ~knows & has_content & bool(len(able))
    rows = np.flatnonzero(lent)
    if not len(rows):
        return found, lent
    at, known = unit_rows(content[able]), found[able]
    for some in np.split(rows, range(CHUNK, len(rows), CHUNK)):
        nearest, weights = nearest_lenders(content[some], at, lenders, 1, temperature)
        found[some] = lend(known[nearest], weights)
    return found, lent


def nearest_lenders(
    vectors: NDArray[np.float32],
    at: NDArray[np.float32],
    lenders: int,
    threads: int = 1,
    temperature: float = TEMPERATURE,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """From whom n entities [n, D] borrow, and how much.

    Args:
        vectors: The entities' content vectors, of any length.
        at: Where those stand that lend, [l, D] of unit length.
        lenders: From how many an entity borrows, at most.
        threads: Cores to use.
        temperature: Of the softmax over cosines.

    Returns:
        Rows of `at` [n, m], the nearest first, and their weights [n, m], which sum to 1.
    """
    with faiss_threads(threads) as faiss:
        cosine, nearest = nearest_by_cosine(faiss, at, unit_rows(vectors), lenders)
    # An approximate search may find too few: -1, which weighs nothing.
    return nearest, normalised(np.where(nearest >= 0, np.exp((cosine - cosine[:, :1]) / temperature), 0))


def nearest_by_cosine(
    faiss: Any, base: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines and rows [n, k] of the nearest of `base` [b, D] to unit vectors [n, D], best first; -1 where none."""
    dim = base.shape[1]
    index = faiss.IndexFlatIP(dim)
    if len(base) > EXACT:
        index = faiss.IndexIVFFlat(index, dim, 4 * isqrt(len(base)), faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.max_points_per_centroid = PROBES, LIST_POINTS
        index.train(base)
    index.add(base)
    cosine, found = index.search(queries, min(k, len(base)))
    return cosine, found


def normalised(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """Weights [n, m] that sum to 1, or are all 0."""
    total = weights.sum(1, keepdims=True)
    return (weights / np.where(total > 0, total, 1)).astype(np.float32)
