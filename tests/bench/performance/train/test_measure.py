"""The benchmark of training speed on little data: rates, ratios and AUC."""

from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.harness import to_json
from kar_bench.performance.train.measure import TrainBenchmarkOptions, measure_training, training_table
from kar_sidecar.errors import InputError


def test_ratios_are_of_the_rates_of_the_same_run(work, tmp_path):
    turns = []
    options = TrainBenchmarkOptions(models=("dcnv2",), rows=32, rounds=2, fit=False)
    report = measure_training(
        work, work.encoding, options, on_turn=lambda *turn: turns.append(turn), busy_cores=lambda: 0.0
    )
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
    report = measure_training(work, work.encoding, options, on_turn=lambda *turn: None, busy_cores=lambda: 0.0)
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
