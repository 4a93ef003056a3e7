"""Owns the clustered store: one Aerospike record per entity, one bin per part.

User keys: "<kind>:<id>" of entities, "meta:<name>" of meta values; as bytes, since the client ends a string at its
first NUL. Beside each part with a header lies its `written_at_ms` as an integer bin, `<part>_t`, so that the server
itself compares when only newer records may be written.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from random import Random
from typing import Any, Final, TypeVar

import aerospike
from aerospike import exception
from aerospike_helpers import expressions as exp
from aerospike_helpers.batch.records import BatchRecords, Write
from aerospike_helpers.operations import operations

from kar_sidecar.errors import (
    DeadlineError,
    IncompleteError,
    InputError,
    KarError,
    PreconditionError,
    UnavailableError,
)
from kar_sidecar.store import TEXT, EntityKey, Record
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.records import in_batches, read_header

__all__ = ["AerospikeStore"]

log = logging.getLogger(__name__)

T = TypeVar("T")
BATCH_BYTES: Final = 1 << 20
"""Bytes that end a batch of writes: bounds what a server has to take at once."""
META_READ_MS: Final = 500
"""For one meta value, in milliseconds: three seals whose node hangs are read from its replica, each at a second attempt
after half of this, within the 1,000 of a health check."""
POLL_S: Final = 0.05
"""Between two looks at a background job."""
FIRST_PAUSE_S: Final = 0.05
"""Before the second try of a write that the cluster refused; then twice as long each time."""
LONGEST_PAUSE_S: Final = 2.0
TOLD_PAUSE_S: Final = 0.4
"""Shorter ones are how a load is slowed down; a user hears of longer ones."""
SWEEPS: Final = 5
"""Most background jobs that remove one part: records that move between nodes can escape one."""
VALUE: Final = "value"
"""The bin of a meta value."""
OK: Final = 0
NOT_FOUND: Final = exception.RecordNotFound.code
FILTERED_OUT: Final = exception.FilteredOut.code
_LATE: Final = (DeadlineError, "did not answer in time: allow more or add capacity")
_LOGIN: Final = (PreconditionError, "refuses the user: correct user, password, auth_mode or the user's roles")
_REQUEST: Final = (PreconditionError, "takes no such request ({}): see that server and settings fit this version")
_USERS: Final = (PreconditionError, "has no users: leave user and password out")
FAILURES: Final[dict[int | None, tuple[type[KarError], str]]] = {
    exception.TimeoutError.code: _LATE,
    exception.NoResponse.code: _LATE,  # type: ignore[attr-defined]
    exception.DeviceOverload.code: (
        UnavailableError,
        "is overloaded, its devices cannot follow: slow down or add some",
    ),
    exception.ServerFull.code: (PreconditionError, "is full: give its namespace more memory or disk"),
    exception.NamespaceNotFound.code: (PreconditionError, "has no such namespace: configure it or name another"),
    exception.RecordTooBig.code: (InputError, "takes no record this large: make it smaller"),
    exception.BinNameError.code: (InputError, "takes no part name this long: make it shorter"),
    exception.ParamError.code: _REQUEST,
    exception.InvalidRequest.code: _REQUEST,
    exception.TLSError.code: (  # type: ignore[attr-defined]
        PreconditionError,
        "cannot be reached by TLS ({}): correct the tls settings",
    ),
    exception.SecurityNotSupported.code: _USERS,
    exception.SecurityNotEnabled.code: _USERS,
    exception.InvalidUser.code: _LOGIN,
    exception.InvalidPassword.code: _LOGIN,
    exception.ExpiredPassword.code: _LOGIN,
    exception.InvalidCredential.code: _LOGIN,
    exception.NotAuthenticated.code: _LOGIN,
    exception.RoleViolation.code: _LOGIN,
}
"""Codes of the client and of single records in a batch, `{}` stands for its words; any other one is UNAVAILABLE.

