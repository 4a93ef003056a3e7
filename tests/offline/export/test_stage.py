"""A work folder of a dozen entities becomes a release that verifies, is reproducible and names what was spoiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import json_format
from tests.support.rounding import SCORE_LIMIT
from typer import Typer
from typer.testing import CliRunner

from kar.records.v1 import records_pb2
from kar_kernels import HybridExpertAdaptor
from kar_kernels.cpu import has_bfloat16
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.export import export
from kar_offline.export.command import export as export_command
from kar_offline.train.checkpoint import build_model, load_trained, run_folder, save_trained
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import AffinityInput
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, IntegrityError, PreconditionError
from kar_sidecar.ranking.affinity import affinity_columns
from kar_sidecar.releases.manifest import Release, list_releases, read_active

pytestmark = pytest.mark.unit

DIM, KNOWLEDGE, COLUMNS = 6, 4, affinity_columns(1)
NUMERIC, CATEGORICAL = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
SCHEMA = records_pb2.FeatureSchema(
    features=[
        records_pb2.Feature(name="age", entity=USER.number, type=NUMERIC),
        records_pb2.Feature(name="genres", entity=ITEM.number, type=CATEGORICAL, width=2),
    ],
    history_length=3,
)
WITHOUT_TEXT = {"user": "u3", "item": "i2"}


def make_dataset():
    users = [Entity(f"u{i}", {"age": 20 + i}, {}) for i in range(1, 6)]
    items = [Entity(f"i{i}", {"genres": ["Action", "Drama"][: 1 + i % 2]}, {}) for i in range(1, 8)]
    events = [(user, (user + step) % 7) for user in range(5) for step in range(4)]
    return Dataset(
        name="tiny",
        schema=SCHEMA,
        users=users,
        items=items,
        offsets=np.arange(0, 24, 4, dtype=np.int64),
        event_item=np.array([item for _, item in events], dtype=np.int32),
        event_rating=np.array([1 + (user + item) % 5 for user, item in events], dtype=np.float32),
        event_time=np.arange(20, dtype=np.int64),
        cutoff=np.full(5, 2, dtype=np.int32),
        event_split=np.repeat([0, 0, 0, 1, 2], 4).astype(np.uint8),
        positive_above=3,
    )


def write_encoding(work, kind, entities, encoder_id="encoder/1"):
    rng = np.random.default_rng(len(kind))
    present = [entity.id != WITHOUT_TEXT[kind] for entity in entities]
    vectors = rng.normal(size=(len(entities), DIM)).astype(np.float32) * np.array(present)[:, None]
    np.save(work.encoding / f"knowledge_{kind}.npy", vectors.astype(np.float32))
    header = {
        "encoder_id": encoder_id,
        "dim": DIM,
        "ids": [entity.id for entity in entities],
        "text_sha256": ["00" if known else None for known in present],
    }
    (work.encoding / f"knowledge_{kind}.json").write_text(json.dumps(header))


def write_knowledge(work, kind, entities):
    records = [
        records_pb2.KnowledgeRecord(id=entity.id, text=f"About {entity.id}.", template=f"{template}/2")
        for entity in entities
        if entity.id != WITHOUT_TEXT[kind]
        for template in ["reasoning" if kind == "user" else "factual"]
    ]
    lines = [json.dumps(json_format.MessageToDict(r, preserving_proto_field_name=True)) for r in records]
    (work.knowledge / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")


def write_training(work, dataset, backbone, seed=1, towers=("user", "item")):
    torch.manual_seed(seed)
    data = encode_dataset(dataset)
    adaptor = {"dim": DIM, "hidden": 5, "out": KNOWLEDGE, "shared": 1, "dedicated": 2, "towers": towers}
    vectors = torch.nn.functional.normalize(torch.randn(len(dataset.items), 2))
    vectors[1] = 0
    affinity = AffinityInput((("text", 2),), vectors, torch.arange(COLUMNS) * 1.0, torch.full((COLUMNS,), 2.0))
    for arm in ("control", "knowledge"):
        made = adaptor if arm == "knowledge" else None
        sizes = {f"{tower}_knowledge": KNOWLEDGE for tower in towers} | {"affinity": COLUMNS}
        spec = type(data.spec).from_json(data.spec.to_json() | (sizes if made else {}))
        model = build_model(backbone, spec, data.categories, made)
        if model.adaptor:
            for tower in towers:
                torch.nn.init.normal_(model.adaptor.neutral(tower))
        folder = run_folder(work, backbone, arm)
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"backbone": backbone, "arm": arm, "spec": spec.to_json(), "adaptor": made}
        identity |= {"encoder_id": "encoder/1" if made else "", "settings": {"seed": 0}}
        known = affinity if made else None
        metrics = {"validation_loss": 0.5}
        save_trained(folder, model.state_dict(), data.features, known, identity=identity, metrics=metrics)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    work = WorkFolder(tmp_path_factory.mktemp("work"))
    for name in ("dataset", "encoding", "knowledge"):
        (work.root / name).mkdir()
    dataset = make_dataset()
    dataset.save(work.dataset)
    for kind, entities in (("user", dataset.users), ("item", dataset.items)):
        write_encoding(work, kind, entities)
        write_knowledge(work, kind, entities)
    for backbone in ("dcnv2", "din", "prm"):
        write_training(work, dataset, backbone)
    return work


@pytest.fixture
def work(finished, tmp_path):
    """A copy of the finished stages, to spoil."""
    copied = shutil.copytree(finished.root, tmp_path / "work", ignore=shutil.ignore_patterns("releases"))
    return WorkFolder(copied)


@pytest.fixture(scope="module")
def exported(finished):
    """One export of dcnv2, only read."""
    result = export(finished, "dcnv2", cores=2, now_s=lambda: 1_700_000_000.5)
    return result, Release.load(finished.releases, result.report.release_id)


def test_the_manifest_ties_everything(exported):
    result, release = exported
    manifest = release.manifest
    assert result.ran
    assert result.folder == release.folder
    assert manifest.created_at.ToMilliseconds() == 1_700_000_000_500
    assert (manifest.dataset, manifest.encoder_id) == ("tiny", "encoder/1")
    assert dict(manifest.prompt_versions) == {"factual": "2", "reasoning": "2"}
    assert (manifest.adapted_space.dim, manifest.encoded_space.dim) == (KNOWLEDGE, DIM)
    assert manifest.adapted_space.space_id != manifest.encoded_space.space_id
    assert {entry.path for entry in manifest.files} == {
        "item_ids.txt",
        "adaptor.safetensors",
        "backbones/control.onnx",
        "backbones/knowledge.onnx",
        "knowledge/item.jsonl",
        "knowledge/user.jsonl",
        "vectors/neutral.npy",
        "vectors/affinity.npy",
        "vectors/affinity_ids.txt",
        *(
            f"vectors/{kind}_{part}"
            for kind in ("item", "user")
            for part in ("ids.txt", "lent.txt", "adapted.npy", "encoded.npy")
        ),
    }
    assert dict(release.model("knowledge").metrics) == {"validation_loss": 0.5}
    assert release.towers == (USER, ITEM)
    affinity = release.affinity
    assert [(segment.name, segment.dim) for segment in affinity.segments] == [("text", 2)]
    assert (affinity.space.dim, affinity.events, affinity.learned) == (2, 100, False)
    assert list(affinity.mean) == list(range(COLUMNS))
    assert list(affinity.scale) == [2] * COLUMNS
    assert (release.folder / "vectors" / "affinity_ids.txt").read_text().split() == ["i1", "i3", "i4", "i5", "i6", "i7"]
    assert np.load(release.folder / "vectors" / "affinity.npy").shape == (6, 2)


def test_a_release_of_one_tower_has_vectors_of_that_kind_alone(work):
    write_training(work, make_dataset(), "dcnv2", towers=("item",))
    release = Release.load(work.releases, export(work, "dcnv2", cores=2).report.release_id)
    assert release.towers == (ITEM,)
    assert not (release.folder / "vectors" / "user_adapted.npy").exists()
    assert (release.folder / "vectors" / "user_encoded.npy").exists()
    assert not release.neutral[0].any()
    config = (release.folder / "triton" / "cpu" / f"dcnv2_encoded_{release.release_id}" / "config.pbtxt").read_text()
    assert "user_encoding" not in config
    assert 'name: "affinity"' in config


def test_what_is_lent_and_clusters_texts_come_along(work):
    header = work.encoding / "knowledge_item.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"lent": ["i6", "i3"]}))
    loan = records_pb2.Loan(id="cluster/0", weight=1)
    lines = (work.knowledge / "item.jsonl").read_text().splitlines()
    borrowing = json_format.MessageToJson(records_pb2.KnowledgeRecord(id="i3", loans=[loan]), indent=None)
    (work.knowledge / "item.jsonl").write_text("\n".join([lines[0], borrowing]) + "\n")
    cluster = json.dumps({"id": "cluster/0", "text": "These films are short.", "template": "cluster/4"}) + "\n"
    (work.knowledge / "item_clusters.jsonl").write_text(cluster)
    release = Release.load(work.releases, export(work, "dcnv2", cores=2).report.release_id)
    assert (release.folder / "vectors" / "item_lent.txt").read_text().split() == ["i3", "i6"]
    assert (release.folder / "vectors" / "user_lent.txt").read_text() == ""
    assert (release.folder / "vectors" / "item_ids.txt").read_text().split() == ["i1", "i3", "i4", "i5", "i6", "i7"]
    assert (release.folder / "knowledge" / "item_clusters.jsonl").read_text() == cluster
    assert "knowledge/item_clusters.jsonl" in {entry.path for entry in release.manifest.files}
    assert dict(release.manifest.prompt_versions) == {"factual": "2", "reasoning": "2", "cluster": "4"}


def test_an_arm_without_an_adaptor_is_refused(work):
    for arm in ("control", "no_adaptor", "cf", "shuffled", "unheard of"):
        with pytest.raises(InputError, match="choose from raw_text, knowledge, paper"):
            export(work, "dcnv2", arm)


def test_vectors_are_those_of_entities_with_text(exported, finished):
    _, release = exported
    vectors = release.folder / "vectors"
    adaptor = HybridExpertAdaptor.load(release.folder / "adaptor.safetensors")
    for kind, ids in (("user", "u1 u2 u4 u5"), ("item", "i1 i3 i4 i5 i6 i7")):
        assert (vectors / f"{kind}_ids.txt").read_text().split() == ids.split()
        source = np.load(finished.encoding / f"knowledge_{kind}.npy")
        encoded = np.load(vectors / f"{kind}_encoded.npy")
        np.testing.assert_array_equal(encoded, np.delete(source, 2 if kind == "user" else 1, axis=0))
        with torch.inference_mode():
            expected = adaptor.tower(torch.from_numpy(encoded), kind).numpy()
        np.testing.assert_allclose(np.load(vectors / f"{kind}_adapted.npy"), expected, rtol=0, atol=SCORE_LIMIT)
    np.testing.assert_array_equal(release.neutral[0], adaptor.user_neutral.detach().numpy())
    np.testing.assert_array_equal(release.neutral[1], adaptor.item_neutral.detach().numpy())


@pytest.mark.parametrize("name", ["dcnv2", "prm"])
def test_onnx_models_score_as_the_trained_ones(name, work):
    release = Release.load(work.releases, export(work, name).report.release_id)
    rng = np.random.default_rng(0)
    inputs = {
        "history_item": rng.integers(0, 7, (2, 3)),
        "history_rating": rng.integers(0, 11, (2, 3)),
        "user_categorical": np.zeros((2, 1), np.int64),
        "user_numeric": rng.normal(size=(2, 1)).astype(np.float32),
        "item_index": rng.integers(0, 7, 4),
        "item_categorical": rng.integers(0, 4, (4, 2)),
        "item_numeric": np.zeros((4, 1), np.float32),
        "request_of_row": np.array([0, 0, 1, 1]),
        "affinity": rng.normal(size=(4, COLUMNS)).astype(np.float32),
        "user_knowledge": rng.normal(size=(2, KNOWLEDGE)).astype(np.float32),
        "item_knowledge": rng.normal(size=(4, KNOWLEDGE)).astype(np.float32),
    }
    for arm in ("knowledge", "control"):
        session = onnxruntime.InferenceSession(release.folder / "backbones" / f"{arm}.onnx")
        given = {one.name: inputs[one.name] for one in session.get_inputs()}
        trained = load_trained(work, name, arm).backbone
        with torch.inference_mode():
            expected = trained({name: torch.from_numpy(value) for name, value in given.items()}).numpy()
        np.testing.assert_allclose(session.run(["score"], given)[0], expected, rtol=0, atol=SCORE_LIMIT)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_triton_repositories_hold_the_named_models(target, exported):
    _, release = exported
    id_ = release.release_id
    names = list(release.triton_models())
    assert sorted(names) == sorted(
        [f"dcnv2_knowledge_{id_}", f"dcnv2_control_{id_}", f"adaptor_{id_}", f"dcnv2_encoded_{id_}"]
    )
    folder = release.folder / "triton" / target
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    control = folder / f"dcnv2_control_{id_}" / "1" / "model.onnx"
    assert control.read_bytes() == (release.folder / "backbones" / "control.onnx").read_bytes()
    for arm, takes in (("knowledge", True), ("control", False)):
        config = (folder / f"dcnv2_{arm}_{id_}" / "config.pbtxt").read_text()
        assert ('name: "user_knowledge"' in config) is takes


def test_a_second_export_does_nothing_and_another_clock_or_machine_changes_no_id(work):
    first = export(work, "dcnv2", cores=2, now_s=lambda: 1.0)
    again = export(work, "dcnv2", cores=64, now_s=lambda: 2.0)
    assert (first.ran, again.ran) == (True, False)
    assert again.report.release_id == first.report.release_id
    assert Release.load(work.releases, first.report.release_id).manifest.created_at.seconds == 1
    shutil.rmtree(first.folder)
    assert export(work, "dcnv2", cores=64, now_s=lambda: 2.0).report.release_id == first.report.release_id
    assert list_releases(work.releases) == [first.report.release_id]


def test_the_first_release_is_active_and_others_on_demand(work):
    releases = work.releases
    first, second = (export(work, backbone) for backbone in ("dcnv2", "din"))
    assert (first.report.active, second.report.active) == (True, False)
    assert read_active(releases) == first.report.release_id
    assert export(work, "din", activate=True).report.active
    assert read_active(releases) == second.report.release_id
    assert not export(work, "dcnv2").report.active


def test_other_weights_make_another_release_in_another_adapted_space(work):
    before = export(work, "dcnv2")
    write_training(work, make_dataset(), "dcnv2", seed=2)
    after = export(work, "dcnv2")
    assert after.ran
    old, new = (Release.load(work.releases, one.report.release_id).manifest for one in (before, after))
    assert old.release_id != new.release_id
    assert old.adapted_space.space_id != new.adapted_space.space_id
    assert old.encoded_space == new.encoded_space


@pytest.mark.parametrize("place", ["backbones/knowledge.onnx", "triton/cpu/adaptor_{id}/config.pbtxt"])
def test_a_spoiled_file_is_named_and_mended_by_exporting_again(place, work):
    id_ = export(work, "dcnv2").report.release_id
    file = work.releases / id_ / place.format(id=id_)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=file.name):
        Release.load(work.releases, id_)
    assert export(work, "dcnv2").ran
    Release.load(work.releases, id_)
    assert file.read_bytes() == content


def test_a_release_with_the_model_code_of_another_version_is_exported_again(work):
    id_ = export(work, "dcnv2").report.release_id
    release = work.releases / id_
    code = release / "triton" / "cpu" / f"adaptor_{id_}" / "1" / "model.py"
    own = code.read_bytes()
    code.write_bytes(b"# as another version wrote it\n" + own)
    listed = json.loads((release / "triton" / "files.json").read_text())
    for file in listed["files"]:
        if (release / file["path"]) == code:
            file |= {"bytes": str(code.stat().st_size), "sha256": file_sha256(code)}
    (release / "triton" / "files.json").write_text(json.dumps(listed))
    Release.load(work.releases, id_)
    assert export(work, "dcnv2").ran
    assert code.read_bytes() == own
    assert not export(work, "dcnv2").ran


@pytest.mark.service
def test_an_implementation_that_cannot_run_here_is_one_line(work):
    command = [Path(sys.executable).with_name("kar"), "export", "--work", str(work), "--backbone", "dcnv2"]
    environment = os.environ | {"KAR_ADAPTOR": "nonsense"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: KAR_ADAPTOR=nonsense is no implementation: choose from fused, fused_per_expert, fused_expert_pairs, "
        "gemm_then_fused, cpu, eager\n"
    )


def test_a_release_without_its_list_of_rendered_files_is_refused(work):
    id_ = export(work, "dcnv2").report.release_id
    (work.releases / id_ / "triton" / "files.json").unlink()
    with pytest.raises(IntegrityError, match=r"files\.json"):
        Release.load(work.releases, id_)


def test_a_draft_of_a_killed_export_is_no_release(work):
    id_ = export(work, "dcnv2").report.release_id
    shutil.copytree(work.releases / id_, work.releases / ".dcnv2_knowledge.draft")
    assert list_releases(work.releases) == [id_]
    assert not export(work, "dcnv2").ran
    assert not (work.releases / ".dcnv2_knowledge.draft").exists()


def test_what_does_not_belong_together_is_refused(work):
    dataset = make_dataset()
    for kind, entities in (("user", dataset.users), ("item", dataset.items)):
        write_encoding(work, kind, entities, encoder_id="encoder/2")
    with pytest.raises(IntegrityError, match="trained on vectors of encoder/1, not encoder/2"):
        export(work, "dcnv2")


def test_models_of_different_features_are_refused(work):
    config = run_folder(work, "dcnv2", "control") / "config.json"
    content = json.loads(config.read_text())
    content["encodings"][0]["mean"] = 99.0
    config.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="read different features"):
        export(work, "dcnv2")


def test_the_precision_is_of_both_modes_and_its_error_is_told(work):
    exact, rough = (export(work, "dcnv2", precision=one) for one in ("float32", "bfloat16"))
    assert (exact.report.precision, exact.report.vector_error) == ("float32", 0.0)
    assert rough.report.precision == "bfloat16"
    assert rough.report.release_id != exact.report.release_id
    assert export(work, "dcnv2").report.release_id == exact.report.release_id
    old, new = (Release.load(work.releases, one.report.release_id) for one in (exact, rough))
    assert old.manifest.adapted_space.space_id != new.manifest.adapted_space.space_id
    assert HybridExpertAdaptor.load(new.folder / "adaptor.safetensors").precision == "bfloat16"
    moved = [
        np.load(new.folder / "vectors" / f"{kind}_adapted.npy")
        - np.load(old.folder / "vectors" / f"{kind}_adapted.npy")
        for kind in ("user", "item")
    ]
    assert rough.report.vector_error == max(np.abs(one).max() for one in moved)
    assert (0 < rough.report.vector_error < 0.01) is has_bfloat16()
    for target in ("cpu", "gpu"):
        config = new.folder / "triton" / target / f"adaptor_{new.release_id}" / "config.pbtxt"
        assert 'key: "precision" value { string_value: "bfloat16" }' in config.read_text()


def test_an_unknown_precision_is_refused_with_those_that_are_known(work):
    with pytest.raises(InputError, match="choose from float32, bfloat16"):
        export(work, "dcnv2", precision="float16")
    app = Typer()
    app.command()(export_command)
    options = ["--work", str(work), "--backbone", "dcnv2", "--precision"]
    refused = CliRunner().invoke(app, [*options, "float16"], env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "'float32', 'bfloat16'" in refused.output
    told = CliRunner().invoke(app, [*options, "bfloat16"], env={"COLUMNS": "200"})
    assert told.exit_code == 0
    assert "dcnv2: bfloat16 changes" in told.output


def test_missing_stages_are_named(work, tmp_path):
    with pytest.raises(InputError, match="choose from dcn, dcnv2"):
        export(work, "perceptron")
    with pytest.raises(PreconditionError, match="kar train"):
        export(WorkFolder(tmp_path / "elsewhere"), "dcnv2")
    (work.knowledge / "item.jsonl").unlink()
    with pytest.raises(PreconditionError, match="kar generate"):
        export(work, "dcnv2")
    assert list_releases(work.releases) == []


def test_an_id_that_breaks_lines_is_refused(work):
    config = run_folder(work, "dcnv2", "knowledge").parent
    for arm in ("knowledge", "control"):
        path = config / f"dcnv2_{arm}" / "config.json"
        content = json.loads(path.read_text())
        content["item_ids"][0] = "i\u20281"
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="line break"):
        export(work, "dcnv2")
