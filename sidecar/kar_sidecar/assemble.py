"""Owns the way from a query and its store records to the tensors that models read (`kar_sidecar.scoring`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.query import Column, Query
from kar_sidecar.scoring import Tensors
from kar_sidecar.served import ENCODED, ServedRelease
from kar_sidecar.store import ITEM, USER, EntityKey, Record
from kar_sidecar.store.records import NEUTRAL, decode_vectors

__all__ = ["Assembly", "assemble", "keys", "nothing_read"]


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


def keys(query: Query) -> list[EntityKey]:
    """What one batch reads for a query: the user, then the candidates."""
    return [EntityKey(USER, query.user_id), *(EntityKey(ITEM, item) for item in query.item_ids)]


def nothing_read(query: Query, parts: Sequence[str]) -> list[Record]:
    """Records of a query whose entities are all unknown."""
    return [(None,) * len(parts)] * (1 + len(query.item_ids))


def assemble(query: Query, served: ServedRelease, records: Sequence[Record], *, at_ms: int) -> Assembly:
    """Build the tensors of one request from records of `keys(query)`, in that order.

    A record holds features and, for an arm with knowledge, a vector. Inline values replace stored ones, an inline
    history the stored one unless that is newer; NaN and infinite numbers are missing. `at_ms` decides what expired.

    Raises:
        IntegrityError: a record of another schema or vector space, or a corrupt one.
    """
    release = served.release
    parts = list(zip(*records, strict=True))
    features = parts[0]
    user = release.user_layout.decode_user(features[0])
    user_row = _replace(user.row, query.user_columns)
    item_rows = _replace(release.item_layout.decode_items(features[1:]), query.item_columns)
    inline = query.history is not None and (
        query.history_as_of_ms is None or query.history_as_of_ms >= user.written_at_ms
    )
    history = query.history if inline and query.history is not None else user.history
    encoder = release.encoder
    history_item, history_rating = encoder.history(history)
    user_categorical, user_numeric, user_missing = encoder.rows(release.user_layout, user_row)
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
    levels = np.zeros(len(records), np.uint8)
    if len(parts) > 1:
        knowledge, levels = _knowledge(served, parts[1], at_ms)
        tensors |= knowledge
    return Assembly(
        tensors,
        int(levels[0]),
        levels[1:],
        min(len(history.item_ids), encoder.history_length),
        user_missing + item_missing,
        user.written_at_ms,
        inline,
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


def _knowledge(
    served: ServedRelease, blobs: Sequence[bytes | None], at_ms: int
) -> tuple[dict[str, NDArray], NDArray[np.uint8]]:
    """Knowledge tensors, and the levels [1 + C] of user and candidates."""
    space = served.space
    batch = decode_vectors(blobs, space.space_id, space.dim, served.neutral[1], dtype=space.dtype, at_ms=at_ms)
    vectors, levels = batch.vectors, batch.levels
    if levels[0] == NEUTRAL:
        vectors[0] = served.neutral[0]
    if served.mode != ENCODED:
        return {"user_knowledge": vectors[0], "item_knowledge": vectors[1:]}, levels
    present = levels != NEUTRAL
    return {
        "user_encoding": vectors[0],
        "user_present": present[:1],
        "item_encoding": vectors[1:],
        "item_present": present[1:],
    }, levels
