"""Owns the store benchmark: loading entities while another process reads batches of them at a steady rate.

ours   `Store.write` and `Store.read`, with what makes records of numbers and numbers of records
bare   the client's package alone, on the same bytes in batches as large: no codec, no conditions, no checks

Both load slice by slice in turns into stores of their own, and are read in turns. Reads are due at fixed times whatever
became of the one before, and a read's latency counts from when it was due.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Final, Protocol

import lmdb
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kar.records.v1 import records_pb2
from kar_bench.studies.quality_report import IDLE_CORES
from kar_kernels.benchmark.machine import machine, others_busy
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import InputError, UnavailableError
from kar_sidecar.features import FeatureLayout
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Store, vector_part
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.lmdb import BATCH, DATA, MAP_SIZE_BYTES
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import decode_vectors, encode_vectors

__all__ = ["Options", "measure_store", "store_table"]

SIDES: Final = ("bare", "ours")
STAGES: Final = ("before", "during", "after")
OVER: Final = len(STAGES)
SLICES: Final = 20
"""Equal turns of loading; one more, before anybody reads, makes the store that is read at first."""
KEYS: Final = 200
"""Entities in one read."""
DIM: Final = 32
SPACE: Final = "0123456789ab"
WRITTEN_AT_MS: Final = 1
ENCODED_AT_ONCE: Final = 1_000
READ_TIMEOUT_S: Final = 5.0
INDEX_BYTES: Final = 64
"""Of an Aerospike record in the primary index, in memory on each node that has it."""
SCHEMA: Final = records_pb2.FeatureSchema(
    features=[
        records_pb2.Feature(name="year", entity=records_pb2.ENTITY_KIND_ITEM, type=records_pb2.FEATURE_TYPE_NUMERIC),
        records_pb2.Feature(
            name="genres", entity=records_pb2.ENTITY_KIND_ITEM, type=records_pb2.FEATURE_TYPE_CATEGORICAL, width=4
        ),
    ]
)
LAYOUT: Final = FeatureLayout(SCHEMA, ITEM)


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    stores: Sequence[str] = ()
    """URLs; an LMDB path is a folder for temporary ones."""
    entities: int = 1_000_000
    reads_per_s: float = 100.0
    quiet_s: float = 10.0
    """Seconds of reading before the load, and again after it."""
    text_bytes: int = 0
    """Of each entity's text; 0: none."""


def _parts(options: Options) -> list[str]:
    return [FEATURES, vector_part(SPACE), *([TEXT] if options.text_bytes else [])]


def _names(ids: Iterable[int]) -> list[str]:
    return [f"item-{number:09d}" for number in ids]


