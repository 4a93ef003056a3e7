"""Owns vectors for entities without a text: those that are most like them by their facts lend theirs.

Weighted by softmax(cosine / temperature), as the loans of collective knowledge are.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.generate.collective import LENDERS, TEMPERATURE
from kar_offline.generate.collective import borrow as nearest_lenders
from kar_sidecar.index import unit_rows

__all__ = ["borrow", "lend"]

CHUNK: Final = 4096
"""Borrowers whose lenders' vectors are in memory together."""


def lend(vectors: NDArray[np.float32], weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """The unit vectors [..., D] of who borrows those of m lenders [..., m, D] with weights [..., m]."""
    mean = (vectors * weights[..., None]).sum(-2)
    return (mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def borrow(
    content: NDArray[np.float32],
    knows: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    *,
    lenders: int = LENDERS,
    temperature: float = TEMPERATURE,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Have those of n entities that know nothing borrow from the nearest that do.

    Args:
        content: Content vectors [n, D] of any length; a row of zeros has no content, lends nothing and borrows nothing.
        knows: [n] whether an entity has knowledge.
        vectors: Knowledge vectors [n, D2]; rows of those that know nothing do not matter.
        lenders: From how many an entity borrows, at most.
        temperature: Of the softmax over cosines.

    Returns:
        Knowledge vectors [n, D2], lent ones of unit length, and [n] which are lent.
    """
    found = np.array(vectors, dtype=np.float32)
    has_content = np.any(content, axis=1)
    able = np.flatnonzero(knows & has_content)
    lent = ~knows & has_content & bool(len(able))
    rows = np.flatnonzero(lent)
    if not len(rows):
        return found, lent
    at, known = unit_rows(content[able]), found[able]
    for some in np.split(rows, range(CHUNK, len(rows), CHUNK)):
        nearest, weights = nearest_lenders(content[some], at, lenders, 1, temperature)
        found[some] = lend(known[nearest], weights)
    return found, lent
