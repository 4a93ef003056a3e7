"""Owns pooling: one vector from the vectors of a chunk's tokens."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pooling", "pool"]

Pooling = Literal["mean", "cls", "last", "weighted"]


def pool(hidden: NDArray[np.float32], mask: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    """Pool the token vectors of b chunks into their vectors [b, D].

    "mean": all tokens have the same weight, special tokens too; "cls": the first token's vector; "last": the last
    token's vector; "weighted": the i-th token has the weight i, since later tokens of a causal model have seen more
    of the text (Muennighoff, SGPT, 2022).

    Args:
        hidden: Token vectors [b, T, D]. Vectors of padding must be finite; padding may be on either side.
        mask: 1 at tokens, 0 at padding [b, T]; each row has at least one token.
        pooling: The kind of pooling.
    """
    position = mask.cumsum(1) * mask  # (b, T), from 1; 0 at padding
    weights = {
        "mean": mask,
        "cls": position == 1,
        "last": position == position.max(1, keepdims=True),
        "weighted": position,
    }[pooling].astype(np.float32)  # (b, T)
    # No matrix product: it would start threads beside the threads that run the batches.
    pooled: NDArray[np.float32] = np.einsum("bt,btd->bd", weights, hidden)  # (b, D)
    return pooled / weights.sum(1, keepdims=True)
