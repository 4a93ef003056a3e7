"""Owns the clustered store: one Aerospike record per entity, one bin per part.

Keys are "<kind number>:<id>" for entities and "meta:<name>" for meta values, as bytes, because the client ends a string
at its first NUL. Each part with a header has a second bin `<part>_t` with its `written_at_ms`, so that the server can
compare times when only newer records may be written.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from random import Random
from typing import Any, Final, TypeVar

import aerospike
from aerospike import exception
from aerospike_helpers import expressions as exp
from aerospike_helpers.batch.records import BatchRecords, Write
from aerospike_helpers.operations import operations

from kar_sidecar.errors import IncompleteError, UnavailableError
from kar_sidecar.store import TEXT, EntityKey, Record
from kar_sidecar.store.aerospike_errors import FILTERED_OUT, NOT_FOUND, OK, ClusterErrors
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.records import in_batches, read_header

__all__ = ["AerospikeStore"]

log = logging.getLogger(__name__)

T = TypeVar("T")
BATCH_BYTES: Final = 1 << 20
"""A batch of writes ends with the record that reaches this size: it bounds the bytes that a server gets at once."""
META_READ_MS: Final = 500
"""Longest wait for one meta value. A health check reads up to three of them within 1,000 ms. If a node hangs, a second
attempt starts after half of this time and reads from a replica."""
POLL_S: Final = 0.05
"""Time between two checks of a background job."""
FIRST_PAUSE_S: Final = 0.05
"""Pause before a refused write is repeated; it doubles each time."""
LONGEST_PAUSE_S: Final = 2.0
WARNED_PAUSE_S: Final = 0.4
"""Pauses from this length on are logged as warnings; shorter ones only slow a load down."""
SWEEPS: Final = 5
"""Largest number of background jobs that remove one part: a record that moves between nodes can escape a job."""
VALUE: Final = "value"
"""The bin of a meta value."""


def _time_bin(part: str) -> str:
    return f"{part}_t"  # a bin name has at most 15 characters


@lru_cache(maxsize=16)  # all vectors of a release have the same time
def _part_is_older(part: str, written_at_ms: int) -> Any:
    """Filter expression of a write: true where the part is absent or older."""
    return exp.Or(exp.Not(exp.BinExists(part)), exp.LT(exp.IntBin(_time_bin(part)), written_at_ms)).compile()


@lru_cache(maxsize=16)
def _part_differs_template(part: str) -> tuple[Any, int]:
    """The compiled filter of `_part_differs` for empty bytes, and the position of the step that holds them."""
    steps = exp.Or(exp.Not(exp.BinExists(part)), exp.NE(exp.BlobBin(part), b"")).compile()
    return steps, next(position for position, step in enumerate(steps) if step[2] == {"val": b""})


def _part_differs(part: str, blob: bytes) -> Any:
    """Filter expression of a write: true where the part is absent or has other bytes; compiled once per part."""
    steps, position = _part_differs_template(part)
    operation, kind, _, children = steps[position]
    return [*steps[:position], (operation, kind, {"val": blob}, children), *steps[position + 1 :]]


def _config(hosts: Sequence[tuple[str, int]], settings: AerospikeSettings, password: str) -> dict[str, Any]:
    """The client's configuration; with `validate_keys` the client refuses unknown keys."""
    tls = {
        "enable": settings.tls,
        **{
            name: str(file)
            for name, file in (
                ("cafile", settings.tls_ca_file),
                ("certfile", settings.tls_cert_file),
                ("keyfile", settings.tls_key_file),
            )
            if file
        },
    }
    return {
        "validate_keys": True,
        "hosts": [(host, port, settings.tls_name or host) if settings.tls else (host, port) for host, port in hosts],
        "connect_timeout": settings.connect_timeout_ms,
        "max_conns_per_node": settings.max_connections,
        "use_services_alternate": settings.use_services_alternate,
        "policies": {
            "auth_mode": getattr(aerospike, f"AUTH_{settings.auth_mode.upper()}"),
            "login_timeout_ms": settings.login_timeout_ms,
        },
        **({"tls": tls} if settings.tls else {}),
        **({"user": settings.user, "password": password} if settings.user else {}),
    }


