import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kar_offline.evaluate import metrics
from kar_offline.evaluate.metrics import (
    Interval,
    auc,
    bootstrap_weights,
    ece,
    gauc,
    holm,
    interval,
    logloss,
    paired_bootstrap,
    reliability,
    resampled_auc,
)

pytestmark = pytest.mark.unit


def slow_auc(labels, scores, weights):
    """Every pair of a positive and a negative, one by one."""
    wins = pairs = 0.0
    for y, s, w in zip(labels, scores, weights, strict=True):
        for z, t, v in zip(labels, scores, weights, strict=True):
            if y > 0 and z <= 0:
                pairs += w * v
                wins += w * v * ((s > t) + 0.5 * (s == t))
    return wins / pairs if pairs else math.nan


def test_auc_by_hand():
    # Positives .8 and .3, negatives .3 and .1: pairs won 1, 1, 1/2, 1.
    assert auc(np.array([1, 1, 0, 0]), np.array([0.8, 0.3, 0.3, 0.1])) == 3.5 / 4
    assert auc(np.array([1, 0]), np.array([0.1, 0.9])) == 0.0
    assert math.isnan(auc(np.array([1, 1]), np.array([0.1, 0.9])))


samples = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30)


@given(samples)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_auc_equals_all_pairs(rows):
    labels, scores, _ = np.array(rows).T
    expected = slow_auc(labels, scores, np.ones(len(labels)))
    assert auc(labels, scores) == pytest.approx(expected, nan_ok=True)


def test_logloss_by_hand():
    labels, scores = np.array([1.0, 0.0]), np.array([0.8, 0.4], dtype=np.float32)
    assert logloss(labels, scores) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2, rel=1e-6)
    assert logloss(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


def test_gauc_by_hand():
    # User 7: AUC 1 over 2 samples; user 3: AUC 1/2 over 3; user 5 has positives only.
    users = np.array([7, 3, 5, 7, 3, 3])
    labels = np.array([1, 1, 1, 0, 0, 0])
    scores = np.array([0.9, 0.5, 0.1, 0.2, 0.7, 0.3])
    assert gauc(labels, scores, users) == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)
    assert math.isnan(gauc(np.ones(2), np.ones(2), np.arange(2)))


def slow_bootstrap(labels, scores, baseline, users, seed, resamples):
    rng = np.random.default_rng(seed)
    distinct = np.unique(users)
    differences = []
    for _ in range(resamples):
        rows = np.concatenate([np.flatnonzero(users == u) for u in rng.choice(distinct, len(distinct))])
        one = np.ones(len(rows))
        differences.append(slow_auc(labels[rows], scores[rows], one) - slow_auc(labels[rows], baseline[rows], one))
    return np.array(differences)


def make(users=12, each=4):
    rng = np.random.default_rng(3)
    user = np.repeat(np.arange(users) * 10, each)
    labels = rng.integers(0, 2, len(user))
    return labels, labels + rng.normal(size=len(user)), labels + 3 * rng.normal(size=len(user)), user


def test_bootstrap_agrees_with_resampling_rows_of_users():
    labels, scores, baseline, users = make()
    fast = paired_bootstrap(labels, scores, baseline, users, seed=0, resamples=4000)
    slow = slow_bootstrap(labels, scores, baseline, users, 1, 400)
    error = slow.std() / 20  # of the slow mean
    one = np.ones(len(labels))
    assert fast.mean == pytest.approx(slow_auc(labels, scores, one) - slow_auc(labels, baseline, one))
    assert fast.low == pytest.approx(np.percentile(slow, 2.5), abs=12 * error)
    assert fast.high == pytest.approx(np.percentile(slow, 97.5), abs=12 * error)
    assert fast.low < fast.mean < fast.high


def test_bootstrap_is_seeded_paired_and_antisymmetric():
    labels, scores, baseline, users = make()
    there = paired_bootstrap(labels, scores, baseline, users, seed=5)
    assert there == paired_bootstrap(labels, scores, baseline, users, seed=5)
    back = paired_bootstrap(labels, baseline, scores, users, seed=5)
    assert (back.mean, back.low) == pytest.approx((-there.mean, -there.high))
    assert paired_bootstrap(labels, scores, scores, users, seed=5) == Interval(0.0, 0.0, 0.0)


def test_bootstrap_resamples_users_not_rows():
    # With one user every resample is the same.
    labels, scores, baseline, _ = make()
    interval = paired_bootstrap(labels, scores, baseline, np.zeros(len(labels), dtype=int), seed=0, resamples=50)
    assert interval.low == pytest.approx(interval.high)
    assert interval.mean == pytest.approx(auc(labels, scores) - auc(labels, baseline))


def test_bootstrap_without_negatives_is_nan():
    assert math.isnan(paired_bootstrap(np.ones(4), np.arange(4), np.arange(4), np.arange(4), seed=0).mean)


@given(samples)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_auc_under_user_weights(rows):
    labels, scores, users = np.array(rows).T
    distinct, row = np.unique(users, return_inverse=True)
    weights = np.random.default_rng(0).integers(0, 3, (4, len(distinct))).astype(float)
    expected = [slow_auc(labels, scores, weight[row]) for weight in weights]
    np.testing.assert_allclose(resampled_auc(labels, scores, users, weights), expected)


def test_resamples_of_more_than_a_block_holds(monkeypatch):
    rng = np.random.default_rng(0)
    labels, scores, users = rng.integers(0, 2, 900), rng.normal(size=900), np.repeat(np.arange(300), 3)
    weights = bootstrap_weights(300, seed=0, resamples=7)
    whole = resampled_auc(labels, scores, users, weights)
    monkeypatch.setattr(metrics, "BLOCK", 2_000)
    np.testing.assert_array_equal(resampled_auc(labels, scores, users, weights), whole)
    assert resampled_auc(labels, scores, users, np.ones((1, 300)))[0] == pytest.approx(auc(labels, scores))


def test_weights_draw_as_many_users_as_there_are():
    weights = bootstrap_weights(7, seed=1, resamples=50)
    assert weights.shape == (50, 7)
    assert (weights.sum(1) == 7).all()
    assert np.array_equal(weights, bootstrap_weights(7, seed=1, resamples=50))


def test_interval_leaves_out_what_cannot_be_measured():
    found = interval(0.5, np.array([0.0, np.nan, 1.0]))
    assert (found.mean, found.low, found.high) == (0.5, pytest.approx(0.025), pytest.approx(0.975))


def test_calibration_by_hand():
    # Two bins: scores .1, .3 with one positive of two; scores .7, .9 with two of two.
    labels, scores = np.array([0, 1, 1, 1]), np.array([0.3, 0.1, 0.9, 0.7])
    found = reliability(labels, scores, bins=2)
    np.testing.assert_allclose(found.score, [0.2, 0.8])
    np.testing.assert_allclose(found.rate, [0.5, 1.0])
    assert found.samples.tolist() == [2, 2]
    assert ece(labels, scores, bins=2) == pytest.approx((0.3 + 0.2) / 2)


def test_holm_by_hand():
    # Sorted .01, .02, .04 times 3, 2, 1: .03, .04, .04.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
