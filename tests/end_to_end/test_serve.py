"""`kar serve` with a real Triton, a real sidecar and real kills, on a release small enough to compute by hand."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import json_format

from kar.admin.v1 import admin_pb2, admin_pb2_grpc
from kar.records.v1 import records_pb2
from kar_model_repository.render import Backbone, Sizes, render
from kar_sidecar.client import KarClient
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.features import FeatureLayout, History, schema_hash
from kar_sidecar.launcher.launcher import is_serving
from kar_sidecar.releases.manifest import RENDERED, list_files, manifest_id, write_active
from kar_sidecar.scoring import BASE_INPUTS, KNOWLEDGE_INPUTS
from kar_sidecar.store import FEATURES, EntityKey, schema_meta, space_meta, vector_part
from kar_sidecar.store.lmdb import LmdbStore
from kar_sidecar.store.records import encode_vectors

pytestmark = pytest.mark.service

LIMIT_S = 90.0
SPACE = "aaaaaaaaaaaa"
SCHEMA = records_pb2.FeatureSchema(
    features=[
        records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC),
        records_pb2.Feature(name="year", entity=ITEM.number, type=records_pb2.FEATURE_TYPE_NUMERIC),
    ],
    history_length=2,
)
VECTORS = {"good": [1.0, 2.0], "bad": [-1.0, -1.0]}
NEUTRAL = [0.25, 0.75]


def write_onnx(path, summed, knowledge):
    """A backbone whose score is the sigmoid of the sum of one input's columns."""
    widths = {"history_item": 2, "history_rating": 2, "user_categorical": 1, "item_categorical": 1}
    widths |= {"user_numeric": 1, "item_numeric": 1, "user_knowledge": 2, "item_knowledge": 2}
    names = (*BASE_INPUTS, "request_of_row", *(KNOWLEDGE_INPUTS if knowledge else ()))
    inputs = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.TensorProto.FLOAT if name.endswith(("numeric", "knowledge")) else onnx.TensorProto.INT64,
            [None, widths[name]] if name in widths else [None],
        )
        for name in names
    ]
    score = onnx.helper.make_tensor_value_info("score", onnx.TensorProto.FLOAT, [None])
    nodes = [
        onnx.helper.make_node("ReduceSum", [summed, "columns"], ["sum"], keepdims=0),
        onnx.helper.make_node("Sigmoid", ["sum"], ["score"]),
    ]
    columns = onnx.numpy_helper.from_array(np.array([1]), "columns")
    graph = onnx.helper.make_graph(nodes, "tiny", inputs, [score], [columns])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def make_release(releases, *, dataset="tiny"):
    """Write a release and its Triton repository; returns its id."""
    draft = releases / "draft"
    (draft / "vectors").mkdir(parents=True)
    (draft / "backbones").mkdir()
    (draft / "item_ids.txt").write_text("good\nbad\n")
    (draft / "adaptor.safetensors").write_bytes(b"")
    np.save(draft / "vectors" / "neutral.npy", np.array([[0.0, 0.0], NEUTRAL], np.float32))
    write_onnx(draft / "backbones" / "knowledge.onnx", "item_knowledge", knowledge=True)
    write_onnx(draft / "backbones" / "control.onnx", "item_numeric", knowledge=False)
    space = records_pb2.VectorSpace(space_id=SPACE, dim=2, dtype="float32")
    manifest = records_pb2.Manifest(
        dataset=dataset,
        adapted_space=space,
        encoded_space=space,
        feature_schema=SCHEMA,
        feature_schema_hash=schema_hash(SCHEMA),
        feature_encodings=[
            records_pb2.FeatureEncoding(name="age", entity=USER.number, mean=30, scale=10),
            records_pb2.FeatureEncoding(name="year", entity=ITEM.number, mean=1990, scale=10),
        ],
        triton_adaptor="adaptor_{release}",
        models=[
            records_pb2.ModelEntry(arm="knowledge", triton_model="k_{release}", triton_ensemble="e_{release}"),
            records_pb2.ModelEntry(arm="control", triton_model="c_{release}"),
        ],
        files=list_files(draft, [path for path in draft.rglob("*") if path.is_file()]),
    )
    manifest.release_id = id_ = manifest_id(manifest)
    (draft / "manifest.json").write_text(json_format.MessageToJson(manifest))
    rendered = render(
        "cpu",
        draft / "triton" / "cpu",
        adaptor=f"adaptor_{id_}",
        adaptor_weights=draft / "adaptor.safetensors",
        backbones=[
            Backbone(f"k_{id_}", draft / "backbones" / "knowledge.onnx", ensemble=f"e_{id_}"),
            Backbone(f"c_{id_}", draft / "backbones" / "control.onnx"),
        ],
        sizes=Sizes(2, 1, 1, 1, 1, encoding=2, user_knowledge=2, item_knowledge=2),
        cores=2,
    )
    files = records_pb2.Manifest(release_id=id_, files=list_files(draft, rendered))
    (draft / RENDERED).write_text(json_format.MessageToJson(files))
    draft.rename(releases / id_)
    return id_


