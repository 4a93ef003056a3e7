"""Owns indexes on disk: immutable folders named by their content, and a pointer to the current one.

<root>/
  current             {"snapshot_id", "published_at_ms"}, replaced by a rename
  <snapshot id>/      the first 12 digits of the hash of snapshot.json
    snapshot.json     {"format", "space_id", "dim", "count", "kind", ..., "recall", "sha256": {file: hash}}
    index.faiss       FAISS's own file
    ids.utf8 ...      see `kar_sidecar.index.ids`

Whoever reads a snapshot holds a shared lock on its snapshot.json, and what is locked is not deleted.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import IntegrityError, PreconditionError, UnavailableError

__all__ = [
    "KEPT",
    "PAYLOAD",
    "Current",
    "Held",
    "make_current",
    "open_snapshot",
    "passing_faults",
    "read_current",
    "write_snapshot",
]

FORMAT: Final = 2
RECORD: Final = "snapshot.json"
PAYLOAD: Final = "index.faiss"
CURRENT: Final = "current"
DRAFT: Final = ".draft"
KEPT: Final = 2
"""Snapshots that stay: the current one, and the one before it for those that are about to read it."""


class Current(NamedTuple):
    """Which snapshot is to be used, and since when."""

    snapshot_id: str
    published_at_ms: int
    """Milliseconds since the epoch."""


class Held(NamedTuple):
    """A snapshot that nobody deletes until `lock` is closed."""

    folder: Path
    record: Mapping[str, Any]
    lock: IO[bytes]


@contextmanager
def passing_faults(path: Path) -> Iterator[None]:
    """Have what the system refuses for now, such as too many open files, told apart from damage.

    Raises:
        UnavailableError: for any OSError or MemoryError.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        told = str(error) or "out of memory"
        raise UnavailableError(
            f"{path} cannot be read now ({told}): see its permissions, its disk and this process's limits, then retry"
        ) from error


def write_snapshot(root: Path, about: Mapping[str, Any], write: Callable[[Path], None]) -> str:
    """Write a snapshot below `root`, unless it is there and whole, and return its id.

    Args:
        root: Of one kind of entity.
        about: What the record says; it must depend on the content alone.
        write: Writes the files into the folder that it is given.

    Raises:
        UnavailableError: what is there under that id cannot be read now.
    """
    draft = root / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    hashes = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
    text = json.dumps({"format": FORMAT, **about, "sha256": hashes}, indent=2) + "\n"
    (draft / RECORD).write_text(text)
    snapshot_id = _content_id(text.encode())
    folder = root / snapshot_id
    try:
        open_snapshot(folder).lock.close()
    except PreconditionError:
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    else:
        shutil.rmtree(draft)
    return snapshot_id


def make_current(root: Path, snapshot_id: str, published_at_ms: int) -> None:
    """Have readers use a snapshot from now on, and delete old ones that nobody reads.

    Raises:
        UnavailableError: the pointer to the former one cannot be read now.
    """
    draft = root / f".{CURRENT}"
    draft.write_text(json.dumps({"snapshot_id": snapshot_id, "published_at_ms": published_at_ms}) + "\n")
    try:
        former = read_current(root)
    except IntegrityError:
        former = None
    draft.replace(root / CURRENT)
    # Newest first; publishing the same content again makes it no younger, so the two in use are named.
    named = [snapshot_id, *([former.snapshot_id] if former else [])]
    found = sorted(root.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    found.sort(key=lambda path: named.index(path.parent.name) if path.parent.name in named else len(named))
    for path in found[KEPT:]:
        with path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # somebody reads it: the next publish looks again
            shutil.rmtree(path.parent)


def read_current(root: Path) -> Current | None:
    """The snapshot to use; None where none was published.

    Raises:
        IntegrityError: the pointer is corrupt.
        UnavailableError: it cannot be read now.
    """
    path = root / CURRENT
    try:
        with passing_faults(path):
            try:
                text = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        found = json.loads(text)
        return Current(str(found["snapshot_id"]), int(found["published_at_ms"]))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} does not name a snapshot ({error}): publish again with --force") from error


def open_snapshot(folder: Path, *, verify: bool = True) -> Held:
    """Hold a snapshot and, with `verify`, check the hash of every file.

    Raises:
        PreconditionError: no snapshot there.
        IntegrityError: a missing, corrupt or foreign file, which the text names.
        UnavailableError: it cannot be read now, which says nothing of what is there.
    """
    with passing_faults(folder):
        try:
            lock = (folder / RECORD).open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PreconditionError(f"{folder} holds no index snapshot: run `kar publish` first") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            return Held(folder, _checked_record(folder, lock.read(), verify), lock)
        except BaseException:
            lock.close()
            raise


def _checked_record(folder: Path, text: bytes, verify: bool) -> Mapping[str, Any]:
    path = folder / RECORD
    if _content_id(text) != folder.name:
        raise IntegrityError(f"{path} was changed after it was written: delete {folder} and publish again")
    try:
        record: dict[str, Any] = json.loads(text)
        known, hashes = record["format"], dict(record["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is not a snapshot's record ({error}): delete {folder} and publish") from error
    if known != FORMAT:
        raise IntegrityError(f"{path} is of format {known!r}, not {FORMAT!r}: publish again with this version")
    for name, sha256 in hashes.items():
        if not (folder / name).is_file() or (verify and file_sha256(folder / name) != sha256):
            raise IntegrityError(f"{folder / name} is missing or corrupt: delete {folder} and publish again")
    return record


def _content_id(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:12]
