"""Entities without knowledge borrow from the nearest by content."""

import numpy as np
import pytest

from kar_offline.knowledge.imputation import borrow

pytestmark = pytest.mark.unit

CONTENT = np.array([[2, 0], [0, 3], [1, 1], [0, 0], [0, 0], [4, 0]], np.float32)
KNOWS = np.array([True, True, False, False, True, False])
VECTORS = np.array([[1, 0, 0], [0, 1, 0], [9, 9, 9], [9, 9, 9], [0, 0, 1], [9, 9, 9]], np.float32)


def test_lent_vectors_are_means_weighted_by_the_softmax_of_cosines() -> None:
    found, lent = borrow(CONTENT, KNOWS, VECTORS, temperature=0.5)
    assert lent.tolist() == [False, False, True, False, False, True]  # the fourth has no content
    half = 0.5**0.5
    # The last has cosines 1 and 0 to the first two: weights e^2 and 1, scaled to unit length.
    unequal = np.array([np.exp(2), 1, 0]) / np.hypot(np.exp(2), 1)
    np.testing.assert_allclose(found[[2, 5]], [[half, half, 0], unequal], atol=1e-6)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], VECTORS[[0, 1, 3, 4]])


def test_the_nearest_lend_and_no_more_than_are_asked_for() -> None:
    found, _ = borrow(CONTENT, KNOWS, VECTORS, lenders=1)
    np.testing.assert_allclose(found[5], [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("knows", [[False] * 6, [True] * 6, [False, False, False, False, True, False]])
def test_nothing_is_lent_where_nobody_can_or_nobody_needs(knows: list[bool]) -> None:
    found, lent = borrow(CONTENT, np.array(knows), VECTORS)
    assert not lent.any()
    np.testing.assert_array_equal(found, VECTORS)


def test_many_borrowers_are_served_in_parts() -> None:
    random = np.random.default_rng(0)
    content, vectors = (random.normal(size=(9000, 4)).astype(np.float32) for _ in range(2))
    knows = np.arange(9000) < 50
    found, lent = borrow(content, knows, vectors)
    assert lent.sum() == 8950
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    for row in (50, 4145, 4146, 8999):
        cosine = unit[:50] @ unit[row]
        nearest = np.argsort(-cosine)[:8]
        mean = np.exp(cosine[nearest] / 0.1) @ vectors[nearest]
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-4)