def publish(folder):
    store = LmdbStore(folder)
    users, items = FeatureLayout(SCHEMA, USER), FeatureLayout(SCHEMA, ITEM)
    nothing = History((), np.zeros(0, np.float32))
    store.write(
        FEATURES, [(EntityKey(USER, "u"), users.encode(users.row({"age": 30}), history=nothing, written_at_ms=1))]
    )
    store.write(
        FEATURES, [(EntityKey(ITEM, id_), items.encode(items.row({"year": 2000}), written_at_ms=1)) for id_ in VECTORS]
    )
    vectors = encode_vectors(np.array(list(VECTORS.values()), np.float32), SPACE, written_at_ms=1)
    store.write(vector_part(SPACE), zip((EntityKey(ITEM, id_) for id_ in VECTORS), vectors, strict=True))
    store.write_meta(space_meta(SPACE), b"{}")
    store.write_meta(schema_meta(schema_hash(SCHEMA)), b"{}")
    store.close()


@pytest.fixture
def work(tmp_path):
    releases = tmp_path / "releases"
    releases.mkdir()
    write_active(releases, make_release(releases))
    publish(tmp_path / "store")
    return tmp_path


def await_true(condition, what, process):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, f"kar serve ended before: {what}"
        assert time.monotonic() < end, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_gone(pids):
    end = time.monotonic() + LIMIT_S
    while any(map(running, pids)):
        assert time.monotonic() < end, f"still running: {pids}"
        time.sleep(0.05)


def kar_serve(work, *options):
    return [sys.executable, "-m", "kar_sidecar", "serve", "--work", work, "--ready-file", work / "ready.json", *options]


@contextlib.contextmanager
def serving(work, *options):
    """A `kar serve` that is ready: its process, and what its ready file says."""
    with (work / "serve.log").open("a") as log:
        process = subprocess.Popen(kar_serve(work, "--port", "0", *options), stdout=log, stderr=subprocess.STDOUT)
    try:
        await_true((work / "ready.json").is_file, f"ready ({(work / 'serve.log').read_text()})", process)
        yield process, json.loads((work / "ready.json").read_text())
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def stubs_of(server):
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    assert children
    return [int(child) for child in children]


def assert_scores(address, release_id):
    with KarClient(address, timeout_s=30.0) as client:
        ranking = client.rank("u", ["bad", "stranger", "good"], arm="knowledge")
    assert ranking.rung == "knowledge", ranking.response.reason
    assert ranking.response.release_id == release_id
    assert list(ranking.response.order) == [2, 1, 0]
    expected = [1 / (1 + math.exp(-x)) for x in (-2.0, sum(NEUTRAL), 3.0)]
    assert list(ranking.response.scores) == pytest.approx(expected, abs=1e-6)


