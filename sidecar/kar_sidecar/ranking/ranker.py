"""Owns one ranking from request to response: assign, fetch, assemble, score, respond, and what to do when one fails.

rung KNOWLEDGE   the model with knowledge; entities without any, or that could not be read, get neutral vectors
rung BACKBONE    the model without, with the time that is left
rung CALLER      the caller's own order; scores only if it sent any
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kar.ranking.v1 import ranking_pb2
from kar.records.v1 import records_pb2
from kar_sidecar.errors import IncompleteError, KarError
from kar_sidecar.experiments.assignment import CONTROL, KNOWLEDGE, Assignment
from kar_sidecar.ranking.assembly import Assembly, UserView, assemble, keys, nothing_read, rated_keys, view_user
from kar_sidecar.ranking.request import Query, assign, read_query
from kar_sidecar.releases.registry import Releases
from kar_sidecar.releases.serving_view import ServedRelease
from kar_sidecar.scoring import BASE_INPUTS, Scorer
from kar_sidecar.scoring.checked import checked_scores
from kar_sidecar.settings import Settings
from kar_sidecar.store import EntityKey, Record, Store
from kar_sidecar.store.async_read import STORE_SHARE, call_store
from kar_sidecar.store.records import now_ms
from kar_sidecar.telemetry import Telemetry

__all__ = ["Ranker"]

log = logging.getLogger(__name__)

T = TypeVar("T")
UNSPECIFIED: Final = records_pb2.KNOWLEDGE_LEVEL_UNSPECIFIED
RUNGS: Final = {KNOWLEDGE: ranking_pb2.RUNG_KNOWLEDGE, CONTROL: ranking_pb2.RUNG_BACKBONE}


@dataclass(slots=True)
class RequestTrace:
    """The course of one request: when it must end, where its time went, what went wrong."""

    clock: Callable[[], float]
    ends_at_s: float
    began_s: float
    stage_began_s: float
    stages_ms: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def left_s(self, cap_ms: float = np.inf) -> float:
        return min(cap_ms / 1e3, self.ends_at_s - self.clock())

    def record_stage(self, stage: str) -> None:
        now = self.clock()
        self.stages_ms[f"{stage}_ms"] = (now - self.stage_began_s) * 1e3
        self.stage_began_s = now


@dataclass(frozen=True, slots=True)
class _Scored:
    scores: NDArray[np.float32]
    arm: str
    model: str


class Ranker:
    """Ranks candidates. `clock` gives seconds for deadlines and timings, `wall_ms` the time of day for expiry."""

    def __init__(
        self,
        releases: Releases,
        store: Store,
        scorer: Scorer,
        settings: Settings,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float] = time.perf_counter,
        wall_ms: Callable[[], int] = now_ms,
    ) -> None:
        """Rank with what `releases` has loaded."""
        self._releases = releases
        self._store = store
        self._scorer = scorer
        self._settings = settings
        self._experiment = settings.experiment.build()
        self._telemetry = telemetry
        self._clock = clock
        self._wall_ms = wall_ms

    async def rank(self, request: ranking_pb2.RankRequest, left_s: float | None = None) -> ranking_pb2.RankResponse:
        """Answer one request within `left_s` seconds (None: no deadline), whatever fails meanwhile.

        Raises:
            InputError: the request is malformed.
            PreconditionError: it names a release that is not loaded.
        """
        began = self._clock()
        ends = np.inf if left_s is None else began + left_s - self._settings.deadline_margin_ms / 1e3
        course = RequestTrace(self._clock, ends, began, began)
        served = self._releases.get(request.release_id)
        query = read_query(request, served, self._settings.max_candidates)
        assignment = assign(request.experiment_overrides, self._experiment, query.user_id)
        course.record_stage("assign")
        assembly = scored = None
        if course.left_s() > 0:
            records, user, rated = await self._fetch(query, served, assignment.arm, course)
            course.record_stage("fetch")
            at_ms = self._wall_ms()
            assembly = assemble(query, served, user, records, rated, at_ms=at_ms)
            for fault in assembly.faults:
                self._failed("store", fault, course)
            course.record_stage("assemble")
            scored = await self._score(served, assignment.arm, assembly, course)
            course.record_stage("score")
            if scored and scored.arm == KNOWLEDGE:
                for given in assembly.given:
                    self._telemetry.served(given.entity, given.levels, given.written_at_ms, at_ms)
        else:
            course.reasons.append("no time was left before the deadline")
        response = _respond(request, query, served, assignment, assembly, scored)
        response.reason = "; ".join(course.reasons)
        total_ms = (self._clock() - began) * 1e3
        respond_ms = total_ms - sum(course.stages_ms.values())
        response.timings.MergeFrom(
            ranking_pb2.StageTimings(**course.stages_ms, respond_ms=respond_ms, total_ms=total_ms)
        )
        self._telemetry.ranked(response, assembly.missing_values if assembly else 0)
        return response

    async def _fetch(
        self, query: Query, served: ServedRelease, arm: str, course: RequestTrace
    ) -> tuple[list[Record], UserView, list[bytes | None]]:
        """Records of user and candidates, the user as models see it, and the affinity parts of the rated items.

        All come with one batch read where the request brings the history, else the rated items are known only when
        the user is, and take a second one.
        """
        parts, own = served.parts(arm), keys(query)
        asked = query.history if query.history_as_of_ms is None else None
        rated = rated_keys(asked, served) if asked and arm == KNOWLEDGE else []
        records = await self._read([*own, *rated], parts, course)
        if records is None:
            return nothing_read(query, parts), view_user(query, served, None), []
        records, more = records[: len(own)], records[len(own) :]
        user = view_user(query, served, records[0][0])
        if not rated and arm == KNOWLEDGE and (rated := rated_keys(user.history, served)):
            more = await self._read(rated, parts[-1:], course) or []
        return records, user, [record[-1] for record in more]

    async def _read(
        self, entities: list[EntityKey], parts: tuple[str, ...], course: RequestTrace
    ) -> list[Record] | None:
        left_s = course.left_s(self._settings.store_timeout_ms)

        async def read() -> list[Record]:
            try:
                return await call_store(self._store, self._store.read, entities, parts, STORE_SHARE * left_s)
            except IncompleteError as error:
                self._failed("store", str(error), course)
                return list(error.records)

        return await self._attempt("store", read(), left_s, course)

    async def _score(
        self, served: ServedRelease, assigned: str, assembly: Assembly, course: RequestTrace
    ) -> _Scored | None:
        """The assigned arm's scores, or else the control model's; None when neither answers in time."""
        for arm in (KNOWLEDGE, CONTROL) if assigned == KNOWLEDGE else (CONTROL,):
            left_s = course.left_s(self._settings.score_timeout_ms)
            if left_s <= 0:
                course.reasons.append(f"no time was left for the {arm} model")
                return None
            model = served.model(arm)
            tensors = assembly.tensors if arm == assigned else {name: assembly.tensors[name] for name in BASE_INPUTS}
            scores = await self._attempt(
                f"{arm} model", checked_scores(self._scorer, model, tensors, left_s), left_s, course
            )
            if scores is not None:
                return _Scored(scores, arm, model)
        return None

    async def _attempt(self, backend: str, call: Awaitable[T], timeout_s: float, course: RequestTrace) -> T | None:
        """The result of a backend's call; None, counted and with a reason, when it fails or takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            reason = f"no answer within {timeout_s * 1e3:.1f} ms"
        except KarError as error:
            reason = str(error)
        except Exception:  # a fault of ours in one backend must not cost the caller its answer
            log.exception("backend_fault backend=%s", backend)
            reason = "an unexpected fault, see the server's log"
        self._failed(backend, reason, course)
        return None

    def _failed(self, backend: str, reason: str, course: RequestTrace) -> None:
        self._telemetry.failed(backend)
        course.reasons.append(f"{backend}: {reason}")


