"""Owns search through FAISS: flat inner product over unit vectors, on a GPU where there is one.

GPU indexes are not thread-safe and OpenMP's thread count belongs to the calling thread, so one thread owns each index.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import IntegrityError, PreconditionError, UnsupportedError
from kar_sidecar.index import Neighbours, checked_entries, checked_queries
from kar_sidecar.index.snapshot import read_snapshot, write_snapshot

__all__ = ["FaissIndex", "import_faiss", "require_one_faiss"]

FORMAT: Final = "faiss-flat-inner-product"
PAYLOAD: Final = "index.faiss"
DISTRIBUTIONS: Final = ("faiss-cpu", "faiss-gpu")
T = TypeVar("T")


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def require_one_faiss(installed: Collection[str]) -> None:
    """Check which of the distributions that provide the module `faiss` are there: exactly one may be.

    Raises:
        UnsupportedError: none.
        PreconditionError: both; they overwrite each other's files.
    """
    if not installed:
        raise UnsupportedError("FAISS is not installed: install kar-sidecar with its extra `cpu` or `gpu`")
    if len(installed) > 1:
        raise PreconditionError(
            f"{' and '.join(sorted(installed))} are both installed and overwrite each other's module `faiss`: "
            "uninstall both, then install kar-sidecar with one of its extras `cpu` and `gpu`"
        )


def import_faiss() -> Any:
    """The module `faiss`; raises as `require_one_faiss` does."""
    require_one_faiss([name for name in DISTRIBUTIONS if _installed(name)])
    import faiss

    return faiss


class FaissIndex:
    """A `VectorIndex` on FAISS. The index file is FAISS's own, so its tools read it too."""

    def __init__(self, ids: Sequence[str], cpu_index: Any, threads: int = 1) -> None:
        """Take a flat inner-product index of unit rows, and search it with `threads` OpenMP threads."""
        faiss = import_faiss()
        self._ids = np.array(ids, dtype=object)
        self.dim = int(cpu_index.d)
        self._cpu_index = cpu_index
        self._owner = ThreadPoolExecutor(1, "faiss", initializer=faiss.omp_set_num_threads, initargs=(threads,))
        # The index keeps no reference to the GPU's resources.
        self._resources = faiss.StandardGpuResources() if faiss.get_num_gpus() > 0 else None
        self._index = (
            self._call(lambda: faiss.index_cpu_to_gpu(self._resources, 0, cpu_index)) if self._resources else cpu_index
        )

    def _call(self, function: Callable[[], T]) -> T:
        return self._owner.submit(function).result()

    @classmethod
    def build(cls, ids: Sequence[str], vectors: NDArray[np.floating]) -> Self:
        """See `VectorIndex.build`."""
        rows = checked_entries(ids, vectors)
        index = import_faiss().IndexFlatIP(rows.shape[1])
        index.add(rows)
        return cls(ids, index)

    def search(self, queries: NDArray[np.floating], k: int) -> Neighbours:
        """See `VectorIndex.search`."""
        rows = checked_queries(queries, k, self.dim)
        k = min(k, len(self._ids))
        if not k or not len(rows):
            return Neighbours([[] for _ in rows], np.zeros((len(rows), k), np.float32))
        similarities, found = self._call(lambda: self._index.search(rows, k))
        return Neighbours(self._ids[found].tolist(), similarities)

    def save(self, folder: Path) -> None:
        """See `VectorIndex.save`."""
        faiss = import_faiss()
        ids = self._ids.tolist()
        write_snapshot(
            folder, FORMAT, ids, self.dim, PAYLOAD, lambda path: faiss.write_index(self._cpu_index, str(path))
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """See `VectorIndex.load`."""
        snapshot = read_snapshot(folder, FORMAT, PAYLOAD)
        index = import_faiss().read_index(str(snapshot.payload))
        if (index.ntotal, index.d) != (len(snapshot.ids), snapshot.dim):
            raise IntegrityError(f"{snapshot.payload} does not fit its record: delete {folder} and publish again")
        return cls(snapshot.ids, index)

    def close(self) -> None:
        """See `VectorIndex.close`."""
        self._owner.shutdown()