def test_killed_children_come_back_and_the_stop_is_clean(work):
    with serving(work) as (process, ready):
        assert_scores(ready["grpc"], ready["release"])
        for name in ("triton", "sidecar"):
            pids = json.loads((work / "ready.json").read_text())["pids"]
            os.kill(pids[name], signal.SIGKILL)
            await_true(lambda: not is_serving(ready["grpc"]), f"health notices the dead {name}", process)
            await_true(lambda: is_serving(ready["grpc"]), f"health is well after {name}", process)
            assert_scores(ready["grpc"], ready["release"])

            def ready_file_has_the_new_process(name=name, before=pids[name]):
                return json.loads((work / "ready.json").read_text())["pids"][name] != before

            await_true(ready_file_has_the_new_process, f"the ready file has the new {name}", process)
        pids = json.loads((work / "ready.json").read_text())["pids"]
        pids_of_all = [*pids.values(), *stubs_of(pids["triton"])]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        await_gone(pids_of_all)
    assert not (work / "ready.json").exists()
    log = (work / "serve.log").read_text()
    assert "triton was killed by SIGKILL; starting it again" in log
    assert "sidecar was killed by SIGKILL; starting it again" in log
    assert log.count("ready on") == 3


def test_a_killed_model_process_comes_back(work):
    with serving(work) as (process, ready):
        os.kill(next(iter(stubs_of(ready["pids"]["triton"]))), signal.SIGKILL)

        def replaced():
            pids = json.loads((work / "ready.json").read_text())["pids"]
            return pids["triton"] != ready["pids"]["triton"]

        await_true(replaced, "Triton is started again", process)
        await_true(lambda: is_serving(ready["grpc"]), "health is well", process)
        assert_scores(ready["grpc"], ready["release"])


def test_a_killed_supervisor_leaves_nothing_and_the_next_one_starts(work):
    with serving(work) as (process, ready):
        pids = [*ready["pids"].values(), *stubs_of(ready["pids"]["triton"])]
        process.kill()
        process.wait()
        await_gone(pids)
    (work / "ready.json").unlink()
    port = ready["grpc"].split(":")[1]
    with serving(work, "--port", port, "--metrics-port", "0") as (_, restarted):
        assert restarted["grpc"] == ready["grpc"]
        assert_scores(restarted["grpc"], restarted["release"])


def test_a_release_exported_later_can_be_activated(work):
    with serving(work) as (process, ready):
        later = make_release(work / "releases", dataset="later")
        await_true((work / "serving" / "models" / f"k_{later}").is_dir, "Triton can see it", process)
        with grpc.insecure_channel(ready["grpc"]) as channel:
            request = admin_pb2.ActivateReleaseRequest(release_id=later)
            answer = admin_pb2_grpc.AdminServiceStub(channel).ActivateRelease(request, timeout=LIMIT_S)
        assert answer.previous_release_id == ready["release"]
        os.kill(ready["pids"]["triton"], signal.SIGKILL)
        await_true(lambda: not is_serving(ready["grpc"]), "health notices", process)
        await_true(lambda: is_serving(ready["grpc"]), "health is well", process)
        assert_scores(ready["grpc"], later)


@pytest.mark.parametrize(
    ("damage", "exit_code", "message"),
    [
        ("corrupt", 1, "knowledge.onnx is corrupt"),
        ("missing", 1, "control.onnx is missing"),
        ("rendering", 1, "config.pbtxt is corrupt"),
        ("unpublished", 1, "run `kar publish`"),
        ("taken port", 2, "cannot be used (Address already in use)"),
        ("unknown release", 2, "release 'nowhere' is not below"),
        ("wrong mode", 2, "mode"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_sentence(work, damage, exit_code, message):
    [backbones] = work.glob("releases/*/backbones")
    options = ["--port", "0"]
    with contextlib.ExitStack() as stack:
        match damage:
            case "corrupt":
                (backbones / "knowledge.onnx").unlink()
                (backbones / "knowledge.onnx").write_bytes(b"something else")
            case "missing":
                (backbones / "control.onnx").unlink()
            case "rendering":
                [config] = work.glob("releases/*/triton/cpu/k_*/config.pbtxt")
                config.write_text(config.read_text() + "# changed\n")
            case "unpublished":
                shutil.rmtree(work / "store")
            case "taken port":
                other = stack.enter_context(socket.socket())
                other.bind(("127.0.0.1", 0))
                other.listen()
                options = ["--port", str(other.getsockname()[1])]
            case "unknown release":
                options += ["--release", "nowhere"]
            case "wrong mode":
                options += ["--mode", "sideways"]
        done = subprocess.run(kar_serve(work, *options), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (work / "ready.json").exists()
