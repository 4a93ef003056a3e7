"""An environment with the extra `sidecar` alone, installed as a user would from this checkout, serves without torch."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from tests.support.paths import ROOT

from kar_sidecar.client import KarClient
from kar_sidecar.errors import UnavailableError
from kar_sidecar.launcher.triton_process import Ports
from kar_sidecar.store.open import open_store

pytestmark = pytest.mark.service

HEAVY = ("torch", "onnxruntime", "transformers", "scipy", "faiss", "kar_sidecar")


@pytest.fixture(scope="module")
def slim(tmp_path_factory) -> Path:
    """The python of a fresh environment."""
    folder = tmp_path_factory.mktemp("slim")
    # Our own pip installs into it: unpacking another pip takes seconds.
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check"]
    constraints = ROOT / "deploy" / "constraints.txt"
    done = subprocess.run([*pip, "-c", constraints, f"{ROOT}[sidecar]"], capture_output=True, text=True, check=False)
    if "Could not fetch URL" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, done.stderr
    return python


def test_the_environment_has_no_torch(slim):
    program = f"import importlib.util as u, json; print(json.dumps([n for n in {HEAVY} if u.find_spec(n)]))"
    found = subprocess.run([slim, "-c", program], capture_output=True, text=True, check=True, cwd="/").stdout
    assert json.loads(found) == ["kar_sidecar"]


def test_the_sidecar_serves_vectors_and_answers_in_the_callers_order_without_triton(slim, world, fill_store, tmp_path):
    store_url = f"lmdb:{tmp_path / 'store'}"
    store = open_store(store_url)
    fill_store(store)
    store.close()
    ports = Ports.free()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("KAR_", "PYTHON"))}
    settings = {
        "KAR_RELEASES": str(world.folder),
        "KAR_STORE": store_url,
        "KAR_GRPC_PORT": str(ports.grpc),
        "KAR_METRICS_PORT": str(ports.metrics),
        "KAR_TRITON_ADDRESS": f"127.0.0.1:{ports.http}",  # nothing listens there
    }
    log = tmp_path / "sidecar.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [slim, "-m", "kar_sidecar", "sidecar"], env=environment | settings, stderr=output, cwd="/"
        )
    try:
        with KarClient(f"127.0.0.1:{ports.grpc}", timeout_s=5.0) as client:
            knowledge = _when_up(server, log, lambda: client.knowledge("item", ["i1", "stranger"]))
            assert knowledge.vectors.tolist() == [[2, 2], [0.25, 0.75]]
            assert knowledge.levels == ("full", "neutral")
            ranking = client.rank("u1", ["i1", "i2"], caller_scores=[0.25, 0.5])
            assert ranking.rung == "caller"
            assert ranking.ranked() == [("i2", 0.5), ("i1", 0.25)]
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert server.returncode == 0


def _when_up(server: subprocess.Popen, log: Path, call):
    """The first answer of a server that is starting."""
    while True:
        try:
            return call()
        except UnavailableError:
            if server.poll() is not None:
                pytest.fail(log.read_text())
