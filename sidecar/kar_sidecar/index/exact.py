"""Owns exact search in NumPy: the reference that other indexes are tested against, fast enough for some thousand rows.

similarity(q, x) = <q, x> / (|q| |x|); rows of equal similarity keep their order.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import NotFoundError
from kar_sidecar.index import Neighbours, checked_entries, checked_queries

__all__ = ["ExactIndex"]


class ExactIndex:
    """A `VectorIndex` that compares each query with every row."""

    def __init__(self, ids: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Take the ids [n] and unit rows [n, dim]."""
        self._ids = list(ids)
        self._rows = rows
        self.dim = int(rows.shape[1])

    def __len__(self) -> int:
        """See `VectorIndex`."""
        return len(self._ids)

    @classmethod
    def build(cls, ids: Sequence[str], vectors: NDArray[np.floating]) -> Self:
        """See `VectorIndex.build`."""
        return cls(ids, checked_entries(ids, vectors))

    def search(self, queries: NDArray[np.floating], k: int) -> Neighbours:
        """See `VectorIndex.search`."""
        similarities = checked_queries(queries, k, self.dim) @ self._rows.T
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        ids = [[self._ids[row] for row in rows] for rows in order]
        return Neighbours(ids, np.take_along_axis(similarities, order, axis=1))

    def search_like(self, id_: str, k: int) -> Neighbours:
        """See `VectorIndex.search_like`."""
        if id_ not in self._ids:
            raise NotFoundError(f"{id_!r} has no vector in the index: name another, or send a vector")
        row = self._ids.index(id_)
        others = ExactIndex(self._ids[:row] + self._ids[row + 1 :], np.delete(self._rows, row, axis=0))
        return others.search(self._rows[row : row + 1], k)

    def close(self) -> None:
        """See `VectorIndex.close`."""
