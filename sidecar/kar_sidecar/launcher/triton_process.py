"""Owns one tritonserver process: where its files come from, how it starts, when it is ready, how it ends.

The server is NVIDIA's binary with its Python backend, taken out of a pinned wheel that is never installed. It listens
on loopback addresses only, loads exactly the models it is told to, and dies with the process that started it.
"""

import contextlib
import itertools
import os
import platform
import re
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final, NamedTuple

from kar_sidecar.errors import PreconditionError, UnavailableError
from kar_sidecar.launcher.supervisor import ChildProcess, spawn
from kar_sidecar.wheel_cache import WheelArchive, fetch

__all__ = [
    "LOOPBACK",
    "Ports",
    "TritonProcess",
    "TritonRuntime",
    "check_platform",
    "find_libpython",
    "link_models",
    "read_metrics",
]

WHEEL: Final = WheelArchive(
    "nvidia-pytriton", "0.7.0", "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
)
LOOPBACK: Final = "127.0.0.1"
GLIBC: Final = (2, 35)
PYTHONS: Final = ((3, 8), (3, 13))
SHARED_MEMORY: Final = Path("/dev/shm")
SHARED_MEMORY_BYTES: Final = 4 << 20
"""First size, and growth, of the region that each model instance shares with the server; its minimum is 1 MiB."""
POLL_S: Final = 0.05

SERVER: Final = "pytriton/tritonserver"
LIBRARIES: Final = "nvidia_pytriton.libs"
STUB: Final = "triton_python_backend_stub"

_starts = itertools.count()


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
            for one in sockets:
                one.bind((LOOPBACK, 0))
            return Ports(*(int(one.getsockname()[1]) for one in sockets))


