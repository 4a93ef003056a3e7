"""The vectors of the index benchmark."""

import numpy as np

from kar_bench.performance.index.mixture import mixture


def test_the_mixture_is_of_unit_vectors_and_the_same_each_time() -> None:
    rows, queries = mixture(2000, 20, queries=10)
    assert (rows.shape, queries.shape, rows.dtype) == ((2000, 20), (10, 20), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(rows, mixture(2000, 20, queries=10)[0])
    assert not np.array_equal(rows, mixture(2000, 20, queries=10, seed=2)[0])
    nearest = np.sort(queries @ rows.T, axis=1)[:, -10:]
    assert 0.5 < nearest.mean() < 0.99  # near, and yet no copies
