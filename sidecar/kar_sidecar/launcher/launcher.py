"""Owns `kar serve`: Triton and the gRPC sidecar over one work folder, as one supervised process tree.

WORK/serving/
  models/                      the folder that Triton reads models from: links to the models of every release
  triton.log, sidecar.log      output of the two processes; *.previous.log: output of the previous `kar serve`
  serve.log, ready.json        written only when `kar replay` or `kar demo` started this `kar serve`
  lock                         held while `kar serve` runs
"""

import asyncio
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from kar_sidecar.errors import InputError, IntegrityError
from kar_sidecar.launcher.supervisor import ChildProcess, RestartPolicy, Service, Supervisor, spawn, termination
from kar_sidecar.launcher.triton_process import LOOPBACK, Ports, TritonProcess
from kar_sidecar.launcher.triton_runtime import TritonRuntime, link_models
from kar_sidecar.lock import held
from kar_sidecar.releases.manifest import Release, list_releases, read_active, write_active
from kar_sidecar.releases.registry import open_active
from kar_sidecar.releases.serving_view import ServedRelease
from kar_sidecar.settings import Settings
from kar_sidecar.store.open import open_store

__all__ = ["ReadyReport", "check", "is_serving", "listen_port", "serve", "serve_until_stopped"]

PROBE_TIMEOUT_S = 1.0
MARGIN_S = 5.0
"""A stopping child is killed this long after the end of the grace period for open requests."""


def listen_port(host: str, port: int, option: str) -> int:
    """`port`, or a free port for 0.

    Raises:
        InputError: `port` is taken; the text names the command's option.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what listens there, or name another "
                f"with {option}"
            ) from error
        return int(probe.getsockname()[1])


def check(settings: Settings) -> None:
    """Check before the start that the active release is sound and published.

    Raises:
        PreconditionError: no release is active, or nothing was published for it.
        IntegrityError: a file is missing or corrupt; the text names it.
        UnavailableError: the store cannot be opened.
    """
    store = open_store(settings.store, aerospike=settings.aerospike, readonly=True)
    try:
        asyncio.run(open_active(settings.releases, store, settings.mode))
    finally:
        store.close()


def is_serving(address: str) -> bool:
    """Whether the gRPC server at `address` reports SERVING."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True)
class ReadyReport:
    """Content of the file `--ready-file`. Addresses are host:port."""

    release: str
    grpc: str
    metrics: str
    triton_grpc: str
    triton_http: str
    triton_metrics: str
    pids: dict[str, int]
    """Process ids by name: supervisor, triton, sidecar."""


class _Serving:
    """One run of `kar serve`: its two services, their shared folder, and its messages."""

    def __init__(
        self, settings: Settings, config: Path | None, ready_file: Path | None, say: Callable[[str], None]
    ) -> None:
        """Prepare the folder; `say` prints a line, `ready_file` is written when both services are ready."""
        self._settings = settings
        self._config = config
        self._ready_file = ready_file
        self._say = say
        self._runtime = TritonRuntime.install()
        self._folder = settings.work / "serving"
        self._ports = Ports.free()
        self._triton: TritonProcess | None = None
        self._linked: set[str] = set()
        self._was_ready = False
        self._changed_s = time.monotonic()
        self.address = f"{settings.host}:{settings.grpc_port}"
        self.supervisor = Supervisor(
            [
                Service("triton", self._start_triton, lambda: self._triton is not None and self._triton.ready()),
                Service("sidecar", self._start_sidecar, lambda: is_serving(self.address)),
            ],
            policy=RestartPolicy(),
            say=say,
            stop_grace_s=settings.grace_s + MARGIN_S,
        )
        shutil.rmtree(self._folder / "models", ignore_errors=True)
        for name in ("triton", "sidecar"):
            log = self._folder / f"{name}.log"
            if log.exists():
                log.replace(log.with_suffix(".previous.log"))

    def _start_triton(self) -> TritonProcess:
        # Triton starts with the active release's models, so it can score as soon as it is ready. The sidecar loads the
        # models of other releases.
        settings = self._settings
        release = Release.load(settings.releases, read_active(settings.releases), verify=False)
        self._triton = self._runtime.start(
            self._folder / "models",
            models=ServedRelease(release, settings.mode).models(),
            log_file=self._folder / "triton.log",
            ports=self._ports,
        )
        return self._triton

    def _start_sidecar(self) -> ChildProcess:
        settings = self._settings
        overrides = {
            "KAR_HOST": settings.host,
            "KAR_GRPC_PORT": str(settings.grpc_port),
            "KAR_METRICS_PORT": str(settings.metrics_port),
            "KAR_RELEASES": str(settings.releases),
            "KAR_STORE": settings.store,
            "KAR_MODE": settings.mode,
            "KAR_TRITON_ADDRESS": f"{LOOPBACK}:{self._ports.grpc}",
        }
        config = ("--config", self._config) if self._config else ()
        command = (sys.executable, "-m", "kar_sidecar", "sidecar", *config)
        return spawn(command, self._folder / "sidecar.log", os.environ | overrides)

    def link_releases(self) -> None:
        """Link the models of releases that were exported since the last call."""
        for release_id in list_releases(self._settings.releases):
            models = self._settings.releases / release_id / "triton" / "cpu"
            if release_id not in self._linked and models.is_dir():
                link_models(models, self._folder / "models")
                self._linked.add(release_id)

    def after_step(self) -> None:
        """Link new releases; print a line when the services become ready or stop being ready."""
        self.link_releases()
        if self.supervisor.ready == self._was_ready:
            return
        now = time.monotonic()
        self._was_ready = not self._was_ready
        if self._was_ready:
            report = self._ready_report()
            self._say(
                f"ready on {report.grpc} in {now - self._changed_s:.1f} s (metrics on {report.metrics}, "
                f"Triton on {report.triton_grpc}); Ctrl-C stops"
            )
            if self._ready_file is not None:
                draft = self._ready_file.with_name(f".{self._ready_file.name}")
                draft.write_text(json.dumps(asdict(report), indent=2) + "\n")
                draft.replace(self._ready_file)
        else:
            self._say(f"not ready ({self._folder / 'sidecar.log'} says why)")
        self._changed_s = now

    def _ready_report(self) -> ReadyReport:
        ports = self._ports
        return ReadyReport(
            release=read_active(self._settings.releases),
            grpc=self.address,
            metrics=f"{self._settings.host}:{self._settings.metrics_port}",
            triton_grpc=f"{LOOPBACK}:{ports.grpc}",
            triton_http=f"{LOOPBACK}:{ports.http}",
            triton_metrics=f"{LOOPBACK}:{ports.metrics}",
            pids={"supervisor": os.getpid(), **self.supervisor.pids},
        )


