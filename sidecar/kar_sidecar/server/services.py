"""Owns the RPCs: each checks its request, calls one package, and builds the response. `CallInterceptor` maps errors."""

import asyncio
from collections.abc import Callable, Sequence

import grpc
import numpy as np
from numpy.typing import NDArray

from kar.admin.v1 import admin_pb2, admin_pb2_grpc
from kar.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from kar.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc
from kar.records.v1 import records_pb2
from kar_sidecar.entities import USER, EntityKind
from kar_sidecar.errors import DeadlineError, IncompleteError, InputError, UnavailableError, UnsupportedError
from kar_sidecar.index.live import LiveIndexes
from kar_sidecar.ranking.ranker import Ranker
from kar_sidecar.releases.registry import Releases
from kar_sidecar.store import TEXT, EntityKey, Record, Store, vector_part
from kar_sidecar.store.async_read import STORE_SHARE, call_store
from kar_sidecar.store.records import decode_vectors
from kar_sidecar.telemetry import Telemetry

__all__ = ["AdminService", "FeedbackService", "KnowledgeService", "RankingService"]

Context = grpc.aio.ServicerContext


class RankingService(ranking_pb2_grpc.RankingServiceServicer):
    """Scores and orders candidates."""

    def __init__(self, ranker: Ranker) -> None:
        """Answer with a ranker."""
        self._ranker = ranker

    async def Rank(self, request: ranking_pb2.RankRequest, context: Context) -> ranking_pb2.RankResponse:
        """See `Ranker.rank`; it must answer within the caller's deadline."""
        return await self._ranker.rank(request, context.time_remaining())


