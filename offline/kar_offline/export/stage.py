"""Owns the stage `export`: two trained models become a release; `kar_sidecar.releases.manifest` has its layout.

The release id is the hash of the manifest, which holds the hash of every file except the files below `triton/`. Their
model names contain the id, so they are rendered when it is known, and `triton/files.json` lists them. No hashed content
depends on the time or on the number of cores, so the same work folder gives the same id.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kar_kernels import Precision
from kar_model_repository.render import is_current
from kar_offline.export.manifest_parts import make_manifest, manifest_json
from kar_offline.export.release_files import write_release_files
from kar_offline.export.sources import ExportSources
from kar_offline.export.triton_repository import write_triton_repositories
from kar_offline.stage_runner import StageResult
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import IntegrityError, NotFoundError
from kar_sidecar.releases.manifest import ACTIVE, MANIFEST, Release, read_active, write_active

__all__ = ["ExportReport", "export"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The release that was exported."""

    release_id: str
    backbone: str
    arm: str
    active: bool
    """Whether serving starts with this release."""
    files: int
    bytes: int
    precision: Precision
    vector_error: float
    """Largest absolute difference of an adapted vector's component from the one computed in float32."""


def export(
    work: WorkFolder,
    backbone: str,
    arm: str = "knowledge",
    *,
    precision: Precision = "float32",
    activate: bool = False,
    cores: int | None = None,
    now_s: Callable[[], float] = time.time,
) -> StageResult[ExportReport]:
    """Make the release of one backbone and arm in `work`/releases, unless it is there, undamaged and of this version.

    Args:
        work: The work folder, with `dataset`, `knowledge`, `encoding` and `training`.
        backbone: A trained backbone, in lower case.
        arm: The training arm of the knowledge model, which has an adaptor. The control model is exported with it.
        precision: Number format in which the adaptor multiplies if the device can, for prestored vectors and in Triton.
        activate: Serve this release from now on; the first release is activated in any case.
        cores: Cores that the models of the CPU repository may use together; default: the cores of this process.
        now_s: Gives seconds since the epoch, for the creation time of the release.

    Raises:
        InputError: no such backbone, arm or precision, or an arm without an adaptor.
        PreconditionError: an earlier stage did not run.
        IntegrityError: the outputs of the stages are corrupt or do not belong together.
    """
    began = time.perf_counter()
    sources = ExportSources.load(work, backbone, arm, precision)
    releases = work.releases
    draft = releases / f".{backbone}_{arm}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    vector_error = write_release_files(draft, sources)
    manifest = make_manifest(draft, sources)
    folder = releases / manifest.release_id
    is_exported = _is_exported(releases, manifest.release_id)
    if is_exported:
        shutil.rmtree(draft)
    else:
        manifest.created_at.FromNanoseconds(int(now_s() * 1e9))
        (draft / MANIFEST).write_text(manifest_json(manifest))
        write_triton_repositories(draft, manifest, sources, cores)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    if activate or not (releases / ACTIVE).is_file():
        write_active(releases, manifest.release_id)
    report = ExportReport(
        manifest.release_id,
        backbone,
        arm,
        active=read_active(releases) == manifest.release_id,
        files=len(manifest.files),
        bytes=sum(entry.bytes for entry in manifest.files),
        precision=precision,
        vector_error=vector_error,
    )
    return StageResult(f"export {backbone}", folder, not is_exported, time.perf_counter() - began, report)


def _is_exported(releases: Path, release_id: str) -> bool:
    """Whether the release is there, undamaged, with Triton repositories of this version."""
    try:
        Release.load(releases, release_id)
        return is_current(releases / release_id)
    except (NotFoundError, IntegrityError):
        return False
