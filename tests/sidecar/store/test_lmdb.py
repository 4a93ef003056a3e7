"""The embedded store among processes, and with files that are missing, damaged or full."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kar_sidecar.entities import ITEM
from kar_sidecar.errors import IntegrityError, PreconditionError
from kar_sidecar.store import FEATURES, EntityKey
from kar_sidecar.store.lmdb import BATCH, LmdbStore
from kar_sidecar.store.records import Header, read_header

pytestmark = pytest.mark.service

READER = """
import sys
from pathlib import Path
from kar_sidecar.entities import ITEM
from kar_sidecar.store import FEATURES, EntityKey
from kar_sidecar.store.lmdb import LmdbStore

store = LmdbStore(Path(sys.argv[1]), readonly=True)
for line in sys.stdin:
    (blob,), = store.read([EntityKey(ITEM, line.rstrip("\\n"))], [FEATURES])
    print(None if blob is None else blob[32:].decode(), flush=True)
"""

DYING_WRITER = """
import os, signal, sys
from pathlib import Path
from kar_sidecar.entities import ITEM
from kar_sidecar.store import FEATURES, EntityKey
from kar_sidecar.store.lmdb import BATCH, LmdbStore
from kar_sidecar.store.records import Header, read_header

blob = Header(0, 7, 1, 0).seal(b"")

def stream():
    for i in range(BATCH + 5):
        yield EntityKey(ITEM, str(i)), blob
    os.kill(os.getpid(), signal.SIGKILL)

LmdbStore(Path(sys.argv[1])).write(FEATURES, stream())
"""


def blob(body: bytes) -> bytes:
    return Header(0, 7, 1, 0).seal(body)


def test_a_reader_process_sees_what_the_writer_writes_meanwhile(tmp_path: Path) -> None:
    writer = LmdbStore(tmp_path / "store")
    writer.write(FEATURES, [(EntityKey(ITEM, "a"), blob(b"first"))])
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def ask(identity: str) -> str:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write(f"{identity}\n")
            return reader.stdout.readline().strip()

        assert (ask("a"), ask("b")) == ("first", "None")
        writer.write(FEATURES, [(EntityKey(ITEM, "a"), blob(b"second")), (EntityKey(ITEM, "b"), blob(b"new"))])
        assert (ask("a"), ask("b")) == ("second", "new")
        writer.remove_part(FEATURES)
        assert ask("a") == "None"
    writer.close()


def test_a_killed_writer_leaves_whole_batches_and_a_store_that_can_be_written(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DYING_WRITER, str(tmp_path / "store")], check=False)
    assert done.returncode == -signal.SIGKILL
    store = LmdbStore(tmp_path / "store")
    present = [
        record[0] is not None for record in store.read([EntityKey(ITEM, str(i)) for i in range(BATCH + 5)], [FEATURES])
    ]
    assert present == [True] * BATCH + [False] * 5
    assert store.write(FEATURES, [(EntityKey(ITEM, str(BATCH)), blob(b""))]) == 1
    store.close()


@pytest.mark.parametrize(
    "prepare", [lambda path: None, Path.mkdir, lambda path: (path.mkdir(), (path / "data.mdb").touch())]
)
def test_a_reader_before_the_first_publish_gets_an_error_that_says_so(tmp_path: Path, prepare) -> None:
    prepare(tmp_path / "store")
    with pytest.raises(PreconditionError, match="run `kar publish` first"):
        LmdbStore(tmp_path / "store", readonly=True)


def filled(path: Path) -> Path:
    store = LmdbStore(path)
    store.write(FEATURES, [(EntityKey(ITEM, str(i)), blob(b"x" * 100)) for i in range(1_000)])
    store.close()
    return path / "data.mdb"


@pytest.mark.parametrize("readonly", [True, False])
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, readonly: bool) -> None:
    file = filled(tmp_path / "store")
    file.write_bytes(b"not a database" * 1_000)
    with pytest.raises(IntegrityError, match=r"store/data\.mdb is corrupt"):
        LmdbStore(tmp_path / "store", readonly=readonly)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kept: float) -> None:
    file = filled(tmp_path / "store")
    os.truncate(file, int(file.stat().st_size * kept) // 4096 * 4096)
    with pytest.raises(IntegrityError, match=r"store/data\.mdb is truncated"):
        LmdbStore(tmp_path / "store", readonly=True)


def test_removal_leaves_a_file_that_readers_accept(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    store = LmdbStore(tmp_path / "store")
    assert store.remove_part(FEATURES) == 1_000
    store.write(FEATURES, [(EntityKey(ITEM, "last"), blob(b"y"))])
    store.close()
    reader = LmdbStore(tmp_path / "store", readonly=True)
    assert reader.read([EntityKey(ITEM, "last"), EntityKey(ITEM, "1")], [FEATURES]) == [(blob(b"y"),), (None,)]
    reader.close()


def test_a_full_store_says_what_to_raise(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store", map_size_bytes=1 << 16)
    with pytest.raises(PreconditionError, match="larger map_size_bytes"):
        store.write(FEATURES, [(EntityKey(ITEM, str(i)), blob(b"x" * 1_000)) for i in range(1_000)])
    assert store.read([EntityKey(ITEM, "1")], [FEATURES]) == [(None,)]
    store.close()


def test_removal_takes_several_transactions_for_a_large_part(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store")
    store.write(FEATURES, ((EntityKey(ITEM, str(i)), blob(b"")) for i in range(2 * BATCH + 1)))
    assert store.remove_part(FEATURES) == 2 * BATCH + 1
    store.close()


RACER = """
import sys
from pathlib import Path
from kar_sidecar.entities import ITEM
from kar_sidecar.store import EntityKey
from kar_sidecar.store.lmdb import LmdbStore
from kar_sidecar.store.records import Header, read_header

path, part, first, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = LmdbStore(Path(path))
sys.stdin.readline()
for version in range(first, 21, step):
    blob = Header(0, 7, version, 0).seal(bytes([version]) * 5_000)
    store.write(part, [(EntityKey(ITEM, str(i)), blob) for i in range(40)], newer_only=True)
"""


def test_processes_that_update_features_and_publish_vectors_lose_nothing(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store")
    keys, parts = [EntityKey(ITEM, str(i)) for i in range(40)], [FEATURES, "vaaaaaaaaaaaa", "vbbbbbbbbbbbb"]
    races = [(FEATURES, "1", "2"), (FEATURES, "2", "2"), (parts[1], "1", "1"), (parts[2], "1", "1")]
    command = [sys.executable, "-c", RACER, str(tmp_path / "store")]
    racers = [subprocess.Popen([*command, *race], stdin=subprocess.PIPE, text=True) for race in races]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    last_read = [(0, 0, 0)] * len(keys)
    running = True
    while running:
        running = any(racer.poll() is None for racer in racers)
        found = [
            tuple(0 if part is None else read_header(part).written_at_ms for part in record)
            for record in store.read(keys, parts)
        ]
        assert all(
            now >= before
            for after, old in zip(found, last_read, strict=True)
            for now, before in zip(after, old, strict=True)
        )
        last_read = found
    for racer in racers:
        racer.communicate(timeout=30)
        assert racer.returncode == 0
    assert last_read == [(20, 20, 20)] * len(keys)
    store.close()
