"""Owns indexes on disk: immutable folders named by their content, and a pointer to the current snapshot.

<root>/
  current             {"snapshot_id", "published_at_ms"}, replaced by a rename
  <snapshot id>/      the first 12 digits of the hash of snapshot.json
    snapshot.json     {"format", "space_id", "dim", "count", "kind", ..., "recall", "sha256": {file: hash}}
    index.faiss       FAISS's own file
    ids.utf8 ...      see `kar_sidecar.index.ids`

A reader holds a shared lock on snapshot.json; a snapshot that is locked is not deleted.
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
    "OpenSnapshot",
    "make_current",
    "open_snapshot",
    "read_current",
    "unavailable_when_unreadable",
    "write_snapshot",
]

FORMAT: Final = 2
RECORD: Final = "snapshot.json"
PAYLOAD: Final = "index.faiss"
CURRENT: Final = "current"
DRAFT: Final = ".draft"
KEPT: Final = 2
"""Number of snapshots kept: the current one, and the previous one for readers that have just read its pointer."""


class Current(NamedTuple):
    """The pointer to the snapshot in use."""

    snapshot_id: str
    published_at_ms: int
    """When it was published, milliseconds since 1970."""


class OpenSnapshot(NamedTuple):
    """A snapshot that is not deleted before `lock` is closed."""

    folder: Path
    record: Mapping[str, Any]
    lock: IO[bytes]


@contextmanager
def unavailable_when_unreadable(path: Path) -> Iterator[None]:
    """Turn operating-system errors, such as too many open files, into UnavailableError: the file may be undamaged.

    Raises:
        UnavailableError: an OSError or MemoryError was raised inside the block.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        reason = str(error) or "out of memory"
        raise UnavailableError(
            f"{path} cannot be read now ({reason}): check permissions, disk and limits of this process, then retry"
        ) from error


def write_snapshot(root: Path, description: Mapping[str, Any], write: Callable[[Path], None]) -> str:
    """Write a snapshot below `root`, unless an undamaged one with the same content exists, and return its id.

    Args:
        root: The folder of one kind of entity.
        description: Fields of the record besides the hashes; they must depend on the content alone.
        write: Writes the files into a folder.

    Raises:
        UnavailableError: an existing snapshot with that id cannot be read now.
    """
    draft = root / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    hashes = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
    text = json.dumps({"format": FORMAT, **description, "sha256": hashes}, indent=2) + "\n"
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
    """Point readers to a snapshot, and delete old snapshots that nobody reads.

    Raises:
        UnavailableError: the pointer to the former snapshot cannot be read now.
    """
    draft = root / f".{CURRENT}"
    draft.write_text(json.dumps({"snapshot_id": snapshot_id, "published_at_ms": published_at_ms}) + "\n")
    try:
        former = read_current(root)
    except IntegrityError:
        former = None
    draft.replace(root / CURRENT)
    # Keep the new and the former snapshot before all others: a folder's time does not change when its content is
    # published again, so the newest folders alone may not include them.
    in_use = [snapshot_id, *([former.snapshot_id] if former else [])]
    records = sorted(root.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    records.sort(key=lambda path: in_use.index(path.parent.name) if path.parent.name in in_use else len(in_use))
    for path in records[KEPT:]:
        with path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # a reader holds it: the next publish tries again
            shutil.rmtree(path.parent)


def read_current(root: Path) -> Current | None:
    """The pointer to the snapshot in use; None where nothing was published.

    Raises:
        IntegrityError: the pointer is corrupt.
        UnavailableError: the pointer cannot be read now.
    """
    path = root / CURRENT
    try:
        with unavailable_when_unreadable(path):
            try:
                text = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        pointer = json.loads(text)
        return Current(str(pointer["snapshot_id"]), int(pointer["published_at_ms"]))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} does not name a snapshot ({error}): publish again with --force") from error


def open_snapshot(folder: Path, *, verify: bool = True) -> OpenSnapshot:
    """Lock a snapshot against deletion and, with `verify`, check the hash of every file.

    Raises:
        PreconditionError: there is no snapshot.
        IntegrityError: a missing, corrupt or foreign file; the text names it.
        UnavailableError: a file cannot be read now; it may be undamaged.
    """
    with unavailable_when_unreadable(folder):
        try:
            lock = (folder / RECORD).open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PreconditionError(f"{folder} holds no index snapshot: run `kar publish` first") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            return OpenSnapshot(folder, _checked_record(folder, lock.read(), verify), lock)
        except BaseException:
            lock.close()
            raise


def _checked_record(folder: Path, text: bytes, verify: bool) -> Mapping[str, Any]:
    path = folder / RECORD
    if _content_id(text) != folder.name:
        raise IntegrityError(f"{path} was changed after it was written: delete {folder} and publish again")
    try:
        record: dict[str, Any] = json.loads(text)
        format_, hashes = record["format"], dict(record["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is not a snapshot's record ({error}): delete {folder} and publish") from error
    if format_ != FORMAT:
        raise IntegrityError(f"{path} has format {format_!r}, not {FORMAT!r}: publish again with this version")
    for name, sha256 in hashes.items():
        if not (folder / name).is_file() or (verify and file_sha256(folder / name) != sha256):
            raise IntegrityError(f"{folder / name} is missing or corrupt: delete {folder} and publish again")
    return record


def _content_id(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:12]
