"""Owns the response to a ranking request: scores and order, the rung that answered, and the explanation on demand."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar.ranking.v1 import ranking_pb2
from kar.records.v1 import records_pb2
from kar_sidecar.experiments.assignment import CONTROL, KNOWLEDGE, Assignment
from kar_sidecar.ranking.assembly import Assembly
from kar_sidecar.ranking.request import Query
from kar_sidecar.releases.serving_view import ServedRelease

__all__ = ["ModelScores", "build_response"]

UNSPECIFIED: Final = records_pb2.KNOWLEDGE_LEVEL_UNSPECIFIED
RUNGS: Final = {KNOWLEDGE: ranking_pb2.RUNG_KNOWLEDGE, CONTROL: ranking_pb2.RUNG_BACKBONE}


@dataclass(frozen=True, slots=True)
class ModelScores:
    """Scores [C] of the candidates, and which model gave them."""

    scores: NDArray[np.float32]
    arm: str
    """The arm that the model belongs to."""
    model: str
    """The model's name in Triton."""


def build_response(
    request: ranking_pb2.RankRequest,
    query: Query,
    served: ServedRelease,
    assignment: Assignment,
    assembly: Assembly | None,
    scored: ModelScores | None,
) -> ranking_pb2.RankResponse:
    """The response without timings and reason.

    Args:
        request: The message as it was received.
        query: The checked request.
        served: The release that answers.
        assignment: The arm that was assigned.
        assembly: The tensors; None if no time was left to build them.
        scored: The model's scores; None if no model answered. The response then has the caller's scores and order.
    """
    scores = query.caller_scores if scored is None else scored.scores
    count = len(query.item_ids)
    order = np.arange(count) if scores is None else np.argsort(-scores, kind="stable")
    # Protobuf's stubs ask for enum members; the arrays hold their numbers.
    user_level: Any = UNSPECIFIED
    item_levels: Any = [UNSPECIFIED] * count
    if assembly and scored and scored.arm == KNOWLEDGE:
        user_level, item_levels = assembly.user_level, assembly.item_levels.tolist()
    return ranking_pb2.RankResponse(
        request_id=request.request_id,
        scores=None if scores is None else scores.tolist(),
        order=order.tolist(),
        experiment=assignment.experiment,
        arm=assignment.arm,
        release_id=served.id,
        backbone=served.release.model(scored.arm).backbone if scored else "",
        rung=RUNGS[scored.arm] if scored else ranking_pb2.RUNG_CALLER,
        user_level=user_level,
        item_levels=item_levels,
        explanation=_explain(served, assembly, scored) if request.explain else None,
    )


def _explain(served: ServedRelease, assembly: Assembly | None, scored: ModelScores | None) -> ranking_pb2.Explanation:
    explanation = ranking_pb2.Explanation()
    if scored:
        explanation.model = scored.model
    if scored and scored.arm == KNOWLEDGE:
        explanation.space_id = served.space.space_id
        if assembly and assembly.oldest_vector_ms:
            explanation.knowledge_written_at.FromMilliseconds(assembly.oldest_vector_ms)
    if assembly:
        explanation.history_events = assembly.history_events
        explanation.missing_values = assembly.missing_values
        explanation.inline_history_used = assembly.inline_history_used
        if assembly.features_written_at_ms:
            explanation.features_written_at.FromMilliseconds(assembly.features_written_at_ms)
    return explanation
