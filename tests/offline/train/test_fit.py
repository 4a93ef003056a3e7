from dataclasses import replace

import pytest
import torch
from tests.support.rounding import SCORE_LIMIT
from tests.support.training import (
    SMALL,
    make_dataset,
    write_work,
)

from kar_offline.dataset.splits import VALIDATION
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.checkpoint import build_model
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, train_run
from kar_offline.train.samples import samples_of_split
from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.unit


def nothing(*_):
    pass


def run_fit(folder, settings, epochs=nothing, arm="paper"):
    """Train din on the tiny dataset, with vectors that are written beside `folder`."""
    work = WorkFolder(folder / "inputs")
    if not work.root.exists():
        write_work(work, without=None)
    data = encode_dataset(make_dataset())
    return train_run(data, work.encoding, Run("din", arm), settings, folder=folder, on_epoch=epochs).fitted


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(a, b):
    assert a.epochs == b.epochs
    assert a.weights.keys() == b.weights.keys()
    for name, value in a.weights.items():
        assert torch.equal(value, b.weights[name]), name


@pytest.mark.usefixtures("one_thread")
def test_training_repeats_bit_for_bit_and_leaves_the_callers_random_state(tmp_path):
    settings = replace(SMALL, epochs=3, patience=9)
    state = torch.get_rng_state()
    first = run_fit(tmp_path, settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    (tmp_path / "again").mkdir()
    assert_same(first, run_fit(tmp_path / "again", settings))
    (tmp_path / "other").mkdir()
    other = run_fit(tmp_path / "other", replace(settings, seed=1))
    assert other.epochs != first.epochs


class Interrupted(Exception):
    pass


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    settings = replace(SMALL, epochs=4, patience=9)
    (tmp_path / "whole").mkdir()
    whole = run_fit(tmp_path / "whole", settings)

    def interrupt(epoch):
        if epoch.number == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_fit(tmp_path, settings, interrupt)
    seen = []
    resumed = run_fit(tmp_path, settings, seen.append)
    assert_same(resumed, whole)
    assert [epoch.number for epoch in seen] == [1, 2, 3, 4]


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    # A learning rate this high makes validation worse after few epochs.
    settings = replace(SMALL, epochs=50, learning_rate=0.1)
    fitted = run_fit(tmp_path, settings, arm="control")
    assert len(fitted.epochs) == fitted.best.number + settings.patience < 50
    assert fitted.best.validation_loss == min(epoch.validation_loss for epoch in fitted.epochs)
    data = encode_dataset(make_dataset())
    model = build_model("din", data.spec, data.categories, None)
    model.load_state_dict(fitted.weights)
    validation = samples_of_split(data, VALIDATION)
    feed = Batches(data, validation, KnowledgeInputs(ARMS["control"], data.dataset))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(predict_logits(model, feed), validation.label)
    assert loss.item() == pytest.approx(fitted.best.validation_loss, abs=SCORE_LIMIT)


def test_clipping_clips(tmp_path):
    free = run_fit(tmp_path, replace(SMALL, clip_norm=1e9))
    (tmp_path / "clipped").mkdir()
    clipped = run_fit(tmp_path / "clipped", replace(SMALL, clip_norm=1e-9))
    assert [epoch.clipped_ratio for epoch in free.epochs] == [0, 0]
    assert [epoch.clipped_ratio for epoch in clipped.epochs] == [1, 1]
    assert free.epochs != clipped.epochs


def test_knowledge_dropout_trains_the_neutral_vectors(tmp_path):
    dropped = run_fit(tmp_path, replace(SMALL, knowledge_dropout=0.5, weight_decay=0))
    (tmp_path / "kept").mkdir()
    kept = run_fit(tmp_path / "kept", replace(SMALL, knowledge_dropout=0.0, weight_decay=0))
    assert not kept.weights["adaptor.user_neutral"].any()
    assert not kept.weights["adaptor.item_neutral"].any()
    assert dropped.weights["adaptor.user_neutral"].all()
    assert dropped.weights["adaptor.item_neutral"].all()
