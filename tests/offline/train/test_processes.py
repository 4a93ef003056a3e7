import json

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.train import TrainSettings, load_trained, train
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER
from kar_sidecar.errors import PreconditionError

pytestmark = pytest.mark.service

SMALL = TrainSettings(epochs=2, batch=8)
SCHEMA = records_pb2.FeatureSchema(
    history_length=3,
    features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
)


def write_dataset(work):
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(30), 6)
    dataset = Dataset.from_events(
        "tiny",
        SCHEMA,
        [Entity(f"u{i}", {"age": i}, {}) for i in range(30)],
        [Entity(f"i{i}", {}, {}) for i in range(6)],
        user=user,
        item=np.tile(np.arange(6), 30),
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=np.arange(len(user)),
        seed=0,
        positive_above=3,
    )
    assert all(len(dataset.samples(split)) for split in (0, 1))
    work.dataset.mkdir(parents=True)
    dataset.save(work.dataset)


def test_processes_give_what_one_process_gives(tmp_path):
    for name in ("a", "b"):
        write_dataset(WorkFolder(tmp_path / name))
    seen = []
    result = train(
        WorkFolder(tmp_path / "a"),
        arms=["control"],
        settings=SMALL,
        workers=2,
        on_epoch=lambda r, e: seen.append((r.name, e.number)),
    )
    assert sorted(seen) == [("dcnv2_control", 1), ("dcnv2_control", 2), ("din_control", 1), ("din_control", 2)]
    here = train(WorkFolder(tmp_path / "b"), arms=["control"], settings=SMALL, workers=0)
    for name, report in result.report.runs.items():
        assert report.validation_loss == pytest.approx(here.report.runs[name].validation_loss, abs=1e-5)
    metrics = json.loads((tmp_path / "a" / "training" / "din_control" / "metrics.json").read_text())
    assert [epoch["number"] for epoch in metrics["epochs"]] == [1, 2]
    assert load_trained(WorkFolder(tmp_path / "a"), "din", "control").name == "din"
    assert not train(WorkFolder(tmp_path / "a"), arms=["control"], settings=SMALL, workers=2).ran


def test_errors_of_a_process_reach_the_caller(tmp_path):
    write_dataset(WorkFolder(tmp_path))
    (tmp_path / "encoding").mkdir()
    with pytest.raises(PreconditionError, match="kar encode"):
        train(WorkFolder(tmp_path), ["dcnv2"], ["knowledge"], SMALL, workers=1)


def test_an_interrupt_ends_the_processes_and_the_next_call_goes_on(tmp_path):
    write_dataset(WorkFolder(tmp_path))

    def interrupt(run, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(WorkFolder(tmp_path), ["dcnv2"], ["control"], SMALL, workers=1, on_epoch=interrupt)
    assert (
        train(WorkFolder(tmp_path), ["dcnv2"], ["control"], SMALL, workers=1).report.runs["dcnv2_control"].epochs == 2
    )
