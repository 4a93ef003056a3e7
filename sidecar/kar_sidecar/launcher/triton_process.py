"""Owns one running tritonserver process: when it is ready, why it failed, its metrics, how it ends."""

import contextlib
import re
import socket
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final, NamedTuple

from kar_sidecar.errors import UnavailableError
from kar_sidecar.launcher.supervisor import ChildProcess

__all__ = [
    "LOOPBACK",
    "SHARED_MEMORY",
    "SHARED_MEMORY_PREFIX",
    "Ports",
    "TritonProcess",
    "read_metrics",
    "sweep_shared_memory",
]

LOOPBACK: Final = "127.0.0.1"
SHARED_MEMORY: Final = Path("/dev/shm")
SHARED_MEMORY_PREFIX: Final = "kar-triton-"
"""Names in shared memory begin with this prefix and the id of the process that started the server."""
POLL_S: Final = 0.05


class Ports(NamedTuple):
    """TCP ports of one server."""

    grpc: int
    http: int
    metrics: int

    @staticmethod
    def free() -> "Ports":
        """Three ports that nothing listens on now."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in Ports._fields]
            for listener in sockets:
                listener.bind((LOOPBACK, 0))
            return Ports(*(int(listener.getsockname()[1]) for listener in sockets))


def sweep_shared_memory() -> None:
    """Remove the shared memory of servers whose starting process is dead."""
    for path in SHARED_MEMORY.glob(f"{SHARED_MEMORY_PREFIX}*"):
        owner = re.match(rf"{SHARED_MEMORY_PREFIX}(\d+)-", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            path.unlink(missing_ok=True)


def _children(pid: int) -> set[int]:
    """Process ids of the children of all threads of a process."""
    pids: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids.update(map(int, path.read_text().split()))
    return pids


def _is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass(slots=True)
class TritonProcess:
    """A started server: its process id, its ports on loopback, its log."""

    ports: Ports
    log_file: Path
    _log_start: int
    """Size of the log before this server wrote to it, in bytes."""
    _shared_memory: str
    """Prefix of this server's names in shared memory."""
    _process: ChildProcess
    hung_s: float = 20.0
    """Seconds without any answer after which a server that was ready before counts as hung."""
    _model_pids: set[int] = field(default_factory=set)
    """Ids of the models' Python processes; empty before the server was first ready."""
    _last_ready_s: float | None = None

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def grpc_target(self) -> str:
        """`address:port` of the gRPC endpoint."""
        return f"{LOOPBACK}:{self.ports.grpc}"

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the server runs."""
        return self._process.poll()

    def ready(self, timeout_s: float = 1.0) -> bool:
        """Whether the server and all models that it was started with answer.

        This call ends a server that hangs, or that lost the Python process of a model: neither recovers by itself, and
        Triton keeps reporting such a model as ready. The supervisor then starts a new server.
        """
        answers = _get(f"{LOOPBACK}:{self.ports.http}", "/v2/health/ready", timeout_s) is not None
        now = time.monotonic()
        if not all(map(_is_running, self._model_pids)) or (not answers and self._is_hung(now, timeout_s)):
            self._process.stop(0.0)
            return False
        if answers:
            self._model_pids |= _children(self.pid)
            self._last_ready_s = now
        return answers

    def _is_hung(self, now: float, timeout_s: float) -> bool:
        if self._last_ready_s is None or now - self._last_ready_s < self.hung_s:
            return False
        return _get(f"{LOOPBACK}:{self.ports.http}", "/v2/health/live", timeout_s) is None

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until `ready`.

        Raises:
            UnavailableError: the server ended, or was not ready in time; the text carries its reason and its log.
        """
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if self.poll() is not None:
                raise UnavailableError(f"tritonserver ended with code {self.poll()}: {self.reason()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"tritonserver was not ready after {timeout_s:g} s: {self.reason()}")
            time.sleep(POLL_S)

    def reason(self) -> str:
        """The first failure in this server's log, and the path of the log."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"E\d{4} ", line)]
        fallback = (errors[:1] or lines[-1:] or [""])[0]
        failure = next((line for line in errors if re.search("failed to (load|poll)", line)), fallback)
        message = re.sub(r"^E\d{4} \S+ \d+ \S+\] ", "", failure).strip('"') or "it logged no error"
        return f"{message} (log: {self.log_file})"

    def metrics(self) -> dict[tuple[str, str], float]:
        """See `read_metrics`."""
        return read_metrics(f"{LOOPBACK}:{self.ports.metrics}")

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server: finish running requests, then kill it and the Python processes of its models."""
        self._process.stop(grace_s)
        for path in SHARED_MEMORY.glob(f"{self._shared_memory}*"):
            path.unlink(missing_ok=True)


def read_metrics(address: str, timeout_s: float = 5.0) -> dict[tuple[str, str], float]:
    """Triton's counters and gauges by (metric name, model name), from its Prometheus page at host:port.

    Raises:
        UnavailableError: no answer.
    """
    text = _get(address, "/metrics", timeout_s)
    if text is None:
        raise UnavailableError(f"tritonserver gives no metrics at {address}: is it alive?")
    samples = re.findall(r'^(\w+)\{[^}]*\bmodel="([^"]+)"[^}]*\} (\S+)$', text, flags=re.MULTILINE)
    values: dict[tuple[str, str], float] = {}
    for name, model, value in samples:
        values[name, model] = values.get((name, model), 0.0) + float(value)
    return values


def _get(address: str, path: str, timeout_s: float) -> str | None:
    """The body of an HTTP response with status 200; None for any other, and for no answer."""
    connection = HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        return body if response.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
