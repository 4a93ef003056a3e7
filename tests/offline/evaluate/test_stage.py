import io
import json

import numpy as np
import pytest
from rich.console import Console
from tests.support.text_vectors import write_text_vectors

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.evaluate import evaluate, evaluation_table
from kar_offline.train import TrainSettings, train
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER
from kar_sidecar.errors import PreconditionError

pytestmark = pytest.mark.unit

SMALL = TrainSettings(epochs=1, batch=16, shared_experts=1, dedicated_experts=1, expert_hidden=4, knowledge_width=3)
USERS, ITEMS, DIM = 20, 8, 4
ROWS = {"control", "raw_text", "knowledge", "neutral"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = WorkFolder(tmp_path_factory.mktemp("work"))
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), ITEMS)
    dataset = Dataset(
        name="tiny",
        schema=records_pb2.FeatureSchema(
            history_length=3,
            features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
        ),
        users=[Entity(f"u{i}", {"age": i}, {}) for i in range(USERS)],
        items=[Entity(f"i{i}", {}, {}) for i in range(ITEMS)],
        offsets=np.arange(0, USERS * ITEMS + 1, ITEMS),
        event_item=np.tile(np.arange(ITEMS, dtype=np.int32), USERS),
        event_rating=rng.integers(1, 6, len(user)).astype(np.float32),
        event_time=np.arange(len(user)),
        cutoff=np.full(USERS, 3, dtype=np.int32),
        event_split=np.repeat([TRAIN] * 12 + [VALIDATION] * 2 + [TEST] * 6, ITEMS).astype(np.uint8),
        positive_above=3,
    )
    folder.dataset.mkdir()
    dataset.save(folder.dataset)
    write_text_vectors(folder.encoding, dataset, dim=DIM, generator=rng)
    return folder


def test_evaluation_of_all_arms(work):
    with pytest.raises(PreconditionError, match="kar train"):
        evaluate(work, ["dcnv2"])
    train(work, ["dcnv2"], settings=SMALL, workers=0)
    result = evaluate(work, ["dcnv2"], resamples=50)
    assert result.ran
    report = json.loads((work.evaluation / "evaluation.json").read_text())
    assert report == json.loads(json.dumps(result.report.to_json()))
    for metric in ("auc", "logloss", "gauc", "calibration"):
        assert report[metric]["dcnv2"].keys() == ROWS
        assert len(set(report[metric]["dcnv2"].values())) == len(ROWS)
    assert report["intervals"]["dcnv2"].keys() == {
        "knowledge_minus_control",
        "knowledge_minus_raw_text",
        "raw_text_minus_control",
        "neutral_minus_control",
    }
    assert report["test"] == {"users": 6, "samples": 6 * 5}
    interval = report["intervals"]["dcnv2"]["knowledge_minus_control"]
    difference = report["auc"]["dcnv2"]["knowledge"] - report["auc"]["dcnv2"]["control"]
    assert interval["low"] <= difference <= interval["high"]
    assert not evaluate(work, ["dcnv2"], resamples=50).ran

    console = Console(file=io.StringIO(), width=120)
    console.print(evaluation_table(result.report))
    shown = console.file.getvalue()
    assert "Users are split" in shown
    assert all(caveat in shown for caveat in report["caveats"])
    assert f"{report['auc']['dcnv2']['knowledge']:.4f}" in shown


def test_evaluation_notices_a_new_model(work):
    train(work, ["din"], settings=SMALL, workers=0)
    assert evaluate(work, ["din"], resamples=10).ran
    train(work, ["din"], ["control"], TrainSettings(epochs=1, batch=16, seed=9), workers=0)
    assert evaluate(work, ["din"], resamples=10).ran
