"""Owns feature records: an entity's features, a user's history, and the time at which both were valid."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.publish.released_entities import EntityRecords
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.features import History
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import EntityKey

__all__ = ["current_features", "cutoff_features"]


def cutoff_features(release: Release, dataset: Dataset) -> EntityRecords:
    """Feature records of all users, then of all items, for a release.

    A user's history ends at the cut-off, since later events are samples. The record has the time of its last
    event; records of items have the time of the dataset's last event.
    """
    item_ids = _item_ids(dataset)
    for row in range(len(dataset.users)):
        events = dataset.written_from(row)
        yield _user_record(release, dataset, item_ids, row, events, int(dataset.event_time[events].max(initial=0)))
    latest_s = int(dataset.event_time.max(initial=0))
    for item in dataset.items:
        yield _item_record(release, item, latest_s)


def current_features(release: Release, dataset: Dataset, keys: Collection[EntityKey]) -> EntityRecords:
    """Feature records of the items among `keys`, then of the users, with all events until now.

    A user's history holds the last events, at most as many as a model reads. The record has the time of the last event;
    records of items, and of users without events, have the time of the dataset's last event.
    """
    item_ids = _item_ids(dataset)
    latest_s = int(dataset.event_time.max(initial=0))
    for item in dataset.items:
        if EntityKey(ITEM, item.id) in keys:
            yield _item_record(release, item, latest_s)
    history_events = max(AFFINITY_EVENTS, dataset.schema.history_length)
    for row, user in enumerate(dataset.users):
        if EntityKey(USER, user.id) in keys:
            start, stop = int(dataset.offsets[row]), int(dataset.offsets[row + 1])
            events = slice(max(start, stop - history_events), stop)
            last_event_s = int(dataset.event_time[events].max(initial=0) or latest_s)
            yield _user_record(release, dataset, item_ids, row, events, last_event_s)


def _item_ids(dataset: Dataset) -> NDArray[np.object_]:
    return np.array([item.id for item in dataset.items], dtype=object)


def _user_record(
    release: Release, dataset: Dataset, item_ids: NDArray[np.object_], row: int, events: slice, written_at_s: int
) -> tuple[EntityKey, bytes]:
    user, layout = dataset.users[row], release.user_layout
    history = History(tuple(item_ids[dataset.event_item[events]]), dataset.event_rating[events])
    blob = layout.encode(layout.row(user.features), written_at_ms=written_at_s * 1000, history=history)
    return EntityKey(USER, user.id), blob


def _item_record(release: Release, item: Entity, written_at_s: int) -> tuple[EntityKey, bytes]:
    layout = release.item_layout
    return EntityKey(ITEM, item.id), layout.encode(layout.row(item.features), written_at_ms=written_at_s * 1000)
