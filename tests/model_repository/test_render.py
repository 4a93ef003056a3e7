"""Rendered repositories parse as Triton's own model configuration, with bounded resources and the seam's names."""

from dataclasses import replace

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as config_pb2

from kar_model_repository.render import Backbone, Resources, Sizes, render
from kar_sidecar.scoring import ADAPTOR_INPUTS, AFFINITY, BASE_INPUTS, KNOWLEDGE_INPUTS, VECTOR_INPUTS

pytestmark = pytest.mark.unit

SIZES = Sizes(
    history=30,
    user_categorical=2,
    user_numeric=1,
    item_categorical=6,
    item_numeric=3,
    encoding=384,
    user_knowledge=32,
    item_knowledge=32,
    affinity=9,
    vector=64,
    vector_events=100,
)
ITEM_ONLY = replace(SIZES, user_knowledge=0, vector=0, vector_events=0)
AFFINITIES = (AFFINITY, *VECTOR_INPUTS)
INT64, FP32, BOOL = config_pb2.TYPE_INT64, config_pb2.TYPE_FP32, config_pb2.TYPE_BOOL
DIMS = {
    "history_item": (INT64, [30]),
    "history_rating": (INT64, [30]),
    "user_categorical": (INT64, [2]),
    "user_numeric": (FP32, [1]),
    "item_index": (INT64, [-1]),
    "item_categorical": (INT64, [-1, 6]),
    "item_numeric": (FP32, [-1, 3]),
    "user_knowledge": (FP32, [32]),
    "item_knowledge": (FP32, [-1, 32]),
    "affinity": (FP32, [-1, 9]),
    "item_vector": (FP32, [-1, 64]),
    "history_vector": (FP32, [100, 64]),
    "history_weight": (FP32, [100]),
    "user_encoding": (FP32, [384]),
    "user_present": (BOOL, [1]),
    "item_encoding": (FP32, [-1, 384]),
    "item_present": (BOOL, [-1]),
    "score": (FP32, [-1]),
}
MODELS = {
    "adaptor_r": (ADAPTOR_INPUTS, KNOWLEDGE_INPUTS),
    "din_knowledge_r": (BASE_INPUTS + KNOWLEDGE_INPUTS + AFFINITIES, ("score",)),
    "din_encoded_r": (BASE_INPUTS + ADAPTOR_INPUTS + AFFINITIES, ("score",)),
    "din_control_r": (BASE_INPUTS, ("score",)),
}


def render_in(folder, target, cores=2, sizes=SIZES, **more):
    files = {name: folder / name for name in ("adaptor.safetensors", "knowledge.onnx", "control.onnx")}
    folder.mkdir(exist_ok=True)
    for name, path in files.items():
        path.write_text(name)
    written = render(
        target,
        folder / target,
        adaptor="adaptor_r",
        adaptor_weights=files["adaptor.safetensors"],
        backbones=[
            Backbone("din_knowledge_r", files["knowledge.onnx"], "din_encoded_r"),
            Backbone("din_control_r", files["control.onnx"]),
        ],
        sizes=sizes,
        cores=cores,
        **more,
    )
    assert written == sorted(path for path in (folder / target).rglob("*") if path.is_file())
    return folder / target


def parse(repository, name):
    text = (repository / name / "config.pbtxt").read_text()
    return text_format.Parse(text, config_pb2.ModelConfig())


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_the_seam(target, name, tmp_path):
    config = parse(render_in(tmp_path, target), name)
    inputs, outputs = MODELS[name]
    assert config.name == name
    assert config.max_batch_size == 64
    assert {one.name: (one.data_type, list(one.dims)) for one in config.input} == {one: DIMS[one] for one in inputs}
    assert {one.name: (one.data_type, list(one.dims)) for one in config.output} == {one: DIMS[one] for one in outputs}


@pytest.mark.parametrize("name", ["adaptor_r", "din_knowledge_r", "din_control_r"])
def test_candidate_axes_are_ragged_and_batching_has_no_queue_policy(name, tmp_path):
    config = parse(render_in(tmp_path, "cpu"), name)
    assert config.backend == "python"
    assert {one.name for one in config.input if one.allow_ragged_batch} == {
        one.name for one in config.input if one.name.startswith(("item_", "affinity"))
    }
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")


def test_what_a_release_does_not_read_is_not_there(tmp_path):
    repository = render_in(tmp_path, "cpu", sizes=ITEM_ONLY)

    def names(model):
        config = parse(repository, model)
        return {one.name for one in config.input}, {one.name for one in config.output}

    assert names("adaptor_r") == ({"item_encoding", "item_present"}, {"item_knowledge"})
    assert names("din_knowledge_r")[0] == {*BASE_INPUTS, "item_knowledge", "affinity"}
    assert names("din_encoded_r")[0] == {*BASE_INPUTS, "item_encoding", "item_present", "affinity"}


def test_the_ensemble_joins_adaptor_and_backbone(tmp_path):
    config = parse(render_in(tmp_path, "cpu"), "din_encoded_r")
    assert config.platform == "ensemble"
    adaptor, backbone = config.ensemble_scheduling.step
    assert (adaptor.model_name, backbone.model_name) == ("adaptor_r", "din_knowledge_r")
    for step, (inputs, outputs) in ((adaptor, MODELS["adaptor_r"]), (backbone, MODELS["din_knowledge_r"])):
        assert dict(step.input_map) == {name: name for name in inputs}
        assert dict(step.output_map) == {name: name for name in outputs}


@pytest.mark.parametrize(
    ("cores", "instances", "threads"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 4, 1), (16, 4, 2), (64, 4, 8)]
)
def test_a_model_takes_half_of_the_cores(cores, instances, threads, tmp_path):
    assert Resources.of("cpu", cores) == Resources(instances, threads, queue_delay_us=0)
    config = parse(render_in(tmp_path, "cpu", cores), "din_knowledge_r")
    [group] = config.instance_group
    assert (group.kind, group.count) == (config_pb2.ModelInstanceGroup.KIND_CPU, instances)
    assert config.parameters["threads"].string_value == str(threads)


def test_the_gpu_repository_has_one_instance_a_gpu_and_gathers_batches(tmp_path):
    config = parse(render_in(tmp_path, "gpu", cores=64), "din_knowledge_r")
    [group] = config.instance_group
    assert (group.kind, group.count) == (config_pb2.ModelInstanceGroup.KIND_GPU, 1)
    assert config.dynamic_batching.max_queue_delay_microseconds == 200


def test_the_adaptor_says_its_precision(tmp_path):
    assert parse(render_in(tmp_path / "one", "cpu"), "adaptor_r").parameters["precision"].string_value == "float32"
    config = parse(render_in(tmp_path / "other", "gpu", precision="bfloat16"), "adaptor_r")
    assert config.parameters["precision"].string_value == "bfloat16"


def test_folders_are_complete(tmp_path):
    repository = render_in(tmp_path, "cpu")
    assert (repository / "adaptor_r" / "1" / "adaptor.safetensors").read_text() == "adaptor.safetensors"
    assert (repository / "din_knowledge_r" / "1" / "model.onnx").read_text() == "knowledge.onnx"
    assert (repository / "din_control_r" / "1" / "model.onnx").read_text() == "control.onnx"
    assert (repository / "din_encoded_r" / "1").is_dir()
    for name in ("adaptor_r", "din_knowledge_r", "din_control_r"):
        assert "class TritonPythonModel" in (repository / name / "1" / "model.py").read_text()
