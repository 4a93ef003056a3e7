"""Owns the store reads of a ranking request: their keys, their batches, and the result when a read fails.

One batch reads the user and all candidates. Knowledge affinity also needs the vectors of the items that the user rated:
they come with the same batch when the request names the history, and otherwise with a second one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IncompleteError, IntegrityError
from kar_sidecar.experiments.assignment import KNOWLEDGE
from kar_sidecar.features import History
from kar_sidecar.ranking.request import Query
from kar_sidecar.ranking.trace import RequestTrace
from kar_sidecar.releases.serving_view import ServedRelease
from kar_sidecar.store import EntityKey, Record, Store
from kar_sidecar.store.async_read import STORE_SHARE, call_store

__all__ = ["Fetched", "UserView", "entity_keys", "fetch", "nothing_read", "rated_item_keys", "view_user"]


@dataclass(frozen=True, slots=True)
class UserView:
    """A user's stored features, and the history that models read."""

    row: NDArray[np.void]
    """Packed stored features [1]; missing values where nothing is stored."""
    history: History
    """The history that `view_user` chose: the request's or the stored one."""
    inline_history: bool
    """Whether the history came with the request."""
    features_written_at_ms: int
    """Time at which the stored features were true, milliseconds since 1970; 0 where nothing is stored."""
    fault: str
    """Why the stored features cannot be used; empty when they are used or absent."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The store records that were read for one query."""

    records: Sequence[Record]
    """Parts of the user, then of each candidate, as `ServedRelease.parts` lists them; None: absent or not read."""
    user: UserView
    rated_vectors: Sequence[bytes | None]
    """Affinity vectors of `rated_item_keys(user.history, ...)`, in that order; empty where they were not read."""


def entity_keys(query: Query) -> list[EntityKey]:
    """Keys of the user, then of the candidates."""
    return [EntityKey(USER, query.user_id), *(EntityKey(ITEM, item) for item in query.item_ids)]


def rated_item_keys(history: History, served: ServedRelease) -> list[EntityKey]:
    """Keys of the last rated items, oldest first, whose affinity vectors are read; empty without affinity vectors."""
    if served.affinity_space is None or served.release.affinity is None:
        return []
    return [EntityKey(ITEM, item) for item in history.item_ids[-served.release.affinity.events :]]


def view_user(query: Query, served: ServedRelease, features: bytes | None) -> UserView:
    """Decode a user's stored features and choose the history; a damaged record counts as absent.

    The request's history is used unless it states a time and the stored history is newer.
    """
    fault = ""
    layout = served.release.user_layout
    try:
        stored = layout.decode_user(features)
    except IntegrityError as error:
        stored, fault = layout.decode_user(None), str(error)
    if query.history is not None and (query.history_as_of_ms is None or query.history_as_of_ms >= stored.written_at_ms):
        return UserView(stored.row, query.history, True, stored.written_at_ms, fault)
    return UserView(stored.row, stored.history, False, stored.written_at_ms, fault)


def nothing_read(query: Query, served: ServedRelease, arm: str) -> Fetched:
    """The result for a query when none of its records could be read."""
    absent: Record = (None,) * len(served.parts(arm))
    return Fetched([absent] * (1 + len(query.item_ids)), view_user(query, served, None), [])


async def fetch(
    query: Query, served: ServedRelease, arm: str, store: Store, limit_ms: float, trace: RequestTrace
) -> Fetched:
    """Read the records that an arm needs for a query. A read that fails, fully or partly, is recorded in `trace`.

    Args:
        query: The request.
        served: Its release.
        arm: The assigned arm; the control arm reads features only.
        store: Where to read.
        limit_ms: Longest wait for one batch, in milliseconds.
        trace: Bounds the wait by the request's deadline, and takes the reasons of failures.
    """
    parts, keys = served.parts(arm), entity_keys(query)
    # A request's history without a time is always used, so its items can be read with the first batch.
    known_history = query.history if query.history_as_of_ms is None else None
    rated_keys = rated_item_keys(known_history, served) if known_history and arm == KNOWLEDGE else []
    batch = await _read(store, [*keys, *rated_keys], parts, limit_ms, trace)
    if batch is None:
        return nothing_read(query, served, arm)
    records, rated_records = batch[: len(keys)], batch[len(keys) :]
    user = view_user(query, served, records[0][0])
    if not rated_keys and arm == KNOWLEDGE and (rated_keys := rated_item_keys(user.history, served)):
        rated_records = await _read(store, rated_keys, parts[-1:], limit_ms, trace) or []
    return Fetched(records, user, [record[-1] for record in rated_records])


async def _read(
    store: Store, keys: Sequence[EntityKey], parts: Sequence[str], limit_ms: float, trace: RequestTrace
) -> list[Record] | None:
    """One batch in the order of `keys`; None when nothing could be read in time."""
    left_s = trace.left_s(limit_ms)

    async def read() -> list[Record]:
        try:
            return await call_store(store, store.read, keys, parts, STORE_SHARE * left_s)
        except IncompleteError as error:
            trace.record_failure("store", str(error))
            return list(error.records)

    return await trace.attempt("store", read(), left_s)
