"""Owns nearest-neighbour search over vectors of one space: the Protocol, and what every implementation checks."""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import InputError

__all__ = ["Neighbours", "VectorIndex", "checked_entries", "checked_queries", "unit_rows"]

ROWS: Final = 16_384
"""Vectors that are scaled together: bounds memory beside the result."""


class Neighbours(NamedTuple):
    """The nearest entities of n queries, nearest first."""

    ids: list[list[str]]
    """[n][at most k]"""
    similarities: NDArray[np.float32]
    """Cosines [n, k]; an approximate search that finds fewer leaves the rest of a row at -inf."""


class VectorIndex(Protocol):
    """An immutable set of named vectors, searched by cosine similarity. May be called from any thread."""

    dim: int
    """Components of a vector."""

    def __len__(self) -> int:
        """How many vectors there are."""
        ...

    @classmethod
    def build(cls, ids: Sequence[str], vectors: NDArray[np.floating]) -> Self:
        """Index `vectors` [n, dim], which need not have unit length; one of length 0 has similarity 0 to all.

        Raises:
            InputError: ids and vectors do not pair up, an id comes twice, or a number is not finite.
        """
        ...

    def search(self, queries: NDArray[np.floating], k: int) -> Neighbours:
        """The `k` nearest entities of each query [n, dim], or all where there are fewer.

        Raises:
            InputError: another number of components, a number that is not finite, or k < 1.
        """
        ...

    def search_like(self, id_: str, k: int) -> Neighbours:
        """The `k` entities nearest to one of them, itself left out.

        Raises:
            NotFoundError: there is no such entity.
            InputError: k < 1.
        """
        ...

    def close(self) -> None:
        """Finish the searches under way, then release threads and memory. The index cannot be used afterwards."""
        ...


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of `vectors` [n, dim] at unit length, C-contiguous float32; rows of zeros stay.

    Raises:
        InputError: not two-dimensional, or not finite.
    """
    given = np.asarray(vectors)
    if given.ndim != 2:
        raise InputError(f"vectors must be of shape [n, dim], not {given.shape}: mend them")
    rows = np.empty(given.shape, np.float32)
    for start in range(0, len(rows), ROWS):
        values = given[start : start + ROWS].astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(
                f"vectors must be finite, and one of rows {start} to {start + len(values)} is not: mend it"
            )
        # Norms in float64: squares of large float32 numbers overflow.
        lengths = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        rows[start : start + ROWS] = values / np.where(lengths > 0, lengths, 1)
    return rows


def checked_entries(ids: Sequence[str], vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Unit rows of what an index is built from; see `VectorIndex.build`."""
    rows = unit_rows(vectors)
    if len(ids) != len(rows) or len(set(ids)) != len(ids):
        raise InputError(f"{len(rows)} vectors need as many different ids, not {len(set(ids))}: pair them up")
    return rows


def checked_queries(queries: NDArray[np.floating], k: int, dim: int) -> NDArray[np.float32]:
    """Unit rows of queries; see `VectorIndex.search`."""
    rows = unit_rows(queries)
    if rows.shape[1] != dim:
        raise InputError(f"queries have {rows.shape[1]} components, the index {dim}: use the same encoder")
    if k < 1:
        raise InputError(f"{k} neighbours were asked for: ask for at least 1")
    return rows
