"""A real Triton server scores as the torch models do, in any batch, also beside requests that it refuses."""

import asyncio
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from tests.support.adaptor_problems import adaptor_excesses
from torch import nn
from tritonclient.grpc import InferenceServerClient, InferInput

from kar_kernels import TOWERS, HybridExpertAdaptor
from kar_kernels.cpu import has_bfloat16
from kar_model_repository.render import Backbone, Sizes, render
from kar_offline.models import BACKBONES, RERANKERS, Field, InputSpec, build_backbone
from kar_offline.models.onnx import export_onnx
from kar_sidecar.errors import InputError, UnavailableError
from kar_sidecar.launcher.triton_process import TritonProcess
from kar_sidecar.launcher.triton_runtime import TritonRuntime, link_models
from kar_sidecar.scoring import ADAPTOR_INPUTS, AFFINITY, BASE_INPUTS, KNOWLEDGE_INPUTS, VECTOR_INPUTS
from kar_sidecar.scoring.triton import TritonScorer

pytestmark = pytest.mark.service

ITEMS, LENGTH, DIM, KNOWLEDGE, COLUMNS, VECTOR, EVENTS = 60, 6, 24, 8, 9, 16, 5
SIZES = Sizes(
    history=LENGTH,
    user_categorical=2,
    user_numeric=1,
    item_categorical=3,
    item_numeric=1,
    encoding=DIM,
    user_knowledge=KNOWLEDGE,
    item_knowledge=KNOWLEDGE,
    affinity=COLUMNS,
    vector=VECTOR,
    vector_events=EVENTS,
)
GIVEN = {"user_knowledge": KNOWLEDGE, "item_knowledge": KNOWLEDGE, "affinity": COLUMNS, "vector": VECTOR}
AFFINITIES = (AFFINITY, *VECTOR_INPUTS)
SPEC = {
    "items": ITEMS,
    "user_fields": (Field(4, 1), Field(9, 1)),
    "item_fields": (Field(12, 3),),
    "user_numbers": 1,
    "item_numbers": 1,
}
MODELS = {f"{name}_knowledge": f"{name}_encoded" for name in (*BACKBONES, *RERANKERS)} | {"dcnv2_control": ""}
KNOWING = [name for name, ensemble in MODELS.items() if ensemble]
ADAPTOR = "adaptor"


@dataclass(frozen=True)
class Models:
    """Random models on disk, rendered, and in memory."""

    repository: Path
    adaptor: HybridExpertAdaptor
    backbones: dict[str, nn.Module]

    def knowledge(self, tensors):
        """What the adaptor makes of one request's encodings."""
        with torch.inference_mode():
            vectors = self.adaptor.adapt(
                {
                    tower: (
                        torch.from_numpy(tensors[f"{tower}_encoding"]).reshape(-1, DIM),
                        torch.from_numpy(tensors[f"{tower}_present"]).reshape(-1),
                    )
                    for tower in TOWERS
                }
            )
        return {"user_knowledge": vectors["user"][0].numpy(), "item_knowledge": vectors["item"].numpy()}

    def score(self, name, tensors):
        """Scores [C] by the torch model."""
        names = BASE_INPUTS + (KNOWLEDGE_INPUTS + AFFINITIES if MODELS[name] else ())
        inputs = {
            key: torch.from_numpy(
                np.asarray(tensors[key][None] if key.startswith(("user", "history")) else tensors[key])
            )
            for key in names
        }
        inputs["request_of_row"] = torch.zeros(len(tensors["item_index"]), dtype=torch.int64)
        with torch.inference_mode():
            return self.backbones[name](inputs).numpy()