def _vectors(first: int, rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(first).standard_normal((rows, DIM), dtype=np.float32)


def _blobs(part: str, first: int, rows: int, options: Options) -> Iterator[bytes]:
    """One part of entities `first` on, encoded as it is asked for."""
    if part == TEXT:
        yield from (f"{number:09d}".encode().ljust(options.text_bytes, b".") for number in range(first, first + rows))
    elif part == FEATURES:
        row = LAYOUT.row({"year": 1995, "genres": ["Drama", "War"]})
        for number in range(first, first + rows):
            row["year"] = number
            yield LAYOUT.encode(row, written_at_ms=WRITTEN_AT_MS)
    else:
        for at in range(first, first + rows, ENCODED_AT_ONCE):
            vectors = _vectors(at, min(ENCODED_AT_ONCE, first + rows - at))
            yield from encode_vectors(vectors, SPACE, written_at_ms=WRITTEN_AT_MS)


class _Side(Protocol):
    """One way to load and read one store."""

    def load(self, part: str, names: Sequence[str], blobs: Iterable[bytes]) -> None: ...

    def read(self, names: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class _Ours:
    def __init__(self, store: Store) -> None:
        self._store, self.close = store, store.close

    def load(self, part: str, names: Sequence[str], blobs: Iterable[bytes]) -> None:
        keys = (EntityKey(ITEM, name) for name in names)
        # As `kar publish` does: vectors where newer, features and texts where they differ.
        self._store.write(part, zip(keys, blobs, strict=True), newer_only=part == vector_part(SPACE))

    def read(self, names: Sequence[str]) -> None:
        keys = [EntityKey(ITEM, name) for name in names]
        features, vectors = zip(*self._store.read(keys, (FEATURES, vector_part(SPACE)), READ_TIMEOUT_S), strict=True)
        LAYOUT.decode_items(features)
        decode_vectors(vectors, SPACE, DIM, np.zeros(DIM, np.float32), dtype="float32", at_ms=WRITTEN_AT_MS)


class _BareLmdb:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(folder), map_size=MAP_SIZE_BYTES)
        self.close = self._env.close

    def load(self, part: str, names: Sequence[str], blobs: Iterable[bytes]) -> None:
        prefix, records = part.encode(), list(zip(names, blobs, strict=True))
        for at in range(0, len(records), BATCH):
            with self._env.begin(write=True) as transaction:
                for name, blob in records[at : at + BATCH]:
                    transaction.put(prefix + name.encode(), blob)

    def read(self, names: Sequence[str]) -> None:
        features, vectors = FEATURES.encode(), vector_part(SPACE).encode()
        with self._env.begin() as transaction:
            for name in names:
                transaction.get(features + name.encode())
                transaction.get(vectors + name.encode())


class _BareAerospike:
    def __init__(self, url: str, settings: AerospikeSettings) -> None:
        import aerospike  # where LMDB alone is measured nobody needs it

        self._aerospike = aerospike
        servers, self._namespace, self._set = url.partition(":")[2].split("/")
        hosts = [server.rsplit(":", 1) for server in servers.split(",")]
        self._client = aerospike.client({"hosts": [(host, int(port)) for host, port in hosts]})
        self._batch = settings.batch_records
        self.close = self._client.close

    def load(self, part: str, names: Sequence[str], blobs: Iterable[bytes]) -> None:
        from aerospike_helpers.batch.records import BatchRecords, Write
        from aerospike_helpers.operations import operations

        records, policy = list(zip(names, blobs, strict=True)), {"ttl": self._aerospike.TTL_NEVER_EXPIRE}
        for at in range(0, len(records), self._batch):
            writes = [
                Write((self._namespace, self._set, name), [operations.write(part, blob)], policy=policy)
                for name, blob in records[at : at + self._batch]
            ]
            self._client.batch_write(BatchRecords(writes), {"total_timeout": 30_000, "socket_timeout": 30_000})

    def read(self, names: Sequence[str]) -> None:
        keys = [(self._namespace, self._set, name) for name in names]
        self._client.batch_read(keys, [FEATURES, vector_part(SPACE)], {"total_timeout": 5_000})

    def used_bytes(self) -> int:
        """Of data and index, all copies."""
        used = 0
        for _, answer in self._client.info_all(f"sets/{self._namespace}/{self._set}").values():
            found = dict(pair.split("=", 1) for pair in answer.split("\t")[-1].strip(" \n;").split(":") if "=" in pair)
            used += int(found["data_used_bytes"]) + INDEX_BYTES * int(found["objects"])
        return used

    def empty(self) -> None:
        self._client.truncate(self._namespace, self._set, 0)

    def build(self) -> str:
        return next(iter(self._client.info_all("build").values()))[1].split("\t")[-1].strip()


@dataclass(frozen=True, slots=True)
class _Target:
    """Two stores of one kind, side by side."""

    name: str
    urls: Mapping[str, str]
    settings: AerospikeSettings

    @staticmethod
    def of(url: str, settings: AerospikeSettings, stack: ExitStack) -> "_Target":
        scheme, _, rest = url.partition(":")
        if scheme == "lmdb":
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=rest or None))
            return _Target("LMDB", {side: f"lmdb:{folder}/{side}" for side in SIDES}, settings)
        if scheme != "aerospike" or rest.count("/") != 2:
            raise InputError(f"{url!r} is not a store to measure: use lmdb:FOLDER or aerospike:HOST:PORT/NAMESPACE/SET")
        target = _Target("Aerospike", {side: f"{url}_{side}" for side in SIDES}, settings)
        for side_url in target.urls.values():
            side = stack.enter_context(closing(_BareAerospike(side_url, settings)))
            side.empty()
            stack.callback(side.empty)
        return target

    def open(self, side: str) -> _Side:
        url = self.urls[side]
        if side == "ours":
            return _Ours(open_store(url, aerospike=self.settings))
        if self.name == "LMDB":
            return _BareLmdb(Path(url.removeprefix("lmdb:")))
        return _BareAerospike(url, self.settings)

    def bytes_per_entity(self, side: str, entities: int) -> float:
        """Of the LMDB file; of Aerospike's data and index, all copies."""
        url = self.urls[side]
        if self.name == "LMDB":
            return (Path(url.removeprefix("lmdb:")) / DATA).stat().st_size / entities
        with closing(_BareAerospike(url, self.settings)) as opened:
            return opened.used_bytes() / entities


