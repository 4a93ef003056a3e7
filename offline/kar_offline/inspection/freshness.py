"""Owns the freshness of knowledge: counts and ages of a work folder's texts, and of the vectors in a store."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.prompts import read_renderer
from kar_offline.refresh.knowledge_state import knowledge_states
from kar_offline.refresh.policy import KnowledgeState, Policy, Reason, refresh_candidates
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER, EntityKind
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import EntityKey, Store, vector_part
from kar_sidecar.store.records import FULL, HEADER, NEUTRAL, NEVER, STALE

__all__ = ["ServedVectors", "TextStatus", "served_status", "text_status"]

AGES_DAYS: Final = (1, 7, 30, 90)
GROWTH_EVENTS: Final = (1, 10, 30, 100)
UNKNOWN: Final = "unknown"
LEVELS: Final = [name.removeprefix("KNOWLEDGE_LEVEL_").lower() for name, _ in records_pb2.KnowledgeLevel.items()]
DAY_MS: Final = 86_400_000
BATCH_ENTITIES: Final = 1_000
"""Number of entities in one read of the store."""
TIMEOUT_S: Final = 5.0
"""Longest time of one read of the store, in seconds."""


@dataclass(frozen=True, slots=True)
class TextStatus:
    """Counts and ages of the texts about one kind of entity."""

    entities: int
    own_text: int
    """Entities with a text of their own."""
    lent: int
    """Entities whose vector is imputed from named neighbours."""
    none: int
    """Entities without a record."""
    expired: int
    """Entities whose text has expired."""
    due: Mapping[str, int]
    """Entities whose text is due, by the first reason."""
    age_days: Mapping[str, int]
    """Texts by age in days, such as "<7"."""
    events_since: Mapping[str, int] | None = None
    """Users by the number of events since their text was written; None for items."""

    def as_json(self) -> dict[str, Any]:
        """The fields as a report has them; a field that is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class ServedVectors:
    """Counts and ages of the vectors that a store serves for one kind of entity."""

    vectors: str
    """"adapted" or "encoded"."""
    levels: Mapping[str, int]
    """Entities by knowledge level."""
    age_days: Mapping[str, int]
    """Vectors by age in days, such as "<7"."""


def text_status(work: WorkFolder, policy: Policy, now: datetime) -> dict[EntityKind, TextStatus]:
    """Counts and ages of the texts in a work folder, by kind of entity.

    Raises:
        PreconditionError: an earlier stage is missing.
        IntegrityError: the output of a stage is corrupt.
    """
    dataset, records = work.read(Dataset), work.read(Knowledge).records
    entity_states = list(knowledge_states(dataset, records, read_renderer(work.prompts, now.date()), now))
    candidates = refresh_candidates(entity_states, policy)
    report = {}
    for kind in EntityKind:
        entities = dataset.entities[kind]
        with_record = [record for entity in entities if (record := records[kind].get(entity.id))]
        with_text = [record for record in with_record if record.text]
        reasons = Counter(candidate.reasons[0] for candidate in candidates if candidate.kind == kind)
        ages = [(now - r.created_at.ToDatetime(UTC)).days if r.HasField("created_at") else None for r in with_text]
        report[kind] = TextStatus(
            entities=len(entities),
            own_text=len(with_text),
            lent=len(with_record) - len(with_text),
            none=len(entities) - len(with_record),
            expired=sum(state.expired for state in entity_states if state.kind == kind),
            due={reason.value: reasons[reason] for reason in Reason},
            age_days=_histogram(ages, AGES_DAYS),
            events_since=_events_since(entity_states) if kind == USER else None,
        )
    return report


def _events_since(entity_states: Iterable[KnowledgeState]) -> dict[str, int]:
    """The number of users by their events since their text was written."""
    events = [state.events - state.cutoff for state in entity_states if state.kind == USER and state.has_text]
    return {name: count for name, count in _histogram(events, GROWTH_EVENTS).items() if name != UNKNOWN}


def served_status(dataset: Dataset, release: Release, store: Store, now_ms: int) -> dict[EntityKind, ServedVectors]:
    """Counts and ages of the vectors of a release in a store, by kind of entity, from the headers of all records.

    For kinds with a tower in the adaptor these are the adapted vectors, for other kinds the encoded ones.

    Raises:
        UnavailableError: the store does not answer.
    """
    report = {}
    manifest = release.manifest
    for kind in EntityKind:
        entities = dataset.entities[kind]
        adapted = kind in release.towers
        space = manifest.adapted_space if adapted else manifest.encoded_space
        headers = _headers(store, kind, entities, vector_part(space.space_id))
        expires = headers["expires_at_ms"]
        levels = np.where((expires != NEVER) & (expires <= now_ms), STALE, headers["level"])
        counts = np.bincount(levels, minlength=NEUTRAL + 1)
        counts[NEUTRAL] = len(entities) - len(headers)
        report[kind] = ServedVectors(
            vectors="adapted" if adapted else "encoded",
            levels=dict(zip(LEVELS[FULL:], counts[FULL:].tolist(), strict=True)),
            age_days=_histogram(((now_ms - headers["written_at_ms"]) // DAY_MS).tolist(), AGES_DAYS),
        )
    return report


def _headers(store: Store, kind: EntityKind, entities: Sequence[Entity], part: str) -> NDArray[np.void]:
    """The headers [m], of dtype `HEADER`, of the m parts that exist."""
    headers = []
    for start in range(0, len(entities), BATCH_ENTITIES):
        keys = [EntityKey(kind, entity.id) for entity in entities[start : start + BATCH_ENTITIES]]
        headers += [blob[: HEADER.itemsize] for (blob,) in store.read(keys, [part], TIMEOUT_S) if blob]
    return np.frombuffer(b"".join(headers), HEADER)


def _histogram(values: Sequence[int | None], bounds: Sequence[int]) -> dict[str, int]:
    """Number of values below the first bound, between bounds, at or above the last bound, and unknown (None)."""
    known_values = [value for value in values if value is not None]
    counts = np.bincount(np.searchsorted(bounds, known_values, side="right"), minlength=len(bounds) + 1)
    names = [*(f"<{bound}" for bound in bounds), f"{bounds[-1]}+"]
    return {**dict(zip(names, counts.tolist(), strict=True)), UNKNOWN: len(values) - len(known_values)}