def request(rng, candidates):
    """Tensors of one request in both modes but for knowledge vectors; a fifth of the items have no encoding."""
    return {
        "history_item": rng.integers(0, ITEMS, LENGTH),
        "history_rating": rng.integers(0, 11, LENGTH),
        "user_categorical": np.array([rng.integers(4), rng.integers(9)]),
        "user_numeric": rng.normal(size=1).astype(np.float32),
        "item_index": rng.integers(0, ITEMS, candidates),
        "item_categorical": rng.integers(0, 12, (candidates, 3)),
        "item_numeric": rng.normal(size=(candidates, 1)).astype(np.float32),
        "user_encoding": rng.normal(size=DIM).astype(np.float32),
        "user_present": np.ones(1, dtype=bool),
        "item_encoding": rng.normal(size=(candidates, DIM)).astype(np.float32),
        "item_present": rng.random(candidates) < 0.8,
        "affinity": rng.normal(size=(candidates, COLUMNS)).astype(np.float32),
        "item_vector": rng.normal(size=(candidates, VECTOR)).astype(np.float32) / 4,
        "history_vector": rng.normal(size=(EVENTS, VECTOR)).astype(np.float32) / 4,
        "history_weight": rng.normal(size=EVENTS).astype(np.float32),
    }


def only(tensors, *names):
    return {name: tensors[name] for name in names}


def prestored(tensors):
    return only(tensors, *BASE_INPUTS, *KNOWLEDGE_INPUTS, *AFFINITIES)


def encoded(tensors):
    return only(tensors, *BASE_INPUTS, *ADAPTOR_INPUTS, *AFFINITIES)


def make_models(folder: Path, target="cpu") -> Models:
    torch.manual_seed(5)
    adaptor = HybridExpertAdaptor(DIM, hidden=16, out=KNOWLEDGE)
    with torch.no_grad():
        adaptor.user_neutral.normal_()
        adaptor.item_neutral.normal_()
    adaptor.save(folder / "adaptor.safetensors")
    categories = torch.randint(0, 12, (ITEMS, 3))
    backbones = {}
    for name, ensemble in MODELS.items():
        spec = InputSpec(**SPEC, **(GIVEN if ensemble else {}))
        model = build_backbone(name.split("_")[0], spec, categories)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # scores far from one half
        backbones[name] = model.eval()
        export_onnx(model, folder / f"{name}.onnx")
    render(
        target,
        folder / target,
        adaptor=ADAPTOR,
        adaptor_weights=folder / "adaptor.safetensors",
        backbones=[Backbone(name, folder / f"{name}.onnx", ensemble) for name, ensemble in MODELS.items()],
        sizes=SIZES,
        cores=2,
    )
    return Models(folder / target, adaptor.eval(), backbones)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def live(models, tmp_path_factory) -> Path:
    """The folder that the server runs on."""
    folder = tmp_path_factory.mktemp("live")
    link_models(models.repository, folder)
    return folder


@pytest.fixture(scope="module")
def server(live, tmp_path_factory) -> Iterator[TritonProcess]:
    process = TritonRuntime.install().start(
        live,
        models=[ADAPTOR, *MODELS, *filter(None, MODELS.values())],
        log_file=tmp_path_factory.mktemp("logs") / "triton.log",
    )
    try:
        process.wait_ready(60)
        yield process
    finally:
        process.stop()


def score_all(server, calls, *, together):
    """Scores of (model, tensors) pairs, sent at once or one after the other."""

    async def run():
        scorer = TritonScorer(server.grpc_target)
        try:
            if together:
                return await asyncio.gather(*(scorer.score(*call, timeout_s=60) for call in calls))
            return [await scorer.score(*call, timeout_s=60) for call in calls]
        finally:
            await scorer.close()

    return asyncio.run(run())


def executions_since(server, model, before, answers):
    """Executions of a model since `before`, once Triton has counted `answers`, which it does after it answers."""
    deadline = time.monotonic() + 30
    while True:
        now = server.metrics()
        executions, answered = (
            now[metric, model] - before[metric, model]
            for metric in ("nv_inference_exec_count", "nv_inference_request_success")
        )
        if answered >= answers:
            return executions
        assert time.monotonic() < deadline, f"{model} counted {answered} of {answers} answers"


def infer(server, model, arrays):
    """Raw inference: the arrays go as they are, batch axis included."""
    kinds = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}
    inputs = []
    for name, array in arrays.items():
        one = InferInput(name, array.shape, kinds[array.dtype.name])
        one.set_data_from_numpy(array)
        inputs.append(one)
    with InferenceServerClient(server.grpc_target) as client:
        return client.infer(model, inputs)


