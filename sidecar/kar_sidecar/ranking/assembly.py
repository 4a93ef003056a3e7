"""Owns the way from a query and its store records to the tensors that models read (`kar_sidecar.scoring`).

A damaged record costs the request that one record: its entity counts as unknown, and the assembly says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IntegrityError
from kar_sidecar.features import History
from kar_sidecar.ranking.affinity import affinity, centred
from kar_sidecar.ranking.request import Column, Query
from kar_sidecar.releases.serving_view import ENCODED, ServedRelease
from kar_sidecar.scoring import AFFINITY, Tensors
from kar_sidecar.store import EntityKey, Record
from kar_sidecar.store.records import NEUTRAL, STALE, VectorBatch, decode_vectors

__all__ = ["Assembly", "UserView", "VectorProvenance", "assemble", "keys", "nothing_read", "rated_keys", "view_user"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UserView:
    """What a query and the store know of its user: packed row [1], and the history that models read."""

    row: NDArray[np.void]
    history: History
    inline: bool
    """Whether the history came with the request."""
    written_at_ms: int
    """When the stored features were true; 0 for none."""
    fault: str
    """Why the stored features were not used; empty when all is well."""


@dataclass(frozen=True, slots=True)
class VectorProvenance:
    """Knowledge vectors of some entities that the tensors hold: levels [n] uint8, and as in `VectorBatch` when written.

    NEUTRAL stands for those that there is no vector of.
    """

    entity: str
    """"user", "item", or "history" for the items that the user rated."""
    levels: NDArray[np.uint8]
    written_at_ms: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Assembly:
    """One request's tensors, and what is worth telling about them.

    `user_level` and `item_levels` [C] uint8 are 0 where no knowledge was asked for.
    """

    tensors: Tensors
    user_level: int
    item_levels: NDArray[np.uint8]
    history_events: int
    missing_values: int
    features_written_at_ms: int
    inline_history_used: bool
    faults: tuple[str, ...]
    """Why records were not used; empty when all is well."""
    given: tuple[VectorProvenance, ...]
    """The knowledge vectors that the tensors hold; an item may have two, of knowledge and of affinity."""

    @property
    def oldest_ms(self) -> int:
        """When the oldest of them was written; 0 without any."""
        times = [one.written_at_ms[one.levels != NEUTRAL] for one in self.given]
        return int(min((t.min() for t in times if len(t)), default=0))


def keys(query: Query) -> list[EntityKey]:
    """What one batch reads for a query: the user, then the candidates."""
    return [EntityKey(USER, query.user_id), *(EntityKey(ITEM, item) for item in query.item_ids)]


def rated_keys(history: History, served: ServedRelease) -> list[EntityKey]:
    """The items of a history, oldest first, whose affinity vectors a release reads."""
    if served.affinity_space is None or served.release.affinity is None:
        return []
    return [EntityKey(ITEM, item) for item in history.item_ids[-served.release.affinity.events :]]


def nothing_read(query: Query, parts: Sequence[str]) -> list[Record]:
    """Records of a query whose entities are all unknown."""
    return [(None,) * len(parts)] * (1 + len(query.item_ids))


def view_user(query: Query, served: ServedRelease, features: bytes | None) -> UserView:
    """Join a query with its user's stored features; a damaged record counts as none.

    Inline values replace stored ones, an inline history the stored one unless that is newer.
    """
    fault = ""
    layout = served.release.user_layout
    try:
        user = layout.decode_user(features)
    except IntegrityError as error:
        user, fault = layout.decode_user(None), str(error)
    inline = query.history is not None and (
        query.history_as_of_ms is None or query.history_as_of_ms >= user.written_at_ms
    )
    history = query.history if inline and query.history is not None else user.history
    return UserView(_replace(user.row, query.user_columns), history, inline, user.written_at_ms, fault)


def assemble(
    query: Query,
    served: ServedRelease,
    user: UserView,
    records: Sequence[Record],
    rated: Sequence[bytes | None],
    *,
    at_ms: int,
) -> Assembly:
    """Build the tensors of one request.

    Args:
        query: The request.
        served: Its release.
        user: `view_user` of the first record.
        records: Records of `keys(query)`, in that order; features and, for an arm with knowledge, vectors.
        rated: Affinity vector parts of `rated_keys(user.history, served)`, in that order; without them all are
            unknown.
        at_ms: Decides what expired.
    """
    release, faults = served.release, [user.fault] if user.fault else []
    parts = list(zip(*records, strict=True))
    stored = _tolerant(release.item_layout.decode_items, parts[0][1:], faults)
    item_rows = _replace(stored, query.item_columns)
    encoder = release.encoder
    history_item, history_rating = encoder.history(user.history)
    user_categorical, user_numeric, user_missing = encoder.rows(release.user_layout, user.row)
    item_categorical, item_numeric, item_missing = encoder.rows(release.item_layout, item_rows)
    tensors = {
        "history_item": history_item,
        "history_rating": history_rating,
        "user_categorical": user_categorical[0],
        "user_numeric": user_numeric[0],
        "item_index": encoder.items(query.item_ids),
        "item_categorical": item_categorical,
        "item_numeric": item_numeric,
    }
    levels, given = np.zeros(len(records), np.uint8), []
    if len(parts) > 1:
        levels, written_at_ms = _knowledge(served, parts[1], at_ms, tensors, faults)
        given = [
            VectorProvenance(USER, levels[:1], written_at_ms[:1]),
            VectorProvenance(ITEM, levels[1:], written_at_ms[1:]),
        ]
        if release.affinity is not None:
            count = len(query.item_ids)
            vectors = parts[2][1:] if len(parts) > 2 else [None] * count
            seen = _affinity(served, release.affinity, user.history, vectors, rated, at_ms, tensors, faults)
            given += [
                VectorProvenance(ITEM, seen.levels[:count], seen.written_at_ms[:count]),
                VectorProvenance("history", seen.levels[count:], seen.written_at_ms[count:]),
            ]
            # A user whose own knowledge is not read is known as well as the best known item of the history.
            best = int(seen.levels[count:].min(initial=NEUTRAL))
            known = np.fromiter(chain([best], seen.levels[:count]), np.uint8, 1 + count)
            levels = np.where(np.isin([USER] + [ITEM] * count, release.towers), levels, known)
            levels[1:][known[1:] == STALE] = STALE
    return Assembly(
        tensors,
        int(levels[0]),
        levels[1:].astype(np.uint8),
        min(len(user.history.item_ids), encoder.history_length),
        user_missing + item_missing,
        user.written_at_ms,
        user.inline,
        tuple(dict.fromkeys(faults)),
        tuple(given),
    )


def _replace(rows: NDArray[np.void], columns: Sequence[Column]) -> NDArray[np.void]:
    if not columns:
        return rows
    rows = rows.copy()
    for column in columns:
        if column.present is None:
            rows[column.name] = column.values
        else:
            rows[column.name][column.present] = column.values[column.present]
    return rows


def _tolerant(decode: Callable[[Sequence[bytes | None]], T], blobs: Sequence[bytes | None], faults: list[str]) -> T:
    """`decode(blobs)`, or without those that cannot be decoded, which leave a fault."""
    try:
        return decode(blobs)
    except IntegrityError as error:
        faults.append(str(error))

    def sound(blob: bytes | None) -> bool:
        try:
            decode([blob])
        except IntegrityError:
            return False
        return True

    return decode([blob if sound(blob) else None for blob in blobs])


def _vectors(
    space: records_pb2.VectorSpace,
    blobs: Sequence[bytes | None],
    neutral: NDArray[np.float32],
    at_ms: int,
    faults: list[str],
) -> VectorBatch:
    def decode(some: Sequence[bytes | None]) -> VectorBatch:
        return decode_vectors(some, space.space_id, space.dim, neutral, dtype=space.dtype, at_ms=at_ms)

    return _tolerant(decode, blobs, faults)


def _knowledge(
    served: ServedRelease,
    blobs: Sequence[bytes | None],
    at_ms: int,
    tensors: dict[str, NDArray],
    faults: list[str],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Add the tensors of the adaptor's towers; returns levels [1 + C] of user and candidates, and when written."""
    towers = served.release.towers
    batch = _vectors(served.space, blobs, served.neutral[1], at_ms, faults)
    vectors, levels = batch.vectors, batch.levels
    if levels[0] == NEUTRAL:
        vectors[0] = served.neutral[0]
    present = levels != NEUTRAL
    user, items = (vectors[0], present[:1]), (vectors[1:], present[1:])
    for kind, name, (own, known) in ((USER, "user", user), (ITEM, "item", items)):
        if kind not in towers:
            levels[slice(1) if kind == USER else slice(1, None)] = NEUTRAL
        elif served.mode == ENCODED:
            tensors |= {f"{name}_encoding": own, f"{name}_present": known}
        else:
            tensors[f"{name}_knowledge"] = own
    return levels, batch.written_at_ms


