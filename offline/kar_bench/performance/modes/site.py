"""Owns the temporary work folder from which one mode serves, and the steps that bring a new model into it."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from kar.admin.v1 import admin_pb2, admin_pb2_grpc
from kar_bench.performance.modes.metered_store import MeteredStore, WrittenPart
from kar_kernels import HybridExpertAdaptor
from kar_offline.dataset.dataset import Dataset
from kar_offline.export import export
from kar_offline.publish.stage import publish_release
from kar_offline.replay.serving import ServingAddresses
from kar_offline.work_folder import WorkFolder
from kar_sidecar.client import KarClient
from kar_sidecar.errors import UnavailableError
from kar_sidecar.experiments.assignment import KNOWLEDGE
from kar_sidecar.releases.manifest import Release, write_active
from kar_sidecar.releases.serving_view import PRESTORED, Mode, ServedRelease
from kar_sidecar.store import FEATURES, TEXT, EntityKey, vector_part
from kar_sidecar.store.lmdb import DATA, LmdbStore

__all__ = ["Bytes", "LiveSite", "Request", "Rollout", "Site"]

STAGES: Final = ("dataset", "encoding", "knowledge", "training")
"""Folders of a work folder that an export and a publish read."""
POLL_S: Final = 0.02
LINK_TIMEOUT_S: Final = 10.0
ACTIVATE_TIMEOUT_S: Final = 120.0

Request = tuple[str, list[str]]
"""A user's id, and the ids of the candidates."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one entity's vector: the record itself, and its place in an LMDB file of such records only."""

    record_bytes: float
    lmdb_bytes: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """How long it took from a trained model on disk to an answer of it, step by step."""

    served: str
    """The model that serves meanwhile."""
    model: str
    export_s: float
    publish_s: float
    load_s: float
    """Seconds to activate the release and to get its first answer."""
    total_s: float
    entities: int
    """Entities that have vectors."""
    vectors_per_s: float | None
    """Adapted vectors made and written a second; None where the mode stores none."""
    parts: Mapping[str, WrittenPart]
    """What publishing wrote, by part."""


@dataclass(frozen=True, slots=True)
class _Published:
    seconds: float
    parts: Mapping[str, WrittenPart]


@dataclass(frozen=True, slots=True)
class Site:
    """The work folder from which one mode serves."""

    mode: Mode
    work: WorkFolder

    @staticmethod
    def create(folder: Path, mode: Mode, source: WorkFolder) -> "Site":
        """Link the stages of the work folder `source`; there is no release yet."""
        site = Site(mode, WorkFolder(folder))
        site.releases.mkdir(parents=True)
        for stage in STAGES:
            (folder / stage).symlink_to(source.folder(stage).resolve(), target_is_directory=True)
        return site

    @property
    def releases(self) -> Path:
        """The folder of releases."""
        return self.work.releases

    @property
    def store(self) -> Path:
        """The folder of the LMDB store."""
        return self.work.store

    def copy_release(self, release: Release) -> None:
        """Copy a release, since serving writes Python's caches beside its models, and make it the active one."""
        shutil.copytree(release.folder, self.releases / release.release_id)
        write_active(self.releases, release.release_id)

    def export(self, release: Release, model: str) -> str:
        """Export a trained model with the arm and precision of `release`; return the new release's id."""
        precision = HybridExpertAdaptor.load(release.folder / "adaptor.safetensors").precision
        result = export(self.work, model, release.model(KNOWLEDGE).recipe or KNOWLEDGE, precision=precision)
        return str(result.report.release_id)

    def publish(self, release_id: str) -> _Published:
        """Publish as `kar publish` does, and measure what is written."""
        began = time.perf_counter()
        release = Release.load(self.releases, release_id)
        dataset = self.work.read(Dataset)
        store = MeteredStore(LmdbStore(self.store))
        try:
            publish_release(release, dataset, store, self.work.index / release_id)
        finally:
            store.close()
        return _Published(time.perf_counter() - began, store.parts)

    def bytes_per_entity(self, release: Release, scratch: Path) -> Bytes:
        """Bytes of the vectors that this mode reads; `scratch` is a folder for an LMDB file of them alone."""
        part, keys = vector_part(ServedRelease(release, self.mode).space.space_id), _entities(release)
        store = LmdbStore(self.store, readonly=True)
        blobs = [record[0] for record in store.read(keys, [part])]
        store.close()
        alone = MeteredStore(LmdbStore(scratch))
        alone.write(part, ((key, blob) for key, blob in zip(keys, blobs, strict=True) if blob is not None))
        alone.close()
        written = alone.parts[part]
        return Bytes(written.bytes / written.records, (scratch / DATA).stat().st_size / written.records)


def _entities(release: Release) -> list[EntityKey]:
    """The entities with adapted vectors in the release, for which both modes read vectors."""
    return [
        EntityKey(kind, id_)
        for kind in release.towers
        for id_ in (release.folder / "vectors" / f"{kind}_ids.txt").read_text().splitlines()
    ]


@dataclass(frozen=True, slots=True)
class LiveSite:
    """A site that serves, and a client of it."""

    site: Site
    addresses: ServingAddresses
    client: KarClient

    def roll_out(self, release: Release, model: str, request: Request) -> Rollout:
        """Export, publish and activate a trained model while `release` serves, with its arm and precision.

        Raises:
            UnavailableError: the server does not see the new release, or does not answer with it.
        """
        site = self.site
        began = time.perf_counter()
        release_id = site.export(release, model)
        export_s = time.perf_counter() - began
        new = Release.load(site.releases, release_id, verify=False)
        # In the other mode the encoder's vectors and the features are in the store already.
        published = site.publish(release_id) if site.mode == PRESTORED else _Published(0.0, {})
        began = time.perf_counter()
        self._activate(new, request)
        load_s = time.perf_counter() - began
        manifest = new.manifest
        names = {
            FEATURES: "features",
            TEXT: "texts",
            vector_part(manifest.adapted_space.space_id): "adapted",
            vector_part(manifest.encoded_space.space_id): "encoded",
            vector_part(manifest.affinity.space.space_id): "affinity",
        }
        parts = {names[part]: written for part, written in published.parts.items()}
        adapted = parts.get("adapted")
        return Rollout(
            served=release.model(KNOWLEDGE).backbone,
            model=model,
            export_s=export_s,
            publish_s=published.seconds,
            load_s=load_s,
            total_s=export_s + published.seconds + load_s,
            entities=len(_entities(new)),
            vectors_per_s=adapted.records / adapted.seconds if adapted else None,
            parts=parts,
        )

    def _activate(self, new: Release, request: Request) -> None:
        """Activate the new release and return when it has answered `request`."""
        links = [self.site.work.serving / "models" / name for name in new.triton_models()]
        began = time.monotonic()
        while not all(link.is_dir() for link in links):
            if time.monotonic() - began > LINK_TIMEOUT_S:
                raise UnavailableError(f"kar serve did not see release {new.release_id} in {LINK_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        with grpc.insecure_channel(self.addresses.grpc) as channel:
            activation = admin_pb2.ActivateReleaseRequest(release_id=new.release_id)
            try:
                admin_pb2_grpc.AdminServiceStub(channel).ActivateRelease(activation, timeout=ACTIVATE_TIMEOUT_S)
            except grpc.RpcError as error:
                raise UnavailableError(f"release {new.release_id} cannot be activated: {error.details()}") from error
        answer = self.client.rank(*request, arm=KNOWLEDGE)
        if answer.response.release_id != new.release_id or answer.rung != KNOWLEDGE:
            raise UnavailableError(f"release {new.release_id} does not answer: {answer.response.reason}")
