"""Entities without knowledge borrow from the nearest by content, in both serving modes, and training never sees it."""

import json

import numpy as np
import pytest
import torch

from kar_offline.dataset.samples import Dataset
from kar_offline.publish.neighbours import borrow, lend_by_content
from kar_offline.train.given import AffinityInput, Components
from kar_offline.train.vectors import load_text_vectors

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


@pytest.fixture
def unknown(work):
    """The tiny work folder; item 2 and user 1 have no text, item 4 has one by loan."""
    for kind, row in (("item", 2), ("user", 1)):
        path = work / "encoding" / f"knowledge_{kind}.json"
        header = json.loads(path.read_text())
        header["text_sha256"][row] = None
        header["lent"] = ["i04"] if kind == "item" else []
        path.write_text(json.dumps(header))
    return work


def test_what_is_served_has_lent_vectors_and_affinities_and_what_is_trained_on_has_not(unknown) -> None:
    dataset = Dataset.load(unknown / "dataset")
    texts = load_text_vectors(unknown / "encoding", "knowledge", dataset)
    affinity = AffinityInput((("cf", 1), ("text", 2)), torch.ones(30, 3), torch.zeros(0), torch.ones(0))
    lent = lend_by_content(unknown / "encoding", dataset, "knowledge", texts, affinity)
    assert lent.ids == {"item": {"i02", "i04"}, "user": {"u1"}}
    assert lent.texts.item_present.all()
    assert lent.texts.user_present.all()
    assert not texts.item_present[2]
    content = np.load(unknown / "encoding" / "raw_item.npy")
    owners = np.ones(30, dtype=bool)
    owners[[2, 4]] = False  # a borrower lends nothing
    expected, _ = borrow(content, owners, np.load(unknown / "encoding" / "knowledge_item.npy"))
    np.testing.assert_allclose(lent.texts.item[2], expected[2], atol=1e-6)
    others = [row for row in range(30) if row != 2]
    torch.testing.assert_close(lent.texts.item[others], texts.item[others])
    projected = Components.of(texts.item[texts.item_present], 2).project(lent.texts.item[2:3])
    assert lent.affinity is not None
    torch.testing.assert_close(lent.affinity.vectors[2], torch.cat([torch.ones(1), projected[0]]))
    torch.testing.assert_close(lent.affinity.vectors[others], affinity.vectors[others])
    assert affinity.vectors[2].tolist() == [1, 1, 1]


def test_without_encoded_facts_only_loans_count(unknown) -> None:
    (unknown / "encoding" / "raw_item.json").unlink()
    dataset = Dataset.load(unknown / "dataset")
    texts = load_text_vectors(unknown / "encoding", "knowledge", dataset)
    lent = lend_by_content(unknown / "encoding", dataset, "knowledge", texts, None)
    assert lent.ids == {"item": {"i04"}, "user": frozenset()}
    assert lent.texts is texts
