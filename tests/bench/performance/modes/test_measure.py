"""Both modes serve a tiny release and then a model that was never released; what cannot be compared is refused."""

import json
import shutil

import pytest
from tests.support.work_folders import QUICK_TRAINING, write_work_folder
from typer.testing import CliRunner

from kar.records.v1 import records_pb2
from kar_bench.command import bench
from kar_bench.performance.modes.measure import ModesBenchmarkOptions, measure_modes, next_model
from kar_offline.dataset.dataset import Dataset
from kar_offline.export import export
from kar_offline.knowledge.records import write_knowledge
from kar_offline.train.stage import train
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, PreconditionError
from kar_sidecar.releases.manifest import list_releases, read_active

ITEMS, ENCODED, ADAPTED, HEADER_BYTES = 30, 5, 32, 32


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A work folder with texts about all entities, and dcnv2 and din trained with knowledge and without."""
    work = write_work_folder(tmp_path_factory.mktemp("trained"))
    work.knowledge.mkdir()
    write_knowledge(
        work.knowledge,
        [
            records_pb2.KnowledgeRecord(
                id=entity.id, entity=kind.number, text=f"About {entity.id}.", template="factual/1"
            )
            for kind, entities in work.read(Dataset).entities.items()
            for entity in entities
        ],
    )
    train(work, ["dcnv2", "din"], ["control", "knowledge"], QUICK_TRAINING, workers=0)
    return work


@pytest.fixture
def trained(trained_once, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(trained_once.root, tmp_path / "work")
    return WorkFolder(tmp_path / "work")


@pytest.mark.service
def test_both_modes_answer_and_a_trained_model_follows_in_both(trained, tmp_path):
    served = export(trained, "dcnv2").report.release_id
    before = {path for path in trained.root.rglob("*") if path.is_file()}
    file = tmp_path / "report.json"
    options = ["--candidates", "3", "--candidates", "8", "--requests", "12", "--json", str(file)]
    done = CliRunner().invoke(bench, ["modes", "--work", str(trained), *options], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.exception
    report = json.loads(file.read_text())
    assert [(row["mode"], row["candidates"]) for row in report["rows"]] == [
        ("prestored", 3),
        ("encoded", 3),
        ("prestored", 8),
        ("encoded", 8),
    ]
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["errors"] == 0
    sizes = report["bytes_per_entity"]
    assert sizes["prestored"]["record_bytes"] == HEADER_BYTES + 4 * ADAPTED
    assert sizes["encoded"]["record_bytes"] == HEADER_BYTES + 4 * ENCODED
    assert all(one["lmdb_bytes"] > one["record_bytes"] for one in sizes.values())
    rollouts = report["checkpoint_to_serving"]
    for rollout in rollouts.values():
        assert (rollout["served"], rollout["model"], rollout["entities"]) == ("dcnv2", "din", ITEMS)
        assert min(rollout["export_s"], rollout["load_s"]) > 0
        assert rollout["total_s"] == pytest.approx(rollout["export_s"] + rollout["publish_s"] + rollout["load_s"])
    assert rollouts["prestored"]["publish_s"] > 0
    assert rollouts["prestored"]["vectors_per_s"] > 0
    assert rollouts["prestored"]["parts"]["adapted"]["records"] == ITEMS
    assert (rollouts["encoded"]["publish_s"], rollouts["encoded"]["parts"]) == (0, {})
    assert report["machine"]
    assert set(report["others_busy_cores"]) == {"before", "after"}
    assert "publish" in done.output
    # The work folder is as it was: one release, active, nothing published or served from it.
    assert list_releases(trained.releases) == [served] == [read_active(trained.releases)]
    assert {path for path in trained.root.rglob("*") if path.is_file()} == before


@pytest.mark.unit
def test_a_work_folder_without_a_release_is_refused(work):
    done = CliRunner().invoke(bench, ["modes", "--work", str(work)])
    assert isinstance(done.exception, PreconditionError)
    assert "run `kar export` first" in str(done.exception)
    done = CliRunner().invoke(bench, ["modes", "--work", str(work), "--model", "perceptron"])
    assert "choose from dcn, dcnv2" in str(done.exception)


@pytest.mark.unit
def test_what_follows_is_another_model_with_the_same_arm(trained):
    assert next_model(trained, "dcnv2", "knowledge") == "din"
    assert next_model(trained, "din", "knowledge") == "dcnv2"
    assert next_model(trained, "dcn", "knowledge", "din") == "din"
    with pytest.raises(InputError, match="din is served already"):
        next_model(trained, "din", "knowledge", "din")
    with pytest.raises(PreconditionError, match=r"kar train --work .* --backbone dcn --arm knowledge --arm control"):
        next_model(trained, "din", "knowledge", "dcn")
    with pytest.raises(PreconditionError, match="another model is not trained with the arms paper and control"):
        next_model(trained, "din", "paper")


@pytest.mark.unit
def test_more_candidates_than_items_are_refused_before_anything_starts(trained):
    export(trained, "dcnv2")
    with pytest.raises(InputError, match="31 candidates among 30 items: ask for fewer"):
        measure_modes(
            trained, ModesBenchmarkOptions(candidates=(31,)), on_step=lambda *step: pytest.fail(f"{step} began")
        )
