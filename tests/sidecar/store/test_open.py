"""A URL names a store; the error about a wrong URL lists the valid forms."""

import socket
from pathlib import Path

import pytest

from kar_sidecar.errors import InputError, PreconditionError, UnavailableError
from kar_sidecar.store.lmdb import LmdbStore
from kar_sidecar.store.open import open_store

pytestmark = pytest.mark.unit


def test_a_writer_creates_a_missing_lmdb_store(tmp_path: Path) -> None:
    store = open_store(f"lmdb:{tmp_path / 'some' / 'folder'}")
    assert isinstance(store, LmdbStore)
    store.close()
    assert (tmp_path / "some" / "folder" / "data.mdb").is_file()


def test_a_reader_does_not_create_an_lmdb_store(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="kar publish"):
        open_store(f"lmdb:{tmp_path / 'store'}", readonly=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "lmdb",
        "lmdb:",
        "memory:",
        "redis:localhost:6379",
        "aerospike:localhost/test/kar",
        "aerospike:localhost:3000/test",
        "aerospike:localhost:3000//kar",
        "aerospike:localhost:3000/test/kar/more",
        "aerospike:localhost:port/test/kar",
        "aerospike::3000/test/kar",
        "aerospike:localhost:3000,/test/kar",
        "aerospike:localhost:3000,other/test/kar",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="use lmdb:PATH or aerospike:HOST:PORT"):
        open_store(url)


def test_an_unreachable_aerospike_is_named() -> None:
    with socket.socket() as held:  # bound but not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"Aerospike 127\.0\.0\.1:{port} \(test/kar\)"):
            open_store(f"aerospike:127.0.0.1:{port}/test/kar")
