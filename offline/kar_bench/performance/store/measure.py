"""Owns the measurement of a store: both clients load slice by slice in turns, while another process reads."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final

import lmdb
import numpy as np
from rich.console import Group
from rich.table import Table

from kar_bench.harness import (
    OMIT_IF_NONE,
    BusyCores,
    LatencyPercentiles,
    OnStep,
    Spread,
    busy_cores_now,
    machine,
    new_table,
    notes,
    show_nothing,
)
from kar_bench.performance.store.clients import BARE, IMPLEMENTATIONS, OURS, Client, StorePair
from kar_bench.performance.store.options import SPACE, StoreBenchmarkOptions, encoded_records, item_ids
from kar_bench.performance.store.reader import READ_ENTITIES, STAGES, TimedRead, reading
from kar_sidecar.store.cluster import AerospikeSettings

__all__ = ["ReadLatency", "StoreRatio", "StoreReport", "StoreRow", "measure_store", "store_table"]

SLICES: Final = 20
"""Equal turns of loading. One more slice is loaded before anything reads."""


@dataclass(frozen=True, slots=True)
class ReadLatency:
    """Latencies of the reads of one stage; no percentiles where there were no reads."""

    count: int
    late: int
    """Reads that began only after the next one was due."""
    p50_ms: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    p95_ms: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    p99_ms: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)

    @staticmethod
    def of(reads: Sequence[TimedRead]) -> "ReadLatency":
        """Percentiles of `reads`."""
        if not reads:
            return ReadLatency(0, 0)
        percentiles = LatencyPercentiles.of([read.seconds for read in reads])
        return ReadLatency(len(reads), sum(read.late for read in reads), *percentiles)


@dataclass(frozen=True, slots=True)
class StoreRow:
    """One implementation on one store."""

    store: str
    implementation: str
    records_per_s: float
    """Parts of entities written a second: median over slices, then the slowest and the fastest."""
    low: float
    high: float
    bytes_per_entity: float
    reads: Mapping[str, ReadLatency]
    """By stage of the load."""


@dataclass(frozen=True, slots=True)
class StoreRatio:
    """Ours divided by bare: rate of loading, slice by slice, and median latency of reads by stage."""

    store: str
    load: float
    low: float
    high: float
    reads: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What was loaded, how fast, and how fast it was read meanwhile."""

    entities: int
    parts: Sequence[str]
    part_bytes: Sequence[int]
    keys_of_a_read: int
    reads_per_s: float
    rows: Sequence[StoreRow]
    ratios: Sequence[StoreRatio]
    others_busy_cores: BusyCores
    versions: Mapping[str, str]
    machine: str


@dataclass(frozen=True, slots=True)
class _Measured:
    """Seconds of each implementation's slices, all reads, and bytes of an entity by implementation."""

    seconds: Mapping[str, Sequence[float]]
    reads: Sequence[TimedRead]
    bytes_per_entity: Mapping[str, float]


def measure_store(
    options: StoreBenchmarkOptions,
    settings: AerospikeSettings | None = None,
    *,
    on_step: OnStep = show_nothing,
    busy_cores: Callable[[], float] = busy_cores_now,
) -> StoreReport:
    """Load and read every store of `options`.

    Args:
        options: What is loaded and read.
        settings: Settings of Aerospike.
        on_step: Called with what runs, the slices loaded, and their number.
        busy_cores: Measures the cores that other processes keep busy.

    Raises:
        InputError: a URL names no store that can be measured.
        UnavailableError: a store does not answer.
    """
    busy_before = busy_cores()
    rows: list[StoreRow] = []
    ratios: list[StoreRatio] = []
    versions = {"lmdb": lmdb.__version__, "liblmdb": ".".join(map(str, lmdb.version()))}
    for url in options.stores:
        with ExitStack() as stack:
            pair = StorePair.create(url, settings or AerospikeSettings(), stack)
            if server := pair.server_version():
                versions["aerospike server"] = server
            measured = _load_while_reading(pair, options, on_step)
        own_rows = [_row(pair.name, implementation, options, measured) for implementation in IMPLEMENTATIONS]
        rows += own_rows
        ratios.append(_ratio(measured.seconds, *own_rows))
    return StoreReport(
        options.entities,
        [part.removesuffix(SPACE) for part in options.parts],
        [len(next(encoded_records(part, 0, 1, options))) for part in options.parts],
        READ_ENTITIES,
        options.reads_per_s,
        rows,
        ratios,
        BusyCores(busy_before),
        versions,
        machine(),
    )


