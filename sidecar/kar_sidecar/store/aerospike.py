"""Owns the clustered store: one Aerospike record per entity, one bin per part.

User keys: "<kind>:<id>" of entities, "meta:<name>" of meta values; as bytes, since the client ends a string at its
first NUL. Beside each part with a header lies its `written_at_ms` as an integer bin, so that the server itself
compares when only newer records may be written.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import aerospike
from aerospike import exception
from aerospike_helpers import expressions as exp
from aerospike_helpers.batch.records import BatchRecords, Write
from aerospike_helpers.operations import operations

from kar_sidecar.errors import DeadlineError, InputError, KarError, PreconditionError, UnavailableError
from kar_sidecar.store import TEXT, EntityKey, Record
from kar_sidecar.store.records import in_batches, read_header

__all__ = ["AerospikeStore"]

BATCH: Final = 500
"""Records in one batch write."""
POLL_S: Final = 0.05
"""Between two looks at a background job."""
VALUE: Final = "value"
"""The bin of a meta value."""
OK: Final = 0
NOT_FOUND: Final = exception.RecordNotFound.code
FILTERED_OUT: Final = exception.FilteredOut.code
NO_RESPONSE: Final[int] = exception.NoResponse.code  # type: ignore[attr-defined]
FAILURES: Final[dict[int | None, tuple[type[KarError], str]]] = {
    exception.TimeoutError.code: (DeadlineError, "did not answer in time: allow more or add capacity"),
    NO_RESPONSE: (DeadlineError, "did not answer in time: allow more or add capacity"),
    exception.NamespaceNotFound.code: (PreconditionError, "has no such namespace: configure it or name another"),
    exception.RecordTooBig.code: (InputError, "takes no record this large: make it smaller"),
    exception.BinNameError.code: (InputError, "takes no part name this long: make it shorter"),
}
"""Codes of the client and of single records in a batch; any other one is UNAVAILABLE."""


def _time_bin(part: str) -> str:
    return f"{part}_t"  # at most 15 characters, as bin names are


class AerospikeStore:
    """A `Store` in one set of an Aerospike namespace, for many sidecars and publishers at a time."""

    blocking = True

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        namespace: str,
        set_name: str,
        *,
        read_timeout_s: float = 0.05,
        write_timeout_s: float = 5.0,
        connect_timeout_s: float = 2.0,
    ) -> None:
        """Connect to the cluster that `hosts` (name, port) belong to.

        `read_timeout_s` bounds batch reads that name no time of their own, `write_timeout_s` each batch of a write
        and each look at a meta value.

        Raises:
            UnavailableError: no host answers.
        """
        self._namespace, self._set = namespace, set_name
        self._where = f"Aerospike {', '.join(f'{host}:{port}' for host, port in hosts)} ({namespace}/{set_name})"
        self._read_timeout_s = read_timeout_s
        write_timeout_ms = int(write_timeout_s * 1000)
        self._patient_policy = {"total_timeout": write_timeout_ms, "socket_timeout": write_timeout_ms}
        self._write_policy = {
            **self._patient_policy,
            "ttl": aerospike.TTL_NEVER_EXPIRE,  # expiry is in our header: a stale vector still beats none
        }
        with self._failures():
            self._client = aerospike.client({"hosts": list(hosts), "connect_timeout": int(connect_timeout_s * 1000)})

    def _error(self, code: int | None, text: str) -> KarError:
        kind, what = FAILURES.get(code, (UnavailableError, f"failed ({text}): see that it runs, then retry"))
        return kind(f"{self._where} {what}")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except exception.AerospikeError as error:
            raise self._error(error.code, error.msg or str(error)) from error

    def _check(self, batch: BatchRecords, *accepted: int | None) -> None:
        """Turn the failure of single records into the failure of the batch, a known one first."""
        failed = {record.result or OK for record in batch.batch_records}.difference(accepted)
        if failed:
            code = min(failed, key=lambda code: code not in FAILURES)
            raise self._error(code, f"code {code} for some records")

    def _user_key(self, name: str) -> tuple[str, str, bytearray]:
        return self._namespace, self._set, bytearray(name.encode())

    def _key(self, key: EntityKey) -> tuple[str, str, bytearray]:
        return self._user_key(f"{key.kind}:{key.id}")

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """See `Store.read`; one batch read."""
        if not keys:
            return []
        limit_ms = max(1, int(1000 * (self._read_timeout_s if timeout_s is None else timeout_s)))
        policy = {"total_timeout": limit_ms, "socket_timeout": limit_ms, "concurrent": True}
        with self._failures():
            batch = self._client.batch_read([self._key(key) for key in keys], list(parts), policy)
        self._check(batch, OK, NOT_FOUND)
        absent: Record = (None,) * len(parts)
        return [
            absent if entry.record is None or entry.record[2] is None else tuple(map(entry.record[2].get, parts))
            for entry in batch.batch_records
        ]

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`; a killed or failed write may leave any of its records, so write again."""
        return sum(self._write_batch(part, batch, newer_only) for batch in in_batches(records, BATCH))

    def _write_batch(self, part: str, batch: dict[EntityKey, bytes], newer_only: bool) -> int:
        writes = [self._write(part, key, blob, newer_only) for key, blob in batch.items()]
        with self._failures():
            done = self._client.batch_write(BatchRecords(writes), self._write_policy)
        self._check(done, OK, FILTERED_OUT)
        return sum(write.result == OK for write in done.batch_records)

    def _write(self, part: str, key: EntityKey, blob: bytes, newer_only: bool) -> Write:
        ops = [operations.write(part, blob)]
        policy: dict[str, Any] = {"ttl": aerospike.TTL_NEVER_EXPIRE}
        if part != TEXT:
            written_at_ms = read_header(blob).written_at_ms
            ops.append(operations.write(_time_bin(part), written_at_ms))
            if newer_only:
                stored = exp.IntBin(_time_bin(part))
                newer = exp.Or(exp.Not(exp.BinExists(_time_bin(part))), exp.LT(stored, written_at_ms))
                policy["expressions"] = newer.compile()
        return Write(self._key(key), ops, policy=policy)

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`; a background job on the servers, awaited."""
        policy = {"expressions": exp.BinExists(part).compile()}
        with self._failures():
            count = len(self._query().results(policy, {"nobins": True}))
            if not count:
                return 0
            query = self._query()
            query.add_ops([operations.write(name, None) for name in (part, _time_bin(part))])
            job = query.execute_background(policy)
            while self._client.job_info(job, aerospike.JOB_QUERY)["status"] == aerospike.JOB_STATUS_INPROGRESS:
                time.sleep(POLL_S)
        return count

    def _query(self) -> Any:
        return self._client.query(self._namespace, self._set)

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`."""
        with self._failures(), suppress(exception.RecordNotFound):
            return self._client.get(self._user_key(f"meta:{name}"), self._patient_policy)[2][VALUE]
        return None

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`."""
        with self._failures(), suppress(exception.RecordNotFound):
            if value is None:
                self._client.remove(self._user_key(f"meta:{name}"), policy=self._patient_policy)
            else:
                self._client.put(self._user_key(f"meta:{name}"), {VALUE: value}, policy=self._write_policy)

    def close(self) -> None:
        """See `Store.close`."""
        self._client.close()
