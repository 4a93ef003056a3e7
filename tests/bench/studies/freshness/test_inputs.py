"""Knowledge by morning, by hand: vectors of items and users, and how much was known about events."""

import numpy as np
import pytest
import torch

from kar_bench.harness import to_json
from kar_bench.studies.freshness.inputs import KnowledgeByMorning
from kar_bench.studies.freshness.simulation import Call, Month, SimulatedHistory
from kar_offline.dataset.splits import TEST
from kar_offline.refresh.policy import Reason
from kar_offline.train.arms import ARMS
from kar_offline.train.features import encode_dataset
from kar_offline.train.vectors import TextVectors


@pytest.fixture
def knowledge(small_log):
    """Item 0 is asked about on evening 0, item 1 on evening 1, where the text of item 1 was refused."""
    month = Month.of(small_log, share=0.5, days=2)
    calls = (Call(0, "item", 0, 0, Reason.NEW), Call(1, "item", 1, 0, Reason.NEW), Call(1, "user", 0, 3, Reason.NEW))
    own = torch.eye(4)
    released = TextVectors("e", torch.zeros(2, 4), torch.zeros(2) > 0, own, torch.tensor([True, False, True, True]))
    raw = np.ones((4, 4), np.float32)
    history = SimulatedHistory(calls, np.zeros(4, np.int64))
    versions = np.full((1, 4), 0.5, np.float32)
    return KnowledgeByMorning.of(month, encode_dataset(month.dataset), history, ARMS["paper"], released, raw, versions)


def test_what_is_known_of_items_on_a_morning_by_hand(knowledge):
    vectors, present = knowledge.items(0)
    assert not present.any()
    assert not vectors.any()
    # On day 1 item 0 has its text and the vector of item 1 is imputed from it; item 2 was not seen by then.
    vectors, present = knowledge.items(1)
    assert present.tolist() == [True, True, False, False]
    np.testing.assert_allclose(vectors[:2], torch.eye(4)[[0, 0]])
    vectors, present = knowledge.items(3)
    assert present.tolist() == [True, True, True, False]
    assert knowledge.items(3, impute=False)[1].tolist() == [True, False, False, False]


def test_what_is_known_of_users_by_hand(knowledge):
    # User 0 has a text, written from three events, on day 3; its row follows those of both users without a text.
    assert knowledge.user_row.tolist() == [0, 0, 0, 2, 1, 1, 1]
    assert knowledge.data.columns["user_numeric"].tolist() == [[0], [1], [0]]  # of training users, the first alone
    inputs = knowledge.inputs(3)
    assert inputs.texts.user_present.tolist() == [False, False, True]
    assert inputs.texts.user[2].tolist() == [0.5] * 4


def test_levels_by_hand(knowledge):
    # Events 3 (user 0, item 1, day 3), 5 and 6 (user 1, items 1 and 2, day 2).
    levels = to_json(knowledge.levels(knowledge.month.dataset.samples(TEST)))
    assert levels["item"] == {"full": 0, "lent": 1, "neutral": 0}
    assert levels["user"] == {"full": pytest.approx(1 / 3), "neutral": pytest.approx(2 / 3)}
    assert levels["age_days"] == {"item": None, "user": 2}
    assert levels["unknown_ratio"] == pytest.approx(2 / 3)  # nothing, all and all of one's events
