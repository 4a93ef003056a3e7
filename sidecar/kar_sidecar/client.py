"""Owns the Python client: it ranks, reads knowledge and finds similar entities, and raises our errors, not gRPC's."""

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
from kar_sidecar.errors import ERROR_OF_STATUS, KarError
from kar_sidecar.features import FeatureValue

__all__ = ["KarClient", "Knowledge", "Ranking", "Similar"]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The ranking of one user's candidates."""

    items: tuple[str, ...]
    """The candidates, in the order of the request."""
    response: ranking_pb2.RankResponse
    """The whole response."""

    @property
    def arm(self) -> str:
        """The arm that was assigned: "knowledge" or "control"."""
        return self.response.arm

    @property
    def rung(self) -> str:
        """The rung that answered: "knowledge", "backbone" or "caller"."""
        return ranking_pb2.Rung.Name(self.response.rung).removeprefix("RUNG_").lower()

    @property
    def levels(self) -> tuple[str, ...]:
        """Knowledge levels ("full" to "neutral") of the user, then of each item; "unspecified" on lower rungs."""
        return tuple(map(_level, (self.response.user_level, *self.response.item_levels)))

    def ranked(self) -> list[tuple[str, float]]:
        """Items with their scores, best first; the score is NaN where neither a model nor the caller gave one."""
        scores = self.response.scores
        return [(self.items[i], scores[i] if scores else float("nan")) for i in self.response.order]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Knowledge of n entities, in the order of their ids."""

    release_id: str
    space_id: str
    vectors: NDArray[np.floating]
    """[n, dim], all of one space; an entity without a vector has the neutral vector."""
    levels: tuple[str, ...]
    """Knowledge levels, "full" to "neutral"."""
    texts: tuple[records_pb2.KnowledgeRecord, ...]
    """One record per entity, empty if the entity has no text. No records at all if `texts` was False."""
    written_at_ms: tuple[int, ...]
    """When each vector was written, milliseconds since 1970; 0 for an entity without a vector."""
    unread: tuple[int, ...]
    """Positions of the entities that the store could not read."""


@dataclass(frozen=True, slots=True)
class Similar:
    """The nearest entities, nearest first."""

    release_id: str
    snapshot_id: str
    """The index snapshot that answered."""
    snapshot_age_ms: int
    """Time since the snapshot was published, in milliseconds."""
    ids: tuple[str, ...]
    similarities: tuple[float, ...]
    """Cosines, aligned with `ids`."""


class KarClient:
    """A blocking client of one sidecar; threads may share it.

    Example:
        >>> with KarClient("127.0.0.1:8500") as client:  # doctest: +SKIP
        ...     client.rank("42", ["50", "100"]).ranked()
    """

    def __init__(self, address: str, *, timeout_s: float | None = 1.0) -> None:
        """Connect to host:port at the first call; every call ends after `timeout_s` seconds (None: no limit)."""
        self._channel = grpc.insecure_channel(address)
        self._timeout_s = timeout_s
        self._ranking = ranking_pb2_grpc.RankingServiceStub(self._channel)
        self._knowledge = knowledge_pb2_grpc.KnowledgeServiceStub(self._channel)

    def __enter__(self) -> Self:
        """Return this client."""
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
            user: The user's id.
            items: Ids of the candidates.
            caller_scores: Your own scores of the items; they decide the order when no model can score.
            user_features: Values that replace the user's stored ones.
            item_features: For each feature one value per item (None: the stored value).
            history: (item id, rating) pairs, oldest first, instead of the stored history.
            arm: Forces an arm of `experiment`; such a request does not count as an exposure.
            experiment: The experiment that `arm` belongs to.
            release_id: The release to use; empty: the active one.
            request_id: Your id of this request; empty: the server chooses one.
            explain: Adds an explanation to the response.

        Raises:
            KarError: a subclass; see `kar_sidecar.errors`.
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
        """Read knowledge vectors of users or items, and with `texts` their texts.

        Raises:
            KarError: a subclass; see `kar_sidecar.errors`.
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
        """Find the users or items whose knowledge vectors are nearest to an entity's vector, or to a given vector.

        Args:
            kind: Which entities to find.
            query: Id of an entity of this kind, or a vector [dim] of the release's encoder.
            limit: Number of neighbours.
            release_id: The release to use; empty: the active one.
            space_id: Space of the query vector; the server refuses a vector of another space. Empty: not checked.

        Raises:
            KarError: a subclass; see `kar_sidecar.errors`.
        """
        request = knowledge_pb2.FindSimilarRequest(
            entity=f"ENTITY_KIND_{kind.upper()}", limit=limit, release_id=release_id, space_id=space_id
        )
        if isinstance(query, str):
            request.id = query
        else:
            request.vector = np.asarray(query, "<f4").tobytes()
        response = self._call(self._knowledge.FindSimilar, request)
        return Similar(
            release_id=response.release_id,
            snapshot_id=response.snapshot_id,
            snapshot_age_ms=response.snapshot_age_ms,
            ids=tuple(response.ids),
            similarities=tuple(response.similarities),
        )

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise ERROR_OF_STATUS.get(error.code(), KarError)(error.details()) from error


def _level(level: records_pb2.KnowledgeLevel) -> str:
    return records_pb2.KnowledgeLevel.Name(level).removeprefix("KNOWLEDGE_LEVEL_").lower()


def _column(name: str, values: Sequence[Any]) -> ranking_pb2.FeatureColumn:
    """One feature's values as a column. The first value that is not None decides: numbers or strings."""
    column = ranking_pb2.FeatureColumn(name=name, present=[value is not None for value in values])
    first_value = next((value for value in values if value is not None), None)
    if isinstance(first_value, (int, float)):
        column.numbers.extend(float("nan") if value is None else value for value in values)
    else:
        for value in values:
            column.strings.add(values=[value] if isinstance(value, str) else value or ())
    return column
