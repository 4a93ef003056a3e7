"""Owns the request that warms a model: one unknown user, one unknown item, no store."""

from typing import Final

from kar_sidecar.ranking.assembly import assemble
from kar_sidecar.ranking.fetch import nothing_read
from kar_sidecar.ranking.request import Query
from kar_sidecar.releases.serving_view import ServedRelease
from kar_sidecar.scoring import Tensors

__all__ = ["probe_tensors"]

PROBE_ID: Final = "warm-up"
"""Id of the user and of the item."""


def probe_tensors(served: ServedRelease, arm: str) -> Tensors:
    """The tensors of a request with an unknown user and one unknown candidate, for the model of an arm."""
    query = Query(
        user_id=PROBE_ID,
        item_ids=(PROBE_ID,),
        caller_scores=None,
        user_columns=(),
        item_columns=(),
        history=None,
        history_as_of_ms=None,
    )
    return assemble(query, served, nothing_read(query, served, arm), at_ms=0).tensors
