"""Owns the releases of a running server: which are loaded, which one is active, and whether they can score now."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kar.admin.v1 import admin_pb2
from kar_sidecar.errors import KarError, PreconditionError, UnavailableError
from kar_sidecar.experiments.assignment import ARMS
from kar_sidecar.releases.manifest import Release, list_releases, read_active, write_active
from kar_sidecar.releases.serving_view import Mode, ServedRelease
from kar_sidecar.scoring import Scorer, Tensors
from kar_sidecar.scoring.checked import checked_scores
from kar_sidecar.store import Store, schema_meta, space_meta
from kar_sidecar.store.async_read import call_store

__all__ = ["ProbeTensors", "Releases", "open_active"]

log = logging.getLogger(__name__)

ProbeTensors = Callable[[ServedRelease, str], Tensors]
"""Builds the tensors of one request for a release and an arm; a model that scores them is warm."""


@dataclass(slots=True)
class _LoadedRelease:
    served: ServedRelease
    fault: str = "its models are not loaded yet"
    """Why it cannot score now; empty when it can."""


async def open_active(folder: Path, store: Store, mode: Mode) -> ServedRelease:
    """Verify the active release below `folder`, file by file, and check that the store holds what it needs.

    A store that does not answer is only logged: it may come back.

    Raises:
        PreconditionError: no release is active, or nothing was published for it.
        IntegrityError: a file is missing or corrupt; the text names it.
    """
    served = await _load_verified(folder, read_active(folder), mode)
    try:
        await _check_published(store, served)
    except UnavailableError as error:
        log.warning("store_unavailable reason=%s", error)
    return served


async def _load_verified(folder: Path, release_id: str, mode: Mode) -> ServedRelease:
    # Only ids of existing folders are accepted: an id such as "../elsewhere" must not become a path.
    release_ids = list_releases(folder)
    if release_id not in release_ids:
        raise PreconditionError(
            f"release {release_id!r} is not below {folder} (known: {', '.join(release_ids) or 'none'}): export it first"
        )
    served = ServedRelease(await asyncio.to_thread(Release.load, folder, release_id), mode)
    served.models()  # raises where a model is missing
    return served


async def _check_published(store: Store, served: ServedRelease) -> None:
    """Raise PreconditionError unless vectors and features of the release are completely published."""
    contents = {
        space_meta(served.space.space_id): "vectors",
        schema_meta(served.release.manifest.feature_schema_hash): "features",
    }
    if served.affinity_space is not None:
        contents[space_meta(served.affinity_space.space_id)] = "affinity vectors"
    for seal, content in contents.items():
        if await call_store(store, store.read_meta, seal) is None:
            raise PreconditionError(f"the store has no {content} for release {served.id} ({seal}): publish it first")


class Releases:
    """Loaded releases by id, one of them active. Call `open` before anything else."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        scorer: Scorer,
        mode: Mode,
        *,
        probe_tensors: ProbeTensors,
        warm_timeout_s: float,
    ) -> None:
        """Serve the releases below `folder` in one mode.

        Args:
            folder: One folder per release.
            store: Holds their vectors and features.
            scorer: Runs their models.
            mode: Which vectors are read, and which models are called.
            probe_tensors: Builds the request that warms a model.
            warm_timeout_s: Longest wait for the scores of that request, in seconds.
        """
        self._folder = folder
        self._store = store
        self._scorer = scorer
        self._mode: Mode = mode
        self._probe_tensors = probe_tensors
        self._warm_timeout_s = warm_timeout_s
        self._loaded: dict[str, _LoadedRelease] = {}
        self._active = ""
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Load the active release; raises as `open_active` does."""
        served = await open_active(self._folder, self._store, self._mode)
        self._loaded[served.id], self._active = _LoadedRelease(served), served.id

    @property
    def active(self) -> ServedRelease:
        """The active release, which serves requests that name none."""
        return self._loaded[self._active].served

    def get(self, release_id: str) -> ServedRelease:
        """A loaded release; the active one for an empty id.

        Raises:
            PreconditionError: it is not loaded.
        """
        loaded = self._loaded.get(release_id or self._active)
        if loaded is None:
            loaded_ids = ", ".join(self._loaded)
            raise PreconditionError(f"release {release_id!r} is not loaded (loaded: {loaded_ids}): activate it first")
        return loaded.served

    async def check(self) -> None:
        """Check that the active release can serve now.

        Raises:
            KarError: it cannot; the text says why.
        """
        loaded = self._loaded[self._active]
        await _check_published(self._store, loaded.served)
        if not loaded.fault and not await self._ready(loaded.served):
            loaded.fault = "its models are no longer ready"
        if loaded.fault:
            raise UnavailableError(f"release {loaded.served.id} cannot score now: {loaded.fault}")

    async def restore(self) -> None:
        """Load and warm the models that the scorer has not loaded or has lost, the active release's first."""
        async with self._lock:
            for release_id in sorted(self._loaded, key=lambda id_: id_ != self._active):
                loaded = self._loaded[release_id]
                if loaded.fault or not await self._ready(loaded.served):
                    try:
                        await self._warm(loaded)
                    except KarError as error:
                        loaded.fault = str(error)

    async def activate(self, release_id: str) -> str:
        """Load and warm a release beside the active one, then activate it; returns the id of the one active before.

        Raises:
            PreconditionError: there is no such release, or nothing was published for it.
            IntegrityError: one of its files is missing or corrupt; the text names it.
            UnavailableError: its models cannot be loaded, or do not score.
        """
        async with self._lock:
            loaded = self._loaded.get(release_id)
            if loaded is None:
                loaded = _LoadedRelease(await _load_verified(self._folder, release_id, self._mode))
            await _check_published(self._store, loaded.served)
            await self._warm(loaded)
            try:
                await asyncio.to_thread(write_active, self._folder, release_id)
            except OSError as error:
                raise PreconditionError(f"{self._folder} cannot be written ({error}): make it writable") from error
            self._loaded[release_id] = loaded
            previous, self._active = self._active, release_id
        log.info("release_activated release=%s previous=%s", release_id, previous)
        return previous

    async def list(self) -> list[admin_pb2.ReleaseSummary]:
        """All releases below the folder, newest first.

        Raises:
            IntegrityError: a folder holds no readable release; the text names the file.
        """
        ids = list_releases(self._folder)
        releases = await asyncio.to_thread(lambda: [Release.load(self._folder, id_, verify=False) for id_ in ids])
        releases.sort(key=lambda release: release.manifest.created_at.ToNanoseconds(), reverse=True)
        return [
            admin_pb2.ReleaseSummary(
                release_id=release.release_id,
                created_at=release.manifest.created_at,
                dataset=release.manifest.dataset,
                active=release.release_id == self._active,
                loaded=release.release_id in self._loaded,
            )
            for release in releases
        ]

    async def _ready(self, served: ServedRelease) -> bool:
        return all([await self._scorer.ready(model) for model in served.models()])

    async def _warm(self, loaded: _LoadedRelease) -> None:
        """Load every model, then score one request with each arm's model: a loaded model may still fail to score."""
        served = loaded.served
        for model in served.models():
            await self._scorer.load(model)
        for arm in ARMS:
            tensors = self._probe_tensors(served, arm)
            await checked_scores(self._scorer, served.model(arm), tensors, self._warm_timeout_s)
        loaded.fault = ""
        log.info("release_warm release=%s models=%s", served.id, ",".join(served.models()))
