"""Owns the measurement of the nearest-neighbour index beside bare FAISS.

bare   FAISS alone reads the file that ours wrote, takes float32 arrays and returns row numbers
ours   what a server calls: checks, the owner's thread, names of entities

Both search with one thread and take turns in rounds. Queries are new draws of the mixture that the vectors come from.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Group

from kar_bench.harness import BusyCores, Spread, busy_cores_now, machine, new_table, notes, take_turns
from kar_bench.performance.index.load_process import load_in_own_process
from kar_bench.performance.index.mixture import LATENT_DIM, SEED, mixture
from kar_sidecar.index.config import KINDS, RECALL_AT, IndexConfig, Kind, Storage
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.library import faiss_threads
from kar_sidecar.index.snapshot import PAYLOAD, open_snapshot

__all__ = ["FLAT_LIMIT", "SIZES", "IndexBenchmarkOptions", "IndexReport", "index_table", "measure_index"]

SIZES: Final = (10_000, 1_000_000)
FLAT_LIMIT: Final = 200_000
"""Above this number of vectors flat is measured only if it is named: a search would take tens of milliseconds."""
BATCH: Final = 64
PARAMETERS: Final = ("lists", "probes", "links", "ef_construction", "ef_search")


@dataclass(frozen=True, slots=True)
class IndexBenchmarkOptions:
    """What the index benchmark builds and how long it searches."""

    sizes: Sequence[int] = SIZES
    """Numbers of vectors."""
    kinds: Sequence[Kind] = ()
    """Empty: all kinds, flat up to `FLAT_LIMIT` vectors."""
    storages: Sequence[Storage] = ("float32",)
    recall: float = 0.95
    """Share of the exact 10 nearest that an index must find."""
    dim: int = 384
    threads: int = 1
    """Threads that build."""
    rounds: int = 5
    """Rounds of searches that count; one more warms up."""
    seconds: float = 1.0
    """Length of a turn of searches."""


@dataclass(frozen=True, slots=True)
class SearchRate:
    """Queries a second, `batch` at a time: medians over rounds, and the ratio of ours to bare, round by round."""

    batch: int
    ours_per_s: float
    bare_per_s: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One index of one kind, size and storage; bytes are those of a vector."""

    size: int
    kind: str
    storage: str
    parameters: Mapping[str, Any]
    """The parameters that the build chose."""
    build_s: float
    recall: float
    """Measured by the build."""
    recall_new: float
    """Measured on queries that the build has not seen."""
    file_bytes: float
    resident_bytes: float
    """Memory of the process's own when the file is read."""
    mapped_bytes: float
    """Memory of the process's own when the file is mapped."""
    load_s: float
    load_mapped_s: float
    verify_s: float
    """Seconds to check the files' hashes."""
    searches: Sequence[SearchRate]


@dataclass(frozen=True, slots=True)
class IndexReport:
    """All indexes of a run, and what they were measured with."""

    rows: Sequence[IndexRow]
    dim: int
    build_threads: int
    search_threads: int
    vectors: str
    """What the vectors are, in words."""
    others_busy_cores: BusyCores
    versions: Mapping[str, str]
    machine: str


def measure_index(
    options: IndexBenchmarkOptions,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    busy_cores: Callable[[], float] = busy_cores_now,
) -> IndexReport:
    """Build, load and search every kind at every size.

    Args:
        options: What is built and searched.
        on_step: Called with what runs next.
        busy_cores: Measures the cores that other processes keep busy.

    Raises:
        InputError: an index does not reach the recall.
    """
    busy_before = busy_cores()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            on_step(f"drawing {size:,} vectors")
            vectors, queries = mixture(size, options.dim)
            # All kinds are compared with the same exact answers.
            with faiss_threads(options.threads) as faiss:
                exact = faiss.knn(queries, vectors, min(RECALL_AT, size), metric=faiss.METRIC_INNER_PRODUCT)[1]
            for kind in options.kinds or [kind for kind in KINDS if kind != "flat" or size <= FLAT_LIMIT]:
                for storage in options.storages:
                    config = IndexConfig(kind, options.recall, storage, threads=options.threads)
                    root = Path(folder) / f"{size}_{kind}_{storage}"
                    rows.append(_row(vectors, queries, exact, config, root, options, on_step))
    with faiss_threads(1) as faiss:
        version = faiss.__version__
    return IndexReport(
        rows,
        options.dim,
        options.threads,
        1,
        f"mixture of n/100 overlapping clusters, {LATENT_DIM} latent dimensions, seed {SEED}",
        BusyCores(busy_before, busy_cores()),
        {"faiss": version},
        machine(),
    )


