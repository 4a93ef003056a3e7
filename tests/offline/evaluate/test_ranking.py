import math

import numpy as np
import pytest

from kar_offline.evaluate.ranking import average_precision, hit, ndcg

pytestmark = pytest.mark.unit

LABELS = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
SCORES = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.5, 0.5, 0.5], [4, 3, 2, 1]])
# Ranked labels: 0 1 1 0, then 0 0 0 1 (ties as they lie), then nothing to find.


def test_average_precision_by_hand():
    assert average_precision(LABELS, SCORES, 4).tolist()[:2] == [(1 / 2 + 2 / 3) / 2, 1 / 4]
    assert average_precision(LABELS, SCORES, 2).tolist()[:2] == [(1 / 2) / 2, 0]
    assert average_precision(LABELS, SCORES, 1).tolist()[:2] == [0, 0]
    assert math.isnan(average_precision(LABELS, SCORES, 4)[2])


def test_ndcg_by_hand():
    found = ndcg(LABELS, SCORES, 4)
    assert found[0] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))
    assert found[1] == pytest.approx(1 / math.log2(5))
    assert math.isnan(found[2])
    assert ndcg(LABELS, SCORES, 1).tolist()[:2] == [0, 0]
    assert ndcg(LABELS, LABELS.astype(float), 3).tolist()[:2] == [1, 1]


def test_hits_by_hand():
    assert hit(LABELS, SCORES, 1).tolist()[:2] == [0, 0]
    assert hit(LABELS, SCORES, 2).tolist()[:2] == [1, 0]
    assert hit(LABELS, SCORES, 99).tolist()[:2] == [1, 1]
    assert math.isnan(hit(LABELS, SCORES, 1)[2])
