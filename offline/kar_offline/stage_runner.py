"""Owns how stages run: each writes one folder atomically, remembers its sources, and is skipped when fresh."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import PreconditionError
from kar_sidecar.lock import held

__all__ = ["RECORD", "StageResult", "draft_of", "folder_hash", "run_stage", "settle", "stage_seconds"]

RECORD = "stage.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    """What became of a stage: its folder, whether it ran, how long it took, and what it reports."""

    name: str
    folder: Path
    ran: bool
    seconds: float
    report: dict[str, Any]

    @property
    def outcome(self) -> str:
        """What became of it, in words."""
        return f"written in {self.seconds:.1f} s" if self.ran else "up to date"


def folder_hash(folder: Path) -> str:
    """Content hash of a finished stage's folder, from its record; of any other path, from its files."""
    record = folder / RECORD
    if record.is_file():
        return str(json.loads(record.read_text())["content"])
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def stage_seconds(folder: Path) -> float:
    """How long a finished stage took."""
    return float(json.loads((folder / RECORD).read_text())["seconds"])


def draft_of(folder: Path) -> Path:
    """Where a stage works before `folder` is ready."""
    return folder.parent / f".{folder.name}.draft"


def settle(folder: Path) -> None:
    """Put a stage's finished folder in its place, where a kill came just after the former one was taken away."""
    if not folder.exists() and (draft_of(folder) / RECORD).is_file():
        draft_of(folder).replace(folder)


def run_stage(
    name: str,
    folder: Path,
    build: Callable[[Path], Mapping[str, Any]],
    *,
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    version: int,
) -> StageResult:
    """Run `build` into a draft folder and move it to `folder`, unless the same inputs and parameters made it before.

    `build` gets the draft folder and returns a JSON-able report. `inputs` are folders of earlier stages, `version`
    rises when the code of the stage changes what it writes. A killed run leaves the former folder untouched; what
    a stage wants to resume from lies in the draft `.<folder>.draft`, which `build` finds as it was left when
    inputs, parameters and version are the same, and empty otherwise.

    Raises:
        PreconditionError: another process is making this folder.
    """
    source = {
        "inputs": {key: folder_hash(path) for key, path in sorted(inputs.items())},
        "params": json.loads(json.dumps(dict(params), sort_keys=True)),
        "version": version,
    }
    record = folder / RECORD
    if record.is_file():
        known = json.loads(record.read_text())
        if known["source"] == source:
            return StageResult(name, folder, False, known["seconds"], known["report"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    taken = PreconditionError(f"another process is making {folder}: wait until it is done")
    with held(folder.parent / f".{folder.name}.lock", taken):
        return _make(name, folder, build, source)


def _make(
    name: str, folder: Path, build: Callable[[Path], Mapping[str, Any]], source: Mapping[str, Any]
) -> StageResult:
    draft = draft_of(folder)
    marker = folder.parent / f".{folder.name}.source.json"
    if not (marker.is_file() and json.loads(marker.read_text()) == source):
        shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(source))
    began = time.perf_counter()
    report = json.loads(json.dumps(dict(build(draft))))
    seconds = time.perf_counter() - began
    content = folder_hash(draft)
    made = {"source": source, "seconds": seconds, "report": report, "content": content}
    (draft / RECORD).write_text(json.dumps(made, indent=2) + "\n")
    former = folder.parent / f".{folder.name}.former"
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.replace(former)
    draft.replace(folder)
    shutil.rmtree(former, ignore_errors=True)
    marker.unlink()
    return StageResult(name, folder, True, seconds, report)