class KnowledgeService(knowledge_pb2_grpc.KnowledgeServiceServicer):
    """Reads vectors and texts, and finds similar entities."""

    def __init__(
        self,
        releases: Releases,
        store: Store,
        indexes: LiveIndexes,
        telemetry: Telemetry,
        *,
        max_ids: int,
        max_similar: int,
        timeout_s: float,
        wall_ms: Callable[[], int],
    ) -> None:
        """Answer from a store and from indexes.

        Args:
            releases: Name the vector spaces.
            store: Holds vectors and texts.
            indexes: Snapshots of the releases' encoded vectors.
            telemetry: Counts levels, ages and failures.
            max_ids: Largest number of ids in one read.
            max_similar: Largest number of neighbours in one search.
            timeout_s: Longest wait for the store, in seconds.
            wall_ms: The time of day, milliseconds since 1970.
        """
        self._releases = releases
        self._store = store
        self._indexes = indexes
        self._telemetry = telemetry
        self._max_ids = max_ids
        self._max_similar = max_similar
        self._timeout_s = timeout_s
        self._wall_ms = wall_ms

    async def BatchGetKnowledge(
        self, request: knowledge_pb2.BatchGetKnowledgeRequest, context: Context
    ) -> knowledge_pb2.BatchGetKnowledgeResponse:
        """Read vectors, and texts on demand, in one batch. The response names ids that could not be read.

        Raises:
            InputError: no kind, no ids, too many ids, or an empty id.
            PreconditionError: the named release is not loaded.
            IntegrityError: a record belongs to another vector space or is damaged.
            UnavailableError: the store does not answer.
        """
        kind = _entity_kind(request.entity)
        if not request.ids or len(request.ids) > self._max_ids or "" in request.ids:
            raise InputError(f"ids must be 1 to {self._max_ids} non-empty ids: correct them")
        served = self._releases.get(request.release_id)
        space = served.space
        parts = (vector_part(space.space_id), TEXT)[: 1 + request.include_texts]
        keys = [EntityKey(kind, id_) for id_ in request.ids]
        left_s = context.time_remaining()
        timeout_s = self._timeout_s if left_s is None else min(self._timeout_s, left_s)
        records, unread = await self._read(keys, parts, timeout_s)
        at_ms = self._wall_ms()
        batch = decode_vectors(
            [record[0] for record in records],
            space.space_id,
            space.dim,
            served.neutral[0 if kind == USER else 1],
            dtype=space.dtype,
            at_ms=at_ms,
        )
        self._telemetry.read(kind, batch.levels, batch.written_at_ms, at_ms)
        return knowledge_pb2.BatchGetKnowledgeResponse(
            release_id=served.id,
            space=space,
            vectors=batch.vectors.astype(np.dtype(space.dtype).newbyteorder("<")).tobytes(),
            levels=batch.levels.tolist(),
            written_at_ms=batch.written_at_ms.tolist(),
            unread=unread,
            texts=[records_pb2.KnowledgeRecord.FromString(record[1] or b"") for record in records]
            if request.include_texts
            else (),
        )

    async def _read(
        self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float
    ) -> tuple[list[Record], Sequence[int]]:
        """Records in the order of `keys`, and the positions of those that could not be read."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call_store(self._store, self._store.read, keys, parts, STORE_SHARE * timeout_s), ()
        except (UnavailableError, TimeoutError) as error:
            self._telemetry.failed("store")
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"the store gave no answer within {timeout_s * 1e3:.1f} ms: allow more") from error
            if not isinstance(error, IncompleteError):
                raise
            return list(error.records), error.unread

    async def FindSimilar(
        self, request: knowledge_pb2.FindSimilarRequest, context: Context
    ) -> knowledge_pb2.FindSimilarResponse:
        """Search the current index snapshot; the search runs on the index's own thread.

        Raises:
            InputError: no kind, no query, a vector of another dimension or space, or a limit out of range.
            NotFoundError: the entity has no vector.
            PreconditionError: the named release is not loaded, or has no snapshot.
            IntegrityError: the snapshot is corrupt, or holds vectors of another space.
            UnavailableError: the snapshot cannot be loaded now.
            UnsupportedError: FAISS is not installed.
        """
        kind = _entity_kind(request.entity)
        if not 1 <= request.limit <= self._max_similar:
            raise InputError(f"limit is {request.limit}: ask for 1 to {self._max_similar} neighbours")
        served = self._releases.get(request.release_id)
        space = served.release.manifest.encoded_space
        vector = None if request.WhichOneof("query") == "id" else _query_vector(request, space)
        if vector is None and not request.id:
            raise InputError("id is empty: send the id of an entity, or a vector")
        snapshot = await self._indexes.get(served.id, space, kind)
        # There is no await between `get` and `submit`, so the snapshot cannot be closed in between.
        index = snapshot.index
        search = index.submit_like(request.id, request.limit) if vector is None else index.submit(vector, request.limit)
        neighbours = await asyncio.wrap_future(search)
        return knowledge_pb2.FindSimilarResponse(
            ids=neighbours.ids[0],
            similarities=neighbours.similarities[0, : len(neighbours.ids[0])].tolist(),
            release_id=served.id,
            snapshot_id=snapshot.snapshot_id,
            snapshot_age_ms=max(self._wall_ms() - snapshot.published_at_ms, 0),
        )


def _entity_kind(number: int) -> EntityKind:
    try:
        return EntityKind.of_number(number)
    except ValueError as error:
        raise InputError("entity is not set: send ENTITY_KIND_USER or ENTITY_KIND_ITEM") from error


def _query_vector(request: knowledge_pb2.FindSimilarRequest, space: records_pb2.VectorSpace) -> NDArray[np.float32]:
    """The request's vector [1, dim], checked."""
    if request.space_id and request.space_id != space.space_id:
        raise InputError(
            f"the vector is of space {request.space_id!r}, the release of {space.space_id!r}: encode with its encoder"
        )
    if len(request.vector) != 4 * space.dim:
        raise InputError(
            f"vector has {len(request.vector)} bytes, not {4 * space.dim}: send {space.dim} little-endian float32 "
            "values, or an id"
        )
    vector = np.frombuffer(request.vector, "<f4").astype(np.float32)[None]
    if not np.isfinite(vector).all() or not vector.any():
        raise InputError("vector is all zeros or not finite: send the encoder's output")
    return vector


class FeedbackService(feedback_pb2_grpc.FeedbackServiceServicer):
    """Receives outcomes."""

    async def ReportOutcomes(
        self, request: feedback_pb2.ReportOutcomesRequest, context: Context
    ) -> feedback_pb2.ReportOutcomesResponse:
        """Not built yet."""
        raise UnsupportedError("ReportOutcomes is not built yet: keep outcomes with their request ids")


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Lists and switches releases."""

    def __init__(self, releases: Releases) -> None:
        """List and switch the releases of this server."""
        self._releases = releases

    async def ListReleases(
        self, request: admin_pb2.ListReleasesRequest, context: Context
    ) -> admin_pb2.ListReleasesResponse:
        """See `Releases.list`."""
        return admin_pb2.ListReleasesResponse(releases=await self._releases.list())

    async def ActivateRelease(
        self, request: admin_pb2.ActivateReleaseRequest, context: Context
    ) -> admin_pb2.ActivateReleaseResponse:
        """See `Releases.activate`."""
        if not request.release_id:
            raise InputError("release_id is empty: send the id of the release to activate")
        previous = await self._releases.activate(request.release_id)
        return admin_pb2.ActivateReleaseResponse(release_id=request.release_id, previous_release_id=previous)