What is not UNAVAILABLE stays as it is however often it is tried; a write is not tried again then.
"""


def _time_bin(part: str) -> str:
    return f"{part}_t"  # at most 15 characters, as bin names are


@lru_cache(maxsize=16)  # all vectors of a release have one time
def _newer(part: str, written_at_ms: int) -> Any:
    """The filter that lets a record be written whose part is absent or older."""
    return exp.Or(exp.Not(exp.BinExists(part)), exp.LT(exp.IntBin(_time_bin(part)), written_at_ms)).compile()


@lru_cache(maxsize=16)
def _changed_steps(part: str) -> tuple[Any, int]:
    """What `_changed` compiles to, and which of its steps holds the bytes."""
    steps = exp.Or(exp.Not(exp.BinExists(part)), exp.NE(exp.BlobBin(part), b"")).compile()
    return steps, next(at for at, step in enumerate(steps) if step[2] == {"val": b""})


def _changed(part: str, blob: bytes) -> Any:
    """The filter that lets a record be written whose part is absent or of other bytes; compiled but once a part."""
    steps, at = _changed_steps(part)
    operation, kind, _, children = steps[at]
    return [*steps[:at], (operation, kind, {"val": blob}, children), *steps[at + 1 :]]


def _config(hosts: Sequence[tuple[str, int]], settings: AerospikeSettings, password: str) -> dict[str, Any]:
    """The client's configuration; it refuses keys that it does not know."""
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
    """A `Store` in one set of an Aerospike namespace, for many sidecars and publishers at a time."""

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
        """Connect to the cluster that `hosts` (name, port) belong to.

        Args:
            hosts: One is enough, more for when it is down.
            namespace: Exists already.
            set_name: Need not.
            settings: How.
            password: Of `settings.user`.
            connect: Makes the client of its configuration.
            sleep: Waits so many seconds between two tries to write.
            random: Jitters these.

        Raises:
            UnavailableError: no host answers.
            PreconditionError: the cluster refuses the user.
        """
        self._namespace, self._set, self._settings = namespace, set_name, settings
        self._where = f"Aerospike {', '.join(f'{host}:{port}' for host, port in hosts)} ({namespace}/{set_name})"
        self._sleep, self._random = sleep, random or Random()
        self._batch_policy = {
            "concurrent": settings.batch_concurrent,
            "allow_inline": settings.batch_allow_inline,
            "allow_inline_ssd": settings.batch_allow_inline_ssd,
            "respond_all_keys": settings.respond_all_keys,
        }
        self._patient_policy = {
            "total_timeout": settings.write_timeout_ms,
            "socket_timeout": settings.write_attempt_timeout_ms,
            "max_retries": settings.write_max_retries,
        }
        self._meta_policy = self._read_policy(META_READ_MS)
        self._write_policy: dict[str, Any] = {
            "ttl": aerospike.TTL_NEVER_EXPIRE,  # expiry is in our header: a stale vector still beats none
            "commit_level": getattr(aerospike, f"POLICY_COMMIT_LEVEL_{settings.commit_level.upper()}"),
        }
        with self._failures():
            self._client = connect(_config(hosts, settings, password))

    def _error(self, code: int | None, text: str) -> KarError:
        kind, what = FAILURES.get(code, (UnavailableError, "failed ({}): see that it runs, then retry"))
        return kind(f"{self._where} {what.format(text)}")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except exception.AerospikeError as error:
            raise self._error(error.code, error.msg or str(error)) from error

    def _record_error(self, codes: Iterable[int]) -> KarError:
        """What is wrong when single records of a batch failed: what stays wrong first, then what is known."""
        code = min(codes, key=lambda code: (self._may_pass(code), code not in FAILURES))
        return self._error(code, f"code {code} for some records")

    @staticmethod
    def _may_pass(code: int) -> bool:
        return code not in FAILURES or issubclass(FAILURES[code][0], UnavailableError)

    def _patiently(self, call: Callable[[], T]) -> T:
        """The result of a write; one that the cluster refuses for now is made again after growing, jittered pauses."""
        left_s, pause_s = self._settings.write_patience_ms / 1e3, FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            try:
                return call()
            except UnavailableError as error:
                pause = pause_s * self._random.uniform(0.5, 1)
                left_s -= time.monotonic() - began_s + pause
                if left_s < 0:
                    raise
                level = logging.WARNING if pause_s >= TOLD_PAUSE_S else logging.DEBUG
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
        with self._failures():
            batch = self._client.batch_read([self._key(key) for key in keys], list(parts), policy)
        absent: Record = (None,) * len(parts)
        records = [
            absent if entry.record is None or entry.record[2] is None else tuple(map(entry.record[2].get, parts))
            for entry in batch.batch_records
        ]
        unread = [at for at, entry in enumerate(batch.batch_records) if entry.result not in (OK, NOT_FOUND)]
        if unread:
            error = self._record_error(batch.batch_records[at].result for at in unread)
            if len(unread) == len(records) or not isinstance(error, UnavailableError):
                raise error
            raise IncompleteError(f"{len(unread)} of {len(records)} records were not read: {error}", records, unread)
        return records

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`; a killed or failed write may leave any of its records, so write again.

        Records that an overloaded or lost cluster does not take are tried again, see `write_patience_ms`. One that it
        took while its answer got lost is found there by the next try, and not counted.
        """
        return sum(
            self._write_batch(part, batch, newer_only)
            for batch in in_batches(records, self._settings.batch_records, BATCH_BYTES)
        )

    def _write_batch(self, part: str, batch: dict[EntityKey, bytes], newer_only: bool) -> int:
        left = [self._write(part, key, blob, newer_only) for key, blob in batch.items()]
        written = 0

        def advance() -> None:
            nonlocal left, written
            with self._failures():
                self._client.batch_write(BatchRecords(left), {**self._batch_policy, **self._patient_policy})
            written += sum(write.result == OK for write in left)
            left = [write for write in left if write.result not in (OK, FILTERED_OUT)]
            if left:
                raise self._record_error(write.result for write in left)

        self._patiently(advance)
        return written

    def _write(self, part: str, key: EntityKey, blob: bytes, newer_only: bool) -> Write:
        ops = [operations.write(part, blob)]
        if part != TEXT:
            written_at_ms = read_header(blob).written_at_ms
            ops.append(operations.write(_time_bin(part), written_at_ms))
        condition = _newer(part, written_at_ms) if newer_only else _changed(part, blob)
        return Write(self._key(key), ops, policy={**self._write_policy, "expressions": condition})

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`; background jobs on the servers, awaited until no record has the part."""
        policy = {"expressions": exp.BinExists(part).compile()}
        removed = left = self._count(policy)
        for _ in range(SWEEPS):
            if not left:
                return removed
            with self._failures():
                query = self._query()
                query.add_ops([operations.write(name, None) for name in (part, _time_bin(part))])
                job = query.execute_background(policy)
                while self._client.job_info(job, aerospike.JOB_QUERY)["status"] == aerospike.JOB_STATUS_INPROGRESS:
                    self._sleep(POLL_S)
            left = self._count(policy)
        raise UnavailableError(f"{self._where} still has {left} records with {part}: retry when it is stable")

    def _query(self) -> Any:
        return self._client.query(self._namespace, self._set)

    def _count(self, policy: dict[str, Any]) -> int:
        """How many records a filter lets through; they are counted as they come, never held together."""
        count = 0

        def one(record: object) -> None:
            nonlocal count
            count += 1

        with self._failures():
            self._query().foreach(one, policy, {"nobins": True})
        return count

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`; takes at most `META_READ_MS`."""
        with self._failures(), suppress(exception.RecordNotFound):
            return self._client.get(self._user_key(f"meta:{name}"), self._meta_policy)[2][VALUE]
        return None

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`; tried again as other writes are."""
        key, policy = self._user_key(f"meta:{name}"), {**self._patient_policy, **self._write_policy}

        def put() -> None:
            with self._failures(), suppress(exception.RecordNotFound):
                if value is None:
                    self._client.remove(key, policy=self._patient_policy)
                else:
                    self._client.put(key, {VALUE: value}, policy=policy)

        self._patiently(put)

    def close(self) -> None:
        """See `Store.close`."""
        self._client.close()
