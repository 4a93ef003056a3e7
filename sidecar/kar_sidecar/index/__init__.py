"""Owns nearest-neighbour search over vectors of one space: the Protocol, its implementations, snapshots on disk.

This file has the Protocol, and the checks of arguments that all implementations share.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import InputError

__all__ = ["Neighbours", "VectorIndex", "checked_entries", "checked_queries", "unit_rows"]

ROWS: Final = 16_384
"""Number of vectors that are scaled at a time; bounds the memory needed besides the result."""


class Neighbours(NamedTuple):
    """The nearest entities of n queries, nearest first."""

    ids: list[list[str]]
    """[n][at most k]"""
    similarities: NDArray[np.float32]
    """Cosines [n, k]; -inf at the end of a row where an approximate search found fewer than k."""


class VectorIndex(Protocol):
    """An immutable set of named vectors, searched by cosine similarity. May be called from any thread."""

    dim: int
    """Components of a vector."""

    def __len__(self) -> int:
        """Number of vectors."""
        ...

    @classmethod
    def build(cls, ids: Sequence[str], vectors: NDArray[np.floating]) -> Self:
        """Index `vectors` [n, dim] of any length; a vector of zeros has similarity 0 to every other.

        Raises:
            InputError: ids and vectors differ in number, an id is repeated, or a number is not finite.
        """
        ...

    def search(self, queries: NDArray[np.floating], k: int) -> Neighbours:
        """The `k` nearest entities of each query [n, dim]; all entities where there are fewer.

        Raises:
            InputError: a query has another number of components or is not finite, or k < 1.
        """
        ...

    def search_like(self, id_: str, k: int) -> Neighbours:
        """The `k` entities nearest to the entity `id_`, without itself.

        Raises:
            NotFoundError: there is no such entity.
            InputError: k < 1.
        """
        ...

    def close(self) -> None:
        """Finish running searches, then release threads and memory. The index cannot be used afterwards."""
        ...


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of `vectors` [n, dim] at unit length, C-contiguous float32; rows of zeros stay.

    Raises:
        InputError: not two-dimensional, or not finite.
    """
    array = np.asarray(vectors)
    if array.ndim != 2:
        raise InputError(f"vectors must have the shape [n, dim], not {array.shape}: correct them")
    rows = np.empty(array.shape, np.float32)
    for start in range(0, len(rows), ROWS):
        values = array[start : start + ROWS].astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(
                f"vectors must be finite, but a row from {start} to {start + len(values) - 1} is not: correct it"
            )
        # Norms in float64: squares of large float32 numbers overflow.
        lengths = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        rows[start : start + ROWS] = values / np.where(lengths > 0, lengths, 1)
    return rows


def checked_entries(ids: Sequence[str], vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Unit rows of the vectors that an index is built from; raises as `VectorIndex.build` does."""
    rows = unit_rows(vectors)
    if len(ids) != len(rows) or len(set(ids)) != len(ids):
        raise InputError(
            f"{len(rows)} vectors need {len(rows)} different ids, not {len(set(ids))}: send one id per vector"
        )
    return rows


def checked_queries(queries: NDArray[np.floating], k: int, dim: int) -> NDArray[np.float32]:
    """Unit rows of queries; raises as `VectorIndex.search` does."""
    rows = unit_rows(queries)
    if rows.shape[1] != dim:
        raise InputError(f"queries have {rows.shape[1]} components, the index {dim}: use the same encoder")
    if k < 1:
        raise InputError(f"{k} neighbours were asked for: ask for at least 1")
    return rows
