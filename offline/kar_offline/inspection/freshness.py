"""Owns how fresh knowledge is: counts and ages of a work folder's texts, and of the vectors that a store serves."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts import read_renderer
from kar_offline.refresh.knowledge_state import entities_of, read_records, states
from kar_offline.refresh.policy import Policy, Reason, State, due
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER, EntityKind
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import EntityKey, Store, vector_part
from kar_sidecar.store.records import FULL, HEADER, NEUTRAL, NEVER, STALE

__all__ = ["served_status", "text_status"]

AGES_DAYS: Final = (1, 7, 30, 90)
GROWTH_EVENTS: Final = (1, 10, 30, 100)
UNKNOWN: Final = "unknown"
LEVELS: Final = [name.removeprefix("KNOWLEDGE_LEVEL_").lower() for name, _ in records_pb2.KnowledgeLevel.items()]
DAY_MS: Final = 86_400_000
BATCH: Final = 1_000
"""Entities of one read of the store."""
TIMEOUT_S: Final = 5.0
"""Of one such read."""


def text_status(work: WorkFolder, policy: Policy, now: datetime) -> dict[str, Any]:
    """What is known of each kind of entities of a work folder: counts, ages of texts, growth of users' histories.

    Raises:
        PreconditionError: an earlier stage is missing.
        IntegrityError: one is corrupt.
    """
    dataset, records = work.read(Dataset), read_records(work)
    every = list(states(dataset, records, read_renderer(work.prompts, now.date()), now))
    found = due(every, policy)
    report: dict[str, Any] = {}
    for kind, entities in entities_of(dataset).items():
        held = [record for entity in entities if (record := records[kind].get(entity.id))]
        own = [record for record in held if record.text]
        reasons = Counter(one.reasons[0] for one in found if one.kind == kind)
        ages = [(now - r.created_at.ToDatetime(UTC)).days if r.HasField("created_at") else None for r in own]
        report[kind] = {
            "entities": len(entities),
            "own_text": len(own),
            "lent": len(held) - len(own),
            "none": len(entities) - len(held),
            "expired": sum(state.expired for state in every if state.kind == kind),
            "due": {reason.value: reasons[reason] for reason in Reason},
            "age_days": _histogram(ages, AGES_DAYS),
        }
        if kind == USER:
            report[kind]["events_since"] = _growth(every)
    return report


def _growth(every: Iterable[State]) -> dict[str, int]:
    """How many users with a text did so much since it was written."""
    grown = [state.events - state.cutoff for state in every if state.kind == USER and state.written]
    counts = _histogram(grown, GROWTH_EVENTS)
    return {name: count for name, count in counts.items() if name != UNKNOWN}


def served_status(dataset: Dataset, release: Release, store: Store, now_ms: int) -> dict[str, Any]:
    """What a store serves of a release: entities by level, and ages of their vectors, from the headers of all records.

    It reads the adapted vectors of kinds that pass through the adaptor, and the encoded ones of the others.

    Raises:
        UnavailableError: the store does not answer.
    """
    report: dict[str, Any] = {"release_id": release.release_id}
    manifest = release.manifest
    for kind, entities in entities_of(dataset).items():
        adapted = kind in release.towers
        space = manifest.adapted_space if adapted else manifest.encoded_space
        headers = _headers(store, kind, entities, vector_part(space.space_id))
        expires = headers["expires_at_ms"]
        levels = np.where((expires != NEVER) & (expires <= now_ms), STALE, headers["level"])
        counts = np.bincount(levels, minlength=NEUTRAL + 1)
        counts[NEUTRAL] = len(entities) - len(headers)
        report[kind] = {
            "vectors": "adapted" if adapted else "encoded",
            "levels": dict(zip(LEVELS[FULL:], counts[FULL:].tolist(), strict=True)),
            "age_days": _histogram(((now_ms - headers["written_at_ms"]) // DAY_MS).tolist(), AGES_DAYS),
        }
    return report


def _headers(store: Store, kind: EntityKind, entities: Sequence[Entity], part: str) -> NDArray[np.void]:
    """The headers of the parts that are there, as `HEADER`."""
    found = []
    for start in range(0, len(entities), BATCH):
        keys = [EntityKey(kind, entity.id) for entity in entities[start : start + BATCH]]
        found += [blob[: HEADER.itemsize] for (blob,) in store.read(keys, [part], TIMEOUT_S) if blob]
    return np.frombuffer(b"".join(found), HEADER)


def _histogram(values: Sequence[int | None], bounds: Sequence[int]) -> dict[str, int]:
    """How many values lie below each bound, but not below the one before; above the last; and are not known."""
    known = [value for value in values if value is not None]
    counts = np.bincount(np.searchsorted(bounds, known, side="right"), minlength=len(bounds) + 1)
    names = [*(f"<{bound}" for bound in bounds), f"{bounds[-1]}+"]
    return {**dict(zip(names, counts.tolist(), strict=True)), UNKNOWN: len(values) - len(known)}
