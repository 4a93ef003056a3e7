"""Vectors of entities without knowledge are imputed from their nearest neighbours by content."""

import numpy as np
import pytest

from kar_offline.knowledge.imputation import impute_from_neighbours

pytestmark = pytest.mark.unit

CONTENT = np.array([[2, 0], [0, 3], [1, 1], [0, 0], [0, 0], [4, 0]], np.float32)
HAS_KNOWLEDGE = np.array([True, True, False, False, True, False])
VECTORS = np.array([[1, 0, 0], [0, 1, 0], [9, 9, 9], [9, 9, 9], [0, 0, 1], [9, 9, 9]], np.float32)


def test_imputed_vectors_are_means_weighted_by_the_softmax_of_cosines() -> None:
    found, imputed = impute_from_neighbours(CONTENT, HAS_KNOWLEDGE, VECTORS, temperature=0.5)
    assert imputed.tolist() == [False, False, True, False, False, True]  # the fourth has no content
    half = 0.5**0.5
    # The last has cosines 1 and 0 to the first two: weights e^2 and 1, scaled to unit length.
    unequal = np.array([np.exp(2), 1, 0]) / np.hypot(np.exp(2), 1)
    np.testing.assert_allclose(found[[2, 5]], [[half, half, 0], unequal], atol=1e-6)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], VECTORS[[0, 1, 3, 4]])


def test_no_more_neighbours_count_than_are_asked_for() -> None:
    found, _ = impute_from_neighbours(CONTENT, HAS_KNOWLEDGE, VECTORS, neighbours=1)
    np.testing.assert_allclose(found[5], [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("has_knowledge", [[False] * 6, [True] * 6, [False, False, False, False, True, False]])
def test_nothing_is_imputed_without_neighbours_or_without_need(has_knowledge: list[bool]) -> None:
    found, imputed = impute_from_neighbours(CONTENT, np.array(has_knowledge), VECTORS)
    assert not imputed.any()
    np.testing.assert_array_equal(found, VECTORS)


def test_many_entities_are_imputed_in_parts() -> None:
    random = np.random.default_rng(0)
    content, vectors = (random.normal(size=(9000, 4)).astype(np.float32) for _ in range(2))
    has_knowledge = np.arange(9000) < 50
    found, imputed = impute_from_neighbours(content, has_knowledge, vectors)
    assert imputed.sum() == 8950
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    for row in (50, 4145, 4146, 8999):
        cosine = unit[:50] @ unit[row]
        nearest = np.argsort(-cosine)[:8]
        mean = np.exp(cosine[nearest] / 0.1) @ vectors[nearest]
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-4)
