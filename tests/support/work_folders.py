"""Owns small work folders, and batches and models that tests train on them within a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.text_vectors import write_text_vectors

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TRAIN
from kar_offline.models import CTRModel
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.run import Run, new_model
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER

__all__ = ["DIM", "QUICK_TRAINING", "batches_of", "titled", "untrained_model", "work", "write_work_folder"]

DIM = 5
QUICK_TRAINING = TrainSettings(epochs=1, batch=64, dedicated_experts=1, shared_experts=1, expert_hidden=8)


def write_work_folder(root: Path) -> WorkFolder:
    """Forty users with ten ratings each, thirty items, and vectors of texts about all of them."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(40), 10)
    dataset = Dataset.from_events(
        "tiny",
        records_pb2.FeatureSchema(
            history_length=4,
            features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
        ),
        [Entity(f"u{i}", {"age": i}, {}) for i in range(40)],
        [Entity(f"i{i:02}", {}, {}) for i in range(30)],
        user=user,
        item=np.concatenate([rng.permutation(30)[:10] for _ in range(40)]),
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=np.tile(np.arange(10), 40),
        positive_above=3,
    )
    (root / "dataset").mkdir()
    dataset.save(root / "dataset")
    write_text_vectors(root / "encoding", dataset, dim=DIM, generator=rng)
    return WorkFolder(root)


@pytest.fixture
def work(tmp_path):
    """The small work folder."""
    return write_work_folder(tmp_path)


@pytest.fixture
def titled(work):
    """The small work folder with titles: item 3 is "Film 3"."""
    dataset = work.read(Dataset)
    named = [Entity(item.id, item.features, {"title": f"Film {row}"}) for row, item in enumerate(dataset.items)]
    replace(dataset, items=named).save(work.dataset)
    return work


def batches_of(work: WorkFolder, arm: str) -> Batches:
    """The training rows of fold 0 with the knowledge inputs of an arm."""
    data = encode_dataset(work.read(Dataset).split_by_user(fold=0, folds=5))
    samples = samples_of_split(data, TRAIN)
    inputs = KnowledgeInputs.for_training(ARMS[arm], data, samples, work.encoding, seed=0)
    return Batches(data, samples, inputs)


def untrained_model(batches: Batches, arm: str, backbone: str = "dcnv2") -> CTRModel:
    """A model for these batches, with the same weights each time."""
    torch.manual_seed(0)
    return new_model(Run(backbone, arm), batches.data, batches.knowledge_inputs, QUICK_TRAINING)
