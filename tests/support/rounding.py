"""Limits for the difference between two float32 evaluations of the same formula."""

from math import sqrt
from typing import Final

__all__ = ["SCORE_LIMIT", "float32_limit"]

UNIT_ROUNDOFF: Final = 2.0**-24
CONFIDENCE: Final = 6
"""Standard deviations that a rounding error may reach: 2 in 1,000,000,000 exceed it."""


def float32_limit(additions: int, magnitude: float = 1.0) -> float:
    """How far two float32 sums of the same numbers may lie apart when their additions are ordered differently.

    Rounding errors of n additions grow like sqrt(n) (Higham and Mary, SIAM J. Sci. Comput. 2019); each of both sums has
    one. Processors differ in their order of additions, so a limit below this depends on the machine.

    Args:
        additions: Additions on the longest path from an input to the result.
        magnitude: Size of the numbers that are added.
    """
    return 2 * CONFIDENCE * sqrt(additions) * UNIT_ROUNDOFF * magnitude


SCORE_LIMIT: Final = float32_limit(1000)
"""For scores of the click models: at most 1,000 additions through all layers, of numbers below 1. It is 2.3e-5."""
