"""Owns the URLs of stores: which store a URL names, and how it is opened."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from kar_sidecar.errors import InputError
from kar_sidecar.store import Store
from kar_sidecar.store.cluster import PASSWORD, AerospikeSettings

__all__ = ["open_store"]

FORMS = "lmdb:PATH or aerospike:HOST:PORT[,HOST:PORT]/NAMESPACE/SET"


def open_store(url: str, *, aerospike: AerospikeSettings | None = None, readonly: bool = False) -> Store:
    """Open the store that `url` names: `lmdb:PATH` or `aerospike:HOST:PORT[,HOST:PORT]/NAMESPACE/SET`.

    Args:
        url: Names the store.
        aerospike: Settings of an Aerospike store; None: the defaults. Its password comes from the environment.
        readonly: Whether an LMDB store is opened for reading only.

    Raises:
        InputError: the URL names no store.
        PreconditionError: a read-only LMDB store is empty.
        UnavailableError: Aerospike does not answer.
    """
    # Implementations are imported on demand: only the one in use needs its package.
    scheme, _, rest = url.partition(":")
    if scheme == "lmdb" and rest:
        from kar_sidecar.store.lmdb import LmdbStore

        return LmdbStore(Path(rest), readonly=readonly)
    if scheme == "aerospike":
        servers, *path = rest.split("/")
        hosts = [_host(server) for server in servers.split(",")]
        if all(host and port for host, port in hosts) and len(path) == 2 and all(path):
            from kar_sidecar.store.aerospike import AerospikeStore

            complete = [(host, port) for host, port in hosts if host and port]
            settings = aerospike or AerospikeSettings()
            return AerospikeStore(complete, path[0], path[1], settings, password=os.environ.get(PASSWORD, ""))
    raise InputError(f"{url!r} is not a store URL: use {FORMS}")


def _host(server: str) -> tuple[str | None, int | None]:
    """Name and port of HOST:PORT; None for a missing or malformed part."""
    try:
        parsed = urlsplit(f"//{server}")
        return parsed.hostname, parsed.port
    except ValueError:
        return None, None