def serve_until_stopped(
    settings: Settings,
    *,
    config: Path | None = None,
    ready_file: Path | None = None,
    say: Callable[[str], None],
) -> None:
    """Run Triton and the sidecar until SIGTERM or SIGINT. Main thread only.

    Args:
        settings: The settings; their ports must be free.
        config: The settings file, which the sidecar reads again.
        ready_file: Written when both are ready, removed at the end: addresses and process ids as JSON.
        say: Prints a line.

    Raises:
        InputError: another `kar serve` runs on this work folder.
        KarError: see `check`, `TritonRuntime.install` and `Supervisor.run`.
    """
    active = read_active(settings.releases)
    if ready_file is not None and not ready_file.parent.is_dir():
        raise InputError(f"{ready_file.parent} is not a folder: create it or name another --ready-file")
    folder = settings.work / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    already_running = InputError(f"another `kar serve` runs on {settings.work}: stop it, or name another --work")
    with held(folder / "lock", already_running), termination() as stopping:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)  # left by a run that was killed
        check(settings)
        if not (models := settings.releases / active / "triton" / "cpu").is_dir():
            raise IntegrityError(f"{models} is missing: export the release again")
        serving = _Serving(settings, config, ready_file, say)
        serving.link_releases()
        say(f"starting Triton and the sidecar on release {active} (logs: {folder}/*.log)")
        try:
            serving.supervisor.run(stopping, serving.after_step)
        finally:
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
            say("stopped")


def serve(
    work: Annotated[
        Path | None, typer.Option(help="Work folder that contains the releases and the store.", show_default="var/demo")
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="Release to activate and serve.", show_default="the active one")
    ] = None,
    store: Annotated[str | None, typer.Option(help="URL of the store.", show_default="lmdb:WORK/store")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="prestored (read adapted vectors) or encoded (run the adaptor in Triton).", show_default="prestored"
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the gRPC services; 0: any free one.", show_default="8500")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of the Prometheus metrics; 0: any free one.", show_default="8502, or 0 with --port 0"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings (docs/settings.md).")] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(help="File for addresses and process ids (JSON): written when ready, removed at the end."),
    ] = None,
) -> None:
    """Serve a release: run Triton and the gRPC sidecar until Ctrl-C.

    All other settings come from --config or from KAR_* variables of the environment.
    """
    if port == 0 and metrics_port is None:
        metrics_port = 0
    settings = Settings.read(config, work=work, store=store, mode=mode, grpc_port=port, metrics_port=metrics_port)
    if release is not None:
        Release.load(settings.releases, release)
        write_active(settings.releases, release)
    ports = {
        "grpc_port": listen_port(settings.host, settings.grpc_port, "--port"),
        "metrics_port": listen_port(settings.host, settings.metrics_port, "--metrics-port"),
    }
    console = Console()
    serve_until_stopped(
        settings.model_copy(update=ports),
        config=config,
        ready_file=ready_file,
        say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