Read = tuple[int, str, float, bool]
"""Stage, side, seconds since it was due, and whether it began later than the next one was due."""


def _read_steadily(
    target: _Target, per_s: float, stage: "Synchronized[int]", loaded: "Synchronized[int]", answer: Connection
) -> None:
    """The reading process: says when it is ready, reads until the last stage is over, and answers with its reads."""
    sides = {side: target.open(side) for side in SIDES}
    rng = np.random.default_rng(0)
    reads: list[Read] = []
    answer.send(None)
    began = time.perf_counter()
    for number in count():
        due = began + number / per_s
        time.sleep(max(due - time.perf_counter(), 0))
        now = stage.value
        if now == OVER:
            break
        side = SIDES[number % 2]
        names = _names(rng.integers(loaded.value, size=KEYS).tolist())
        late = time.perf_counter() - due > 1 / per_s
        sides[side].read(names)
        reads.append((now, side, time.perf_counter() - due, late))
    for opened in sides.values():
        opened.close()
    answer.send(reads)


def measure_store(
    options: Options,
    settings: AerospikeSettings | None = None,
    *,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Load and read every store of `options`.

    `rows` of the report has `{store, implementation, records_per_s, low, high, bytes_per_entity, reads}`: parts of
    entities written a second, median and extremes over slices; and of reads `before`, `during` and `after` the load
    `{count, late, p50_ms, p95_ms, p99_ms}`. `ratios` has `{store, load, low, high, reads}`: the rate of ours to that of
    bare slice by slice, and the median latency of ours to that of bare at each stage.

    Raises:
        InputError: not such a URL.
        UnavailableError: a store does not answer.
    """
    busy = others_busy()
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    versions = {"lmdb": lmdb.__version__, "liblmdb": ".".join(map(str, lmdb.version()))}
    for url in options.stores:
        with ExitStack() as stack:
            target = _Target.of(url, settings or AerospikeSettings(), stack)
            if target.name == "Aerospike":
                with closing(_BareAerospike(target.urls["bare"], target.settings)) as server:
                    versions["aerospike server"] = server.build()
            seconds, reads, sizes = _measure(target, options, on_step)
        found = _rows(target.name, options, seconds, reads, sizes)
        rows += found
        ratios.append(_ratios(target.name, seconds, found))
    return {
        "entities": options.entities,
        "parts": [part.removesuffix(SPACE) for part in _parts(options)],
        "part_bytes": [len(next(_blobs(part, 0, 1, options))) for part in _parts(options)],
        "keys_of_a_read": KEYS,
        "reads_per_s": options.reads_per_s,
        "rows": rows,
        "ratios": ratios,
        "others_busy_cores": {"before": busy},
        "versions": versions,
        "machine": machine(),
    }


def _measure(
    target: _Target, options: Options, on_step: Callable[[str, int, int], None]
) -> tuple[dict[str, list[float]], list[Read], dict[str, float]]:
    """Seconds of each side's slices, all reads, and bytes an entity."""
    spawn = multiprocessing.get_context("spawn")
    stage, loaded = spawn.Value("i", 0), spawn.Value("q", 0)
    bounds = np.linspace(0, options.entities, SLICES + 2).astype(int).tolist()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        sides: dict[str, _Side] = {side: stack.enter_context(closing(target.open(side))) for side in SIDES}
        for side in SIDES:
            _load(sides[side], 0, bounds[1], options, ours=side == "ours")
        loaded.value = bounds[1]
        here, there = spawn.Pipe()
        reader = spawn.Process(target=_read_steadily, args=(target, options.reads_per_s, stage, loaded, there))
        reader.start()
        stack.callback(reader.join)
        there.close()  # so that a reader that dies is seen as the end of the pipe
        _answer(here)
        try:
            on_step(f"{target.name}: reading", 0, SLICES)
            time.sleep(options.quiet_s)
            stage.value = STAGES.index("during")
            for number in range(1, SLICES + 1):
                first, rows = bounds[number], bounds[number + 1] - bounds[number]
                for side in SIDES if number % 2 else SIDES[::-1]:
                    on_step(f"{target.name}: loading, {side}", number - 1, SLICES)
                    seconds[side].append(_load(sides[side], first, rows, options, ours=side == "ours"))
                loaded.value = first + rows
            stage.value = STAGES.index("after")
            on_step(f"{target.name}: reading", SLICES, SLICES)
            time.sleep(options.quiet_s)
        finally:
            stage.value = OVER
        reads = _answer(here)
        sizes = {side: target.bytes_per_entity(side, options.entities) for side in SIDES}
    return seconds, reads, sizes


def _answer(reader: Connection) -> Any:
    """What the reading process sends next."""
    try:
        return reader.recv()
    except EOFError as error:
        raise UnavailableError("the reading process failed, see its error above: mend that and run again") from error


def _load(side: _Side, first: int, rows: int, options: Options, *, ours: bool) -> float:
    """Write all parts of some entities; returns the seconds, which for ours count the encoding."""
    names = _names(range(first, first + rows))
    took = 0.0
    for part in _parts(options):
        blobs: Iterable[bytes] = _blobs(part, first, rows, options)
        if not ours:
            blobs = list(blobs)
        began = time.perf_counter()
        side.load(part, names, blobs)
        took += time.perf_counter() - began
    return took


def _rows(
    store: str,
    options: Options,
    seconds: Mapping[str, Sequence[float]],
    reads: Sequence[Read],
    sizes: Mapping[str, float],
) -> list[dict[str, Any]]:
    records = options.entities / (SLICES + 1) * len(_parts(options))
    rows = []
    for side in SIDES:
        rates = sorted(records / took for took in seconds[side])
        rows.append(
            {
                "store": store,
                "implementation": side,
                "records_per_s": statistics.median(rates),
                "low": rates[0],
                "high": rates[-1],
                "bytes_per_entity": sizes[side],
                "reads": {name: _latencies(reads, stage, side) for stage, name in enumerate(STAGES)},
            }
        )
    return rows


def _latencies(reads: Sequence[Read], stage: int, side: str) -> dict[str, float]:
    of = [(took, late) for at, who, took, late in reads if (at, who) == (stage, side)]
    if not of:
        return {"count": 0, "late": 0}
    p50, p95, p99 = (1e3 * np.percentile([took for took, _ in of], (50, 95, 99))).tolist()
    return {"count": len(of), "late": sum(late for _, late in of), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def _ratios(store: str, seconds: Mapping[str, Sequence[float]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    loads = sorted(bare / ours for bare, ours in zip(seconds["bare"], seconds["ours"], strict=True))
    bare, ours = (row["reads"] for row in rows)
    return {
        "store": store,
        "load": statistics.median(loads),
        "low": loads[0],
        "high": loads[-1],
        "reads": {
            stage: ours[stage]["p50_ms"] / bare[stage]["p50_ms"]
            for stage in STAGES
            if ours[stage]["count"] and bare[stage]["count"]
        },
    }


def store_table(report: Mapping[str, Any]) -> Group:
    """Rates, sizes, latencies and ratios, ready to print."""
    table = Table(title="loading, and reading 200 entities meanwhile", box=box.SIMPLE, padding=0)
    for column in ("store", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("records/s", "bytes/entity", *(f"{stage}: p50, p95, p99 ms (late)" for stage in STAGES)):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        cells = [_told(row["reads"][stage]) for stage in STAGES]
        rate = f"{row['records_per_s']:,.0f} [{row['low']:,.0f}, {row['high']:,.0f}]"
        table.add_row(row["store"], row["implementation"], rate, f"{row['bytes_per_entity']:,.0f}", *cells)
    lines = [
        f"{found['store']}: ours / bare {found['load']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of records/s; "
        f"median latency {', '.join(f'{stage} {ratio:.2f}' for stage, ratio in found['reads'].items())}"
        for found in report["ratios"]
    ]
    if not any(row["store"] == "Aerospike" for row in report["rows"]):
        lines.append("Aerospike was not measured: name one with --store or AEROSPIKE_HOSTS")
    busy = report["others_busy_cores"]["before"]
    if busy > IDLE_CORES:
        lines.append(f"others kept {busy:.1f} cores busy: measure again on an idle machine")
    return Group(table, *(Text(line) for line in lines))


def _told(reads: Mapping[str, Any]) -> str:
    if not reads["count"]:
        return "none"
    return ", ".join(f"{reads[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms")) + f" ({reads['late']})"
