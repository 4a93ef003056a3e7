"""Owns an index on disk: a folder that is written once, whole, and checked when it is read.

<folder>/
  snapshot.json   {"format", "dim", "count", "sha256": {file: hash}}
  ids.json        one id a row
  <payload>       the vectors in the format's own file
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kar_sidecar.errors import IntegrityError, PreconditionError
from kar_sidecar.hashing import file_sha256

__all__ = ["Snapshot", "read_snapshot", "write_snapshot"]

RECORD = "snapshot.json"
IDS = "ids.json"


class Snapshot(NamedTuple):
    """A verified snapshot: its ids, the number of components, and the payload file."""

    ids: list[str]
    dim: int
    payload: Path


def write_snapshot(
    folder: Path, format_name: str, ids: Sequence[str], dim: int, payload: str, write: Callable[[Path], None]
) -> None:
    """Write a snapshot whose `payload` file `write` makes, then move it to `folder` in one step.

    Raises:
        PreconditionError: `folder` exists.
    """
    if folder.exists():
        raise PreconditionError(f"{folder} exists and snapshots are immutable: write to another folder or delete it")
    draft = folder.parent / f".{folder.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / IDS).write_text(json.dumps(list(ids)) + "\n")
    write(draft / payload)
    hashes = {name: file_sha256(draft / name) for name in (IDS, payload)}
    record = {"format": format_name, "dim": dim, "count": len(ids), "sha256": hashes}
    (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    draft.replace(folder)


def read_snapshot(folder: Path, format_name: str, payload: str) -> Snapshot:
    """Verify a snapshot.

    Raises:
        PreconditionError: no snapshot there.
        IntegrityError: a missing, corrupt or foreign file, which the text names.
    """
    path = folder / RECORD
    if not path.is_file():
        raise PreconditionError(f"{folder} holds no index snapshot: run `kar publish` first")
    try:
        record = json.loads(path.read_text())
        known, dim, count = record["format"], int(record["dim"]), int(record["count"])
        hashes = {name: record["sha256"][name] for name in (IDS, payload)} if known == format_name else {}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is not a snapshot's record ({error}): delete {folder} and publish") from error
    if known != format_name:
        raise IntegrityError(f"{path} is of format {known!r}, not {format_name!r}: open it as what it is")
    for name, sha256 in hashes.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise IntegrityError(f"{folder / name} is missing or corrupt: delete {folder} and publish again")
    ids = json.loads((folder / IDS).read_text())
    if len(ids) != count:
        raise IntegrityError(f"{folder / IDS} has {len(ids)} ids, not {count}: delete {folder} and publish again")
    return Snapshot(ids, dim, folder / payload)
