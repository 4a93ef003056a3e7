"""Owns the steps of one ranking: read, assign, fetch, assemble, score, respond; and the rungs when a step fails.

rung KNOWLEDGE   the model with knowledge; the neutral vector stands for a missing or unread one
rung BACKBONE    the model without knowledge, in the time that is left
rung CALLER      the caller's own order, with scores only if the caller sent any
"""

import time
from collections.abc import Callable

from kar.ranking.v1 import ranking_pb2
from kar_sidecar.experiments.assignment import CONTROL, KNOWLEDGE
from kar_sidecar.ranking.assembly import Assembly, assemble
from kar_sidecar.ranking.fetch import fetch
from kar_sidecar.ranking.request import read_query
from kar_sidecar.ranking.response import ModelScores, build_response
from kar_sidecar.ranking.trace import RequestTrace
from kar_sidecar.releases.registry import Releases
from kar_sidecar.releases.serving_view import ServedRelease
from kar_sidecar.scoring import BASE_INPUTS, Scorer
from kar_sidecar.scoring.checked import checked_scores
from kar_sidecar.settings import Settings
from kar_sidecar.store import Store
from kar_sidecar.store.records import now_ms
from kar_sidecar.telemetry import Telemetry

__all__ = ["Ranker"]


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
        """Rank with the releases that `releases` has loaded."""
        self._releases = releases
        self._store = store
        self._scorer = scorer
        self._settings = settings
        self._experiment = settings.experiment.build()
        self._telemetry = telemetry
        self._clock = clock
        self._wall_ms = wall_ms

    async def rank(self, request: ranking_pb2.RankRequest, left_s: float | None = None) -> ranking_pb2.RankResponse:
        """Answer one request within `left_s` seconds (None: no deadline), even if the store or a model fails.

        Raises:
            InputError: the request is malformed.
            PreconditionError: it names a release that is not loaded.
        """
        settings = self._settings
        trace = RequestTrace.start(self._telemetry, self._clock, left_s=left_s, margin_ms=settings.deadline_margin_ms)
        served = self._releases.get(request.release_id)
        query = read_query(request, served, settings.max_candidates)
        assignment = self._experiment.assign(query.user_id, request.experiment_overrides)
        trace.record_stage("assign")
        assembly = scored = None
        if trace.left_s() > 0:
            fetched = await fetch(query, served, assignment.arm, self._store, settings.store_timeout_ms, trace)
            trace.record_stage("fetch")
            at_ms = self._wall_ms()
            assembly = assemble(query, served, fetched, at_ms=at_ms)
            for fault in assembly.faults:
                trace.record_failure("store", fault)
            trace.record_stage("assemble")
            scored = await self._score(served, assignment.arm, assembly, trace)
            trace.record_stage("score")
            if scored and scored.arm == KNOWLEDGE:
                for vectors in assembly.provenance:
                    self._telemetry.served(vectors.entity, vectors.levels, vectors.written_at_ms, at_ms)
        else:
            trace.reasons.append("no time was left before the deadline")
        response = build_response(request, query, served, assignment, assembly, scored)
        response.reason = "; ".join(trace.reasons)
        response.timings.MergeFrom(trace.timings())
        self._telemetry.ranked(response, assembly.missing_values if assembly else 0)
        return response

    async def _score(
        self, served: ServedRelease, assigned: str, assembly: Assembly, trace: RequestTrace
    ) -> ModelScores | None:
        """The scores of the assigned arm's model, or else of the control model; None when neither answers in time."""
        for arm in (KNOWLEDGE, CONTROL) if assigned == KNOWLEDGE else (CONTROL,):
            left_s = trace.left_s(self._settings.score_timeout_ms)
            if left_s <= 0:
                trace.reasons.append(f"no time was left for the {arm} model")
                return None
            model = served.model(arm)
            tensors = assembly.tensors if arm == assigned else {name: assembly.tensors[name] for name in BASE_INPUTS}
            call = checked_scores(self._scorer, model, tensors, left_s)
            scores = await trace.attempt(f"{arm} model", call, left_s)
            if scores is not None:
                return ModelScores(scores, arm, model)
        return None
