"""Owns exact search in numpy: the reference that other indexes are compared with, and enough for a few thousand rows.

similarity(q, x) = <q, x> / (|q| |x|); ties go to the earlier row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import IntegrityError
from kar_sidecar.index import Neighbours, checked_entries, checked_queries
from kar_sidecar.index.snapshot import read_snapshot, write_snapshot

__all__ = ["ExactIndex"]

FORMAT = "exact"
PAYLOAD = "vectors.npy"


class ExactIndex:
    """A `VectorIndex` that compares each query with every row."""

    def __init__(self, ids: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Take unit rows [n, dim] as they are."""
        self._ids = list(ids)
        self._rows = rows
        self.dim = int(rows.shape[1])

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

    def save(self, folder: Path) -> None:
        """See `VectorIndex.save`."""
        write_snapshot(folder, FORMAT, self._ids, self.dim, PAYLOAD, lambda path: np.save(path, self._rows))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """See `VectorIndex.load`."""
        snapshot = read_snapshot(folder, FORMAT, PAYLOAD)
        rows = np.load(snapshot.payload, allow_pickle=False)
        if rows.shape != (len(snapshot.ids), snapshot.dim):
            raise IntegrityError(f"{snapshot.payload} does not fit its record: delete {folder} and publish again")
        return cls(snapshot.ids, rows)

    def close(self) -> None:
        """See `VectorIndex.close`."""
