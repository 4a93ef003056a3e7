"""Owns the sidecar process: it starts the services, watches the health of store and models, and stops gracefully."""

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

import grpc
import typer
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kar.admin.v1 import admin_pb2_grpc
from kar.feedback.v1 import feedback_pb2_grpc
from kar.knowledge.v1 import knowledge_pb2_grpc
from kar.ranking.v1 import ranking_pb2_grpc
from kar_sidecar.errors import KarError, PreconditionError
from kar_sidecar.index.live import LiveIndexes
from kar_sidecar.ranking.probe import probe_tensors
from kar_sidecar.ranking.ranker import Ranker
from kar_sidecar.releases.registry import Releases
from kar_sidecar.scoring import Scorer
from kar_sidecar.server.interceptor import CallInterceptor
from kar_sidecar.server.metrics import MetricsServer
from kar_sidecar.server.services import AdminService, FeedbackService, KnowledgeService, RankingService
from kar_sidecar.settings import Settings
from kar_sidecar.store import Store
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import now_ms
from kar_sidecar.telemetry import Telemetry

__all__ = ["SERVICES", "Addresses", "Sidecar", "serve", "sidecar"]

log = logging.getLogger(__name__)

SERVICES: Final = (
    "kar.ranking.v1.RankingService",
    "kar.knowledge.v1.KnowledgeService",
    "kar.feedback.v1.FeedbackService",
    "kar.admin.v1.AdminService",
)
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING: Final = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses that a sidecar listens on, as host:port."""

    grpc: str
    metrics: str


class Sidecar:
    """One server on a store and a scorer; as a context manager it runs inside the block.

    Health reports SERVING while the store and the active release's models answer. Ranking requests are answered at any
    time: when store or models fail, from a lower rung.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        scorer: Scorer,
        *,
        indexes: LiveIndexes | None = None,
        ready: Callable[[Addresses], None] | None = None,
    ) -> None:
        """Prepare the services; nothing listens yet.

        Args:
            settings: Read at start-up.
            store: The caller closes it.
            scorer: The caller closes it.
            indexes: None: the indexes below the settings' folder. Closed at the end.
            ready: Called once, when health first reports SERVING.
        """
        self._settings = settings
        self._ready = ready
        self._reason = "starting"
        self._telemetry = Telemetry()
        self._releases = Releases(
            settings.releases,
            store,
            scorer,
            settings.mode,
            probe_tensors=probe_tensors,
            warm_timeout_s=settings.warm_timeout_ms / 1e3,
        )
        self._indexes = indexes or LiveIndexes(settings.index)
        self._health = health.aio.HealthServicer()
        # SO_REUSEPORT is off: with it, a second server on the same port would silently take half of the requests.
        self._server = grpc.aio.server(
            interceptors=(CallInterceptor(self._telemetry),), options=(("grpc.so_reuseport", 0),)
        )
        ranker = Ranker(self._releases, store, scorer, settings, self._telemetry)
        knowledge = KnowledgeService(
            self._releases,
            store,
            self._indexes,
            self._telemetry,
            max_ids=settings.max_candidates,
            max_similar=settings.max_similar,
            timeout_s=settings.store_timeout_ms / 1e3,
            wall_ms=now_ms,
        )
        ranking_pb2_grpc.add_RankingServiceServicer_to_server(RankingService(ranker), self._server)
        knowledge_pb2_grpc.add_KnowledgeServiceServicer_to_server(knowledge, self._server)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(FeedbackService(), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(self._releases), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def __aenter__(self) -> Self:
        """Verify the active release, open both ports, and start to answer and to watch.

        Raises:
            PreconditionError: no release is active, nothing was published for it, or a port is taken.
            IntegrityError: a file of the release is missing or corrupt; the text names it.
        """
        settings = self._settings
        await self._releases.open()
        await self._set_health(NOT_SERVING)
        try:
            grpc_port = self._server.add_insecure_port(f"{settings.host}:{settings.grpc_port}")
            self._metrics = MetricsServer(settings.host, settings.metrics_port, self._telemetry.registry)
        except (RuntimeError, OSError) as error:
            raise PreconditionError(
                f"cannot listen on {settings.host}, ports {settings.grpc_port} and {settings.metrics_port} ({error}): "
                "choose free ports"
            ) from error
        self.addresses = Addresses(f"{settings.host}:{grpc_port}", f"{settings.host}:{self._metrics.port}")
        await self._server.start()
        # Two tasks: verifying a large snapshot must not delay the health checks.
        self._watchers = [asyncio.create_task(watch()) for watch in (self._watch_health, self._watch_indexes)]
        served = self._releases.active
        log.info(
            "listening grpc=%s metrics=%s release=%s space=%s mode=%s",
            self.addresses.grpc,
            self.addresses.metrics,
            served.id,
            served.space.space_id,
            settings.mode,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Report NOT_SERVING, give open requests their grace, close both ports."""
        await self._health.enter_graceful_shutdown()
        self._telemetry.serving.set(0)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.wait(self._watchers)
        await self._server.stop(self._settings.grace_s)
        await self._indexes.close()
        await asyncio.to_thread(self._metrics.stop)
        log.info("stopped grpc=%s", self.addresses.grpc)

    async def _set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)
        self._telemetry.serving.set(status == SERVING)

    async def _watch_health(self) -> None:
        """Update health, and load again the models that a restarted scorer has lost."""
        while True:
            try:
                if not await self._check_health():
                    await self._releases.restore()
                    await self._check_health()
            except Exception:
                log.exception("health_fault")
            await asyncio.sleep(self._settings.health_interval_ms / 1e3)

    async def _watch_indexes(self) -> None:
        """Swap in index snapshots when they are published."""
        while True:
            try:
                served = self._releases.active
                await self._indexes.refresh(served.id, served.release.manifest.encoded_space)
            except Exception:
                log.exception("index_fault")
            await asyncio.sleep(self._settings.health_interval_ms / 1e3)

    async def _check_health(self) -> bool:
        """Whether store and models answer; a change is logged and reported by health."""
        reason = ""
        try:
            async with asyncio.timeout(self._settings.health_timeout_ms / 1e3):
                await self._releases.check()
        except TimeoutError:
            reason = "no answer to a health check"
        except KarError as error:
            reason = str(error)
        except Exception:
            log.exception("health_fault")
            reason = "an unexpected fault"
        if reason != self._reason:
            await self._set_health(NOT_SERVING if reason else SERVING)
            log.info("health status=%s reason=%s", "NOT_SERVING" if reason else "SERVING", reason)
            self._reason = reason
            if not reason and self._ready is not None:
                self._ready(self.addresses)
                self._ready = None
        return not reason


async def serve(
    settings: Settings,
    *,
    store: Store | None = None,
    scorer: Scorer | None = None,
    ready: Callable[[Addresses], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: Read at start-up.
        store: None: the one that the settings name. Closed at the end.
        scorer: None: Triton at the settings' address. Closed at the end.
        ready: Called once, when health first reports SERVING.

    Raises:
        PreconditionError: no release is active, nothing was published for it, or a port is taken.
        IntegrityError: a file of the release is missing or corrupt; the text names it.
        InputError: the settings' store is not a store URL.
        UnavailableError: the store does not answer.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    store = store or open_store(settings.store, aerospike=settings.aerospike, readonly=True)
    scorer = scorer or _triton(settings.triton_address)
    try:
        async with Sidecar(settings, store, scorer, ready=ready):
            await stop.wait()
    finally:
        await scorer.close()
        store.close()


def _triton(address: str) -> Scorer:
    from kar_sidecar.scoring.triton import TritonScorer  # only this scorer needs the package tritonclient

    return TritonScorer(address)


def sidecar(
    work: Annotated[
        Path | None, typer.Option(help="Work folder that contains the releases and the store.", show_default="var/demo")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings (docs/settings.md).")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="prestored (read adapted vectors) or encoded (run the adaptor in Triton).", show_default="prestored"
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of the gRPC services; 0: any free one.", show_default="8500")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of the Prometheus metrics; 0: any free one.", show_default="8502")
    ] = None,
    triton: Annotated[str | None, typer.Option(help="gRPC address of Triton.", show_default="127.0.0.1:8001")] = None,
) -> None:
    """Run the gRPC sidecar alone; Triton must be running already.

    All other settings come from --config or from KAR_* variables of the environment.
    """
    settings = Settings.read(
        config,
        work=work,
        mode=mode,
        host=host,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        triton_address=triton,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")
    uvloop.run(serve(settings))
