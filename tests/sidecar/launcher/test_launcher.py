"""What `kar serve` refuses before it starts anything."""

import fcntl
import socket
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kar_sidecar.errors import InputError, NotFoundError, PreconditionError
from kar_sidecar.launcher.launcher import is_serving, listen_port, serve
from kar_sidecar.releases.manifest import write_active

pytestmark = pytest.mark.service


def test_a_taken_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127.0.0.1 cannot be used .* name another with --port"):
            serve(port=port)


def test_port_zero_becomes_a_free_port():
    port = listen_port("127.0.0.1", 0, "--port")
    assert listen_port("127.0.0.1", port, "--port") == port


def test_a_work_folder_without_a_release_is_refused(tmp_path):
    with pytest.raises(PreconditionError, match="run `kar export` first"):
        serve(work=tmp_path / "mistyped", port=0)
    assert not (tmp_path / "mistyped").exists()


def test_a_release_that_is_not_published_is_refused(tmp_path):
    (tmp_path / "releases").mkdir()
    write_active(tmp_path / "releases", "abc")
    ready = tmp_path / "ready.json"
    ready.write_text("of one that was killed")
    with pytest.raises(PreconditionError, match="run `kar publish` first"):
        serve(work=tmp_path, port=0, ready_file=ready)
    assert not ready.exists()


def test_an_unknown_release_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"release 'abc' is not below .*releases \(known: none\)"):
        serve(work=tmp_path, port=0, release="abc")


def test_a_second_serve_of_a_work_folder_is_refused(tmp_path):
    (tmp_path / "releases").mkdir()
    write_active(tmp_path / "releases", "abc")
    (tmp_path / "serving").mkdir()
    with (tmp_path / "serving" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"another `kar serve` runs on {tmp_path}"):
            serve(work=tmp_path, port=0)


def test_is_serving_reads_health():
    servicer = health.HealthServicer()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    assert not is_serving(address)
    server.start()
    assert is_serving(address)
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not is_serving(address)
    server.stop(None).wait()
    assert not is_serving(address)
