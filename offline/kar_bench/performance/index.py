"""Owns the benchmark of the nearest-neighbour index: build, recall, searches a second beside bare FAISS, bytes, loads.

Vectors are a seeded mixture: n / 100 clusters in a space of `LATENT` dimensions, as wide as the centres are spread, so
that clusters overlap and an index has to work for its recall; turned into 384 dimensions with noise in all of them.
Real encoders' vectors may be easier or harder. Queries are new draws of the same mixture.

bare   the very file that ours wrote, read by FAISS alone, which gets float32 arrays and gives row numbers
ours   what a server calls: checks, the owner's thread, names

Both search with one thread, and take turns in rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kar_bench.studies.quality_report import IDLE_CORES
from kar_kernels.benchmark.machine import machine, others_busy
from kar_sidecar.index.config import KINDS, RECALL_AT, IndexConfig, Kind, Storage
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.library import faiss_threads
from kar_sidecar.index.snapshot import PAYLOAD, open_snapshot

__all__ = ["FLAT_MOST", "SIZES", "Options", "index_table", "measure_index", "mixture"]

SIZES: Final = (10_000, 1_000_000)
FLAT_MOST: Final = 200_000
"""Vectors above which flat is measured only when it is named: a search would take tens of milliseconds."""
LATENT: Final = 16
NOISE: Final = 0.3
"""Length of the noise in all dimensions, by the standard deviation within a cluster."""
DRAWN: Final = 65_536
"""Vectors that are drawn together; bounds memory."""
QUERIES: Final = 1024
BATCH: Final = 64
SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure."""

    sizes: Sequence[int] = SIZES
    kinds: Sequence[Kind] = ()
    """None named: all, flat up to `FLAT_MOST` vectors."""
    storages: Sequence[Storage] = ("float32",)
    recall: float = 0.95
    dim: int = 384
    threads: int = 1
    """That build."""
    rounds: int = 5
    seconds: float = 1.0
    """Of each turn."""


class _Loaded(NamedTuple):
    """What it takes to load an index and search it a few times, in a process of its own."""

    seconds: float
    anonymous_bytes: int
    """Memory of the process's own: it cannot be dropped and read again."""