def _respond(
    request: ranking_pb2.RankRequest,
    query: Query,
    served: ServedRelease,
    assignment: Assignment,
    assembly: Assembly | None,
    scored: _Scored | None,
) -> ranking_pb2.RankResponse:
    scores = query.caller_scores if scored is None else scored.scores
    count = len(query.item_ids)
    order = np.arange(count) if scores is None else np.argsort(-scores, kind="stable")
    knows = scored is not None and scored.arm == KNOWLEDGE
    levels: dict[str, Any] = {"item_levels": [UNSPECIFIED] * count}
    if assembly and knows:
        levels = {"user_level": assembly.user_level, "item_levels": assembly.item_levels.tolist()}
    response = ranking_pb2.RankResponse(
        request_id=request.request_id,
        scores=None if scores is None else scores.tolist(),
        order=order.tolist(),
        experiment=assignment.experiment,
        arm=assignment.arm,
        release_id=served.id,
        backbone=served.release.model(scored.arm).backbone if scored else "",
        rung=RUNGS[scored.arm] if scored else ranking_pb2.RUNG_CALLER,
        **levels,
    )
    if request.explain:
        explanation = response.explanation
        explanation.SetInParent()
        if scored:
            explanation.model = scored.model
        if knows:
            explanation.space_id = served.space.space_id
            if assembly and assembly.oldest_ms:
                explanation.knowledge_written_at.FromMilliseconds(assembly.oldest_ms)
        if assembly:
            explanation.history_events = assembly.history_events
            explanation.missing_values = assembly.missing_values
            explanation.inline_history_used = assembly.inline_history_used
            if assembly.features_written_at_ms:
                explanation.features_written_at.FromMilliseconds(assembly.features_written_at_ms)
    return response
