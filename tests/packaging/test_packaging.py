"""The pinned packages live together, the extras stay apart, the contracts are fresh."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from tests.support.paths import ROOT

from kar_sidecar.cli import EXTRA_OF_MODULE

pytestmark = pytest.mark.service

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_pinned_packages_import_together():
    modules = [
        "aerospike",
        "faiss",
        "google.protobuf",
        "grpc",
        "grpc_health.v1.health",
        "grpc_reflection.v1alpha.reflection",
        "jinja2",
        "lmdb",
        "matplotlib",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "prometheus_client",
        "pydantic",
        "rich",
        "safetensors",
        "torch",
        "transformers",
        "triton",
        "tritonclient.grpc",
        "typer",
        "uvloop",
    ]
    command = "import " + ", ".join(modules)
    subprocess.run([sys.executable, "-W", "ignore", "-c", command], check=True, timeout=120)


def test_installed_versions_are_the_pinned_ones():
    pins = dict(
        line.split("==") for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    names = ("grpcio", "numpy", "onnxruntime", "protobuf", "torch", "tritonclient")
    assert {name: version(name).split("+")[0] for name in names} == {name: pins[name] for name in names}


def test_the_sidecar_imports_without_the_offline_half():
    """A torch that cannot be imported stands for an environment with the extra `sidecar` alone."""
    blocked = ("torch", "onnx", "onnxruntime", "transformers", "matplotlib", "kar_offline", "kar_kernels")
    program = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import kar_sidecar.server.process, kar_sidecar.store.open, kar_sidecar.scoring.triton
import kar_sidecar.client, kar_sidecar.launcher.supervisor
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_no_extra_installs_faiss_twice():
    extras = PROJECT["project"]["optional-dependencies"]
    for name, requirements in extras.items():
        found = [requirement for requirement in requirements if requirement.startswith("faiss")]
        assert len(found) <= 1, name
    assert sum(any(r.startswith("faiss-cpu") for r in extra) for extra in extras.values()) == 1
    assert sum(any(r.startswith("faiss-gpu") for r in extra) for extra in extras.values()) == 1


def test_generated_code_is_fresh():
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", "--check"], check=True, timeout=60)


def test_protos_pass_buf():
    buf = Path(sys.executable).with_name("buf")
    subprocess.run([buf, "lint"], cwd=ROOT / "protos", check=True, timeout=60, env={**os.environ})


def test_every_entry_point_loads():
    for target in PROJECT["project"]["entry-points"]["kar.commands"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_extra_of_every_optional_module_is_known():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(EXTRA_OF_MODULE.values()) <= set(extras)
    distributions = packages_distributions()
    for module, extra in EXTRA_OF_MODULE.items():
        names = {name.lower().replace("_", "-") for name in distributions.get(module, ())}
        required = {re.split(r"[\[<>=;]", requirement)[0].lower() for requirement in extras[extra]}
        assert names & required or not names, module
