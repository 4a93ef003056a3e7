"""Owns a release on disk: its layout, its content hashes, its verification.

<releases>/<release id>/
  manifest.json                      kar.records.v1.Manifest as JSON
  item_ids.txt                       items of the training data, one id per line; line i has the index i + 2
  backbones/{knowledge,control}.onnx
  adaptor.safetensors                expert, gate and neutral weights
  vectors/neutral.npy                [2, K] float32: neutral vector of users, of items
  vectors/{user,item}_ids.txt        one id per line, row order of the arrays
  vectors/{user,item}_lent.txt       ids of entities whose vector is imputed from neighbours
  vectors/{user,item}_adapted.npy    [n, K], only for kinds with a tower in the adaptor
  vectors/{user,item}_encoded.npy    [n, D]
  vectors/affinity_ids.txt           items with an affinity vector, only where the model reads affinities
  vectors/affinity.npy               [n, V]
  knowledge/{user,item}.jsonl        KnowledgeRecord as JSON, one per line
  knowledge/{user,item}_clusters.jsonl  KnowledgeRecord of each cluster, only where entities use the texts of clusters
  triton/{cpu,gpu}/<model>/          Triton repository; names end in the release id
  triton/files.json                  a Manifest with the release id and the files of triton/; manifest.json cannot list
                                     them, since they contain the release id, which is the hash of manifest.json
<releases>/active                    the id of the release that serving starts with
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import IntegrityError, NotFoundError, PreconditionError
from kar_sidecar.features import FeatureEncoder, FeatureLayout, schema_hash

__all__ = [
    "ACTIVE",
    "MANIFEST",
    "RENDERED",
    "Release",
    "list_files",
    "list_releases",
    "manifest_id",
    "read_active",
    "write_active",
]

MANIFEST = "manifest.json"
RENDERED = "triton/files.json"
ACTIVE = "active"


def list_files(folder: Path, paths: Iterable[Path]) -> list[records_pb2.FileEntry]:
    """Manifest entries of files below a release folder, sorted by path."""
    return [
        records_pb2.FileEntry(
            path=path.relative_to(folder).as_posix(), sha256=file_sha256(path), bytes=path.stat().st_size
        )
        for path in sorted(paths)
    ]


def manifest_id(manifest: records_pb2.Manifest) -> str:
    """Content hash of a manifest without its id and creation time: 12 hexadecimal digits."""
    content = records_pb2.Manifest()
    content.CopyFrom(manifest)
    content.ClearField("release_id")
    content.ClearField("created_at")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()[:12]


def list_releases(releases: Path) -> list[str]:
    """Ids of the releases below a folder, oldest first."""
    manifests = sorted(releases.glob(f"[!.]*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent.name for path in manifests]


def read_active(releases: Path) -> str:
    """The id of the release that serving starts with.

    Raises:
        PreconditionError: nothing was exported or activated yet.
        IntegrityError: the file `active` is corrupt.
    """
    path = releases / ACTIVE
    if not path.is_file():
        raise PreconditionError(f"no active release below {releases}: run `kar export` first")
    try:
        return path.read_text().strip()
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path} is corrupt: activate a release again") from error


def write_active(releases: Path, release_id: str) -> None:
    """Write the id of the release that serving starts with; atomic."""
    draft = releases / f".{ACTIVE}"
    draft.write_text(release_id + "\n")
    draft.replace(releases / ACTIVE)


def _read_manifest(path: Path) -> records_pb2.Manifest:
    try:
        return json_format.Parse(path.read_text(), records_pb2.Manifest())
    except (OSError, json_format.ParseError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is not a readable manifest: {error}; export the release again") from error


def _triton_files(folder: Path, release_id: str) -> Sequence[records_pb2.FileEntry]:
    """The listed files below `triton/`; none where the release has no Triton repository."""
    if not (folder / "triton").is_dir():
        return ()
    listed = _read_manifest(folder / RENDERED)
    if listed.release_id != release_id or not listed.files:
        raise IntegrityError(f"{folder / RENDERED} does not list this release's files: export the release again")
    return listed.files


@dataclass(frozen=True)
class Release:
    """A release on disk. Construct with `Release.load`."""

    folder: Path
    manifest: records_pb2.Manifest

    @staticmethod
    def load(releases: Path, release_id: str, *, verify: bool = True) -> "Release":
        """Read a release and, with `verify`, check the hash of every file.

        Raises:
            NotFoundError: no such release.
            IntegrityError: a file is missing, corrupt or of another release; the text names it.
        """
        folder = releases / release_id
        path = folder / MANIFEST
        if not path.is_file():
            release_ids = ", ".join(list_releases(releases)) or "none"
            raise NotFoundError(f"release {release_id!r} is not below {releases} (known: {release_ids})")
        manifest = _read_manifest(path)
        if manifest.release_id != release_id or manifest_id(manifest) != release_id:
            raise IntegrityError(f"{path} was changed after export: export the release again")
        if schema_hash(manifest.feature_schema) != manifest.feature_schema_hash:
            raise IntegrityError(f"{path} names another feature schema than it holds: export the release again")
        if verify:
            for entry in (*manifest.files, *_triton_files(folder, release_id)):
                file = folder / entry.path
                if not file.is_file():
                    raise IntegrityError(f"{file} is missing: export the release again")
                if file.stat().st_size != entry.bytes or file_sha256(file) != entry.sha256:
                    raise IntegrityError(f"{file} is corrupt (its hash differs): export the release again")
        return Release(folder, manifest)

    @property
    def release_id(self) -> str:
        """Content hash of the manifest, 12 hexadecimal digits."""
        return self.manifest.release_id

    def triton_name(self, template: str) -> str:
        """The name of a Triton model: `template` from the manifest with this release's id."""
        return template.format(release=self.release_id)

    def model(self, arm: str) -> records_pb2.ModelEntry:
        """The scoring model of an arm.

        Raises:
            PreconditionError: the release has none.
        """
        for entry in self.manifest.models:
            if entry.arm == arm:
                return entry
        raise PreconditionError(f"release {self.release_id} has no {arm!r} model: activate a release that has one")

    def triton_models(self) -> Iterator[str]:
        """Names of all Triton models; ensembles come after the models that they consist of."""
        for entry in self.manifest.models:
            yield self.triton_name(entry.triton_model)
        yield self.triton_name(self.manifest.triton_adaptor)
        for entry in self.manifest.models:
            if entry.triton_ensemble:
                yield self.triton_name(entry.triton_ensemble)

    @cached_property
    def towers(self) -> tuple[EntityKind, ...]:
        """Kinds of entity that the adaptor has a tower for: the knowledge model reads their adapted vectors."""
        return tuple(map(EntityKind.of_number, self.manifest.towers)) or (USER, ITEM)

    @cached_property
    def affinity(self) -> records_pb2.Affinity | None:
        """The knowledge affinity that the knowledge model reads; None where it reads none."""
        return self.manifest.affinity if self.manifest.HasField("affinity") else None

    @cached_property
    def encoder(self) -> FeatureEncoder:
        """The feature encoder of this release."""
        ids = (self.folder / "item_ids.txt").read_text().splitlines()
        return FeatureEncoder(self.manifest.feature_schema, self.manifest.feature_encodings, ids)

    @cached_property
    def user_layout(self) -> FeatureLayout:
        """The packed layout of user features."""
        return FeatureLayout(self.manifest.feature_schema, USER)

    @cached_property
    def item_layout(self) -> FeatureLayout:
        """The packed layout of item features."""
        return FeatureLayout(self.manifest.feature_schema, ITEM)

    @cached_property
    def neutral(self) -> NDArray[np.float32]:
        """Neutral vectors float32 [2, K]: of users, of items."""
        return np.load(self.folder / "vectors" / "neutral.npy", allow_pickle=False)
