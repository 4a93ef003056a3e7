"""Owns the snapshots of a running server: it finds new ones, verifies them off the event loop and swaps them in.

A search uses the snapshot that was current when the search began; a replaced snapshot is closed after its last search.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kar.records.v1 import records_pb2
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import IntegrityError, KarError, PreconditionError, UnavailableError
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import Current, read_current

__all__ = ["LiveIndexes", "LiveSnapshot"]

log = logging.getLogger(__name__)

LoadIndex = Callable[[Path], FaissIndex]
"""Loads the snapshot in a folder; raises as `FaissIndex.load` does."""


@dataclass(frozen=True, slots=True)
class LiveSnapshot:
    """A snapshot that answers searches."""

    index: FaissIndex
    snapshot_id: str
    published_at_ms: int
    """When it was published, milliseconds since 1970."""


@dataclass(slots=True)
class _WatchedFolder:
    """The snapshots of one release and one kind of entity."""

    root: Path
    space: records_pb2.VectorSpace
    live: LiveSnapshot | None = None
    examined: Current | None = None
    """The pointer that was last loaded or found damaged: it is not loaded again before it changes."""
    fault: KarError | None = None
    """Why the current snapshot cannot be used."""
    check: "asyncio.Task[None] | None" = None
    """Checks for a new snapshot. A separate task, so that the end of one caller's deadline does not cancel a load."""


class LiveIndexes:
    """The current snapshots below <folder>/<release id>/<user or item>, for every release named in a call so far."""

    def __init__(self, folder: Path, *, load: LoadIndex = FaissIndex.load) -> None:
        """Store the arguments; `load` loads a snapshot when it is first needed."""
        self._folder = folder
        self._load = load
        self._watched: dict[tuple[str, EntityKind], _WatchedFolder] = {}

    async def get(self, release_id: str, space: records_pb2.VectorSpace, kind: EntityKind) -> LiveSnapshot:
        """The current snapshot of a release's vectors in its encoder's space; after the next await it may be closed.

        Raises:
            PreconditionError: none was published.
            IntegrityError: it is corrupt, or holds vectors of another space.
            UnavailableError: it cannot be loaded now.
            UnsupportedError: FAISS is not installed.
        """
        watched = self._watch(release_id, space, kind)
        if watched.live is None:
            await self._check(watched)
        if watched.live is not None:
            return watched.live
        if watched.fault is not None:
            raise type(watched.fault)(str(watched.fault))
        raise PreconditionError(f"{watched.root} holds no index snapshot: run `kar publish` first")

    async def refresh(self, release_id: str, space: records_pb2.VectorSpace) -> None:
        """Check for new snapshots of a release and of all releases named in earlier calls, and swap them in.

        A snapshot that cannot be used does not stop the others; `get` raises its fault.
        """
        for kind in EntityKind:
            self._watch(release_id, space, kind)
        for watched in list(self._watched.values()):
            await self._check(watched)

    async def close(self) -> None:
        """Finish running loads and searches."""
        for watched in self._watched.values():
            if watched.check is not None:
                await asyncio.wait([watched.check])
            if watched.live is not None:
                await asyncio.to_thread(watched.live.index.close)
                watched.live = None

    def _watch(self, release_id: str, space: records_pb2.VectorSpace, kind: EntityKind) -> _WatchedFolder:
        # The id of a loaded release is the name of a folder, so it is safe in a path.
        return self._watched.setdefault((release_id, kind), _WatchedFolder(self._folder / release_id / kind, space))

    async def _check(self, watched: _WatchedFolder) -> None:
        if watched.check is None or watched.check.done():
            watched.check = asyncio.create_task(_swap(watched, self._load))
        await asyncio.shield(watched.check)


async def _swap(watched: _WatchedFolder, load: LoadIndex) -> None:
    """Load the current snapshot if it is new. If anything fails, the loaded snapshot stays in use."""
    former = watched.live
    current = None
    try:
        current = await asyncio.to_thread(read_current, watched.root)
        if current is None:
            watched.examined = watched.fault = None
            return
        if current == watched.examined:
            return
        if former is not None and former.snapshot_id == current.snapshot_id:  # the same content, published again
            watched.live, watched.examined, watched.fault = LiveSnapshot(former.index, *current), current, None
            return
        index = await asyncio.to_thread(_load_of_space, load, watched.root / current.snapshot_id, watched.space)
    except Exception as error:
        if isinstance(error, KarError):
            fault = error
        else:
            fault = UnavailableError(f"{watched.root} could not be loaded ({error!r}): see the log, then retry")
        if str(fault) != str(watched.fault):
            log.warning("index_unavailable root=%s reason=%s", watched.root, fault, exc_info=fault is not error)
        # A temporary fault is retried at the next check; a damaged snapshot is skipped until another one is published.
        watched.fault, watched.examined = fault, None if isinstance(fault, UnavailableError) else current
        return
    watched.live, watched.examined, watched.fault = LiveSnapshot(index, *current), current, None
    log.info("index_loaded root=%s snapshot=%s vectors=%d", watched.root, current.snapshot_id, len(index))
    if former is not None:
        await asyncio.to_thread(former.index.close)


def _load_of_space(load: LoadIndex, folder: Path, space: records_pb2.VectorSpace) -> FaissIndex:
    index = load(folder)
    if (index.space_id, index.dim) != (space.space_id, space.dim):
        index.close()
        raise IntegrityError(f"{folder} holds vectors of another space than its release: publish the release again")
    return index
