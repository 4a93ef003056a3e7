"""A running Triton server: it becomes ready, says why it failed, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kar_sidecar.errors import UnavailableError
from kar_sidecar.launcher.triton_process import SHARED_MEMORY, Ports
from kar_sidecar.launcher.triton_runtime import TritonRuntime

pytestmark = pytest.mark.service

MODEL = """
import numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return []
"""
CONFIG = """
backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [1] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [1] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
STARTER = """
import sys, time
from pathlib import Path
from kar_sidecar.launcher.triton_runtime import TritonRuntime
folder = Path(sys.argv[1])
server = TritonRuntime.install().start(folder / "models", models=["good"], log_file=folder / "triton.log")
server.wait_ready(60)
print(server.pid, flush=True)
time.sleep(600)
"""


def write_model(repository, name, initialize="pass"):
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL.format(initialize=initialize))
    (repository / name / "config.pbtxt").write_text(CONFIG)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def group_is_gone(pid):
    """Whether no process of a group lives (one that waits to be reaped does not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == pid and state != "Z":
            return False
    return True


def test_ports_are_free_and_distinct():
    assert len(set(Ports.free())) == 3


def test_a_server_becomes_ready_serves_metrics_and_stops_clean(tmp_path):
    write_model(tmp_path / "models", "good")
    log = tmp_path / "logs" / "triton.log"
    server = TritonRuntime.install().start(tmp_path / "models", models=["good"], log_file=log)
    try:
        server.wait_ready(60)
        assert server.poll() is None
        assert server.metrics()["nv_inference_request_success", "good"] == 0
        assert list(SHARED_MEMORY.glob(f"kar-triton-{os.getpid()}-*"))
    finally:
        server.stop()
    assert server.poll() == 0
    assert not server.ready()
    assert group_is_gone(server.pid)
    assert not list(SHARED_MEMORY.glob(f"kar-triton-{os.getpid()}-*"))
    with pytest.raises(UnavailableError, match="gives no metrics"):
        server.metrics()


def test_a_model_that_cannot_load_ends_the_server_and_is_named(tmp_path):
    write_model(tmp_path / "models", "good")
    write_model(tmp_path / "models", "bad", "raise pb_utils.TritonModelException('weights.bin is corrupt')")
    log = tmp_path / "triton.log"
    log.write_text("E0101 a former server failed to load 'other'\n")
    server = TritonRuntime.install().start(tmp_path / "models", models=["good", "bad"], log_file=log)
    try:
        with pytest.raises(UnavailableError, match=r"ended with code 1: .*'bad'.*weights\.bin is corrupt.*triton\.log"):
            server.wait_ready(60)
    finally:
        server.stop()


def test_a_hung_server_is_ended_by_the_caller_of_ready(tmp_path):
    write_model(tmp_path / "models", "good")
    server = TritonRuntime.install().start(tmp_path / "models", models=["good"], log_file=tmp_path / "triton.log")
    try:
        server.wait_ready(60)
        server.hung_s = 0.0
        os.kill(server.pid, signal.SIGSTOP)
        assert not server.ready(timeout_s=0.2)
        assert server.poll() == -signal.SIGKILL
        assert group_is_gone(server.pid)
    finally:
        server.stop()


def test_a_server_that_was_never_ready_is_not_called_hung(tmp_path):
    write_model(tmp_path / "models", "good")
    server = TritonRuntime.install().start(tmp_path / "models", models=["good"], log_file=tmp_path / "triton.log")
    try:
        server.hung_s = 0.0
        os.kill(server.pid, signal.SIGSTOP)
        assert not server.ready(timeout_s=0.2)
        assert server.poll() is None
        os.kill(server.pid, signal.SIGCONT)
        server.wait_ready(60)
    finally:
        server.stop(grace_s=0.0)


def test_a_hung_server_is_killed(tmp_path):
    (tmp_path / "models").mkdir()
    server = TritonRuntime.install().start(tmp_path / "models", models=[], log_file=tmp_path / "triton.log")
    server.wait_ready(60)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop(grace_s=0.1)
    assert server.poll() == -signal.SIGKILL


def test_no_process_survives_when_its_starter_is_killed(tmp_path):
    write_model(tmp_path / "models", "good")
    starter = subprocess.Popen([sys.executable, "-c", STARTER, tmp_path], stdout=subprocess.PIPE, text=True)
    with starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert not group_is_gone(pid)
        starter.kill()
    wait_until(lambda: group_is_gone(pid))
    # The next start removes the shared memory that the killed one left.
    (tmp_path / "none").mkdir()
    server = TritonRuntime.install().start(tmp_path / "none", models=[], log_file=tmp_path / "next.log")
    server.stop(grace_s=0.0)
    assert not list(SHARED_MEMORY.glob(f"kar-triton-{starter.pid}-*"))
