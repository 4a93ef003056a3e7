"""Owns the snapshots of a running server: found when they are published, verified off the event loop, then swapped.

A search is answered by the snapshot that was current when it was asked for, which is closed after its last search.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from kar.records.v1 import records_pb2
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import IntegrityError, KarError, PreconditionError, UnavailableError
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import Current, read_current

__all__ = ["LiveIndexes", "LiveSnapshot"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LiveSnapshot:
    """A snapshot that answers."""

    index: FaissIndex
    snapshot_id: str
    published_at_ms: int
    """Milliseconds since the epoch."""


@dataclass(slots=True)
class _Slot:
    """Where one release's snapshots of one kind are published, and what is known of them."""

    root: Path
    space: records_pb2.VectorSpace
    live: LiveSnapshot | None = None
    seen: Current | None = None
    fault: KarError | None = None
    """Why what is current cannot be used; `seen` is looked at again when it changes, what may pass at every look."""
    look: "asyncio.Task[None] | None" = None
    """Looks for a new snapshot. It outlives who waits for it: a caller whose deadline ends must not end a load."""


class LiveIndexes:
    """The current snapshots below <folder>/<release id>/<user or item>, of the releases that were asked for."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self._folder = folder
        self._slots: dict[tuple[str, EntityKind], _Slot] = {}

    async def get(self, release_id: str, space: records_pb2.VectorSpace, kind: EntityKind) -> LiveSnapshot:
        """The current snapshot of a release's vectors in its encoder's space. Use it before the next await.

        Raises:
            PreconditionError: none was published.
            IntegrityError: it is corrupt, or of another space.
            UnavailableError: it cannot be loaded now.
            UnsupportedError: FAISS is not installed.
        """
        slot = self._slot(release_id, space, kind)
        if slot.live is None:
            await self._look(slot)
        if slot.live is not None:
            return slot.live
        if slot.fault is not None:
            raise type(slot.fault)(str(slot.fault))
        raise PreconditionError(f"{slot.root} holds no index snapshot: run `kar publish` first")

    async def refresh(self, release_id: str, space: records_pb2.VectorSpace) -> None:
        """Look for new snapshots of a release, and of all that were asked for before, and swap what is new.

        What keeps one of them from being used is told by `get`, and keeps no other back.
        """
        for kind in EntityKind:
            self._slot(release_id, space, kind)
        for slot in list(self._slots.values()):
            await self._look(slot)

    async def close(self) -> None:
        """Finish the loads and searches under way."""
        for slot in self._slots.values():
            if slot.look is not None:
                await asyncio.wait([slot.look])
            if slot.live is not None:
                await asyncio.to_thread(slot.live.index.close)
                slot.live = None

    def _slot(self, release_id: str, space: records_pb2.VectorSpace, kind: EntityKind) -> _Slot:
        # A release id that is loaded is a folder's name, and no path.
        return self._slots.setdefault((release_id, kind), _Slot(self._folder / release_id / kind, space))

    async def _look(self, slot: _Slot) -> None:
        if slot.look is None or slot.look.done():
            slot.look = asyncio.create_task(_swap(slot))
        await asyncio.shield(slot.look)


async def _swap(slot: _Slot) -> None:
    """Load what is current, if it is new; otherwise what is loaded goes on answering."""
    old = slot.live
    current = None
    try:
        current = await asyncio.to_thread(read_current, slot.root)
        if current is None:
            slot.seen = slot.fault = None
            return
        if current == slot.seen:
            return
        if old is not None and old.snapshot_id == current.snapshot_id:
            slot.live, slot.seen, slot.fault = LiveSnapshot(old.index, *current), current, None
            return
        index = await asyncio.to_thread(_load, slot.root / current.snapshot_id, slot.space)
    except Exception as error:
        if isinstance(error, KarError):
            fault = error
        else:
            fault = UnavailableError(f"{slot.root} could not be loaded ({error!r}): see the log, then retry")
        if str(fault) != str(slot.fault):
            log.warning("index_unavailable root=%s reason=%s", slot.root, fault, exc_info=fault is not error)
        # What may pass is looked at again, whether or not something else is published.
        slot.fault, slot.seen = fault, None if isinstance(fault, UnavailableError) else current
        return
    slot.live, slot.seen, slot.fault = LiveSnapshot(index, *current), current, None
    log.info("index_loaded root=%s snapshot=%s vectors=%d", slot.root, current.snapshot_id, len(index))
    if old is not None:
        await asyncio.to_thread(old.index.close)


def _load(folder: Path, space: records_pb2.VectorSpace) -> FaissIndex:
    index = FaissIndex.load(folder)
    if (index.about["space_id"], index.dim) != (space.space_id, space.dim):
        index.close()
        raise IntegrityError(f"{folder} holds vectors of another space than its release: publish the release again")
    return index
