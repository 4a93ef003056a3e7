"""The adaptor's Triton model, without a server: its metrics about the implementation that runs, and its refusals."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kar_kernels import HybridExpertAdaptor
from kar_model_repository import render

pytestmark = pytest.mark.unit

DIM, KNOWLEDGE, CANDIDATES = 12, 4, 3


class ModelError(Exception):
    """The backend's error for a model that does not load."""


@dataclass
class Family:
    """A metric family whose metrics live as long as the model holds them, as the backend's do."""

    name: str
    description: str
    kind: str
    shown: list[dict[str, str]] = field(default_factory=list)

    def Metric(self, labels):
        return Gauge(self, labels)


class Gauge:
    def __init__(self, family, labels):
        self.family, self.labels = family, labels

    def set(self, value):
        assert value == 1
        self.family.shown.append(self.labels)

    def __del__(self):
        self.family.shown.remove(self.labels)


@pytest.fixture
def families():
    return []


@pytest.fixture
def start(monkeypatch, families, tmp_path):
    """Starts an instance of the model on a processor, from a folder as `render` writes it."""
    backend = ModuleType("triton_python_backend_utils")
    backend.TritonModelException = ModelError

    def make_family(**arguments):
        families.append(Family(**arguments))
        return families[-1]

    backend.MetricFamily = make_family
    make_family.GAUGE = "gauge"
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.delenv("KAR_ADAPTOR", raising=False)

    def begin(precision="float32", configured=None):
        adaptor = HybridExpertAdaptor(DIM, hidden=8, out=KNOWLEDGE)
        adaptor.precision = precision
        adaptor.save(tmp_path / "adaptor.safetensors")
        source = render.HERE / "adaptor" / "model.py"
        (tmp_path / "model.py").write_text(source.read_text())
        spec = importlib.util.spec_from_file_location("adaptor_model", tmp_path / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parameters = {"threads": "1", "precision": configured or precision}
        config = {
            "parameters": {name: {"string_value": value} for name, value in parameters.items()},
            "input": [
                {"name": f"{tower}_{part}", "dims": [DIM if part == "encoding" else 1]}
                for tower in ("user", "item")
                for part in ("encoding", "present")
            ],
            "output": [{"name": f"{tower}_knowledge"} for tower in ("user", "item")],
        }
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "CPU",
                "model_name": "adaptor_r",
                "model_instance_name": "adaptor_r_0_0",
            }
        )
        return SimpleNamespace(model=model, family=families[-1])

    return begin


def encodings():
    return {
        "user_encoding": torch.randn(1, DIM),
        "user_present": torch.ones(1, 1, dtype=torch.bool),
        "item_encoding": torch.randn(1, CANDIDATES, DIM),
        "item_present": torch.ones(1, CANDIDATES, dtype=torch.bool),
    }


def test_metrics_show_the_implementation_and_follow_its_changes(start, monkeypatch):
    one = start()
    labels = {"model": "adaptor_r", "instance": "adaptor_r_0_0", "device": "cpu", "dtype": "float32"}
    first = labels | {"path": "cpu", "reason": "tensors are on the processor"}
    assert one.family.name == "kar_adaptor_info"
    assert one.family.shown == [first]
    one.model._vectors([encodings(), encodings()])
    assert one.family.shown == [first]
    monkeypatch.setenv("KAR_ADAPTOR", "eager")
    one.model._vectors([encodings()])
    assert one.family.shown == [labels | {"path": "eager", "reason": "KAR_ADAPTOR says so"}]
    one.model.finalize()
    assert one.family.shown == []


def test_another_precision_than_the_configuration_says_is_refused(start, families):
    with pytest.raises(
        ModelError, match=r"adaptor\.safetensors is not an adaptor .* precision is bfloat16, not float32"
    ):
        start("bfloat16", configured="float32")
    assert families[-1].shown == []