def check_platform(system: str, machine: str, libc: tuple[str, str], python: tuple[int, int]) -> None:
    """Check that the packaged server runs here; arguments as from `platform` and `sys.version_info`.

    Raises:
        PreconditionError: it does not; the text says what is needed.
    """
    if (system, machine) != ("Linux", "x86_64"):
        raise PreconditionError(
            f"the packaged Triton server runs on Linux x86-64, not {system} {machine}: run it in NVIDIA's container"
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        raise PreconditionError(
            f"the packaged Triton server needs glibc 2.35 or newer, not {name or 'another C library'} {version}: "
            "use Debian 12, Ubuntu 22.04 or newer, or NVIDIA's container"
        )
    if not PYTHONS[0] <= python <= PYTHONS[1]:
        raise PreconditionError(
            f"the packaged Triton server has no Python backend for Python {python[0]}.{python[1]}: use 3.8 to 3.13"
        )


def find_libpython(name: str, folders: Iterable[str | Path]) -> Path:
    """The first of `folders` that holds the shared library of this interpreter, such as `libpython3.11.so.1.0`.

    Raises:
        PreconditionError: none does; the text names Debian's package.
    """
    for folder in map(Path, folders):
        if (folder / name).exists():
            return folder
    package = name.split(".so")[0]
    raise PreconditionError(
        f"Triton's Python backend needs {name}, which is not installed: run `apt-get install {package}` (Debian), "
        "or use a Python that was built with --enable-shared"
    )


def _library_folders() -> list[str]:
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    configured = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib")
    standard = (f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/usr/lib64", "/usr/local/lib", "/usr/lib")
    given = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [folder for folder in (*configured, *given, *standard) if folder]


def link_models(source: Path, repository: Path) -> list[str]:
    """Make every model below `source` loadable by a server that runs on `repository`; returns their names.

    A running server reads no second folder, so one repository holds symbolic links to the models of all releases.
    """
    repository.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in source.iterdir() if path.is_dir())
    for name in names:
        draft = repository / f".{name}.{os.getpid()}"
        draft.unlink(missing_ok=True)
        draft.symlink_to((source / name).resolve(), target_is_directory=True)
        draft.replace(repository / name)
    return names


@dataclass(frozen=True, slots=True)
class TritonRuntime:
    """An unpacked server that fits this interpreter. Construct with `TritonRuntime.install`."""

    folder: Path
    libpython_folder: Path

    @staticmethod
    def install(cache: Path | None = None) -> "TritonRuntime":
        """Check the platform and unpack the server from its wheel, unless the cache has it.

        Raises:
            PreconditionError: this platform or interpreter cannot run it; the text says what to install.
            UnavailableError: the wheel is not cached and cannot be downloaded.
            IntegrityError: the wheel is not the pinned one.
        """
        python = sys.version_info[:2]
        check_platform(platform.system(), platform.machine(), platform.libc_ver(), python)
        version = f"{python[0]}.{python[1]}"
        libpython = find_libpython(f"libpython{version}.so.1.0", _library_folders())
        stub = f"{SERVER}/python_backend_stubs/{version}/{STUB}"
        kept = (f"{SERVER}/bin/", f"{SERVER}/backends/", f"{LIBRARIES}/", stub)
        folder = fetch(WHEEL, keep=lambda member: member.startswith(kept) or "/licenses/" in member, cache=cache)
        backend_stub = folder / SERVER / "backends" / "python" / STUB
        if not backend_stub.exists():
            draft = backend_stub.with_name(f".{STUB}.{os.getpid()}")
            shutil.copyfile(folder / stub, draft)
            draft.chmod(0o755)
            draft.replace(backend_stub)
        (folder / SERVER / "bin" / "tritonserver").chmod(0o755)
        return TritonRuntime(folder, libpython)

    def start(
        self,
        repository: Path,
        *,
        models: Sequence[str],
        log_file: Path,
        ports: Ports | None = None,
    ) -> "TritonProcess":
        """Start a server on a model repository and return at once; `TritonProcess.wait_ready` waits for its models.

        Call it from a thread that lives as long as the server should: the kernel ends the server with that thread.
        The server's output is appended to `log_file`. Numerical libraries get one thread each; models set their own.
        """
        ports = ports or Ports.free()
        shared_memory = f"kar-triton-{os.getpid()}-{next(_starts)}-"
        _sweep_shared_memory()
        server = self.folder / SERVER
        options = {
            "model-repository": repository,
            "backend-directory": server / "backends",
            "model-control-mode": "explicit",
            "grpc-address": LOOPBACK,
            "grpc-port": ports.grpc,
            "http-address": LOOPBACK,
            "http-port": ports.http,
            "metrics-address": LOOPBACK,
            "metrics-port": ports.metrics,
            "allow-gpu-metrics": "false",
            "exit-timeout-secs": 5,
        }
        backend = {
            "shm-region-prefix-name": shared_memory,
            "shm-default-byte-size": SHARED_MEMORY_BYTES,
            "shm-growth-byte-size": SHARED_MEMORY_BYTES,
        }
        arguments = [
            # Our configurations are complete. Completing costs each model one more start of its Python process, which
            # imports torch, and the end of that process would look like a lost one (`TritonProcess.ready`).
            "--disable-auto-complete-config",
            *(f"--{key}={value}" for key, value in options.items()),
            *(f"--backend-config=python,{key}={value}" for key, value in backend.items()),
            *(f"--load-model={model}" for model in models),
        ]
        libraries = (str(self.folder / LIBRARIES), str(self.libpython_folder), os.environ.get("LD_LIBRARY_PATH", ""))
        bounded = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = os.environ | {
            # The stub runs the first python3 of the PATH: this environment's.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
            "OMP_WAIT_POLICY": "passive",
            **dict.fromkeys(bounded, "1"),
        }
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_start = log_file.stat().st_size if log_file.exists() else 0
        process = spawn([server / "bin" / "tritonserver", *arguments], log_file, environment)
        return TritonProcess(ports, log_file, log_start, shared_memory, process)


def _sweep_shared_memory() -> None:
    """Remove what servers of dead processes left in shared memory."""
    for path in SHARED_MEMORY.glob("kar-triton-*"):
        owner = re.match(r"kar-triton-(\d+)-", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            path.unlink(missing_ok=True)


def _children(pid: int) -> set[int]:
    """Process ids of the children of all threads of a process."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, path.read_text().split()))
    return found


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
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
    _shared_memory: str
    _process: ChildProcess
    hung_s: float = 20.0
    """Seconds without any answer after which a server that was ready before counts as hung."""
    _stubs: set[int] = field(default_factory=set)
    _ready_at: float | None = None

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
        """Whether the server and all models that it was told to load answer.

        A server that hangs, or one of whose models lost its Python process, never recovers by itself (it even goes on
        calling such a model ready): it is ended here, so that whoever watches it starts it anew.
        """
        answers = _get(f"{LOOPBACK}:{self.ports.http}", "/v2/health/ready", timeout_s) is not None
        now = time.monotonic()
        if not all(map(_runs, self._stubs)) or (not answers and self._hangs(now, timeout_s)):
            self._process.stop(0.0)
            return False
        if answers:
            self._stubs |= _children(self.pid)
            self._ready_at = now
        return answers

    def _hangs(self, now: float, timeout_s: float) -> bool:
        if self._ready_at is None or now - self._ready_at < self.hung_s:
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
        """The first failure that this server logged, and where its log is."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"E\d{4} ", line)]
        found = next(
            (line for line in errors if re.search("failed to (load|poll)", line)), (errors[:1] or lines[-1:] or [""])[0]
        )
        said = re.sub(r"^E\d{4} \S+ \d+ \S+\] ", "", found).strip('"') or "it logged no error"
        return f"{said} (log: {self.log_file})"

    def metrics(self) -> dict[tuple[str, str], float]:
        """See `read_metrics`."""
        return read_metrics(f"{LOOPBACK}:{self.ports.metrics}")

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server: finish running requests, then kill what is left of it, its Python stubs too."""
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
    found = re.findall(r'^(\w+)\{[^}]*\bmodel="([^"]+)"[^}]*\} (\S+)$', text, flags=re.MULTILINE)
    values: dict[tuple[str, str], float] = {}
    for name, model, value in found:
        values[name, model] = values.get((name, model), 0.0) + float(value)
    return values


def _get(address: str, path: str, timeout_s: float) -> str | None:
    """The body of an HTTP answer 200, None for anything else."""
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
