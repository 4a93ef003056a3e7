"""Owns which store a URL names."""

from pathlib import Path
from urllib.parse import urlsplit

from kar_sidecar.errors import InputError
from kar_sidecar.store import Store

__all__ = ["open_store"]

FORMS = "lmdb:PATH or aerospike:HOST:PORT/NAMESPACE/SET"


def open_store(url: str, *, readonly: bool = False) -> Store:
    """Open the store that `url` names: `lmdb:PATH` or `aerospike:HOST:PORT/NAMESPACE/SET`.

    Implementations are imported on demand: only the one in use needs its package.

    Raises:
        InputError: not such a URL.
        PreconditionError: a read-only LMDB store that nothing was published to.
        UnavailableError: Aerospike does not answer.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "lmdb" and rest:
        from kar_sidecar.store.lmdb import LmdbStore

        return LmdbStore(Path(rest), readonly=readonly)
    if scheme == "aerospike":
        parsed = urlsplit(f"//{rest}")
        path = parsed.path.strip("/").split("/")
        try:
            host, port = parsed.hostname, parsed.port
        except ValueError:
            host, port = None, None
        if host and port and len(path) == 2 and all(path):
            from kar_sidecar.store.aerospike import AerospikeStore

            return AerospikeStore([(host, port)], path[0], path[1])
    raise InputError(f"{url!r} is not a store URL: use {FORMS}")
