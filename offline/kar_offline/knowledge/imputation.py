"""Owns imputation: knowledge vectors for entities without a text, from the entities that are most like them.

An imputed vector is the weighted mean of the vectors of its nearest neighbours, scaled to unit length. Neighbours are
nearest by the cosine of content vectors (encoded facts). The weight of a neighbour is softmax(cosine / temperature).

    neighbour_weights          the neighbours and their weights
    mean_of_neighbours         the weighted mean of their vectors
    impute_from_neighbours     both, for all entities without knowledge
"""

from math import isqrt
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.index import unit_rows
from kar_sidecar.index.library import faiss_threads

__all__ = [
    "NEIGHBOURS",
    "TEMPERATURE",
    "Imputation",
    "NeighbourWeights",
    "impute_from_neighbours",
    "mean_of_neighbours",
    "nearest_by_cosine",
    "neighbour_weights",
    "normalised",
]

NEIGHBOURS: Final = 8
TEMPERATURE: Final = 0.1
EXACT_SEARCH: Final = 1 << 14
"""Largest number of vectors for an exact search; with more, it reads the nearest `PROBES` of 4 x sqrt(n) lists."""
PROBES: Final = 8
LIST_POINTS: Final = 64
"""Number of vectors per list from which the lists' centres are learned."""
CHUNK_ROWS: Final = 4096
"""Number of entities whose neighbours' vectors are in memory at a time."""


class Imputation(NamedTuple):
    """Knowledge vectors of n entities after imputation."""

    vectors: NDArray[np.float32]
    """[n, D]; imputed vectors have unit length, the others are unchanged."""
    imputed: NDArray[np.bool_]
    """[n] True where the vector was imputed."""


class NeighbourWeights(NamedTuple):
    """The neighbours of n entities, the nearest first."""

    rows: NDArray[np.int64]
    """[n, m] rows of the neighbours; -1 where the search found fewer than m."""
    weights: NDArray[np.float32]
    """[n, m] each row sums to 1; 0 where there is no neighbour."""


def impute_from_neighbours(
    content: NDArray[np.float32],
    has_knowledge: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Imputation:
    """Impute the knowledge vectors of entities without knowledge from their nearest neighbours with knowledge.

    Args:
        content: Content vectors [n, D] of any length. An entity with a row of zeros has no content: its vector is not
            imputed, and it is not a neighbour of others.
        has_knowledge: [n] whether an entity has a knowledge vector of its own.
        vectors: Knowledge vectors [n, D2]; rows of entities without knowledge are ignored.
        neighbours: Largest number of neighbours of one entity.
        temperature: Temperature of the softmax over cosines.
    """
    vectors = np.array(vectors, dtype=np.float32)
    has_content = np.any(content, axis=1)
    known_rows = np.flatnonzero(has_knowledge & has_content)
    imputed = ~has_knowledge & has_content & bool(len(known_rows))
    imputed_rows = np.flatnonzero(imputed)
    if not len(imputed_rows):
        return Imputation(vectors, imputed)
    known_content, known_vectors = unit_rows(content[known_rows]), vectors[known_rows]
    for rows in np.split(imputed_rows, range(CHUNK_ROWS, len(imputed_rows), CHUNK_ROWS)):
        nearest, weights = neighbour_weights(content[rows], known_content, neighbours, temperature=temperature)
        vectors[rows] = mean_of_neighbours(known_vectors[nearest], weights)
    return Imputation(vectors, imputed)


def mean_of_neighbours(vectors: NDArray[np.float32], weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """The mean [..., D] of the vectors of m neighbours [..., m, D] with weights [..., m], scaled to unit length."""
    mean = (vectors * weights[..., None]).sum(-2)  # (..., D)
    return (mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def neighbour_weights(
    content: NDArray[np.float32],
    known_content: NDArray[np.float32],
    neighbours: int,
    *,
    threads: int = 1,
    temperature: float = TEMPERATURE,
) -> NeighbourWeights:
    """Find the nearest neighbours of n entities, and their weights.

    Args:
        content: The entities' content vectors [n, D] of any length.
        known_content: Content vectors [k, D], of unit length, of the entities that can be neighbours.
        neighbours: Largest number of neighbours of one entity.
        threads: Cores to use.
        temperature: Temperature of the softmax over cosines.
    """
    with faiss_threads(threads) as faiss:
        cosine, rows = nearest_by_cosine(faiss, known_content, unit_rows(content), neighbours)
    # Cosines are taken relative to the largest one, so that no exponential overflows.
    weights = np.where(rows >= 0, np.exp((cosine - cosine[:, :1]) / temperature), 0)
    return NeighbourWeights(rows, normalised(weights))


def nearest_by_cosine(
    faiss: Any, base: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines and rows [n, k] of the vectors of `base` [b, D] nearest to `queries` [n, D], best first; row -1: none.

    All vectors have unit length.
    """
    dim = base.shape[1]
    index = faiss.IndexFlatIP(dim)
    if len(base) > EXACT_SEARCH:
        index = faiss.IndexIVFFlat(index, dim, 4 * isqrt(len(base)), faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.max_points_per_centroid = PROBES, LIST_POINTS
        index.train(base)
    index.add(base)
    cosine, rows = index.search(queries, min(k, len(base)))
    return cosine, rows


def normalised(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """Weights [n, m] scaled so that each row sums to 1; a row of zeros stays zero."""
    total = weights.sum(1, keepdims=True)
    return (weights / np.where(total > 0, total, 1)).astype(np.float32)
