"""Owns how a stage runs: it fills its folder in one step, records its sources, and is skipped if they are unchanged.

WORK/<stage>/                 the finished folder
WORK/<stage>/stage.json       its record: sources, seconds, report, content hash
WORK/.<stage>.draft/          the output so far of a running or killed stage
WORK/.<stage>.source.json     the sources that the draft is made from
WORK/.<stage>.former/         the folder that is being replaced
WORK/.<stage>.lock            held while the stage runs
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, overload

from pydantic import TypeAdapter

from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import PreconditionError
from kar_sidecar.lock import held

__all__ = ["RECORD", "StageResult", "draft_of", "folder_hash", "run_stage", "settle", "stage_seconds"]

RECORD: Final = "stage.json"
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class StageResult(Generic[R]):
    """The result of a stage, which ran now or earlier.

    Attributes:
        name: the stage as users know it, such as `encode`.
        folder: the folder that the stage fills.
        ran: False if the folder was up to date already.
        seconds: duration of the run that filled the folder.
        report: the stage's figures, as they were when it ran.
    """

    name: str
    folder: Path
    ran: bool
    seconds: float
    report: R

    @property
    def outcome(self) -> str:
        """`written in 1.5 s`, or `up to date`."""
        return f"written in {self.seconds:.1f} s" if self.ran else "up to date"


def folder_hash(folder: Path) -> str:
    """SHA-256 of a folder's file names and contents, hexadecimal; read from the record of a finished stage."""
    record = folder / RECORD
    if record.is_file():
        return str(json.loads(record.read_text())["content"])
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def stage_seconds(folder: Path) -> float:
    """Duration in seconds of the run that filled a finished stage's folder."""
    return float(json.loads((folder / RECORD).read_text())["seconds"])


def draft_of(folder: Path) -> Path:
    """The folder that a stage writes to until it is renamed to `folder`."""
    return folder.parent / f".{folder.name}.draft"


def settle(folder: Path) -> None:
    """Rename a finished draft to `folder` if a killed run had moved the former folder away but not yet done so."""
    if not folder.exists() and (draft_of(folder) / RECORD).is_file():
        draft_of(folder).replace(folder)


@overload
def run_stage(
    name: str,
    folder: Path,
    build: Callable[[Path], Mapping[str, Any]],
    *,
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    version: int,
) -> StageResult[dict[str, Any]]: ...
@overload
def run_stage(
    name: str,
    folder: Path,
    build: Callable[[Path], R],
    *,
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    version: int,
    report_type: type[R],
) -> StageResult[R]: ...
def run_stage(
    name: str,
    folder: Path,
    build: Callable[[Path], Any],
    *,
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    version: int,
    report_type: type[Any] = dict,
) -> StageResult[Any]:
    """Fill `folder` with `build`, unless it was filled from the same inputs, parameters and version before.

    `build` writes to a draft folder, which then replaces `folder` with one rename: a run that is killed leaves the
    former folder untouched. The next run gets the draft of the killed run if its sources are the same, so that it can
    resume, and an empty draft otherwise.

    Args:
        name: the stage as users know it.
        folder: the folder to fill.
        build: gets the draft folder and returns the report: a mapping that JSON can hold, or a `report_type`.
        inputs: folders of earlier stages, by name; their content hashes are sources.
        params: settings that change what the stage writes, as JSON can hold them.
        version: rises when the stage's code changes what it writes.
        report_type: a dataclass; the report of a skipped run is read from the record as this type.

    Raises:
        PreconditionError: another process is filling this folder.
    """
    source = {
        "inputs": {key: folder_hash(path) for key, path in sorted(inputs.items())},
        "params": json.loads(json.dumps(dict(params), sort_keys=True)),
        "version": version,
    }
    record_file = folder / RECORD
    if record_file.is_file():
        record = json.loads(record_file.read_text())
        if record["source"] == source:
            return StageResult(name, folder, False, record["seconds"], _typed(record["report"], report_type))
    folder.parent.mkdir(parents=True, exist_ok=True)
    locked = PreconditionError(f"another process is writing {folder}: wait until it has finished")
    with held(folder.parent / f".{folder.name}.lock", locked):
        draft = _open_draft(folder, source)
        started_s = time.perf_counter()
        report = json.loads(json.dumps(_as_mapping(build(draft))))
        seconds = time.perf_counter() - started_s
        record = {"source": source, "seconds": seconds, "report": report, "content": folder_hash(draft)}
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _replace_by_draft(folder)
    return StageResult(name, folder, True, seconds, _typed(report, report_type))


def _open_draft(folder: Path, source: Mapping[str, Any]) -> Path:
    """The draft folder, emptied unless a killed run with the same sources left it."""
    draft, source_file = draft_of(folder), _source_file(folder)
    if not (source_file.is_file() and json.loads(source_file.read_text()) == source):
        shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True, exist_ok=True)
    source_file.write_text(json.dumps(source))
    return draft


def _replace_by_draft(folder: Path) -> None:
    former = folder.parent / f".{folder.name}.former"
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.replace(former)
    draft_of(folder).replace(folder)
    shutil.rmtree(former, ignore_errors=True)
    _source_file(folder).unlink()


def _source_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.source.json"


def _as_mapping(report: Any) -> Mapping[str, Any]:
    if hasattr(report, "to_json"):
        return report.to_json()
    return asdict(report) if is_dataclass(report) and not isinstance(report, type) else dict(report)


def _typed(report: dict[str, Any], report_type: type[Any]) -> Any:
    return report if report_type is dict else TypeAdapter(report_type).validate_python(report)
