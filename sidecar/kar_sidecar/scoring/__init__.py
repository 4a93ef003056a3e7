"""Owns the scoring models as the server sees them: tensor names, the Scorer Protocol, its implementations.

One request's tensors, named as in the Triton repository. C candidates; L history events for the backbone, H for the
affinity; vectors of K (adapted), D (encoded) or V (affinity) components:

    history_item      [L]      int64    item index, right-padded with 0
    history_rating    [L]      int64    half-star bucket, right-padded with 0
    user_categorical  [Uc]     int64
    user_numeric      [Un]     float32  standardised
    item_index        [C]      int64
    item_categorical  [C, Ic]  int64
    item_numeric      [C, In]  float32
    user_knowledge    [K]      float32  prestored mode, models with a user tower only
    item_knowledge    [C, K]   float32  prestored mode, models with an item tower only
    affinity          [C, F]   float32  standardised, models with knowledge affinity only (`ranking.affinity`)
    item_vector       [C, V]   float32  affinity vectors of the candidates; this and the next two for models with
                                        learned affinity only
    history_vector    [H, V]   float32  affinity vectors of the rated items, right-padded with 0
    history_weight    [H]      float32  their ratings minus the user's mean rating, right-padded with 0
    user_encoding     [D]      float32  encoded mode only, as the next three: input of the adaptor
    user_present      [1]      bool     False: the adaptor answers with the neutral vector
    item_encoding     [C, D]   float32
    item_present      [C]      bool
    -> score          [C]      float32  probability
"""

from collections.abc import Mapping
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADAPTOR_INPUTS",
    "AFFINITY",
    "BASE_INPUTS",
    "KNOWLEDGE_INPUTS",
    "SCORE",
    "VECTOR_INPUTS",
    "Scorer",
    "Tensors",
]

Tensors = Mapping[str, NDArray]

BASE_INPUTS: Final = (
    "history_item",
    "history_rating",
    "user_categorical",
    "user_numeric",
    "item_index",
    "item_categorical",
    "item_numeric",
)
KNOWLEDGE_INPUTS: Final = ("user_knowledge", "item_knowledge")
ADAPTOR_INPUTS: Final = ("user_encoding", "user_present", "item_encoding", "item_present")
AFFINITY: Final = "affinity"
VECTOR_INPUTS: Final = ("item_vector", "history_vector", "history_weight")
SCORE: Final = "score"


class Scorer(Protocol):
    """Runs one request through one named model. An implementation may batch requests."""

    async def score(self, model: str, tensors: Tensors, timeout_s: float | None = None) -> NDArray[np.float32]:
        """Scores [C] of the candidates in `tensors` (module docstring).

        Raises:
            DeadlineError: no answer within `timeout_s`.
            UnavailableError: the scorer does not answer, or has not loaded `model`.
        """
        ...

    async def load(self, model: str) -> None:
        """Load `model` unless it is ready.

        Raises:
            UnavailableError: it cannot be loaded; the text says why.
        """
        ...

    async def ready(self, model: str) -> bool:
        """Whether `model` can score now; False when the scorer does not answer."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