@pytest.mark.parametrize("name", KNOWING)
def test_a_thousand_rows_score_as_offline_in_both_modes(name, models, server):
    rng = np.random.default_rng(1)
    requests = [request(rng, candidates) for candidates in (1, 2, 7, 90, 150, 250, 500)]
    requests = [tensors | models.knowledge(tensors) for tensors in requests]
    expected = np.concatenate([models.score(name, tensors) for tensors in requests])
    assert len(expected) == 1000
    assert expected.std() > 0.01  # a thousand times the tolerance
    stored = score_all(server, [(name, prestored(tensors)) for tensors in requests], together=False)
    raw = score_all(server, [(MODELS[name], encoded(tensors)) for tensors in requests], together=False)
    np.testing.assert_allclose(np.concatenate(stored), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(raw), expected, rtol=0, atol=1e-5)


def test_the_control_model_needs_no_knowledge(models, server):
    tensors = request(np.random.default_rng(2), 30)
    [scores] = score_all(server, [("dcnv2_control", only(tensors, *BASE_INPUTS))], together=False)
    np.testing.assert_allclose(scores, models.score("dcnv2_control", tensors), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dcnv2_knowledge", "din_knowledge"])
@pytest.mark.parametrize("mode", ["prestored", "encoded"])
def test_requests_of_different_sizes_batch_and_no_score_moves(name, mode, models, server):
    rng = np.random.default_rng(3)
    requests = [request(rng, candidates) for candidates in rng.permutation(np.arange(1, 201))[:120]]
    model = name if mode == "prestored" else MODELS[name]
    tensors = [prestored(one | models.knowledge(one)) if mode == "prestored" else encoded(one) for one in requests]
    calls = [(model, one) for one in tensors]
    before = server.metrics()
    alone = score_all(server, calls, together=False)
    batched = score_all(server, calls, together=True)
    for step in [name] if mode == "prestored" else [name, "adaptor"]:
        executions = executions_since(server, step, before, answers=2 * len(calls))
        # Each of the first half took an execution of its own.
        assert executions - len(calls) < 0.8 * len(calls)
    # The promise of scores: another batch may add up in another order, but another row's score would be 0.01 away.
    for one, other in zip(alone, batched, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


def test_several_users_in_one_request(models, server):
    rng = np.random.default_rng(4)
    requests = [request(rng, 5) for _ in range(3)]
    requests = [tensors | models.knowledge(tensors) for tensors in requests]
    stacked = {name: np.stack([prestored(one)[name] for one in requests]) for name in prestored(requests[0])}
    scores = infer(server, "din_knowledge", stacked).as_numpy("score")
    expected = np.stack([models.score("din_knowledge", one) for one in requests])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_absent_entities_get_the_neutral_vectors_whatever_their_encoding_holds(models, server):
    tensors = request(np.random.default_rng(5), 4)
    tensors["user_present"][:] = False
    tensors["item_present"] = np.array([False, True, False, False])
    tensors["user_encoding"][:] = np.nan
    tensors["item_encoding"][0] = np.nan
    result = infer(server, "adaptor", {name: tensors[name][None] for name in ADAPTOR_INPUTS})
    user, item = result.as_numpy("user_knowledge"), result.as_numpy("item_knowledge")
    assert user.shape == (1, KNOWLEDGE)
    assert item.shape == (1, 4, KNOWLEDGE)
    np.testing.assert_array_equal(user[0], models.adaptor.user_neutral.detach().numpy())
    for row in (0, 2, 3):
        np.testing.assert_array_equal(item[0, row], models.adaptor.item_neutral.detach().numpy())
    assert np.abs(item[0, 1] - item[0, 0]).max() > 0.01


def with_one_candidate_less(tensors, name):
    return tensors | {name: tensors[name][:-1]}


@pytest.mark.parametrize(
    ("model", "spoil", "reason"),
    [
        ("dcnv2_knowledge", lambda t: with_one_candidate_less(prestored(t), "item_index"), "send the same number"),
        ("dcnv2_encoded", lambda t: with_one_candidate_less(encoded(t), "item_present"), "send the same number"),
        ("dcnv2_knowledge", lambda t: {n: v[:0] if n[0] in "ia" else v for n, v in prestored(t).items()}, "at least"),
        ("dcnv2_knowledge", lambda t: prestored(t) | {"item_index": t["item_index"] + 10**6}, "refuses the input"),
        ("dcnv2_knowledge", lambda t: prestored(t) | {"user_numeric": np.full(1, np.nan, np.float32)}, "not finite"),
        ("dcnv2_knowledge", lambda t: prestored(t) | {"user_numeric": np.zeros(2, np.float32)}, "user_numeric"),
        ("dcnv2_knowledge", lambda t: prestored(t) | {"user_numeric": np.zeros(1, np.int64)}, "user_numeric"),
        ("dcnv2_knowledge", lambda t: only(t, *BASE_INPUTS), "inputs"),
    ],
    ids=["misaligned", "misaligned raw", "empty", "bad index", "not a number", "width", "dtype", "missing"],
)
def test_a_bad_request_is_refused_alone(model, spoil, reason, models, server):
    rng = np.random.default_rng(6)
    good = [request(rng, candidates) for candidates in range(3, 23)]
    good = [tensors | models.knowledge(tensors) for tensors in good]
    bad = request(rng, 9)
    bad |= models.knowledge(bad)

    async def run():
        scorer = TritonScorer(server.grpc_target)
        calls = [("dcnv2_knowledge", prestored(tensors)) for tensors in good]
        calls.insert(10, (model, spoil(bad)))
        try:
            return await asyncio.gather(*(scorer.score(*call) for call in calls), return_exceptions=True)
        finally:
            await scorer.close()

    answers = asyncio.run(run())
    refused = answers.pop(10)
    assert isinstance(refused, InputError)
    assert reason in str(refused)
    for tensors, scores in zip(good, answers, strict=True):
        np.testing.assert_allclose(scores, models.score("dcnv2_knowledge", tensors), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "file"), [("adaptor", "adaptor.safetensors"), ("din_knowledge", "model.onnx"), ("dcnv2_control", "swap")]
)
def test_a_model_file_that_is_corrupt_or_of_another_model_is_named(name, file, models, server, live, tmp_path):
    copy = tmp_path / f"spoiled_{name}"
    shutil.copytree(models.repository / name, copy)
    config = copy / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{name}"', f'name: "spoiled_{name}"', 1))
    spoiled = copy / "1" / ("model.onnx" if file == "swap" else file)
    spoiled.unlink()
    if file == "swap":
        shutil.copyfile(models.repository / "dcnv2_knowledge" / "1" / "model.onnx", spoiled)
    else:
        spoiled.write_bytes((models.repository / name / "1" / file).read_bytes()[:-100])
    assert link_models(tmp_path, live) == [f"spoiled_{name}"]

    async def run():
        scorer = TritonScorer(server.grpc_target)
        try:
            with pytest.raises(UnavailableError, match=f"spoiled_{name}/1/{spoiled.name} is no"):
                await scorer.load(f"spoiled_{name}")
            return await scorer.ready(f"spoiled_{name}"), await scorer.ready("dcnv2_knowledge")
        finally:
            await scorer.close()

    assert asyncio.run(run()) == (False, True)


def test_a_model_is_added_to_a_running_server_and_loading_it_again_does_nothing(models, server, live, tmp_path):
    shutil.copytree(models.repository / "dcnv2_control", tmp_path / "added")
    config = tmp_path / "added" / "config.pbtxt"
    config.write_text(config.read_text().replace("dcnv2_control", "added"))
    link_models(tmp_path, live)
    tensors = only(request(np.random.default_rng(7), 5), *BASE_INPUTS)

    async def run():
        scorer = TritonScorer(server.grpc_target)
        try:
            with pytest.raises(UnavailableError):
                await scorer.score("added", tensors)
            before = await scorer.ready("added")
            await scorer.load("added")
            await scorer.load("added")
            return before, await scorer.ready("added"), await scorer.score("added", tensors)
        finally:
            await scorer.close()

    before, after, scores = asyncio.run(run())
    assert (before, after) == (False, True)
    np.testing.assert_allclose(scores, models.score("dcnv2_control", tensors), rtol=0, atol=1e-5)


def adaptor_labels(server, model):
    """Labels of every `kar_adaptor_info` of a model on the server's Prometheus page; each must be 1."""
    with urlopen(f"http://127.0.0.1:{server.ports.metrics}/metrics") as answer:
        page = answer.read().decode()
    found = re.findall(r"^kar_adaptor_info\{(.*)\} (\S+)$", page, flags=re.MULTILINE)
    assert all(value == "1" for _, value in found)
    all_labels = [dict(re.findall(r'(\w+)="([^"]*)"', text)) for text, _ in found]
    return [labels for labels in all_labels if labels["model"] == model]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_metrics_show_the_implementation_while_the_adaptor_is_loaded(precision, models, server, live, tmp_path):
    name = f"adaptor_of_{precision}"
    adaptor = HybridExpertAdaptor.load(models.repository / ADAPTOR / "1" / "adaptor.safetensors")
    adaptor.precision = precision
    adaptor.save(tmp_path / "adaptor.safetensors")
    repository = tmp_path / "repository"
    files = tmp_path / "adaptor.safetensors"
    render(
        "cpu", repository, adaptor=name, adaptor_weights=files, backbones=[], sizes=SIZES, precision=precision, cores=4
    )
    link_models(repository, live)
    assert adaptor_labels(server, name) == []
    with InferenceServerClient(server.grpc_target) as client:
        client.load_model(name)
        labels = {
            "model": name,
            "device": "cpu",
            "path": "cpu",
            "reason": "tensors are on the processor",
            "dtype": "bfloat16" if precision == "bfloat16" and has_bfloat16() else "float32",
        }
        instances = [f"{name}_0_0", f"{name}_0_1"]
        assert sorted(adaptor_labels(server, name), key=lambda one: one["instance"]) == [
            labels | {"instance": instance} for instance in instances
        ]
        assert client.get_model_config(name).config.parameters["precision"].string_value == precision
        log = server.log_file.read_text()
        for instance in instances:
            assert log.count(f"{instance}: adaptor runs cpu: tensors are on the processor") == 1
        tensors = request(np.random.default_rng(8), 50)
        result = infer(server, name, {one: tensors[one][None] for one in ADAPTOR_INPUTS})
        dtype = getattr(torch, labels["dtype"])
        with torch.no_grad():
            for parameter in adaptor.parameters():
                parameter.copy_(parameter.to(dtype))
        encodings = {tower: torch.from_numpy(tensors[f"{tower}_encoding"]).reshape(-1, DIM) for tower in TOWERS}
        known = {tower: torch.from_numpy(tensors[f"{tower}_present"]).reshape(-1) for tower in TOWERS}
        vectors = {
            tower: torch.tensor(result.as_numpy(f"{tower}_knowledge")).reshape(-1, KNOWLEDGE) for tower in TOWERS
        }
        encodings, vectors = ({t: rows[known[t]] for t, rows in one.items()} for one in (encodings, vectors))
        assert adaptor_excesses(adaptor, encodings, vectors, dtype) == []
        absent = ~tensors["item_present"]
        neutral = models.adaptor.item_neutral.detach().expand(int(absent.sum()), -1)
        np.testing.assert_array_equal(result.as_numpy("item_knowledge")[0][absent], neutral)
        assert len(adaptor_labels(server, name)) == len(instances)
        client.unload_model(name)
    deadline = time.monotonic() + 30
    while adaptor_labels(server, name):
        assert time.monotonic() < deadline, "a model that is unloaded is still on the metrics page"
        time.sleep(0.1)
    assert adaptor_labels(server, ADAPTOR)
