"""Owns the tensors of a ranking request: it makes the models' inputs (`kar_sidecar.scoring`) from query and records.

A damaged record counts as absent: its entity is treated as unknown, and `Assembly.faults` gives the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IntegrityError
from kar_sidecar.features import History
from kar_sidecar.ranking.affinity import affinity, centred
from kar_sidecar.ranking.fetch import Fetched
from kar_sidecar.ranking.request import Column, Query
from kar_sidecar.releases.serving_view import ENCODED, ServedRelease
from kar_sidecar.scoring import AFFINITY, Tensors
from kar_sidecar.store.records import NEUTRAL, STALE, VectorBatch, decode_vectors

__all__ = ["Assembly", "VectorProvenance", "assemble"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VectorProvenance:
    """Level and age of n knowledge vectors that the tensors hold."""

    entity: str
    """"user", "item", or "history" for the items that the user rated."""
    levels: NDArray[np.uint8]
    """Knowledge level [n]; NEUTRAL where the entity has no vector."""
    written_at_ms: NDArray[np.int64]
    """When each was written [n], milliseconds since 1970; 0 where the entity has no vector."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """The tensors of one request for C candidates, and the facts about them that the response states."""

    tensors: Tensors
    user_level: int
    """The user's knowledge level; 0 where the arm reads no knowledge."""
    item_levels: NDArray[np.uint8]
    """Each candidate's knowledge level [C]; 0 where the arm reads no knowledge."""
    history_events: int
    """Number of history events that the model reads."""
    missing_values: int
    """Number of numeric features of the user and all candidates that were absent, NaN or infinite."""
    features_written_at_ms: int
    """Time at which the user's stored features were true, milliseconds since 1970; 0 where nothing is stored."""
    inline_history_used: bool
    faults: tuple[str, ...]
    """Reasons why records were not used; empty when all were used."""
    provenance: tuple[VectorProvenance, ...]
    """The knowledge vectors in the tensors; an item may have two: its knowledge vector and its affinity vector."""

    @property
    def oldest_vector_ms(self) -> int:
        """When the oldest knowledge vector was written, milliseconds since 1970; 0 without any."""
        times = [group.written_at_ms[group.levels != NEUTRAL] for group in self.provenance]
        return int(min((written_at_ms.min() for written_at_ms in times if len(written_at_ms)), default=0))


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Decodes records as of `at_ms`. Records that cannot be decoded count as absent and leave a fault."""

    at_ms: int
    faults: list[str]

    def decode(self, decode: Callable[[Sequence[bytes | None]], T], blobs: Sequence[bytes | None]) -> T:
        """`decode(blobs)`, with None in the place of every damaged record."""
        try:
            return decode(blobs)
        except IntegrityError as error:
            self.faults.append(str(error))

        def is_sound(blob: bytes | None) -> bool:
            try:
                decode([blob])
            except IntegrityError:
                return False
            return True

        return decode([blob if is_sound(blob) else None for blob in blobs])

    def vectors(
        self, space: records_pb2.VectorSpace, blobs: Sequence[bytes | None], neutral: NDArray[np.float32]
    ) -> VectorBatch:
        """Vectors of one space; `neutral` [dim] where there is none."""

        def decode(parts: Sequence[bytes | None]) -> VectorBatch:
            return decode_vectors(parts, space.space_id, space.dim, neutral, dtype=space.dtype, at_ms=self.at_ms)

        return self.decode(decode, blobs)


@dataclass(frozen=True, slots=True)
class _Knowledge:
    """Inputs of the knowledge arm besides features: tensors, levels [1 + C] of user and candidates, provenance."""

    tensors: dict[str, NDArray]
    levels: NDArray[np.uint8]
    provenance: tuple[VectorProvenance, ...]


def assemble(query: Query, served: ServedRelease, fetched: Fetched, *, at_ms: int) -> Assembly:
    """Build the tensors of one request.

    Args:
        query: The request.
        served: Its release.
        fetched: What `fetch` read for it.
        at_ms: The time of day, milliseconds since 1970: vectors that have expired by then are STALE.
    """
    user = fetched.user
    decoder = _Decoder(at_ms, [user.fault] if user.fault else [])
    features, *vectors = zip(*fetched.records, strict=True)  # by part: of the user, then of the candidates
    tensors, missing_values = _feature_tensors(query, served, fetched, features[1:], decoder)
    if vectors:
        knowledge = _knowledge(served, fetched, vectors, decoder)
    else:
        knowledge = _Knowledge({}, np.zeros(len(fetched.records), np.uint8), ())
    return Assembly(
        tensors | knowledge.tensors,
        user_level=int(knowledge.levels[0]),
        item_levels=knowledge.levels[1:],
        history_events=min(len(user.history.item_ids), served.release.encoder.history_length),
        missing_values=missing_values,
        features_written_at_ms=user.features_written_at_ms,
        inline_history_used=user.inline_history,
        faults=tuple(dict.fromkeys(decoder.faults)),
        provenance=knowledge.provenance,
    )


def _feature_tensors(
    query: Query, served: ServedRelease, fetched: Fetched, item_features: Sequence[bytes | None], decoder: _Decoder
) -> tuple[dict[str, NDArray], int]:
    """The tensors that every arm reads, and how many numbers were missing."""
    release, encoder, user = served.release, served.release.encoder, fetched.user
    user_row = _replace(user.row, query.user_columns)
    item_rows = _replace(decoder.decode(release.item_layout.decode_items, item_features), query.item_columns)
    history_item, history_rating = encoder.history(user.history)
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
    return tensors, user_missing + item_missing


def _replace(rows: NDArray[np.void], columns: Sequence[Column]) -> NDArray[np.void]:
    """Packed rows [n] with the values of inline columns in place of the stored ones."""
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
    served: ServedRelease, fetched: Fetched, vectors: Sequence[Sequence[bytes | None]], decoder: _Decoder
) -> _Knowledge:
    """Knowledge of user and candidates from their own vectors and, in releases with affinity, from rated items.

    `vectors` holds the knowledge vectors [1 + C] of user and candidates, then, where the release has an affinity space,
    their affinity vectors.
    """
    adapted = _tower_knowledge(served, vectors[0], decoder)
    if served.release.affinity is None:
        return adapted
    count = len(fetched.records) - 1
    candidate_vectors = vectors[1][1:] if len(vectors) > 1 else [None] * count
    tensors, batch = _affinity_tensors(
        served, served.release.affinity, fetched.user.history, candidate_vectors, fetched.rated_vectors, decoder
    )
    candidates, rated = batch.levels[:count], batch.levels[count:]
    levels = adapted.levels.copy()
    if USER not in served.release.towers:
        # The release does not read user vectors. The best level among the rated items stands for the user's level.
        levels[0] = rated.min(initial=NEUTRAL)
    if ITEM not in served.release.towers:
        levels[1:] = candidates
    levels[1:][candidates == STALE] = STALE
    return _Knowledge(
        adapted.tensors | tensors,
        levels,
        (
            *adapted.provenance,
            VectorProvenance(ITEM, candidates, batch.written_at_ms[:count]),
            VectorProvenance("history", rated, batch.written_at_ms[count:]),
        ),
    )


def _tower_knowledge(served: ServedRelease, blobs: Sequence[bytes | None], decoder: _Decoder) -> _Knowledge:
    """Knowledge from the vectors [1 + C] of user and candidates; kinds without a tower in the adaptor are NEUTRAL."""
    towers = served.release.towers
    user_neutral, item_neutral = served.neutral
    batch = decoder.vectors(served.space, blobs, item_neutral)
    vectors, levels = batch.vectors, batch.levels
    if levels[0] == NEUTRAL:
        vectors[0] = user_neutral
    present = levels != NEUTRAL
    tensors: dict[str, NDArray] = {}
    for kind, kind_vectors, kind_present in ((USER, vectors[0], present[:1]), (ITEM, vectors[1:], present[1:])):
        if kind not in towers:
            levels[slice(1) if kind == USER else slice(1, None)] = NEUTRAL
        elif served.mode == ENCODED:
            tensors |= {f"{kind}_encoding": kind_vectors, f"{kind}_present": kind_present}
        else:
            tensors[f"{kind}_knowledge"] = kind_vectors
    provenance = (
        VectorProvenance(USER, levels[:1], batch.written_at_ms[:1]),
        VectorProvenance(ITEM, levels[1:], batch.written_at_ms[1:]),
    )
    return _Knowledge(tensors, levels, provenance)


def _affinity_tensors(
    served: ServedRelease,
    config: records_pb2.Affinity,
    history: History,
    candidates: Sequence[bytes | None],
    rated: Sequence[bytes | None],
    decoder: _Decoder,
) -> tuple[dict[str, NDArray], VectorBatch]:
    """The affinity tensors, and the affinity vectors of the C candidates, then of the last H rated items."""
    ratings = history.ratings[-config.events :][None]  # (1, H)
    is_event = np.ones(ratings.shape, bool)
    count, rows = len(candidates), len(candidates) + ratings.shape[1]
    batch = VectorBatch(np.zeros((rows, 0), np.float32), np.full(rows, NEUTRAL, np.uint8), np.zeros(rows, np.int64))
    space = served.affinity_space
    if space is not None:
        parts = [*candidates, *(rated or [None] * ratings.shape[1])]
        batch = decoder.vectors(space, parts, np.zeros(space.dim, np.float32))
    candidate_vectors, rated_vectors = batch.vectors[:count], batch.vectors[count:]  # (C, V), (H, V)
    tensors: dict[str, NDArray] = {}
    if config.mean:
        segments = [segment.dim for segment in config.segments]
        columns = affinity(candidate_vectors[None], rated_vectors[None], ratings, is_event, segments)[0]  # (C, F)
        mean, scale = (np.array(list(values), np.float32) for values in (config.mean, config.scale))
        tensors[AFFINITY] = (columns - mean) / scale
    if config.learned:
        padding = config.events - len(rated_vectors)
        tensors["item_vector"] = candidate_vectors
        tensors["history_vector"] = np.pad(rated_vectors, ((0, padding), (0, 0)))
        tensors["history_weight"] = np.pad(centred(ratings, is_event)[0], (0, padding))
    return tensors, batch