class AerospikeStore:
    """A `Store` in one set of an Aerospike namespace, which many sidecars and publishers use at the same time."""

    blocking = True

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        namespace: str,
        set_name: str,
        settings: AerospikeSettings,
        *,
        password: str = "",
        connect: Callable[[dict[str, Any]], Any] = aerospike.client,
        sleep: Callable[[float], None] = time.sleep,
        random: Random | None = None,
    ) -> None:
        """Connect to a cluster.

        Args:
            hosts: Name and port of some nodes; one running node is enough.
            namespace: An existing namespace.
            set_name: Created by the first write.
            settings: Connection, time limits and batch sizes.
            password: Password of `settings.user`.
            connect: Makes a client from its configuration.
            sleep: Waits a number of seconds.
            random: Draws the pauses between repeated writes.

        Raises:
            UnavailableError: no host answers.
            PreconditionError: the cluster refuses the user.
        """
        self._namespace, self._set, self._settings = namespace, set_name, settings
        self._cluster = f"Aerospike {', '.join(f'{host}:{port}' for host, port in hosts)} ({namespace}/{set_name})"
        self._errors = ClusterErrors(self._cluster)
        self._sleep, self._random = sleep, random or Random()
        self._batch_policy = {
            "concurrent": settings.batch_concurrent,
            "allow_inline": settings.batch_allow_inline,
            "allow_inline_ssd": settings.batch_allow_inline_ssd,
            "respond_all_keys": settings.respond_all_keys,
        }
        self._write_time_policy = {
            "total_timeout": settings.write_timeout_ms,
            "socket_timeout": settings.write_attempt_timeout_ms,
            "max_retries": settings.write_max_retries,
        }
        self._meta_policy = self._read_policy(META_READ_MS)
        self._write_policy: dict[str, Any] = {
            "ttl": aerospike.TTL_NEVER_EXPIRE,  # our header holds the expiry: a stale vector is better than none
            "commit_level": getattr(aerospike, f"POLICY_COMMIT_LEVEL_{settings.commit_level.upper()}"),
        }
        with self._errors.translated():
            self._client = connect(_config(hosts, settings, password))

    def _repeat_while_refused(self, write: Callable[[], T]) -> T:
        """Run a write and return its result; repeat it after growing, random pauses while it fails temporarily."""
        left_s, pause_s = self._settings.write_patience_ms / 1e3, FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            try:
                return write()
            except UnavailableError as error:
                pause = pause_s * self._random.uniform(0.5, 1)
                left_s -= time.monotonic() - started_s + pause
                if left_s < 0:
                    raise
                level = logging.WARNING if pause_s >= WARNED_PAUSE_S else logging.DEBUG
                log.log(level, "%s; trying again in %.1f s", error, pause)
            self._sleep(pause)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _user_key(self, name: str) -> tuple[str, str, bytearray]:
        return self._namespace, self._set, bytearray(name.encode())

    def _key(self, key: EntityKey) -> tuple[str, str, bytearray]:
        return self._user_key(f"{key.kind.number}:{key.id}")

    def _read_policy(self, limit_ms: int, attempt_ms: int = 0) -> dict[str, int]:
        retries = self._settings.read_max_retries
        return {
            "total_timeout": limit_ms,
            "socket_timeout": attempt_ms or max(1, limit_ms // (1 + retries)),
            "max_retries": retries,
        }

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """See `Store.read`; one batch read."""
        if not keys:
            return []
        limit_ms = self._settings.read_timeout_ms if timeout_s is None else max(1, int(1000 * timeout_s))
        policy = {**self._batch_policy, **self._read_policy(limit_ms, self._settings.read_attempt_timeout_ms)}
        with self._errors.translated():
            batch = self._client.batch_read([self._key(key) for key in keys], list(parts), policy)
        absent: Record = (None,) * len(parts)
        records = [
            absent if entry.record is None or entry.record[2] is None else tuple(map(entry.record[2].get, parts))
            for entry in batch.batch_records
        ]
        unread = [row for row, entry in enumerate(batch.batch_records) if entry.result not in (OK, NOT_FOUND)]
        if unread:
            error = self._errors.of_records(batch.batch_records[row].result for row in unread)
            if len(unread) == len(records) or not isinstance(error, UnavailableError):
                raise error
            raise IncompleteError(f"{len(unread)} of {len(records)} records were not read: {error}", records, unread)
        return records

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`. A killed or failed write may have stored any of its records: write all of them again.

        Records that an overloaded or lost cluster refuses are written again for `write_patience_ms`. If a record was
        written but the answer was lost, the next attempt finds it unchanged and does not count it.
        """
        return sum(
            self._write_batch(part, batch, newer_only)
            for batch in in_batches(records, self._settings.batch_records, BATCH_BYTES)
        )

    def _write_batch(self, part: str, batch: dict[EntityKey, bytes], newer_only: bool) -> int:
        pending = [self._write(part, key, blob, newer_only) for key, blob in batch.items()]
        written = 0

        def write_pending() -> None:
            nonlocal pending, written
            with self._errors.translated():
                self._client.batch_write(BatchRecords(pending), {**self._batch_policy, **self._write_time_policy})
            written += sum(write.result == OK for write in pending)
            pending = [write for write in pending if write.result not in (OK, FILTERED_OUT)]
            if pending:
                raise self._errors.of_records(write.result for write in pending)

        self._repeat_while_refused(write_pending)
        return written

    def _write(self, part: str, key: EntityKey, blob: bytes, newer_only: bool) -> Write:
        ops = [operations.write(part, blob)]
        if part != TEXT:
            written_at_ms = read_header(blob).written_at_ms
            ops.append(operations.write(_time_bin(part), written_at_ms))
        condition = _part_is_older(part, written_at_ms) if newer_only else _part_differs(part, blob)
        return Write(self._key(key), ops, policy={**self._write_policy, "expressions": condition})

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`. Background jobs on the servers run until no record has the part."""
        policy = {"expressions": exp.BinExists(part).compile()}
        total = remaining = self._count(policy)
        for _ in range(SWEEPS):
            if not remaining:
                return total
            with self._errors.translated():
                query = self._query()
                query.add_ops([operations.write(name, None) for name in (part, _time_bin(part))])
                job = query.execute_background(policy)
                while self._client.job_info(job, aerospike.JOB_QUERY)["status"] == aerospike.JOB_STATUS_INPROGRESS:
                    self._sleep(POLL_S)
            remaining = self._count(policy)
        raise UnavailableError(
            f"{self._cluster} still has {remaining} records with {part}: retry when no node joins or leaves"
        )

    def _query(self) -> Any:
        return self._client.query(self._namespace, self._set)

    def _count(self, policy: dict[str, Any]) -> int:
        """Number of records that pass a filter; the records are streamed, not kept."""
        count = 0

        def count_record(record: object) -> None:
            nonlocal count
            count += 1

        with self._errors.translated():
            self._query().foreach(count_record, policy, {"nobins": True})
        return count

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`; takes at most `META_READ_MS`."""
        with self._errors.translated(), suppress(exception.RecordNotFound):
            return self._client.get(self._user_key(f"meta:{name}"), self._meta_policy)[2][VALUE]
        return None

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`; repeated as other writes are."""
        key, policy = self._user_key(f"meta:{name}"), {**self._write_time_policy, **self._write_policy}

        def put() -> None:
            with self._errors.translated(), suppress(exception.RecordNotFound):
                if value is None:
                    self._client.remove(key, policy=self._write_time_policy)
                else:
                    self._client.put(key, {VALUE: value}, policy=policy)

        self._repeat_while_refused(put)

    def close(self) -> None:
        """See `Store.close`."""
        self._client.close()
