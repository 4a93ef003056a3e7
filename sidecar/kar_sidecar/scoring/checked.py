"""Owns the check of scores: one finite number per candidate."""

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import UnavailableError
from kar_sidecar.scoring import Scorer, Tensors

__all__ = ["checked_scores"]


async def checked_scores(scorer: Scorer, model: str, tensors: Tensors, timeout_s: float | None) -> NDArray[np.float32]:
    """Scores [C] of one request; see `Scorer.score`.

    Raises:
        UnavailableError: the scorer does not answer, or not with one finite number per candidate.
    """
    scores = await scorer.score(model, tensors, timeout_s)
    if scores.shape != tensors["item_index"].shape or not np.isfinite(scores).all():
        raise UnavailableError(f"model {model} did not answer with one finite score per candidate: export it again")
    return scores
