"""Owns the packaged Triton server: its platform checks, its files from a pinned wheel, and how it is started.

The server is NVIDIA's binary with its Python backend. The wheel is unpacked into the cache and never installed. A
server listens on loopback addresses only, loads exactly the given models, and dies with the process that started it.
"""

import itertools
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kar_sidecar.errors import PreconditionError
from kar_sidecar.launcher.supervisor import spawn
from kar_sidecar.launcher.triton_process import (
    LOOPBACK,
    SHARED_MEMORY_PREFIX,
    Ports,
    TritonProcess,
    sweep_shared_memory,
)
from kar_sidecar.wheel_cache import WheelArchive, fetch

__all__ = ["TritonRuntime", "check_platform", "find_libpython", "link_models"]

WHEEL: Final = WheelArchive(
    "nvidia-pytriton", "0.7.0", "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
)
GLIBC: Final = (2, 35)
PYTHONS: Final = ((3, 8), (3, 13))
SHARED_MEMORY_BYTES: Final = 4 << 20
"""Initial size and growth step of the memory that each model instance shares with the server; at least 1 MiB."""

SERVER: Final = "pytriton/tritonserver"
LIBRARIES: Final = "nvidia_pytriton.libs"
STUB: Final = "triton_python_backend_stub"

_starts = itertools.count()


def check_platform(system: str, machine: str, libc: tuple[str, str], python: tuple[int, int]) -> None:
    """Check that the packaged server runs on a platform; arguments as `platform` and `sys.version_info` give them.

    Raises:
        PreconditionError: the server does not run here; the text says what it needs.
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
    """The first folder that contains the interpreter's shared library `name`, such as `libpython3.11.so.1.0`.

    Raises:
        PreconditionError: no folder does; the text names Debian's package.
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
    """Folders that may contain this interpreter's shared library."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    configured = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib")
    standard = (f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/usr/lib64", "/usr/local/lib", "/usr/lib")
    from_environment = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [folder for folder in (*configured, *from_environment, *standard) if folder]


def link_models(source: Path, repository: Path) -> list[str]:
    """Link every model below `source` into the folder that a server reads its models from; returns their names.

    A server reads one folder only, so this folder holds symbolic links to the models of all releases.
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
    """An unpacked server for this interpreter. Construct with `TritonRuntime.install`."""

    folder: Path
    """The wheel's files."""
    libpython_folder: Path
    """Contains the interpreter's shared library, which the Python backend loads."""

    @staticmethod
    def install(cache: Path | None = None) -> "TritonRuntime":
        """Check the platform and unpack the server from its wheel, unless it is in the cache.

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
        members = (f"{SERVER}/bin/", f"{SERVER}/backends/", f"{LIBRARIES}/", stub)
        folder = fetch(WHEEL, keep=lambda member: member.startswith(members) or "/licenses/" in member, cache=cache)
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
    ) -> TritonProcess:
        """Start a server and return at once; `TritonProcess.wait_ready` waits for its models.

        Call it from a thread that lives as long as the server should: the kernel ends the server with that thread.
        Numerical libraries get one thread each; models set their own.

        Args:
            repository: Folder with one folder per model.
            models: Names of the models to load.
            log_file: The server's output is appended to it.
            ports: None: free ones.
        """
        ports = ports or Ports.free()
        shared_memory = f"{SHARED_MEMORY_PREFIX}{os.getpid()}-{next(_starts)}-"
        sweep_shared_memory()
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_start = log_file.stat().st_size if log_file.exists() else 0
        binary = self.folder / SERVER / "bin" / "tritonserver"
        command: list[str | Path] = [binary, *self._arguments(repository, models, ports, shared_memory)]
        process = spawn(command, log_file, self._environment())
        return TritonProcess(ports, log_file, log_start, shared_memory, process)

    def _arguments(self, repository: Path, models: Sequence[str], ports: Ports, shared_memory: str) -> list[str]:
        options = {
            "model-repository": repository,
            "backend-directory": self.folder / SERVER / "backends",
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
        return [
            # Our configurations are complete. To complete them, Triton would start one more Python process per model,
            # which imports torch, and `TritonProcess.ready` would take the end of that process for a crash.
            "--disable-auto-complete-config",
            *(f"--{key}={value}" for key, value in options.items()),
            *(f"--backend-config=python,{key}={value}" for key, value in backend.items()),
            *(f"--load-model={model}" for model in models),
        ]

    def _environment(self) -> dict[str, str]:
        libraries = (str(self.folder / LIBRARIES), str(self.libpython_folder), os.environ.get("LD_LIBRARY_PATH", ""))
        one_thread = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return {
            **os.environ,
            # The backend runs the first python3 of the PATH: this environment's.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
            "OMP_WAIT_POLICY": "passive",
            **dict.fromkeys(one_thread, "1"),
        }
