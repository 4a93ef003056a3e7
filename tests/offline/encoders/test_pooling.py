import numpy as np
import pytest
from tests.support.rounding import float32_limit

from kar_offline.encoders.pooling import Pooling, pool

pytestmark = pytest.mark.unit

# Three tokens and two of padding, on the right and on the left; padding holds what must not count.
TOKENS = [[1.0, 0.0], [2.0, 6.0], [6.0, 3.0]]
PADDING = [[100.0, 100.0], [-50.0, 7.0]]
HIDDEN = np.array([TOKENS + PADDING, PADDING + TOKENS], dtype=np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "vector"),
    [
        ("mean", [3.0, 3.0]),
        ("cls", [1.0, 0.0]),
        ("last", [6.0, 3.0]),
        # (1 x [1, 0] + 2 x [2, 6] + 3 x [6, 3]) / 6
        ("weighted", [23 / 6, 3.5]),
    ],
)
def test_padding_on_either_side_does_not_count(pooling: Pooling, vector: list[float]) -> None:
    pooled = pool(HIDDEN, MASK, pooling)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, [vector, vector], rtol=float32_limit(16))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted"])
def test_one_token_is_its_own_vector(pooling: Pooling) -> None:
    pooled = pool(HIDDEN, np.array([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]), pooling)
    np.testing.assert_allclose(pooled, [[2.0, 6.0], [2.0, 6.0]], rtol=float32_limit(16))
