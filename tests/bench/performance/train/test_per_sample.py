"""The loop over samples scores and learns as our trainer does."""

import pytest
import torch
from tests.support.work_folders import QUICK_TRAINING, batches_of, untrained_model

from kar_bench.performance.train.per_sample import PerSample, score_seconds, train_seconds
from kar_offline.train.predict import predict_logits


@pytest.mark.parametrize("arm", ["control", "paper", "knowledge"])
def test_the_loop_over_samples_scores_as_our_trainer_does(work, arm):
    batches = batches_of(work, arm)
    model = untrained_model(batches, arm, "din")
    seconds, logits = score_seconds(model, batches, batch=7)
    assert seconds > 0
    torch.testing.assert_close(logits, predict_logits(model, batches), rtol=1e-5, atol=1e-5)


def test_the_loop_over_samples_learns(work):
    batches = batches_of(work, "paper")
    model = untrained_model(batches, "paper")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert train_seconds(model, batches, QUICK_TRAINING) > 0
    after = model.state_dict()
    for part in ("backbone.", "adaptor."):
        assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part))


def test_every_row_has_its_own_copy_of_an_entity(work):
    rows = PerSample(batches_of(work, "paper"))
    batch = {name: torch.stack([rows[i][name] for i in range(4)]) for name in rows[0]}
    assert batch["item_text"].shape == batch["user_text"].shape == (4, 5)
