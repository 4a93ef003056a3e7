import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.support.rounding import float32_limit

from kar_sidecar.ranking.affinity import SIMILARITIES, STATISTICS, affinity, affinity_columns, centred

pytestmark = pytest.mark.unit

UNIT = np.eye(4, dtype=np.float32)


def one(candidates, history, ratings, segments=(4,), padding=0):
    candidates, history = np.atleast_2d(candidates), np.reshape(history, (-1, sum(segments)))
    is_event = np.arange(len(history) + padding) < len(history)
    padded = np.concatenate([history, np.full((padding, history.shape[1]), 9)]).astype(np.float32)
    rated = np.concatenate([ratings, np.full(padding, 99)]).astype(np.float32)
    return affinity(candidates[None].astype(np.float32), padded[None], rated[None], is_event[None], segments)[0]


def test_affinity_equals_values_by_hand():
    # The liked item equals the candidate (similarity 1), the disliked one is orthogonal to it (0).
    (found,) = one(UNIT[0], [UNIT[0], UNIT[1]], [5, 1])
    named = dict(zip((*STATISTICS, *SIMILARITIES), found, strict=True))
    assert named["log_events"] == pytest.approx(np.log(3))
    assert (named["mean_rating"], named["rating_spread"]) == (3, 2)
    assert named["linear"] == pytest.approx((2 * 1 + -2 * 0) / 2)
    for t in (0.05, 0.1, 0.2):
        odds = np.exp(1 / t)
        assert named[f"softmax_{t}"] == pytest.approx((2 * odds - 2) / (odds + 1))
    assert named["positive"] == pytest.approx(1)
    assert named["nearest"] == pytest.approx(1)


def test_two_segments_stand_side_by_side():
    text, other = UNIT[0], UNIT[2]
    both = one(np.r_[text, other], [np.r_[UNIT[0], UNIT[1]], np.r_[UNIT[1], UNIT[2]]], [4, 2], (4, 4))
    alone = one(text, [UNIT[0], UNIT[1]], [4, 2]), one(other, [UNIT[1], UNIT[2]], [4, 2])
    np.testing.assert_allclose(both[0], np.r_[alone[0][0], alone[1][0][len(STATISTICS) :]])
    assert both.shape[1] == affinity_columns(2)


@pytest.mark.parametrize("case", ["no history", "no candidate vector", "no history vectors"])
def test_similarity_columns_are_zero_without_history_or_vectors(case):
    history = np.zeros((0, 4)) if case == "no history" else np.zeros((2, 4)) if "history v" in case else UNIT[:2]
    candidate = np.zeros(4) if "candidate" in case else UNIT[0]
    (found,) = one(candidate, history, [5, 1][: len(history)], padding=2)
    assert not found[len(STATISTICS) :].any()
    assert found[: len(STATISTICS)].any() == (case != "no history")


def test_an_event_without_a_vector_counts_for_statistics_only():
    (found,) = one(UNIT[0], [UNIT[0], np.zeros(4), UNIT[1]], [5, 3, 1])
    (without,) = one(UNIT[0], [UNIT[0], UNIT[1]], [5, 1])
    np.testing.assert_allclose(found[len(STATISTICS) :], without[len(STATISTICS) :], rtol=float32_limit(64))
    assert found[0] == pytest.approx(np.log(4))


def test_centred_ratings():
    found = centred(np.array([[4, 2, 7]], np.float32), np.array([[True, True, False]]))
    assert found.tolist() == [[1, -1, 0]]


vectors = st.integers(0, 6).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float32, (5, 4), elements=st.floats(-1, 1, width=32)),
        hnp.arrays(np.float32, (n, 4), elements=st.floats(-1, 1, width=32)),
        hnp.arrays(np.float32, (n,), elements=st.floats(0.5, 5, width=32)),
    )
)


@given(vectors, st.integers(0, 5))
def test_neither_padding_nor_the_other_candidates_nor_the_other_users_matter(case, padding):
    candidates, history, ratings = case
    together = one(candidates, history, ratings, (3, 1), padding)
    alone = np.concatenate([one(candidate, history, ratings, (3, 1)) for candidate in candidates])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert np.isfinite(together).all()
    is_event = np.ones((2, len(history)), bool)
    stacked = np.stack([history, -history])
    two = affinity(np.stack([candidates] * 2), stacked, np.stack([ratings] * 2), is_event, (3, 1))
    np.testing.assert_allclose(two[0], together, rtol=0, atol=1e-5)
