"""Owns the releases of a running server: which are loaded, which is active, and whether they can serve now."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kar.admin.v1 import admin_pb2
from kar_sidecar.errors import KarError, PreconditionError, UnavailableError
from kar_sidecar.experiments.assignment import ARMS
from kar_sidecar.ranking.assembly import assemble, nothing_read, view_user
from kar_sidecar.ranking.request import Query
from kar_sidecar.releases.manifest import Release, list_releases, read_active, write_active
from kar_sidecar.releases.serving_view import Mode, ServedRelease
from kar_sidecar.scoring import Scorer
from kar_sidecar.scoring.checked import checked_scores
from kar_sidecar.store import Store, schema_meta, space_meta
from kar_sidecar.store.async_read import call_store

__all__ = ["Releases"]

log = logging.getLogger(__name__)

PROBE: Final = "warm-up"
"""User and item id of the request that warms a model: unknown to every release."""


@dataclass(slots=True)
class _Loaded:
    served: ServedRelease
    fault: str = "its models are not loaded yet"
    """Why it cannot score now; empty when it can."""


class Releases:
    """Loaded releases by id, one of them active. Call `open` before anything else."""

    def __init__(self, folder: Path, store: Store, scorer: Scorer, mode: Mode, *, warm_timeout_s: float) -> None:
        """Serve the releases below `folder` in one mode."""
        self._folder = folder
        self._store = store
        self._scorer = scorer
        self._mode: Mode = mode
        self._warm_timeout_s = warm_timeout_s
        self._loaded: dict[str, _Loaded] = {}
        self._active = ""
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Verify the active release, file by file, and that the store holds what it needs.

        An unreachable store is left to `check`: it may come back.

        Raises:
            PreconditionError: no release is active, or the store has nothing of it.
            IntegrityError: a missing or corrupt file, which the text names.
        """
        active = read_active(self._folder)
        served = await self._verified(active)
        try:
            await self._check_store(served)
        except UnavailableError as error:
            log.warning("store_unavailable reason=%s", error)
        self._loaded[active], self._active = _Loaded(served), active

    @property
    def active(self) -> ServedRelease:
        """The release that requests go to by default."""
        return self._loaded[self._active].served

    def get(self, release_id: str) -> ServedRelease:
        """A loaded release; the active one for an empty id.

        Raises:
            PreconditionError: it is not loaded.
        """
        loaded = self._loaded.get(release_id or self._active)
        if loaded is None:
            known = ", ".join(self._loaded)
            raise PreconditionError(f"release {release_id!r} is not loaded (loaded: {known}): activate it first")
        return loaded.served

    async def check(self) -> None:
        """Return when the active release can serve now.

        Raises:
            KarError: why it cannot.
        """
        loaded = self._loaded[self._active]
        await self._check_store(loaded.served)
        if not loaded.fault and not await self._ready(loaded.served):
            loaded.fault = "its models are not ready any more"
        if loaded.fault:
            raise UnavailableError(f"release {loaded.served.id} cannot score now: {loaded.fault}")

    async def restore(self) -> None:
        """Load and warm what the scorer does not have (any more), the active release first."""
        async with self._lock:
            for release_id in sorted(self._loaded, key=lambda id_: id_ != self._active):
                loaded = self._loaded[release_id]
                if loaded.fault or not await self._ready(loaded.served):
                    try:
                        await self._warm(loaded)
                    except KarError as error:
                        loaded.fault = str(error)

    async def activate(self, release_id: str) -> str:
        """Load and warm a release beside the current one, then route to it; returns the id of the one before.

        Raises:
            PreconditionError: there is no such release, or the store has no vectors or features for it.
            IntegrityError: one of its files is missing or corrupt.
            UnavailableError: its models cannot be loaded, or do not score.
        """
        async with self._lock:
            loaded = self._loaded.get(release_id) or _Loaded(await self._verified(release_id))
            await self._check_store(loaded.served)
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
            IntegrityError: one of them is not a release; the text names it.
        """
        ids = list_releases(self._folder)
        found = await asyncio.to_thread(lambda: [Release.load(self._folder, id_, verify=False) for id_ in ids])
        found.sort(key=lambda release: release.manifest.created_at.ToNanoseconds(), reverse=True)
        return [
            admin_pb2.ReleaseSummary(
                release_id=release.release_id,
                created_at=release.manifest.created_at,
                dataset=release.manifest.dataset,
                active=release.release_id == self._active,
                loaded=release.release_id in self._loaded,
            )
            for release in found
        ]

    async def _verified(self, release_id: str) -> ServedRelease:
        # Comparing with what lies there keeps ids such as "../elsewhere" out of paths.
        known = list_releases(self._folder)
        if release_id not in known:
            raise PreconditionError(
                f"release {release_id!r} is not below {self._folder} (known: {', '.join(known) or 'none'}): "
                "export it first"
            )
        served = ServedRelease(await asyncio.to_thread(Release.load, self._folder, release_id), self._mode)
        served.models()
        return served

    async def _check_store(self, served: ServedRelease) -> None:
        needed = {
            space_meta(served.space.space_id): "vectors",
            schema_meta(served.release.manifest.feature_schema_hash): "features",
        }
        if served.affinity_space is not None:
            needed[space_meta(served.affinity_space.space_id)] = "affinity vectors"
        for name, what in needed.items():
            if await call_store(self._store, self._store.read_meta, name) is None:
                raise PreconditionError(f"the store has no {what} for release {served.id} ({name}): publish it first")

    async def _ready(self, served: ServedRelease) -> bool:
        return all([await self._scorer.ready(model) for model in served.models()])

    async def _warm(self, loaded: _Loaded) -> None:
        """Load every model, then send one real request through each arm: a model that loads may still not score."""
        served = loaded.served
        for model in served.models():
            await self._scorer.load(model)
        query = Query(PROBE, (PROBE,), None, (), (), None, None)
        for arm in ARMS:
            user, records = view_user(query, served, None), nothing_read(query, served.parts(arm))
            assembly = assemble(query, served, user, records, [], at_ms=0)
            await checked_scores(self._scorer, served.model(arm), assembly.tensors, self._warm_timeout_s)
        loaded.fault = ""
        log.info("release_warm release=%s models=%s", served.id, ",".join(served.models()))
