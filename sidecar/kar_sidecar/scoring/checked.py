"""Owns the check of what a scorer answers."""

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import UnavailableError
from kar_sidecar.scoring import Scorer, Tensors

__all__ = ["checked_scores"]


async def checked_scores(scorer: Scorer, model: str, tensors: Tensors, timeout_s: float | None) -> NDArray[np.float32]:
    """Scores [C] of one request, one finite number a candidate.

    Raises:
        UnavailableError: the scorer does not answer, or with something else than scores.
    """
    scores = await scorer.score(model, tensors, timeout_s)
    if scores.shape != tensors["item_index"].shape or not np.isfinite(scores).all():
        raise UnavailableError(f"model {model} did not answer with one finite score a candidate: export it again")
    return scores
