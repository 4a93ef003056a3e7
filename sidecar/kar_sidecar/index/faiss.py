"""Owns search through FAISS: exact, inverted lists (ivf) or a graph (hnsw) over unit vectors; on a GPU if there is one.

One thread owns each index, because GPU indexes are not thread-safe and OpenMP's thread count belongs to the calling
thread. Searches that wait for that thread are answered together, by one call of FAISS for each k.

HNSW: Malkov and Yashunin, arXiv 1603.09320.
"""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import IO, Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import InputError, IntegrityError, NotFoundError, UnavailableError
from kar_sidecar.index import Neighbours, checked_entries, checked_queries
from kar_sidecar.index.config import IndexConfig, IndexDescription
from kar_sidecar.index.ids import Ids
from kar_sidecar.index.library import faiss_threads, import_faiss
from kar_sidecar.index.recall import held_out_last, tune
from kar_sidecar.index.snapshot import PAYLOAD, open_snapshot, unavailable_when_unreadable, write_snapshot

__all__ = ["FaissIndex"]

BATCH: Final = 1024
"""Largest number of searches that are answered together: larger batches are no faster and delay later searches."""
ITERATIONS: Final = 10
"""ivf: k-means steps."""
POINTS_PER_LIST: Final = 64
"""ivf: vectors per list that k-means learns from."""
TEMPORARY: Final = tuple(
    map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO, errno.ENOMEM, errno.EAGAIN))
)
"""Texts of operating-system errors that do not mean a damaged file. FAISS's errors carry the text, but no number."""


class _Search(NamedTuple):
    """A search that waits for the index's thread."""

    query: NDArray[np.float32] | str
    """Unit vectors [n, dim], or the id of the entity whose neighbours to find."""
    k: int
    future: "Future[Neighbours]"


