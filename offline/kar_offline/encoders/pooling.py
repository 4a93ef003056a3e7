"""Owns pooling: how the vectors of tokens become one."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pooling", "pool"]

Pooling = Literal["mean", "cls", "last", "weighted"]


def pool(hidden: NDArray[np.float32], mask: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    """The vectors [b, D] of b chunks from those of their tokens.

    "mean": all tokens count alike, the special ones included; "cls": the first token's vector; "last": the last
    token's; "weighted": the mean in which the i-th token counts i, so that a causal model's later tokens, which saw
    more, count more (Muennighoff, SGPT, 2022).

    Args:
        hidden: Vectors of tokens [b, T, D]; those of padding, on whichever side, are finite.
        mask: 1 at tokens, 0 at padding [b, T]; each row has a token.
        pooling: How.
    """
    position = mask.cumsum(1) * mask  # (b, T), from 1; 0 at padding
    weights = {
        "mean": mask,
        "cls": position == 1,
        "last": position == position.max(1, keepdims=True),
        "weighted": position,
    }[pooling].astype(np.float32)
    # Not a matrix product: it would start threads of its own beside those that run the batches.
    pooled: NDArray[np.float32] = np.einsum("bt,btd->bd", weights, hidden)
    return pooled / weights.sum(1, keepdims=True)
