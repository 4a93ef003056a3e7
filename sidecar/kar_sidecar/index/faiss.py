"""Owns search through FAISS: flat, inverted lists or a graph over unit vectors; on a GPU where there is one.

GPU indexes are not thread-safe and OpenMP's thread count belongs to the calling thread, so one thread owns each index.
Searches that wait for it are answered together, by one call of FAISS for each k.

HNSW: Malkov and Yashunin, arXiv 1603.09320. Recall is of unit vectors' inner product, against exact search.
"""

import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import IO, Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import (
    InputError,
    IntegrityError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from kar_sidecar.index import Neighbours, checked_entries, checked_queries
from kar_sidecar.index.config import RECALL_AT, IndexConfig
from kar_sidecar.index.ids import Ids
from kar_sidecar.index.snapshot import PAYLOAD, open_snapshot, passing_faults, write_snapshot

__all__ = ["FaissIndex", "faiss_threads", "import_faiss", "require_one_faiss"]

DISTRIBUTIONS: Final = ("faiss-cpu", "faiss-gpu")
TOGETHER: Final = 1024
"""Searches that are answered together, at most: more gain nothing, and those behind them wait longer."""
ITERATIONS: Final = 10
"""Steps of k-means for the lists of ivf."""
LIST_POINTS: Final = 64
"""Vectors a list that the lists are learned from."""
EF_LEAST: Final = 16
EF_MOST: Final = 1024
"""hnsw: where the search for `ef_search` begins and ends."""
SAME: Final = 1e-6
"""Cosines that differ by less are equal: recall does not care which of equals is found."""
PASSING: Final = tuple(
    map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO, errno.ENOMEM, errno.EAGAIN))
)
"""Of what FAISS reports of a file, which it does in words alone: what says nothing of the file's content."""


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