def _row(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    exact: NDArray[np.int64],
    config: IndexConfig,
    root: Path,
    options: IndexBenchmarkOptions,
    on_step: Callable[[str], None],
) -> IndexRow:
    size, name = len(vectors), f"{config.kind} of {len(vectors):,} in {config.storage}"
    ids = [str(row) for row in range(size)]
    on_step(f"building {name}")
    began = time.perf_counter()
    built = FaissIndex.build(ids, vectors, config)
    build_s = time.perf_counter() - began
    folder = root / built.save(root)
    about = built.description.to_json()
    built.close()
    began = time.perf_counter()
    open_snapshot(folder).lock.close()
    verify_s = time.perf_counter() - began
    on_step(f"loading {name}")
    read, mapped = load_in_own_process(folder, "read"), load_in_own_process(folder, "mapped")
    on_step(f"searching {name}")
    index = FaissIndex.load(folder, verify=False)
    nearest = index.search(queries, RECALL_AT).ids
    hits = [len(set(map(int, names)) & set(truth)) for names, truth in zip(nearest, exact.tolist(), strict=True)]
    searches = [_search_rate(index, folder, queries, batch, options) for batch in (1, BATCH)]
    index.close()
    return IndexRow(
        size=size,
        kind=about["kind"],
        storage=config.storage,
        parameters={name: about[name] for name in PARAMETERS if name in about},
        build_s=build_s,
        recall=about["recall"]["value"],
        recall_new=sum(hits) / exact.size,
        file_bytes=sum(path.stat().st_size for path in folder.iterdir()) / size,
        resident_bytes=read.anonymous_bytes / size,
        mapped_bytes=mapped.anonymous_bytes / size,
        load_s=read.seconds,
        load_mapped_s=mapped.seconds,
        verify_s=verify_s,
        searches=searches,
    )


def _search_rate(
    index: FaissIndex, folder: Path, queries: NDArray[np.float32], batch: int, options: IndexBenchmarkOptions
) -> SearchRate:
    with faiss_threads(1) as faiss:
        bare = faiss.read_index(str(folder / PAYLOAD), faiss.IO_FLAG_MMAP_IFC)

        def queries_per_s(search: Callable[[NDArray[np.float32]], object]) -> float:
            began, searched = time.perf_counter(), 0
            for part in _batches(queries, batch):
                search(part)
                searched += len(part)
                if (seconds := time.perf_counter() - began) >= options.seconds:
                    return searched / seconds
            raise AssertionError("batches never end")

        ours_per_s, bare_per_s = take_turns(
            (
                lambda: queries_per_s(lambda part: index.search(part, RECALL_AT)),
                lambda: queries_per_s(lambda part: bare.search(part, RECALL_AT)),
            ),
            options.rounds,
        )
    ratio = Spread.of([ours / alone for ours, alone in zip(ours_per_s, bare_per_s, strict=True)])
    return SearchRate(batch, Spread.of(ours_per_s).median, Spread.of(bare_per_s).median, *ratio)


def _batches(queries: NDArray[np.float32], batch: int) -> Iterator[NDArray[np.float32]]:
    while True:
        for start in range(0, len(queries) - batch + 1, batch):
            yield queries[start : start + batch]


def index_table(report: IndexReport) -> Group:
    """Builds, searches and loads, ready to print."""
    builds = new_table(
        f"{report.dim} dimensions; {report.vectors}",
        ("vectors", "kind", "storage", "chosen"),
        ("build, s", "recall", "on new queries"),
    )
    searches = new_table(
        "queries a second, one thread, and bytes a vector",
        ("vectors", "kind", "storage"),
        ("alone", "/ bare", str(BATCH), "/ bare", "file", "read", "mapped"),
    )
    lines = []
    for row in report.rows:
        name = [f"{row.size:,}", row.kind, row.storage]
        chosen = [f"{key} {row.parameters[key]}" for key in ("probes", "ef_search") if key in row.parameters]
        builds.add_row(*name, *(chosen[:1] or [""]), f"{row.build_s:.1f}", f"{row.recall:.4f}", f"{row.recall_new:.4f}")
        rates = [text for rate in row.searches for text in (f"{rate.ours_per_s:,.0f}", f"{rate.ratio:.2f}")]
        sizes = [f"{size:,.0f}" for size in (row.file_bytes, row.resident_bytes, row.mapped_bytes)]
        searches.add_row(*name, *rates, *sizes)
        lines.append(
            f"{' '.join(name)}: mapped in {1e3 * row.load_mapped_s:,.1f} ms, read in {1e3 * row.load_s:,.1f} ms; "
            f"verified in {1e3 * row.verify_s:,.0f} ms"
        )
    return Group(builds, searches, *notes(lines + report.others_busy_cores.warnings()))
