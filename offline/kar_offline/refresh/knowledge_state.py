"""Owns the state of each entity's knowledge: its text compared with the dataset, the templates and the time."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.knowledge.knowledge_folder import RecordsByKind
from kar_offline.prompts import Renderer
from kar_offline.refresh.policy import KnowledgeState
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["entity_traffic", "knowledge_states"]

WINDOW_DAYS: Final = 30
"""Days before the dataset's last event whose events count as traffic."""
SMOOTHING_EVENTS: Final = 1.0
"""Added to the traffic of every entity, so that a new entity has a value."""
DAY_S: Final = 86_400
UNKNOWN_TEMPLATE: Final = "unknown"


def entity_traffic(dataset: Dataset) -> dict[EntityKind, NDArray[np.float64]]:
    """Events of each entity [rows] in the last `WINDOW_DAYS`, plus `SMOOTHING_EVENTS`.

    All events count if the users' clocks cannot be compared.
    """
    times = dataset.event_time
    in_window = np.ones(len(times), np.bool_)
    if dataset.shared_clock:
        in_window = times > times.max(initial=0) - WINDOW_DAYS * DAY_S
    event_rows = {ITEM: dataset.event_item, USER: dataset.event_user}
    return {
        kind: np.bincount(rows[in_window], minlength=len(dataset.entities[kind])).astype(np.float64) + SMOOTHING_EVENTS
        for kind, rows in event_rows.items()
    }


def knowledge_states(
    dataset: Dataset, records: RecordsByKind, renderer: Renderer, now: datetime
) -> Iterator[KnowledgeState]:
    """The state of every item, then of every user with an event, in row order.

    An entity whose record names neighbours counts as having a text. A text from an unknown template
    counts as a text from the newest template.

    Args:
        dataset: The dataset; its cut-offs are ignored, since each record has the cut-off of its text.
        records: The records in use.
        renderer: Gives the current templates and seasons.
        now: The time.
    """
    traffic = entity_traffic(dataset)
    user_events = np.diff(dataset.offsets)
    seasons = {kind: renderer.season(kind) for kind in EntityKind}
    for kind in (ITEM, USER):
        for row, entity in enumerate(dataset.entities[kind]):
            events = int(user_events[row]) if kind == USER else 0
            if kind == USER and not events:
                continue
            record = records[kind].get(entity.id)
            state = KnowledgeState(
                kind, entity.id, float(traffic[kind][row]), has_text=record is not None, events=events, cutoff=events
            )
            if record is not None and record.text:
                state = replace(
                    state,
                    cutoff=min(record.history_cutoff, events),
                    expired=record.HasField("expires_at") and record.expires_at.ToDatetime(UTC) <= now,
                    season_changed=record.context.get("season", "") != seasons[kind],
                    template_changed=record.template not in (renderer.names[kind], UNKNOWN_TEMPLATE),
                )
            yield state
