"""Owns the sidecar process: it binds the services, follows the health of what they need, and stops gracefully."""

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Annotated, Final, Self
from wsgiref.simple_server import WSGIServer

import grpc
import typer
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

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
    """Where a sidecar listens, as host:port."""

    grpc: str
    metrics: str


class Sidecar:
    """One server on a store and a scorer; as a context manager it runs inside of the block.

    Health says SERVING while the active release's models and the store answer. Requests are answered at any time:
    what does not answer only lowers the rung.
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
        """Prepare; `ready` is called once, when health first says SERVING.

        `indexes` are those below the settings' folder unless others are given; they are closed at the end.
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
        # A port is ours alone: with SO_REUSEPORT a second server would silently take half of the requests.
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
        """Verify the active release, bind both ports, start to answer and to watch.

        Raises:
            PreconditionError: no active release, nothing published for it, or a port is taken.
            IntegrityError: a corrupt release; the text names the file.
        """
        settings = self._settings
        await self._releases.open()
        await self._say(NOT_SERVING)
        try:
            grpc_port = self._server.add_insecure_port(f"{settings.host}:{settings.grpc_port}")
            self._metrics: tuple[WSGIServer, Thread] = start_http_server(
                settings.metrics_port, settings.host, self._telemetry.registry
            )
        except (RuntimeError, OSError) as error:
            raise PreconditionError(
                f"cannot listen on {settings.host}, ports {settings.grpc_port} and {settings.metrics_port} ({error}): "
                "choose free ports"
            ) from error
        self.addresses = Addresses(f"{settings.host}:{grpc_port}", f"{settings.host}:{self._metrics[0].server_port}")
        await self._server.start()
        # Apart from each other: verifying a large snapshot must not hold up what health says.
        self._watchers = [asyncio.create_task(watch()) for watch in (self._watch, self._watch_index)]
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
        """Say NOT_SERVING, give open requests their grace, close both ports."""
        await self._health.enter_graceful_shutdown()
        self._telemetry.serving.set(0)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.wait(self._watchers)
        await self._server.stop(self._settings.grace_s)
        await self._indexes.close()
        server, thread = self._metrics
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
        log.info("stopped grpc=%s", self.addresses.grpc)

    async def _say(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)
        self._telemetry.serving.set(status == SERVING)

    async def _watch(self) -> None:
        """Keep health true, and load again what a restarted scorer has lost."""
        while True:
            try:
                if not await self._look():
                    await self._releases.restore()
                    await self._look()
            except Exception:
                log.exception("health_fault")
            await asyncio.sleep(self._settings.health_interval_ms / 1e3)

    async def _watch_index(self) -> None:
        """Swap index snapshots as they are published."""
        while True:
            try:
                served = self._releases.active
                await self._indexes.refresh(served.id, served.release.manifest.encoded_space)
            except Exception:
                log.exception("index_fault")
            await asyncio.sleep(self._settings.health_interval_ms / 1e3)

    async def _look(self) -> bool:
        """Check, tell health, and log what changed."""
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
            await self._say(NOT_SERVING if reason else SERVING)
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
    """Serve until SIGTERM or SIGINT; `ready` is called once, when health first says SERVING.

    Store and scorer are the ones that the settings name unless they are given; both are closed at the end.

    Raises:
        PreconditionError: see `Sidecar`.
        IntegrityError: a corrupt release; the text names the file.
        InputError: not a store URL.
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
    from kar_sidecar.scoring.triton import TritonScorer  # a server on another scorer needs no tritonclient

    return TritonScorer(address)


def sidecar(
    work: Annotated[
        Path | None, typer.Option(help="Work folder with releases and store.", show_default="var/demo")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    mode: Annotated[str | None, typer.Option(help="prestored or encoded.", show_default="prestored")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC services.", show_default="8500")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of the metrics.", show_default="8502")] = None,
    triton: Annotated[str | None, typer.Option(help="Triton's gRPC address.", show_default="127.0.0.1:8001")] = None,
) -> None:
    """Run the gRPC sidecar alone, beside a Triton that runs already; every other knob: KAR_* or --config."""
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
