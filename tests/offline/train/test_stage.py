from dataclasses import replace

import pytest
import torch
from tests.support.rounding import SCORE_LIMIT
from tests.support.training import (
    SMALL,
    write_work,
)

from kar_kernels import HybridExpertAdaptor
from kar_offline.dataset.splits import TRAIN, VALIDATION
from kar_offline.train import load_trained, train
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset, learn_features
from kar_offline.train.fit import STATE
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.samples import samples_of_split
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, IntegrityError, PreconditionError

pytestmark = pytest.mark.unit


def test_train_load_and_second_run(tmp_path):
    dataset = write_work(WorkFolder(tmp_path))
    seen = []
    arms = ["control", "knowledge"]
    result = train(
        WorkFolder(tmp_path), ["dcnv2"], arms, SMALL, workers=0, on_epoch=lambda run, _: seen.append(run.name)
    )
    assert result.ran
    assert sorted(seen) == ["dcnv2_control"] * 2 + ["dcnv2_knowledge"] * 2
    folder = tmp_path / "training" / "dcnv2_knowledge"
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.json", "metrics.json"}
    assert not (folder / STATE).exists()
    trained = load_trained(WorkFolder(tmp_path), "dcnv2", "knowledge")
    assert not trained.backbone.training
    assert not trained.adaptor.training
    assert isinstance(trained.adaptor, HybridExpertAdaptor)
    assert trained.encoder_id == "e1"
    assert list(trained.item_ids) == learn_features(dataset).item_ids
    assert list(trained.encodings) == learn_features(dataset).encodings
    data = encode_dataset(dataset)
    given = KnowledgeInputs.for_training(
        ARMS["knowledge"], data, samples_of_split(data, TRAIN), tmp_path / "encoding", seed=0
    )
    torch.testing.assert_close(trained.affinity.vectors, given.affinity.vectors)
    assert trained.affinity.segments == given.affinity.segments == (("text", 64),)
    logits = predict_logits(trained.model, Batches(data, samples_of_split(data, VALIDATION), given))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, samples_of_split(data, VALIDATION).label)
    assert loss.item() == pytest.approx(trained.metrics["validation_loss"], abs=SCORE_LIMIT)
    control = load_trained(WorkFolder(tmp_path), "dcnv2", "control")
    assert (control.adaptor, control.affinity, control.encoder_id) == (None, None, "")
    assert (folder / "curves.png").stat().st_size > 1000

    again = train(WorkFolder(tmp_path), ["dcnv2"], arms, SMALL, workers=0)
    assert not again.ran
    assert again.report == result.report
    assert train(WorkFolder(tmp_path), ["dcnv2"], ["control"], replace(SMALL, seed=5), workers=0).ran


def test_an_interrupted_stage_resumes(tmp_path):
    write_work(WorkFolder(tmp_path))

    def interrupt(_, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(WorkFolder(tmp_path), ["din"], ["raw_text"], SMALL, workers=0, on_epoch=interrupt)
    with pytest.raises(PreconditionError, match="kar train"):
        load_trained(WorkFolder(tmp_path), "din", "raw_text")
    seen = []
    train(
        WorkFolder(tmp_path),
        ["din"],
        ["raw_text"],
        SMALL,
        workers=0,
        on_epoch=lambda _, epoch: seen.append(epoch.number),
    )
    assert seen == [1, 2]
    assert load_trained(WorkFolder(tmp_path), "din", "raw_text").metrics["best_epoch"] in (1, 2)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="choose from"):
        train(WorkFolder(tmp_path), ["perceptron"], workers=0)
    with pytest.raises(InputError, match="control, raw_text, knowledge, "):
        train(WorkFolder(tmp_path), ["din"], ["llm"], workers=0)
    with pytest.raises(PreconditionError, match="kar train"):
        load_trained(WorkFolder(tmp_path), "din", "control")


def test_corrupt_models_are_named(tmp_path):
    write_work(WorkFolder(tmp_path))
    train(WorkFolder(tmp_path), ["dcnv2"], ["control"], SMALL, workers=0)
    model = tmp_path / "training" / "dcnv2_control" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="dcnv2_control"):
        load_trained(WorkFolder(tmp_path), "dcnv2", "control")