def mixture(count: int, dim: int, *, queries: int = QUERIES, seed: int = SEED) -> tuple[NDArray, NDArray]:
    """Unit vectors [count, dim] float32, and queries [queries, dim] of the same distribution."""
    random = np.random.default_rng(seed)
    latent = min(LATENT, dim)
    centres = random.standard_normal((max(count // 100, 1), latent), dtype=np.float32)
    axes = np.linalg.qr(random.standard_normal((dim, latent)))[0].T.astype(np.float32)
    rows = np.empty((count + queries, dim), np.float32)
    for start in range(0, len(rows), DRAWN):
        size = min(DRAWN, len(rows) - start)
        drawn = centres[random.integers(len(centres), size=size)]
        drawn += random.standard_normal((size, latent), dtype=np.float32)
        some = drawn @ axes
        some += NOISE * (latent / dim) ** 0.5 * random.standard_normal((size, dim), dtype=np.float32)
        rows[start : start + size] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return rows[:count], rows[count:]


def measure_index(options: Options, *, on_step: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Build, search and load every kind at every size.

    `rows` of the report has `{size, kind, storage, parameters, build_s, recall, recall_new, file_bytes, resident_bytes,
    mapped_bytes, load_s, load_mapped_s, verify_s, searches}`: bytes are those of a vector, `recall` is measured by the
    build and `recall_new` on new queries; `searches` has `{batch, ours_per_s, bare_per_s, ratio, low, high}`.

    Raises:
        InputError: an index does not reach the recall.
    """
    busy = others_busy()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            on_step(f"drawing {size:,} vectors")
            vectors, queries = mixture(size, options.dim)
            # Exact answers are those of all kinds.
            with faiss_threads(options.threads) as faiss:
                exact = faiss.knn(queries, vectors, min(RECALL_AT, size), metric=faiss.METRIC_INNER_PRODUCT)[1]
            for kind in options.kinds or [kind for kind in KINDS if kind != "flat" or size <= FLAT_MOST]:
                for storage in options.storages:
                    config = IndexConfig(kind, options.recall, storage, threads=options.threads)
                    root = Path(folder) / f"{size}_{kind}_{storage}"
                    rows.append(_row(vectors, queries, exact, config, root, options, on_step))
    with faiss_threads(1) as faiss:
        version = faiss.__version__
    return {
        "rows": rows,
        "dim": options.dim,
        "build_threads": options.threads,
        "search_threads": 1,
        "vectors": f"mixture of n/100 overlapping clusters, {LATENT} latent dimensions, seed {SEED}",
        "others_busy_cores": {"before": busy, "after": others_busy()},
        "versions": {"faiss": version},
        "machine": machine(),
    }


def _row(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    exact: NDArray[np.int64],
    config: IndexConfig,
    root: Path,
    options: Options,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    size, of = len(vectors), f"{config.kind} of {len(vectors):,} in {config.storage}"
    ids = [str(row) for row in range(size)]
    on_step(f"building {of}")
    began = time.perf_counter()
    built = FaissIndex.build(ids, vectors, config)
    build_s = time.perf_counter() - began
    folder = root / built.save(root)
    about = built.description.to_json()
    built.close()
    began = time.perf_counter()
    open_snapshot(folder).lock.close()
    verify_s = time.perf_counter() - began
    on_step(f"loading {of}")
    read, mapped = (_in_own_process(folder, way) for way in ("read", "mapped"))
    on_step(f"searching {of}")
    index = FaissIndex.load(folder, verify=False)
    found = index.search(queries, RECALL_AT).ids
    hits = [len(set(map(int, of)) & set(truth)) for of, truth in zip(found, exact.tolist(), strict=True)]
    searches = [_searches(index, folder, queries, batch, options) for batch in (1, BATCH)]
    index.close()
    parameters = ("lists", "probes", "links", "ef_construction", "ef_search")
    return {
        "size": size,
        "kind": about["kind"],
        "storage": config.storage,
        "parameters": {name: about[name] for name in parameters if name in about},
        "build_s": build_s,
        "recall": about["recall"]["value"],
        "recall_new": sum(hits) / exact.size,
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir()) / size,
        "resident_bytes": read.anonymous_bytes / size,
        "mapped_bytes": mapped.anonymous_bytes / size,
        "load_s": read.seconds,
        "load_mapped_s": mapped.seconds,
        "verify_s": verify_s,
        "searches": searches,
    }


def _in_own_process(folder: Path, way: str) -> _Loaded:
    command = [sys.executable, "-m", "kar_bench.performance.index_process", str(folder), way]
    return _Loaded(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def _searches(
    index: FaissIndex, folder: Path, queries: NDArray[np.float32], batch: int, options: Options
) -> dict[str, Any]:
    """Queries a second, `batch` at a time, of ours and of FAISS alone on the same file; the first round warms up."""
    with faiss_threads(1) as faiss:
        bare = faiss.read_index(str(folder / PAYLOAD), faiss.IO_FLAG_MMAP_IFC)

        def rate(search: Callable[[NDArray[np.float32]], object]) -> float:
            began, done = time.perf_counter(), 0
            for some in _batches(queries, batch):
                search(some)
                done += len(some)
                if (taken := time.perf_counter() - began) >= options.seconds:
                    return done / taken
            raise AssertionError("batches never end")

        turns = [
            (rate(lambda some: index.search(some, RECALL_AT)), rate(lambda some: bare.search(some, RECALL_AT)))
            for _ in range(options.rounds + 1)
        ][1:]
    ratios = sorted(ours / alone for ours, alone in turns)
    return {
        "batch": batch,
        "ours_per_s": statistics.median(ours for ours, _ in turns),
        "bare_per_s": statistics.median(alone for _, alone in turns),
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
    }


def _batches(queries: NDArray[np.float32], batch: int) -> Iterator[NDArray[np.float32]]:
    while True:
        for start in range(0, len(queries) - batch + 1, batch):
            yield queries[start : start + batch]


def index_table(report: Mapping[str, Any]) -> Group:
    """The report, ready to print."""
    what = Table(title=f"{report['dim']} dimensions; {report['vectors']}", box=box.SIMPLE, padding=0)
    speed = Table(title="queries a second, one thread, and bytes a vector", box=box.SIMPLE, padding=0)
    for table, words, numbers in (
        (what, ("vectors", "kind", "storage", "chosen"), ("build, s", "recall", "of new")),
        (speed, ("vectors", "kind", "storage"), ("alone", "/ bare", "64", "/ bare", "file", "read", "mapped")),
    ):
        for word in words:
            table.add_column(word, no_wrap=True)
        for number in numbers:
            table.add_column(number, justify="right", no_wrap=True)
    loads = []
    for row in report["rows"]:
        of = [f"{row['size']:,}", row["kind"], row["storage"]]
        chosen = next(
            (f"{name} {row['parameters'][name]}" for name in ("probes", "ef_search") if name in row["parameters"]), ""
        )
        what.add_row(*of, chosen, f"{row['build_s']:.1f}", f"{row['recall']:.4f}", f"{row['recall_new']:.4f}")
        rates = [text for one in row["searches"] for text in (f"{one['ours_per_s']:,.0f}", f"{one['ratio']:.2f}")]
        sizes = [f"{row[name]:,.0f}" for name in ("file_bytes", "resident_bytes", "mapped_bytes")]
        speed.add_row(*of, *rates, *sizes)
        loads.append(
            f"{' '.join(of)}: mapped in {1e3 * row['load_mapped_s']:,.1f} ms, read in {1e3 * row['load_s']:,.1f} ms; "
            f"verified in {1e3 * row['verify_s']:,.0f} ms"
        )
    busy = max(report["others_busy_cores"].values())
    if busy > IDLE_CORES:
        loads.append(f"others kept {busy:.1f} cores busy: measure again on an idle machine")
    return Group(what, speed, *(Text(line) for line in loads))
