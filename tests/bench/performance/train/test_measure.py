import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.harness import to_json
from kar_bench.performance.train.fuxictr_process import FuxiCTR, write_task
from kar_bench.performance.train.measure import TrainBenchmarkOptions, measure_training, training_table
from kar_bench.performance.train.per_sample import PerSample, score_seconds, train_seconds
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TRAIN
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, new_model
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_sidecar.errors import InputError, UnavailableError

pytestmark = pytest.mark.unit

SETTINGS = TrainSettings(epochs=1, batch=64, dedicated_experts=1, shared_experts=1, expert_hidden=8)


def feed(work, arm):
    data = encode_dataset(work.read(Dataset).split_by_user(fold=0, folds=5))
    samples = samples_of_split(data, TRAIN)
    given = KnowledgeInputs.for_training(ARMS[arm], data, samples, work.encoding, seed=0)
    return Batches(data, samples, given)


def model(of, arm, name="dcnv2"):
    torch.manual_seed(0)
    return new_model(Run(name, arm), of.data, of.knowledge_inputs, SETTINGS)


@pytest.mark.parametrize("arm", ["control", "paper", "knowledge"])
def test_the_loop_over_samples_scores_as_our_trainer_does(work, arm):
    ours = feed(work, arm)
    made = model(ours, arm, "din")
    seconds, logits = score_seconds(made, ours, batch=7)
    assert seconds > 0
    torch.testing.assert_close(logits, predict_logits(made, ours), rtol=1e-5, atol=1e-5)


def test_the_loop_over_samples_learns(work):
    ours = feed(work, "paper")
    made = model(ours, "paper")
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert train_seconds(made, ours, SETTINGS) > 0
    after = made.state_dict()
    for part in ("backbone.", "adaptor."):
        assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part))


def test_every_row_has_its_own_copy_of_an_entity(work):
    rows = PerSample(feed(work, "paper"))
    batch = {name: torch.stack([rows[i][name] for i in range(4)]) for name in rows[0]}
    assert batch["item_text"].shape == batch["user_text"].shape == (4, 5)


def test_ratios_are_of_the_rates_of_the_same_run(work, tmp_path):
    turns = []
    options = TrainBenchmarkOptions(models=("dcnv2",), rows=32, rounds=2, fit=False)
    report = measure_training(work, work.encoding, options, on_turn=lambda *turn: turns.append(turn))
    found = to_json(report)
    rate = {(r["arm"], r["implementation"], r["phase"]): r["samples_per_s"] for r in found["rows"]}
    assert len(rate) == 3 * 2 * 2
    assert len(turns) == 3 * len(rate)
    for ratios in found["ratios"]:
        phase = ratios["phase"]
        ours = rate["knowledge", "ours", phase]
        assert ratios["knowledge_costs"] == rate["control", "ours", phase] / ours
        assert ratios["per_sample_knowledge"] == ours / rate["knowledge", "per_sample", phase]
    assert all(row["low"] <= row["samples_per_s"] <= row["high"] for row in found["rows"])
    assert training_table(report).renderables


def test_auc_is_of_a_control_trained_to_the_end_on_every_fold(work):
    options = TrainBenchmarkOptions(models=("dcnv2",), rows=32, rounds=1)
    report = measure_training(work, work.encoding, options, on_turn=lambda *turn: None)
    assert [(one.model, one.implementation, one.fold) for one in report.auc] == [
        ("dcnv2", "ours", fold) for fold in range(5)
    ]
    assert len({one.auc for one in report.auc}) > 1
    assert any("by fold" in str(line) for line in training_table(report).renderables)


def test_the_command_says_what_it_cannot_compare(tmp_path):
    def call(*options):
        return CliRunner().invoke(bench, ["train", "--dataset", "prepared", "--work", str(tmp_path), *options])

    assert isinstance(call("--model", "dlcm").exception, InputError)
    told = call("--model", "dcn", "--fuxictr", str(tmp_path / "peer"))
    assert "leave dcn or --fuxictr out" in str(told.exception)


def test_a_peer_that_breaks_down_is_reported_with_its_last_words(work, tmp_path):
    python = tmp_path / "peer" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho out of luck >&2\n")
    python.chmod(0o755)
    with FuxiCTR(tmp_path / "peer", tmp_path) as peer, pytest.raises(UnavailableError, match="out of luck"):
        peer.ask("train", "dcnv2", "npz", 8)


def test_a_peer_gets_every_split_and_no_other_row(work, tmp_path):
    data = feed(work, "control").data
    write_task(tmp_path, data, SETTINGS)
    for number, name in enumerate(("train", "validation", "test")):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            samples = samples_of_split(data, number)
            assert arrays["label"].sum() == samples.label.sum()
            assert sorted(arrays["item_index"].tolist()) == sorted(data.columns["item_index"][samples.item].tolist())


@pytest.mark.skipif("FUXICTR_ENVIRONMENT" not in os.environ, reason="FUXICTR_ENVIRONMENT names no environment")
@pytest.mark.parametrize("name", ["dcnv2", "din"])
def test_a_real_peer_trains_and_scores(work, tmp_path, name):
    data = feed(work, "control").data
    write_task(tmp_path, data, replace(SETTINGS, batch=16))
    with FuxiCTR(Path(os.environ["FUXICTR_ENVIRONMENT"]), tmp_path) as peer:
        for loader in ("npz", "memory"):
            assert peer.seconds("train", name, loader, 64) > 0
            assert peer.seconds("score", name, loader, 64) > 0
        assert 0 <= peer.ask("fit", name, "memory", 1)["auc"] <= 1