def _load_while_reading(pair: StorePair, options: StoreBenchmarkOptions, on_step: OnStep) -> _Measured:
    bounds = np.linspace(0, options.entities, SLICES + 2).astype(int).tolist()
    seconds: dict[str, list[float]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    with ExitStack() as stack:
        clients = {name: stack.enter_context(closing(pair.connect(name))) for name in IMPLEMENTATIONS}
        for name in IMPLEMENTATIONS:
            _load(clients[name], 0, bounds[1], options, encode_timed=name == OURS)
        with reading(pair, options.reads_per_s, loaded=bounds[1]) as reader:
            on_step(f"{pair.name}: reading", 0, SLICES)
            time.sleep(options.quiet_s)
            reader.enter("during")
            for number in range(1, SLICES + 1):
                first, end = bounds[number], bounds[number + 1]
                for name in IMPLEMENTATIONS if number % 2 else IMPLEMENTATIONS[::-1]:
                    on_step(f"{pair.name}: loading, {name}", number - 1, SLICES)
                    seconds[name].append(_load(clients[name], first, end, options, encode_timed=name == OURS))
                reader.extend(end)
            reader.enter("after")
            on_step(f"{pair.name}: reading", SLICES, SLICES)
            time.sleep(options.quiet_s)
        sizes = {name: pair.bytes_per_entity(name, options.entities) for name in IMPLEMENTATIONS}
    return _Measured(seconds, reader.reads, sizes)


def _load(client: Client, first: int, end: int, options: StoreBenchmarkOptions, *, encode_timed: bool) -> float:
    """Write all parts of the items `first` to `end - 1`; return the seconds, with or without those of encoding."""
    ids = item_ids(range(first, end))
    seconds = 0.0
    for part in options.parts:
        blobs: Iterable[bytes] = encoded_records(part, first, end - first, options)
        if not encode_timed:
            blobs = list(blobs)
        began = time.perf_counter()
        client.load(part, ids, blobs)
        seconds += time.perf_counter() - began
    return seconds


def _row(store: str, implementation: str, options: StoreBenchmarkOptions, measured: _Measured) -> StoreRow:
    records = options.entities / (SLICES + 1) * len(options.parts)
    rate = Spread.of([records / seconds for seconds in measured.seconds[implementation]])
    own_reads = [read for read in measured.reads if read.implementation == implementation]
    reads = {
        name: ReadLatency.of([read for read in own_reads if read.stage == stage]) for stage, name in enumerate(STAGES)
    }
    return StoreRow(store, implementation, *rate, measured.bytes_per_entity[implementation], reads)


def _ratio(seconds: Mapping[str, Sequence[float]], bare: StoreRow, ours: StoreRow) -> StoreRatio:
    load = Spread.of([bare_s / our_s for bare_s, our_s in zip(seconds[BARE], seconds[OURS], strict=True)])
    medians = {stage: (ours.reads[stage].p50_ms, bare.reads[stage].p50_ms) for stage in STAGES}
    reads = {stage: our_ms / bare_ms for stage, (our_ms, bare_ms) in medians.items() if our_ms and bare_ms}
    return StoreRatio(bare.store, *load, reads)


def store_table(report: StoreReport) -> Group:
    """Rates, sizes, latencies and ratios, ready to print."""
    table = _wrapping_table(
        f"loading, and reading {READ_ENTITIES} entities meanwhile",
        ("records/s", "bytes/entity", *(f"{stage}: p50, p95, p99 ms (late)" for stage in STAGES)),
    )
    for row in report.rows:
        latencies = [_latency_text(row.reads[stage]) for stage in STAGES]
        rate = f"{row.records_per_s:,.0f} [{row.low:,.0f}, {row.high:,.0f}]"
        table.add_row(row.store, row.implementation, rate, f"{row.bytes_per_entity:,.0f}", *latencies)
    lines = [
        f"{ratio.store}: ours / bare {ratio.load:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of records/s; "
        f"median latency {', '.join(f'{stage} {value:.2f}' for stage, value in ratio.reads.items())}"
        for ratio in report.ratios
    ]
    if not any(row.store == "Aerospike" for row in report.rows):
        lines.append("Aerospike was not measured: name one with --store or AEROSPIKE_HOSTS")
    return Group(table, *notes(lines + report.others_busy_cores.warnings()))


def _wrapping_table(title: str, numbers: Sequence[str]) -> Table:
    """A table whose wide numeric cells may wrap."""
    table = new_table(title, ("store", "implementation"), ())
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _latency_text(latency: ReadLatency) -> str:
    if latency.p50_ms is None:
        return "none"
    return f"{latency.p50_ms:.1f}, {latency.p95_ms:.1f}, {latency.p99_ms:.1f} ({latency.late})"
