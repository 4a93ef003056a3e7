"""Owns the process that reads from both stores at a steady rate while the benchmark loads them.

Reads are due at fixed times, however long the read before takes. The latency of a read counts from the time at which it
was due, so that a stall is not hidden by reads that were never begun.
"""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Final, NamedTuple

import numpy as np

from kar_bench.performance.store.clients import IMPLEMENTATIONS, StorePair
from kar_bench.performance.store.options import item_ids
from kar_sidecar.errors import UnavailableError

__all__ = ["READ_ENTITIES", "STAGES", "Reader", "TimedRead", "reading"]

STAGES: Final = ("before", "during", "after")
"""Stages of the load in which reads are timed."""
FINISHED: Final = len(STAGES)
READ_ENTITIES: Final = 200
"""Entities in one read."""


class TimedRead(NamedTuple):
    """One read of one implementation."""

    stage: int
    """A position in `STAGES`."""
    implementation: str
    seconds: float
    """Seconds since the read was due."""
    late: bool
    """Whether it began only after the next read was due."""


class Reader:
    """The reading process, seen from the process that loads."""

    def __init__(self, stage: "Synchronized[int]", loaded: "Synchronized[int]", connection: Connection) -> None:
        self._stage, self._loaded, self._connection = stage, loaded, connection
        self.reads: list[TimedRead] = []
        """All reads, once the process has ended."""

    def enter(self, stage: str) -> None:
        """Count the reads from now on for `stage`."""
        self._stage.value = STAGES.index(stage)

    def extend(self, loaded: int) -> None:
        """Let it read the first `loaded` entities."""
        self._loaded.value = loaded

    def stop(self) -> None:
        """Let it end after the current read."""
        self._stage.value = FINISHED

    def receive(self) -> Any:
        """What it sends next.

        Raises:
            UnavailableError: the process died.
        """
        try:
            return self._connection.recv()
        except EOFError as error:
            raise UnavailableError(
                "the reading process failed, see its error above: fix its cause and run again"
            ) from error


@contextmanager
def reading(pair: StorePair, reads_per_s: float, loaded: int) -> Iterator[Reader]:
    """Read from both stores until the context ends; `reads` of the reader are complete then."""
    spawn = multiprocessing.get_context("spawn")
    stage, readable = spawn.Value("i", 0), spawn.Value("q", loaded)
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_read_steadily, args=(pair, reads_per_s, stage, readable, theirs))
    process.start()
    theirs.close()  # so that the death of the process shows as the end of the pipe
    reader = Reader(stage, readable, ours)
    try:
        reader.receive()  # it has connected
        try:
            yield reader
        finally:
            reader.stop()
        reader.reads = reader.receive()
    finally:
        ours.close()  # after a failure nobody takes the reads, and a full pipe would keep the process alive
        process.join()


def _read_steadily(
    pair: StorePair,
    reads_per_s: float,
    stage: "Synchronized[int]",
    loaded: "Synchronized[int]",
    connection: Connection,
) -> None:
    """Connect, say so, read until the load has finished, and send all reads."""
    clients = {implementation: pair.connect(implementation) for implementation in IMPLEMENTATIONS}
    rng = np.random.default_rng(0)
    reads: list[TimedRead] = []
    connection.send(None)
    began = time.perf_counter()
    for number in count():
        due = began + number / reads_per_s
        time.sleep(max(due - time.perf_counter(), 0))
        current = stage.value
        if current == FINISHED:
            break
        implementation = IMPLEMENTATIONS[number % 2]
        ids = item_ids(rng.integers(loaded.value, size=READ_ENTITIES).tolist())
        late = time.perf_counter() - due > 1 / reads_per_s
        clients[implementation].read(ids)
        reads.append(TimedRead(current, implementation, time.perf_counter() - due, late))
    for client in clients.values():
        client.close()
    connection.send(reads)