class FaissIndex:
    """A `VectorIndex` on FAISS. The index file has FAISS's own format, so FAISS's tools read it too."""

    def __init__(
        self,
        ids: Ids,
        index: Any,
        description: IndexDescription,
        *,
        space_id: str = "",
        threads: int = 1,
        lock: IO[bytes] | None = None,
    ) -> None:
        """Take over a FAISS index.

        Args:
            ids: Ids of the index's rows.
            index: An inner-product index of unit rows.
            description: Kind, size and parameters of the index.
            space_id: The space of its vectors; empty: not known.
            threads: OpenMP threads of a search.
            lock: The snapshot's lock file; `close` closes it.
        """
        faiss = import_faiss()
        self.dim = int(index.d)
        self.description: Final = description
        self.space_id: Final = space_id
        self._ids = ids
        self._lock = lock
        self._waiting: SimpleQueue[_Search | None] = SimpleQueue()
        self._closing = Lock()
        self._closed = False
        self._cpu_index = index
        # FAISS has no GPU index for HNSW or compressed vectors. It keeps no reference to the GPU resources: we keep it.
        on_gpu = description.kind != "hnsw" and description.storage == "float32" and faiss.get_num_gpus() > 0
        self._resources = faiss.StandardGpuResources() if on_gpu else None
        needs_map = hasattr(index, "make_direct_map")  # ivf alone needs a map to find a vector by its row
        if on_gpu and needs_map:
            index.make_direct_map(False)  # a GPU index has no such map
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index) if on_gpu else index
        if needs_map:
            index.make_direct_map()
        # No executor: it would make a second future for each search.
        self._owner = Thread(target=self._run, args=(threads,), name="faiss", daemon=True)
        self._owner.start()

    def __len__(self) -> int:
        """See `VectorIndex`."""
        return len(self._ids)

    @classmethod
    def build(
        cls,
        ids: Sequence[str],
        vectors: NDArray[np.floating],
        config: IndexConfig | None = None,
        *,
        queries: NDArray[np.floating] | None = None,
    ) -> Self:
        """See `VectorIndex.build`. Recall at 10 is measured and kept in `description`.

        Args:
            ids: The entities' ids [n].
            vectors: [n, dim], of any length.
            config: Kind, parameters and required recall.
            queries: [m, dim] to measure recall with; None: a sample of `vectors`, measured before it is added.

        Raises:
            InputError: see `VectorIndex.build`; or the recall is below the required one, and the text says what to do.
        """
        config = config or IndexConfig()
        rows = checked_entries(ids, vectors)
        count, dim = rows.shape
        description = IndexDescription(config.kind_for(count), config.storage, dim, count)
        order, held_out = held_out_last(count, config) if queries is None else (list(range(count)), 0)
        with faiss_threads(config.threads) as faiss:
            index, description = _new_index(faiss, description, config)
            if count:
                index.train(rows)
            if count > held_out:
                added_rows, held_out_rows = rows[order[: count - held_out]], rows[order[count - held_out :]]
                index.add(added_rows)
                recall_queries = held_out_rows if queries is None else checked_queries(queries, 1, dim)
                description = tune(faiss, index, description, added_rows, recall_queries, config)
                del added_rows
            if held_out:
                index.add(held_out_rows)
        return cls(Ids.of([ids[row] for row in order]), index, description, threads=config.threads)

    def submit(self, queries: NDArray[np.floating], k: int) -> "Future[Neighbours]":
        """`search` without waiting. A future that is cancelled before its search starts is skipped."""
        return self._submit(checked_queries(queries, k, self.dim), k)

    def submit_like(self, id_: str, k: int) -> "Future[Neighbours]":
        """`search_like` without waiting."""
        if k < 1:
            raise InputError(f"{k} neighbours were asked for: ask for at least 1")
        # One more neighbour, because the entity finds itself.
        return self._submit(id_, k + 1)

    def _submit(self, query: NDArray[np.float32] | str, k: int) -> "Future[Neighbours]":
        search = _Search(query, k, Future())
        with self._closing:
            if self._closed:
                raise UnavailableError("the index is closed: load the current snapshot")
            self._waiting.put(search)
        return search.future

    def search(self, queries: NDArray[np.floating], k: int) -> Neighbours:
        """See `VectorIndex.search`."""
        return self.submit(queries, k).result()

    def search_like(self, id_: str, k: int) -> Neighbours:
        """See `VectorIndex.search_like`."""
        return self.submit_like(id_, k).result()

    def _run(self, threads: int) -> None:
        """Runs on the index's thread: answers all waiting searches at once, until the queue gives None."""
        import_faiss().omp_set_num_threads(threads)
        ends = False
        while not ends:
            batch = [self._waiting.get()]
            while not self._waiting.empty() and len(batch) < BATCH:
                batch.append(self._waiting.get())
            ends = batch[-1] is None
            self._answer([search for search in batch if search is not None])

    def _answer(self, searches: Sequence[_Search]) -> None:
        """Answer searches by one call of FAISS for each k, so that no search changes another's result."""
        by_k: dict[int, list[tuple[_Search, NDArray[np.float32], int]]] = {}
        for search in searches:
            if not search.future.set_running_or_notify_cancel():
                continue
            try:
                queries, own_row = self._query_vectors(search.query)
            except Exception as error:
                search.future.set_exception(error)
            else:
                by_k.setdefault(search.k, []).append((search, queries, own_row))
        for k, group in by_k.items():
            try:
                similarities, rows = self._nearest([queries for _, queries, _ in group], k)
            except Exception as error:
                for search, _, _ in group:
                    search.future.set_exception(error)
                continue
            end = 0
            for search, queries, own_row in group:
                part = slice(end, end := end + len(queries))
                try:
                    neighbours = self._neighbours(similarities[part], rows[part], own_row)
                except Exception as error:
                    search.future.set_exception(error)
                else:
                    search.future.set_result(neighbours)

    def _query_vectors(self, query: NDArray[np.float32] | str) -> tuple[NDArray[np.float32], int]:
        """The vectors [n, dim] of a search, and the row of the entity that it names; -1 for a search by vectors."""
        if not isinstance(query, str):
            return query, -1
        row = self._ids.row(query)
        if row is None:
            raise NotFoundError(f"{query!r} has no vector in the index: name another, or send a vector")
        return self._cpu_index.reconstruct(row)[None], row

    def _nearest(self, groups: Sequence[NDArray[np.float32]], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and rows [n, at most k] of the vectors nearest to n queries; row -1 where fewer were found."""
        queries = np.concatenate(groups)
        k = min(k, len(self))
        if k and len(queries):
            similarities, rows = self._index.search(queries, k)
            return similarities, rows
        return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)

    def _neighbours(self, similarities: NDArray[np.float32], rows: NDArray[np.int64], own_row: int) -> Neighbours:
        """The entities of rows [n, k], without the entity of `own_row` (n is 1 then) unless it is negative."""
        if own_row >= 0:
            is_other = rows[0] != own_row
            if is_other.all():  # an approximate search can miss the entity itself: drop the farthest instead
                is_other[-1:] = False
            similarities, rows = similarities[:, is_other], rows[:, is_other]
        is_found = rows >= 0
        names = iter(self._ids.at(rows[is_found]))
        ids = [[next(names) for _ in range(count)] for count in is_found.sum(1).tolist()]
        return Neighbours(ids, np.where(is_found, similarities, -np.inf))

    def save(self, root: Path, *, space_id: str = "") -> str:
        """Write a snapshot of vectors of one space below `root` and return its id, which depends on its content."""

        def write(folder: Path) -> None:
            import_faiss().write_index(self._cpu_index, str(folder / PAYLOAD))
            self._ids.save(folder)

        return write_snapshot(root, {"space_id": space_id, **self.description.to_json()}, write)

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1, mapped: bool = True, verify: bool = True) -> Self:
        """Map a snapshot that `save` wrote, or with `mapped` False read it into memory.

        With `verify`, the hash of every file is checked.

        Raises:
            PreconditionError: there is no snapshot.
            IntegrityError: a missing, corrupt or foreign file; the text names it.
            UnavailableError: a file cannot be read now.
        """
        snapshot = open_snapshot(folder, verify=verify)
        try:
            ids, index = _read_files(folder, mapped)
            record = snapshot.record
            if (index.ntotal, index.d, len(ids)) != (record["count"], record["dim"], record["count"]):
                raise IntegrityError(f"{folder / PAYLOAD} does not match its record: delete {folder} and publish again")
            description = IndexDescription.from_json(record)
            return cls(
                ids, index, description, space_id=record.get("space_id", ""), threads=threads, lock=snapshot.lock
            )
        except BaseException:
            snapshot.lock.close()
            raise

    def close(self) -> None:
        """See `VectorIndex.close`."""
        with self._closing:
            if not self._closed:
                self._waiting.put(None)
            self._closed = True
        self._owner.join()
        self._index = self._cpu_index = self._resources = None
        if self._lock is not None:
            self._lock.close()


def _new_index(faiss: Any, description: IndexDescription, config: IndexConfig) -> tuple[Any, IndexDescription]:
    """An empty FAISS index, and its description with the parameters that its kind is built with."""
    index = faiss.index_factory(description.dim, config.factory(description.count), faiss.METRIC_INNER_PRODUCT)
    if description.kind == "ivf":
        index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = ITERATIONS, config.seed, POINTS_PER_LIST
        index.cp.min_points_per_centroid = 1  # silences FAISS's warning about lists with fewer than 39 vectors
        return index, replace(description, lists=index.nlist)
    if description.kind == "hnsw":
        index.hnsw.efConstruction = config.ef_construction
        return index, replace(description, links=config.links, ef_construction=config.ef_construction)
    return index, description


def _read_files(folder: Path, mapped: bool) -> tuple[Ids, Any]:
    """Ids and FAISS index of a snapshot; raises as `FaissIndex.load` does."""
    faiss = import_faiss()
    try:
        with unavailable_when_unreadable(folder):
            ids = Ids.load(folder, mapped=mapped)
            return ids, faiss.read_index(str(folder / PAYLOAD), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        if any(words in str(error) for words in TEMPORARY):
            raise UnavailableError(f"{folder / PAYLOAD} cannot be read now ({error}): retry") from error
        raise IntegrityError(f"{folder / PAYLOAD} is not an index that FAISS reads: publish again") from error
