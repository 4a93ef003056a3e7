"""Owns the clients that the store benchmark compares, and the pair of stores that they write to.

ours   `Store.write` and `Store.read`, encoding and decoding of records included
bare   the client's package alone, on the same bytes in batches as large: no encoding, no conditions, no checks
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import lmdb
import numpy as np

from kar_bench.performance.store.options import DIM, LAYOUT, SPACE, VECTORS, WRITTEN_AT_MS
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import InputError
from kar_sidecar.store import FEATURES, EntityKey, Store
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.lmdb import BATCH, DATA, MAP_SIZE_BYTES
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import decode_vectors

__all__ = ["BARE", "IMPLEMENTATIONS", "OURS", "Client", "StorePair"]

BARE: Final = "bare"
OURS: Final = "ours"
IMPLEMENTATIONS: Final = (BARE, OURS)
READ_TIMEOUT_S: Final = 5.0
INDEX_BYTES: Final = 64
"""Memory of an Aerospike record in the primary index, on each node that has the record."""
WRITE_POLICY: Final = {"total_timeout": 30_000, "socket_timeout": 30_000}
READ_POLICY: Final = {"total_timeout": 5_000}


class Client(Protocol):
    """One way to load and read one store."""

    def load(self, part: str, ids: Sequence[str], blobs: Iterable[bytes]) -> None:
        """Write one part of the items `ids`."""

    def read(self, ids: Sequence[str]) -> None:
        """Read features and vectors of the items `ids`."""

    def close(self) -> None:
        """Disconnect."""


class _OurClient:
    def __init__(self, store: Store) -> None:
        self._store, self.close = store, store.close

    def load(self, part: str, ids: Sequence[str], blobs: Iterable[bytes]) -> None:
        keys = (EntityKey(ITEM, id_) for id_ in ids)
        # `kar publish` writes vectors where they are newer, features and texts where they differ.
        self._store.write(part, zip(keys, blobs, strict=True), newer_only=part == VECTORS)

    def read(self, ids: Sequence[str]) -> None:
        keys = [EntityKey(ITEM, id_) for id_ in ids]
        features, vectors = zip(*self._store.read(keys, (FEATURES, VECTORS), READ_TIMEOUT_S), strict=True)
        LAYOUT.decode_items(features)
        decode_vectors(vectors, SPACE, DIM, np.zeros(DIM, np.float32), dtype="float32", at_ms=WRITTEN_AT_MS)


class _BareLmdb:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(folder), map_size=MAP_SIZE_BYTES)
        self.close = self._env.close

    def load(self, part: str, ids: Sequence[str], blobs: Iterable[bytes]) -> None:
        prefix, records = part.encode(), list(zip(ids, blobs, strict=True))
        for start in range(0, len(records), BATCH):
            with self._env.begin(write=True) as transaction:
                for id_, blob in records[start : start + BATCH]:
                    transaction.put(prefix + id_.encode(), blob)

    def read(self, ids: Sequence[str]) -> None:
        features, vectors = FEATURES.encode(), VECTORS.encode()
        with self._env.begin() as transaction:
            for id_ in ids:
                transaction.get(features + id_.encode())
                transaction.get(vectors + id_.encode())


class _BareAerospike:
    def __init__(self, url: str, settings: AerospikeSettings) -> None:
        import aerospike  # not needed where LMDB alone is measured

        self._aerospike = aerospike
        servers, self._namespace, self._set = url.partition(":")[2].split("/")
        hosts = [server.rsplit(":", 1) for server in servers.split(",")]
        self._client = aerospike.client({"hosts": [(host, int(port)) for host, port in hosts]})
        self._batch_records = settings.batch_records
        self.close = self._client.close

    def load(self, part: str, ids: Sequence[str], blobs: Iterable[bytes]) -> None:
        from aerospike_helpers.batch.records import BatchRecords, Write
        from aerospike_helpers.operations import operations

        records, policy = list(zip(ids, blobs, strict=True)), {"ttl": self._aerospike.TTL_NEVER_EXPIRE}
        for start in range(0, len(records), self._batch_records):
            writes = [
                Write((self._namespace, self._set, id_), [operations.write(part, blob)], policy=policy)
                for id_, blob in records[start : start + self._batch_records]
            ]
            self._client.batch_write(BatchRecords(writes), WRITE_POLICY)

    def read(self, ids: Sequence[str]) -> None:
        keys = [(self._namespace, self._set, id_) for id_ in ids]
        self._client.batch_read(keys, [FEATURES, VECTORS], READ_POLICY)

    def used_bytes(self) -> int:
        """Bytes of data and index, all copies."""
        used = 0
        for _, answer in self._client.info_all(f"sets/{self._namespace}/{self._set}").values():
            pairs = answer.split("\t")[-1].strip(" \n;").split(":")
            statistics = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            used += int(statistics["data_used_bytes"]) + INDEX_BYTES * int(statistics["objects"])
        return used

    def empty(self) -> None:
        """Remove all records of the set."""
        self._client.truncate(self._namespace, self._set, 0)

    def server_version(self) -> str:
        """The version of the first node."""
        return next(iter(self._client.info_all("build").values()))[1].split("\t")[-1].strip()


@dataclass(frozen=True, slots=True)
class StorePair:
    """Two empty stores of one kind, one for each implementation."""

    name: str
    urls: Mapping[str, str]
    """By implementation."""
    settings: AerospikeSettings

    @staticmethod
    def create(url: str, settings: AerospikeSettings, stack: ExitStack) -> "StorePair":
        """Make the stores; they are emptied or removed when `stack` closes.

        Raises:
            InputError: the URL names no store that can be measured.
        """
        scheme, _, rest = url.partition(":")
        if scheme == "lmdb":
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=rest or None))
            return StorePair("LMDB", {name: f"lmdb:{folder}/{name}" for name in IMPLEMENTATIONS}, settings)
        if scheme != "aerospike" or rest.count("/") != 2:
            raise InputError(f"{url!r} is not a store to measure: use lmdb:FOLDER or aerospike:HOST:PORT/NAMESPACE/SET")
        pair = StorePair("Aerospike", {name: f"{url}_{name}" for name in IMPLEMENTATIONS}, settings)
        for set_url in pair.urls.values():
            client = stack.enter_context(closing(_BareAerospike(set_url, settings)))
            client.empty()
            stack.callback(client.empty)
        return pair

    def connect(self, implementation: str) -> Client:
        """A client of one of the stores."""
        url = self.urls[implementation]
        if implementation == OURS:
            return _OurClient(open_store(url, aerospike=self.settings))
        if self.name == "LMDB":
            return _BareLmdb(Path(url.removeprefix("lmdb:")))
        return _BareAerospike(url, self.settings)

    def bytes_per_entity(self, implementation: str, entities: int) -> float:
        """Bytes of the LMDB file, or of Aerospike's data and index in all copies, by entity."""
        url = self.urls[implementation]
        if self.name == "LMDB":
            return (Path(url.removeprefix("lmdb:")) / DATA).stat().st_size / entities
        with closing(_BareAerospike(url, self.settings)) as client:
            return client.used_bytes() / entities

    def server_version(self) -> str | None:
        """The version of the Aerospike server; None for LMDB."""
        if self.name == "LMDB":
            return None
        with closing(_BareAerospike(self.urls[BARE], self.settings)) as client:
            return client.server_version()
