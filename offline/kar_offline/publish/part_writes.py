"""Owns every way in which publishing writes records of one part into a store.

- `write_part`: all records of a release, resumed after a kill, at a limited rate.
- `write_changed`: fresh records, if they differ from the stored ones.

Both keep records of the store that are newer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from rich.progress import Progress

from kar_offline.publish.checkpoint import Checkpoint
from kar_offline.publish.released_entities import EntityRecords
from kar_sidecar.errors import IntegrityError
from kar_sidecar.store import Store
from kar_sidecar.store.records import HEADER, in_batches, read_header

__all__ = ["CHECKPOINT_EVERY", "PartRecords", "dated_after", "paced", "write_changed", "write_part"]

CHECKPOINT_EVERY: Final = 20_000
"""Records between two checkpoints: after a kill, at most this number of records is offered to the store again."""
SAMPLE_RECORDS: Final = 200
"""Records that are looked up before a checkpoint is trusted."""
READ_BATCH: Final = 1_000
"""Records that are compared with the store's at once."""
READ_TIMEOUT_S: Final = 5.0
BURST_S: Final = 0.5
"""Seconds of its rate that a paced publish may catch up at once after falling behind."""
SHORTEST_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class PartRecords:
    """The records of one part of a store, for all entities of a release."""

    name: str
    """Name in reports and checkpoints."""
    part: str
    """Name of the store's part."""
    make_records: Callable[[], EntityRecords]
    """Makes the records, in the same order at each call."""
    total: int
    """Number of records."""
    newer_only: bool
    """Whether a record that the store holds is kept unless it is older."""


def write_part(
    records: PartRecords,
    store: Store,
    checkpoint: Checkpoint,
    *,
    checkpoint_every: int = CHECKPOINT_EVERY,
    max_rate_per_s: int | None = None,
    progress: Progress,
) -> int:
    """Write the records that the checkpoint does not count yet; returns the number of records that changed the store.

    Args:
        records: The part and its records.
        store: The store.
        checkpoint: The checkpoint, which is saved each `checkpoint_every` records.
        checkpoint_every: Records between two checkpoints.
        max_rate_per_s: Maximal records per second; None: no limit.
        progress: Shows progress.
    """
    done = checkpoint.rows.get(records.name, 0)
    if not _are_stored(records, store, done):
        done = 0
    if done == records.total:
        return 0
    stream = iter(progress.track(records.make_records(), records.total, description=records.name))
    for _ in islice(stream, done):
        pass
    if max_rate_per_s is not None:
        stream = paced(stream, max_rate_per_s)
    written = 0
    # The last slice reaches beyond the last record, so that the generator runs to its end, where it may find an error.
    for start in range(done, records.total + 1, checkpoint_every):
        written += store.write(records.part, islice(stream, checkpoint_every), newer_only=records.newer_only)
        checkpoint.save(records.name, min(start + checkpoint_every, records.total))
    return written


def _are_stored(records: PartRecords, store: Store, rows: int) -> bool:
    """Whether a sample of the first `rows` records is stored; the part may have been removed since the checkpoint."""
    keys = [key for key, _ in islice(records.make_records(), min(rows, SAMPLE_RECORDS))]
    return all(blob is not None for (blob,) in store.read(keys, [records.part], READ_TIMEOUT_S))


def paced(
    records: EntityRecords,
    rate_per_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> EntityRecords:
    """Yield the records at `rate_per_s` at most; after a delay, at most `BURST_S` seconds are caught up faster."""
    due_s = clock()
    for record in records:
        now_s = clock()
        if due_s - now_s >= SHORTEST_PAUSE_S:
            sleep(due_s - now_s)
        due_s = max(due_s, now_s - BURST_S) + 1 / rate_per_s
        yield record


def _unchanged(blob: bytes, stored: bytes) -> bytes:
    return blob


def write_changed(
    store: Store, part: str, records: EntityRecords, restamp: Callable[[bytes, bytes], bytes] = _unchanged
) -> int:
    """Write the records that the store lacks, or holds with other content; returns the number of written records.

    Records that differ only in their time of writing count as equal. A record that is newer in the store is kept.

    Args:
        store: The store.
        part: Name of the store's part.
        records: The fresh records.
        restamp: Gives the record to write, from a fresh record and the stored one; see `dated_after`.
    """
    written = 0
    for batch in in_batches(records, READ_BATCH):
        stored_records = store.read(list(batch), [part], READ_TIMEOUT_S)
        changed = [
            (key, blob if stored is None else restamp(blob, stored))
            for (key, blob), (stored,) in zip(batch.items(), stored_records, strict=True)
            if stored is None or not _same_content(blob, stored)
        ]
        written += store.write(part, changed, newer_only=True)
    return written


def dated_after(blob: bytes, stored: bytes) -> bytes:
    """A feature record dated 1 ms after the stored one, if both are of the same second or the stored one is older.

    A feature record has the time of its user's last event. An event that arrives late does not change that time, yet
    the record must replace the stored one.
    """
    try:
        header, stored_header = read_header(blob), read_header(stored)
    except IntegrityError:
        return blob
    if stored_header.written_at_ms // 1000 > header.written_at_ms // 1000:
        return blob
    later = replace(header, written_at_ms=max(header.written_at_ms, stored_header.written_at_ms + 1))
    return later.seal(blob[HEADER.itemsize :])


def _same_content(blob: bytes, stored: bytes) -> bool:
    try:
        header, stored_header = read_header(blob), read_header(stored)
    except IntegrityError:
        return False
    same_header = header == replace(stored_header, written_at_ms=header.written_at_ms)
    return same_header and blob[HEADER.itemsize :] == stored[HEADER.itemsize :]