@contextmanager
def faiss_threads(threads: int) -> Iterator[Any]:
    """FAISS with so many threads, which are the calling thread's own setting."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


class _Request(NamedTuple):
    """A search that waits for the owner."""

    queries: NDArray[np.float32] | str
    """Unit vectors [n, dim], or the id of the entity whose neighbours are asked for."""
    k: int
    future: "Future[Neighbours]"


class FaissIndex:
    """A `VectorIndex` on FAISS. The index file is FAISS's own, so its tools read it too."""

    def __init__(
        self, ids: Ids, index: Any, about: Mapping[str, Any], *, threads: int = 1, lock: IO[bytes] | None = None
    ) -> None:
        """Take an inner-product index of unit rows, and search it with `threads` OpenMP threads.

        `about` is what its record says; `lock` is closed at the end.
        """
        faiss = import_faiss()
        self.dim = int(index.d)
        self.about: Final = dict(about)
        """Kind, parameters and measured recall, as `snapshot.json` has them."""
        self._ids = ids
        self._lock = lock
        self._inbox: SimpleQueue[_Request | None] = SimpleQueue()
        self._gate = Lock()
        self._closed = False
        self._cpu_index = index
        # Of HNSW and compressed vectors there are no GPU indexes. The index keeps no reference to the GPU's resources.
        on_gpu = about["kind"] != "hnsw" and about["storage"] == "float32" and faiss.get_num_gpus() > 0
        self._resources = faiss.StandardGpuResources() if on_gpu else None
        by_row = hasattr(index, "make_direct_map")  # ivf alone needs a map to find a vector by its row
        if on_gpu and by_row:
            index.make_direct_map(False)  # a GPU has none
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index) if on_gpu else index
        if by_row:
            index.make_direct_map()
        # No executor: it would make a second future for each search.
        self._owner = Thread(target=self._serve, args=(threads,), name="faiss", daemon=True)
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
        """See `VectorIndex.build`. Recall at 10 is measured and in `about`.

        Args:
            ids: The entities' ids [n].
            vectors: [n, dim] of any length.
            config: Kind, parameters and required recall.
            queries: [m, dim] to measure recall with; default: some of the vectors, before they are added.

        Raises:
            InputError: see `VectorIndex.build`; or the recall is below the required one, and the text says what to do.
        """
        config = config or IndexConfig()
        rows = checked_entries(ids, vectors)
        count = len(rows)
        kind = config.kind_for(count)
        about: dict[str, Any] = {"kind": kind, "storage": config.storage, "dim": rows.shape[1], "count": count}
        with faiss_threads(config.threads) as faiss:
            index = faiss.index_factory(rows.shape[1], config.factory(count), faiss.METRIC_INNER_PRODUCT)
            if kind == "ivf":
                index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = ITERATIONS, config.seed, LIST_POINTS
                index.cp.min_points_per_centroid = 1  # it warns of fewer than 39, which is what was asked for
                about["lists"] = index.nlist
            if kind == "hnsw":
                index.hnsw.efConstruction = config.ef_construction
                about |= {"links": config.links, "ef_construction": config.ef_construction}
            order, held_out = _held_out(count, config if queries is None else None)
            if count:
                index.train(rows)
            if count > held_out:
                first = rows[order[: count - held_out]]
                index.add(first)
                asked = rows[order[count - held_out :]] if queries is None else checked_queries(queries, 1, index.d)
                about |= _tuned(faiss, index, kind, first, asked, config)
                del first
            if held_out:
                index.add(rows[order[count - held_out :]])
        return cls(Ids.of([ids[row] for row in order]), index, about, threads=config.threads)

    def submit(self, queries: NDArray[np.floating], k: int) -> "Future[Neighbours]":
        """`search` without waiting; what is cancelled before its turn costs nothing."""
        return self._submit(checked_queries(queries, k, self.dim), k)

    def submit_like(self, id_: str, k: int) -> "Future[Neighbours]":
        """`search_like` without waiting."""
        if k < 1:
            raise InputError(f"{k} neighbours were asked for: ask for at least 1")
        # One more: the entity itself is among its own neighbours.
        return self._submit(id_, k + 1)

    def _submit(self, queries: NDArray[np.float32] | str, k: int) -> "Future[Neighbours]":
        request = _Request(queries, k, Future())
        with self._gate:
            if self._closed:
                raise UnavailableError("the index is closed: load the current snapshot")
            self._inbox.put(request)
        return request.future

    def search(self, queries: NDArray[np.floating], k: int) -> Neighbours:
        """See `VectorIndex.search`."""
        return self.submit(queries, k).result()

    def search_like(self, id_: str, k: int) -> Neighbours:
        """See `VectorIndex.search_like`."""
        return self.submit_like(id_, k).result()

    def _serve(self, threads: int) -> None:
        """Answer on the owner's thread, all that wait at once, until None comes."""
        import_faiss().omp_set_num_threads(threads)
        closing = False
        while not closing:
            waiting = [self._inbox.get()]
            while not self._inbox.empty() and len(waiting) < TOGETHER:
                waiting.append(self._inbox.get())
            closing = waiting[-1] is None
            self._answer([request for request in waiting if request is not None])

    def _answer(self, waiting: Sequence[_Request]) -> None:
        """Answer requests; those of one k together, so that none changes another's."""
        groups: dict[int, list[tuple[_Request, NDArray[np.float32], int]]] = {}
        for request in waiting:
            if not request.future.set_running_or_notify_cancel():
                continue
            try:
                queries, row = self._asked(request.queries)
            except Exception as error:
                request.future.set_exception(error)
            else:
                groups.setdefault(request.k, []).append((request, queries, row))
        for k, group in groups.items():
            try:
                similarities, found = self._found([queries for _, queries, _ in group], k)
            except Exception as error:
                for request, _, _ in group:
                    request.future.set_exception(error)
                continue
            end = 0
            for request, queries, row in group:
                one = slice(end, end := end + len(queries))
                try:
                    if row < 0:
                        neighbours = self._named(similarities[one], found[one])
                    else:
                        neighbours = self._others(similarities[one], found[one], row)
                except Exception as error:
                    request.future.set_exception(error)
                else:
                    request.future.set_result(neighbours)

    def _asked(self, queries: NDArray[np.float32] | str) -> tuple[NDArray[np.float32], int]:
        """A request's vectors [n, dim], and the row of the entity that it names; -1 where it names none."""
        if not isinstance(queries, str):
            return queries, -1
        row = self._ids.row(queries)
        if row is None:
            raise NotFoundError(f"{queries!r} has no vector in the index: name another, or send a vector")
        return self._cpu_index.reconstruct(row)[None], row

    def _found(self, together: Sequence[NDArray[np.float32]], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and rows [n, at most k] of the nearest of all queries, one after the other; -1 where none was."""
        queries = np.concatenate(together)
        k = min(k, len(self))
        if k and len(queries):
            similarities, found = self._index.search(queries, k)
            return similarities, found
        return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)

    def _others(self, similarities: NDArray[np.float32], found: NDArray[np.int64], row: int) -> Neighbours:
        """All but the entity itself, or all but the last where an approximate search missed it."""
        others = found[0] != row
        if others.all():
            others[-1:] = False
        return self._named(similarities[:, others], found[:, others])

    def _named(self, similarities: NDArray[np.float32], found: NDArray[np.int64]) -> Neighbours:
        there = found >= 0
        names = iter(self._ids.at(found[there]))
        counts = there.sum(1).tolist()
        return Neighbours(
            [[next(names) for _ in range(count)] for count in counts], np.where(there, similarities, -np.inf)
        )

    def save(self, root: Path, *, space_id: str = "") -> str:
        """Write a snapshot of vectors of one space below `root`, and return its id; the same content has the same."""
        about = {"space_id": space_id, **self.about}

        def write(folder: Path) -> None:
            import_faiss().write_index(self._cpu_index, str(folder / PAYLOAD))
            self._ids.save(folder)

        return write_snapshot(root, about, write)

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1, mapped: bool = True, verify: bool = True) -> Self:
        """Map what `save` wrote, or with `mapped` False read it into memory; with `verify` check every file's hash.

        Raises:
            PreconditionError: no snapshot there.
            IntegrityError: a missing, corrupt or foreign file, which the text names.
            UnavailableError: one cannot be read now.
        """
        faiss = import_faiss()
        held = open_snapshot(folder, verify=verify)
        try:
            try:
                with passing_faults(folder):
                    ids = Ids.load(folder, mapped=mapped)
                    index = faiss.read_index(str(folder / PAYLOAD), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
            except RuntimeError as error:
                if any(text in str(error) for text in PASSING):
                    raise UnavailableError(f"{folder / PAYLOAD} cannot be read now ({error}): retry") from error
                raise IntegrityError(f"{folder / PAYLOAD} is no index that FAISS reads: publish again") from error
            record = held.record
            if (index.ntotal, index.d, len(ids)) != (record["count"], record["dim"], record["count"]):
                raise IntegrityError(f"{folder / PAYLOAD} does not fit its record: delete {folder} and publish again")
            return cls(ids, index, record, threads=threads, lock=held.lock)
        except BaseException:
            held.lock.close()
            raise

    def close(self) -> None:
        """See `VectorIndex.close`."""
        with self._gate:
            if not self._closed:
                self._inbox.put(None)
            self._closed = True
        self._owner.join()
        self._index = self._cpu_index = self._resources = None
        if self._lock is not None:
            self._lock.close()


def _held_out(count: int, config: IndexConfig | None) -> tuple[list[int], int]:
    """The order in which rows are added, and how many of the last recall is measured with before that.

    A graph finds the vectors that it was made of more easily than others, so they would flatter it.
    """
    if config is None or count < 2:
        return list(range(count)), 0
    chosen = np.zeros(count, np.bool_)
    size = max(1, min(config.sample, count // 10))
    chosen[np.random.default_rng(config.seed).choice(count, size, replace=False)] = True
    return np.argsort(chosen, kind="stable").tolist(), size


def _tuned(
    faiss: Any,
    index: Any,
    kind: str,
    rows: NDArray[np.float32],
    asked: NDArray[np.float32],
    config: IndexConfig,
) -> dict[str, Any]:
    """Set what searches keep or look into, and tell it with the recall that was measured."""
    k = min(RECALL_AT, len(rows))
    if not len(asked):
        return {"recall": {"at": RECALL_AT, "value": 1.0, "required": config.recall, "queries": 0}}
    last = faiss.knn(asked, rows, k, metric=faiss.METRIC_INNER_PRODUCT)[0][:, -1:]
    name, given, low, most = {
        "flat": ("", None, 0, 0),
        "ivf": ("probes", config.probes, 1, index.nlist if kind == "ivf" else 0),
        "hnsw": ("ef_search", config.ef_search, EF_LEAST, EF_MOST),
    }[kind]

    def recall_with(value: int) -> float:
        if kind == "ivf":
            index.nprobe = value
        if kind == "hnsw":
            index.hnsw.efSearch = value
        found = index.search(asked, k)[1]
        # Compressed vectors have cosines of their own: compare the exact ones.
        cosines = np.where(found >= 0, np.einsum("mkd,md->mk", rows[found], asked), -np.inf)
        return float((cosines >= last - SAME).mean())

    value = _fewest(recall_with, config.recall, low, most) if name and given is None else (given or 0)
    recall = recall_with(value)
    if recall < config.recall:
        raise InputError(_advice(kind, config, name, value, recall))
    told = {"at": RECALL_AT, "value": round(recall, 6), "required": config.recall, "queries": len(asked)}
    return {name: value, "recall": told} if name else {"recall": told}


def _advice(kind: str, config: IndexConfig, name: str, value: int, recall: float) -> str:
    raised = {"ivf": "probes", "hnsw": "ef_search" if config.ef_search else "links or ef_construction"}.get(kind, "")
    advice = f"raise {raised}" if raised and not (kind == "ivf" and config.probes is None) else "keep float32"
    if config.storage != "float32" and advice != "keep float32":
        advice += ", or keep float32"
    told = f" with {name} {value}" if name else ""
    return (
        f"the {kind} index in {config.storage} finds {recall:.4f} of the exact {RECALL_AT} nearest{told}, "
        f"and {config.recall:g} is required: {advice}, or require less; nothing was written"
    )


def _fewest(recall_with: Callable[[int], float], required: float, low: int, most: int) -> int:
    """The smallest value from `low` to `most` that reaches the recall, or `most`; recall rises with the value."""
    value = low
    while value < most and recall_with(value) < required:
        low, value = value + 1, min(2 * value, most)
    high = value
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if recall_with(middle) >= required else (middle + 1, high)
    return high
