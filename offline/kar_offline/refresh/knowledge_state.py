"""Owns the state of knowledge: what is known of every entity of a work folder, and of its text, at some time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.knowledge.records import read_knowledge
from kar_offline.prompts import Renderer
from kar_offline.refresh.policy import State
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["Records", "entities_of", "read_records", "states", "traffic"]

WINDOW_DAYS: Final = 30
"""Days before a dataset's last event whose events are its traffic."""
SMOOTHING: Final = 1.0
"""Events that everybody is taken to have had in the window, so that new ones are not worth nothing."""
DAY_S: Final = 86_400
UNKNOWN: Final = "unknown"

Records = Mapping[EntityKind, Mapping[str, records_pb2.KnowledgeRecord]]
"""Knowledge records by kind and id."""


def entities_of(dataset: Dataset) -> dict[EntityKind, list[Entity]]:
    """The entities of each kind, in the order of their rows."""
    return {ITEM: list(dataset.items), USER: list(dataset.users)}


def read_records(work: WorkFolder) -> dict[EntityKind, dict[str, records_pb2.KnowledgeRecord]]:
    """The knowledge records of a work folder; errors as of `read_knowledge`."""
    return {kind: {record.id: record for record in read_knowledge(work.knowledge, kind)} for kind in EntityKind}


def traffic(dataset: Dataset) -> dict[EntityKind, NDArray[np.float64]]:
    """How often each entity [rows] is asked about: its events of the last `WINDOW_DAYS`, plus `SMOOTHING`.

    Where users have no clock in common, all events count.
    """
    times = dataset.event_time
    recent = np.ones(len(times), np.bool_)
    if dataset.shared_clock:
        recent = times > times.max(initial=0) - WINDOW_DAYS * DAY_S
    rows: dict[EntityKind, tuple[NDArray[np.int32], int]] = {
        ITEM: (dataset.event_item, len(dataset.items)),
        USER: (dataset.event_user, len(dataset.users)),
    }
    return {
        kind: np.bincount(of[recent], minlength=count).astype(np.float64) + SMOOTHING
        for kind, (of, count) in rows.items()
    }


def states(dataset: Dataset, records: Records, renderer: Renderer, now: datetime) -> Iterator[State]:
    """The state of every item, then of every user that did something, in the order of their rows.

    Entities that borrow texts have one in use. A text whose template is not known counts as one of the newest.

    Args:
        dataset: The dataset as it is now; cut-offs do not matter, but what texts were written from.
        records: What is in use.
        renderer: Knows the templates and the seasons of the day.
        now: The time.
    """
    asked = traffic(dataset)
    events = np.diff(dataset.offsets)
    seasons = {kind: renderer.season(kind) for kind in EntityKind}
    for kind, entities in entities_of(dataset).items():
        for row, entity in enumerate(entities):
            done = int(events[row]) if kind == USER else 0
            if kind == USER and not done:
                continue
            record = records[kind].get(entity.id)
            count = float(asked[kind][row])
            state = State(kind, entity.id, count, written=record is not None, events=done, cutoff=done)
            if record is not None and record.text:
                state = replace(
                    state,
                    cutoff=min(record.history_cutoff, done),
                    expired=record.HasField("expires_at") and record.expires_at.ToDatetime(UTC) <= now,
                    season_changed=record.context.get("season", "") != seasons[kind],
                    template_changed=record.template not in (renderer.names[kind], UNKNOWN),
                )
            yield state
