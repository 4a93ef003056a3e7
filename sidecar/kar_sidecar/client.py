"""Owns the Python client: ranks, reads knowledge, finds neighbours, over one channel, with our errors, not gRPC's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from kar.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc
from kar.records.v1 import records_pb2
from kar_sidecar import errors
from kar_sidecar.features import FeatureValue

__all__ = ["KarClient", "Knowledge", "Ranking", "Similar"]

ERRORS: dict[grpc.StatusCode, type[errors.KarError]] = {
    kind.status: kind for kind in (getattr(errors, name) for name in errors.__all__)
}


@dataclass(frozen=True, slots=True)
class Ranking:
    """What came back for one user: `response` has everything, `items` are the candidates as they were sent."""

    items: tuple[str, ...]
    response: ranking_pb2.RankResponse

    @property
    def arm(self) -> str:
        """The arm that served the user: "knowledge" or "control"."""
        return self.response.arm

    @property
    def rung(self) -> str:
        """Which rung answered: "knowledge", "backbone" or "caller"."""
        return ranking_pb2.Rung.Name(self.response.rung).removeprefix("RUNG_").lower()

    @property
    def levels(self) -> tuple[str, ...]:
        """Knowledge of the user, then of each item: "full" to "neutral"; "unspecified" unless a rung used it."""
        return tuple(map(_level, (self.response.user_level, *self.response.item_levels)))

    def ranked(self) -> list[tuple[str, float]]:
        """Items with their scores, best first; NaN where neither a model nor the caller gave scores."""
        scores = self.response.scores
        return [(self.items[i], scores[i] if scores else float("nan")) for i in self.response.order]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Vectors [n, dim] of one space, how good each is ("full" to "neutral"), and texts if they were asked for.

    `written_at_ms` says when each was written, 0 where there is none; `unread` are the positions of those that the
    store could not read now.
    """

    release_id: str
    space_id: str
    vectors: NDArray[np.floating]
    levels: tuple[str, ...]
    texts: tuple[records_pb2.KnowledgeRecord, ...]
    written_at_ms: tuple[int, ...]
    unread: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Similar:
    """The entities nearest to one, nearest first, with their cosines, and which snapshot of the index answered."""

    release_id: str
    snapshot_id: str
    snapshot_age_ms: int
    ids: tuple[str, ...]
    similarities: tuple[float, ...]


class KarClient:
    """A blocking client of one sidecar; threads may share it.

    >>> with KarClient("127.0.0.1:8500") as client:  # doctest: +SKIP
    ...     client.rank("42", ["50", "100"]).ranked()
    """

    def __init__(self, address: str, *, timeout_s: float | None = 1.0) -> None:
        """Connect to host:port on the first call; `timeout_s` is each call's deadline (None: none)."""
        self._channel = grpc.insecure_channel(address)
        self._timeout_s = timeout_s
        self._ranking = ranking_pb2_grpc.RankingServiceStub(self._channel)
        self._knowledge = knowledge_pb2_grpc.KnowledgeServiceStub(self._channel)

    def __enter__(self) -> Self:
        """Give this client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel."""
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def rank(
        self,
        user: str,
        items: Sequence[str],
        *,
        caller_scores: Sequence[float] = (),
        user_features: Mapping[str, FeatureValue] | None = None,
        item_features: Mapping[str, Sequence[FeatureValue]] | None = None,
        history: Sequence[tuple[str, float]] | None = None,
        arm: str = "",
        experiment: str = "knowledge",
        release_id: str = "",
        request_id: str = "",
        explain: bool = False,
    ) -> Ranking:
        """Rank items for a user.

        Args:
            user: the user's id.
            items: candidate ids.
            caller_scores: your own scores of the items, returned when nothing better can be had.
            user_features: values that replace the user's stored ones.
            item_features: by feature, one value an item (None: keep the stored one).
            history: (item id, rating) pairs, oldest first, instead of the stored history.
            arm: forces an arm of `experiment`; such a request is no exposure.
            experiment: the experiment that `arm` belongs to.
            release_id: the release to use; empty: the active one.
            request_id: your id of this request; empty: the server chooses.
            explain: adds an explanation to the response.

        Raises:
            KarError: the subclass says what is wrong; its text what to do.
        """
        request = ranking_pb2.RankRequest(
            request_id=request_id,
            user=ranking_pb2.User(
                id=user,
                features=[_column(name, [value]) for name, value in (user_features or {}).items()],
                history=None
                if history is None
                else ranking_pb2.History(
                    item_ids=[item for item, _ in history], ratings=[rating for _, rating in history]
                ),
            ),
            candidates=ranking_pb2.Candidates(
                ids=items,
                caller_scores=caller_scores,
                features=[_column(name, values) for name, values in (item_features or {}).items()],
            ),
            experiment_overrides={experiment: arm} if arm else {},
            explain=explain,
            release_id=release_id,
        )
        return Ranking(tuple(items), self._call(self._ranking.Rank, request))

    def knowledge(
        self, kind: Literal["user", "item"], ids: Sequence[str], *, texts: bool = False, release_id: str = ""
    ) -> Knowledge:
        """Read the knowledge vectors of users or items.

        Raises:
            KarError: the subclass says what is wrong; its text what to do.
        """
        request = knowledge_pb2.BatchGetKnowledgeRequest(
            entity=f"ENTITY_KIND_{kind.upper()}",
            ids=ids,
            include_texts=texts,
            release_id=release_id,
        )
        response = self._call(self._knowledge.BatchGetKnowledge, request)
        space = response.space
        vectors = np.frombuffer(response.vectors, np.dtype(space.dtype).newbyteorder("<")).reshape(-1, space.dim)
        return Knowledge(
            response.release_id,
            space.space_id,
            vectors,
            tuple(map(_level, response.levels)),
            tuple(response.texts),
            tuple(response.written_at_ms),
            tuple(response.unread),
        )

    def find_similar(
        self,
        kind: Literal["user", "item"],
        query: str | NDArray[np.floating],
        limit: int = 10,
        *,
        release_id: str = "",
        space_id: str = "",
    ) -> Similar:
        """Find the users or items whose knowledge is nearest to an entity's, by its id, or to a vector [dim].

        `space_id` is that of the vector, to have it checked.

        Raises:
            KarError: the subclass says what is wrong; its text what to do.
        """
        request = knowledge_pb2.FindSimilarRequest(
            entity=f"ENTITY_KIND_{kind.upper()}", limit=limit, release_id=release_id, space_id=space_id
        )
        if isinstance(query, str):
            request.id = query
        else:
            request.vector = np.asarray(query, "<f4").tobytes()
        found = self._call(self._knowledge.FindSimilar, request)
        return Similar(
            found.release_id, found.snapshot_id, found.snapshot_age_ms, tuple(found.ids), tuple(found.similarities)
        )

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise ERRORS.get(error.code(), errors.KarError)(error.details()) from error


def _level(level: records_pb2.KnowledgeLevel) -> str:
    return records_pb2.KnowledgeLevel.Name(level).removeprefix("KNOWLEDGE_LEVEL_").lower()


def _column(name: str, values: Sequence[Any]) -> ranking_pb2.FeatureColumn:
    """One feature's values as a column; numbers where the first value given is one."""
    column = ranking_pb2.FeatureColumn(name=name, present=[value is not None for value in values])
    given = next((value for value in values if value is not None), None)
    if isinstance(given, (int, float)):
        column.numbers.extend(float("nan") if value is None else value for value in values)
    else:
        for value in values:
            column.strings.add(values=[value] if isinstance(value, str) else value or ())
    return column