def _affinity(
    served: ServedRelease,
    how: records_pb2.Affinity,
    history: History,
    candidates: Sequence[bytes | None],
    rated: Sequence[bytes | None],
    at_ms: int,
    tensors: dict[str, NDArray],
    faults: list[str],
) -> VectorBatch:
    """Add the affinity tensors; returns the affinity vectors of the candidates, then of the rated items."""
    ratings = history.ratings[-how.events :][None]
    seen = np.ones(ratings.shape, bool)
    space, count, rows = served.affinity_space, len(candidates), len(candidates) + ratings.shape[1]
    batch = VectorBatch(np.zeros((rows, 0), np.float32), np.full(rows, NEUTRAL, np.uint8), np.zeros(rows, np.int64))
    if space is not None:
        parts = [*candidates, *(rated or [None] * ratings.shape[1])]
        batch = _vectors(space, parts, np.zeros(space.dim, np.float32), at_ms, faults)
    vectors, past = batch.vectors[:count], batch.vectors[count:]
    if how.mean:
        columns = affinity(vectors[None], past[None], ratings, seen, [segment.dim for segment in how.segments])[0]
        mean, scale = (np.array(list(values), np.float32) for values in (how.mean, how.scale))
        tensors[AFFINITY] = (columns - mean) / scale
    if how.learned:
        padding = how.events - len(past)
        tensors["item_vector"] = vectors
        tensors["history_vector"] = np.pad(past, ((0, padding), (0, 0)))
        tensors["history_weight"] = np.pad(centred(ratings, seen)[0], (0, padding))
    return batch
