"""Both modes serve a tiny release, a model that was never released follows; what cannot be compared is refused."""

import json

import pytest
from typer.testing import CliRunner

from kar.records.v1 import records_pb2
from kar_bench.command import bench
from kar_bench.performance.modes.measure import ModesBenchmarkOptions, measure_modes, next_model
from kar_bench.performance.modes.metered_store import MeteredStore
from kar_offline.dataset.dataset import Dataset
from kar_offline.export import export
from kar_offline.knowledge.records import write_knowledge
from kar_offline.train.settings import TrainSettings
from kar_offline.train.stage import train
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, PreconditionError
from kar_sidecar.releases.manifest import list_releases, read_active
from kar_sidecar.store import EntityKey
from kar_sidecar.store.memory import MemoryStore

ITEMS, ENCODED, ADAPTED, HEADER_BYTES = 30, 5, 32, 32
SETTINGS = TrainSettings(epochs=1, batch=64, dedicated_experts=1, shared_experts=1, expert_hidden=8)


@pytest.fixture
def trained(work):
    """The work folder with texts of all, and dcnv2 and din trained with knowledge and without."""
    dataset = work.read(Dataset)
    work.knowledge.mkdir()
    write_knowledge(
        work.knowledge,
        [
            records_pb2.KnowledgeRecord(id=one.id, entity=kind.number, text=f"About {one.id}.", template="factual/1")
            for kind, entities in ((USER, dataset.users), (ITEM, dataset.items))
            for one in entities
        ],
    )
    train(work, ["dcnv2", "din"], ["control", "knowledge"], SETTINGS, workers=0)
    return work


@pytest.mark.service
def test_both_modes_answer_and_a_trained_model_follows_in_both(trained, tmp_path):
    served = export(trained, "dcnv2").report.release_id
    before = {path for path in trained.root.rglob("*") if path.is_file()}
    file = tmp_path / "report.json"
    options = ["--candidates", "3", "--candidates", "8", "--requests", "12", "--json", str(file)]
    told = CliRunner().invoke(bench, ["modes", "--work", str(trained), *options], env={"COLUMNS": "120"})
    assert told.exit_code == 0, told.exception
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
    brought = report["checkpoint_to_serving"]
    for one in brought.values():
        assert (one["served"], one["model"], one["entities"]) == ("dcnv2", "din", ITEMS)
        assert min(one["export_s"], one["load_s"]) > 0
        assert one["total_s"] == pytest.approx(one["export_s"] + one["publish_s"] + one["load_s"])
    assert brought["prestored"]["publish_s"] > 0
    assert brought["prestored"]["vectors_per_s"] > 0
    assert brought["prestored"]["parts"]["adapted"]["records"] == ITEMS
    assert (brought["encoded"]["publish_s"], brought["encoded"]["parts"]) == (0, {})
    assert report["machine"]
    assert set(report["others_busy_cores"]) == {"before", "after"}
    assert "publish" in told.output
    # The work folder is as it was: one release, active, nothing published or served from it.
    assert list_releases(trained.releases) == [served] == [read_active(trained.releases)]
    assert {path for path in trained.root.rglob("*") if path.is_file()} == before | {file}


@pytest.mark.unit
def test_a_work_folder_without_a_release_is_refused(work):
    told = CliRunner().invoke(bench, ["modes", "--work", str(work)])
    assert isinstance(told.exception, PreconditionError)
    assert "run `kar export` first" in str(told.exception)
    told = CliRunner().invoke(bench, ["modes", "--work", str(work), "--model", "perceptron"])
    assert "choose from dcn, dcnv2" in str(told.exception)


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


@pytest.mark.unit
def test_the_meter_counts_what_is_offered():
    store = MeteredStore(MemoryStore())
    store.write("a", [(EntityKey(ITEM, "1"), b"four"), (EntityKey(ITEM, "2"), b"seven..")])
    store.write("a", [(EntityKey(USER, "1"), b"one")])
    store.write("b", [])
    assert {part: (one.records, one.bytes) for part, one in store.parts.items()} == {"a": (3, 14), "b": (0, 0)}
    assert store.parts["a"].seconds > 0
    assert store.read([EntityKey(ITEM, "2")], ["a"]) == [(b"seven..",)]
    store.write_meta("seal", b"{}")
    assert store.read_meta("seal") == b"{}"
    assert store.remove_part("a") == 3
