"""A whole sidecar: health, ports, metrics, start and stop."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.support.paths import ROOT
from tests.support.running_sidecar import NOT_SERVING, PATIENCE_S, SERVING, rank_request, refused, with_sidecar

from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc
from kar_sidecar.errors import IntegrityError, PreconditionError, UnavailableError
from kar_sidecar.server.process import SERVICES, Sidecar

pytestmark = pytest.mark.service


async def until(stub, status, service=""):
    """Wait for health to say `status`, on its own stream."""
    async for change in stub.Watch(health_pb2.HealthCheckRequest(service=service)):
        if change.status == status:
            return


def test_health_follows_the_models_while_requests_are_still_answered(world):
    async def body(sidecar, channel):
        health, ranking = health_pb2_grpc.HealthStub(channel), ranking_pb2_grpc.RankingServiceStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        assert (await ranking.Rank(rank_request())).rung == ranking_pb2.RUNG_CALLER
        world.scorer.down.clear()
        await until(health, SERVING)
        assert (await ranking.Rank(rank_request())).rung == ranking_pb2.RUNG_KNOWLEDGE
        for service in SERVICES:
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        # A crash takes the models along; a restarted server has none loaded.
        world.scorer.down |= set(world.scorer.models)
        world.scorer.loaded.clear()
        await until(health, NOT_SERVING, SERVICES[0])
        world.scorer.down.clear()
        await until(health, SERVING, SERVICES[0])
        assert (await ranking.Rank(rank_request())).rung == ranking_pb2.RUNG_KNOWLEDGE

    world.scorer.down |= set(world.scorer.models)
    with_sidecar(world, body, wait=False)


def test_health_follows_the_store(world):
    async def body(sidecar, channel):
        health = health_pb2_grpc.HealthStub(channel)
        world.store.fault = UnavailableError("gone")
        await until(health, NOT_SERVING)
        world.store.fault = None
        await until(health, SERVING)

    with_sidecar(world, body)


def test_health_does_not_wait_for_a_store_that_hangs(world):
    gate = threading.Event()

    async def body(sidecar, channel):
        world.store.gate = gate.wait
        await until(health_pb2_grpc.HealthStub(channel), NOT_SERVING)
        gate.set()
        await until(health_pb2_grpc.HealthStub(channel), SERVING)

    with_sidecar(world, body, health_timeout_ms=20)


def test_health_of_an_unknown_service_is_not_found(world):
    async def body(sidecar, channel):
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="stranger"))
        await refused(check, grpc.StatusCode.NOT_FOUND)

    with_sidecar(world, body)


def test_reflection_lists_the_services(world):
    async def body(sidecar, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([ask])):
            return {service.name for service in answer.list_services_response.service}

    assert with_sidecar(world, body) >= {*SERVICES, "grpc.health.v1.Health"}


def test_metrics_have_their_own_port(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        await stub.Rank(rank_request())
        await refused(stub.Rank(ranking_pb2.RankRequest()), grpc.StatusCode.INVALID_ARGUMENT)
        await refused(
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="stranger")),
            grpc.StatusCode.NOT_FOUND,
        )
        # The last call may reach us before the server has counted it.
        while True:
            text = await asyncio.to_thread(
                lambda: urlopen(f"http://{sidecar.addresses.metrics}/metrics").read().decode()
            )
            if 'status="NOT_FOUND"' in text:
                return text.splitlines()

    lines = with_sidecar(world, body)
    rpc = 'rpc="kar.ranking.v1.RankingService/Rank"'
    assert f'kar_requests_total{{arm="knowledge",{rpc},rung="knowledge",status="OK"}} 1.0' in lines
    assert f'kar_requests_total{{arm="",{rpc},rung="",status="INVALID_ARGUMENT"}} 1.0' in lines
    assert 'kar_requests_total{arm="",rpc="grpc.health.v1.Health/Check",rung="",status="NOT_FOUND"} 1.0' in lines
    assert 'kar_stage_milliseconds_count{stage="total"} 1.0' in lines
    assert 'kar_knowledge_levels_total{entity="item",level="neighbour"} 1.0' in lines
    assert "kar_serving 1.0" in lines


def test_the_start_is_logged_with_addresses_release_space_and_mode(world, caplog):
    caplog.set_level(logging.INFO, "kar_sidecar")

    async def body(sidecar, channel):
        return sidecar.addresses

    addresses = with_sidecar(world, body)
    where = f"grpc={addresses.grpc} metrics={addresses.metrics}"
    facts = f"release={world.release_id} space=aaaaaaaaaaaa mode=prestored"
    assert f"listening {where} {facts}" in [record.message for record in caplog.records]


def test_stopping_says_not_serving_and_finishes_open_requests(world):
    async def run():
        ready, entered, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
        sidecar = Sidecar(world.settings(grace_s=PATIENCE_S), world.store, world.scorer, ready=lambda _: ready.set())
        async with sidecar:
            await ready.wait()
            channel = grpc.aio.insecure_channel(sidecar.addresses.grpc)
            score = world.scorer.score

            async def slow(*arguments):
                entered.set()
                await go_on.wait()
                return await score(*arguments)

            world.scorer.score = slow
            open_request = asyncio.ensure_future(ranking_pb2_grpc.RankingServiceStub(channel).Rank(rank_request()))
            await entered.wait()
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            statuses = []

            async def follow():
                async for change in watch:
                    statuses.append(change.status)
                    if change.status == NOT_SERVING:
                        go_on.set()
                        watch.cancel()  # an open stream is a request, too: stopping would wait for it
                        return

            following = asyncio.ensure_future(follow())
            while not statuses:
                await asyncio.sleep(0)
        await following
        answer = await open_request
        await channel.close()
        return statuses, answer

    statuses, answer = asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert statuses == [SERVING, NOT_SERVING]
    assert answer.rung == ranking_pb2.RUNG_KNOWLEDGE


def test_a_taken_port_refuses_to_start(world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def body(sidecar, channel):
            raise AssertionError

        for setting in ("grpc_port", "metrics_port"):
            with pytest.raises(PreconditionError, match="choose free ports"):
                with_sidecar(world, body, **{setting: port})


def test_two_sidecars_do_not_share_a_port(world):
    async def body(sidecar, channel):
        port = int(sidecar.addresses.grpc.rsplit(":", 1)[1])
        with pytest.raises(PreconditionError, match="choose free ports"):
            async with Sidecar(world.settings(grpc_port=port), world.store, world.scorer):
                raise AssertionError

    with_sidecar(world, body)


def test_a_corrupt_release_refuses_to_start(world):
    (world.folder / world.release_id / "item_ids.txt").write_text("other\n")

    async def body(sidecar, channel):
        raise AssertionError

    with pytest.raises(IntegrityError, match=r"item_ids\.txt"):
        with_sidecar(world, body)


def test_the_server_imports_no_torch():
    program = (
        "import kar_sidecar.server.process, sys; print([m for m in ('torch', 'onnx', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_sigterm_stops_the_process_cleanly(world):
    """A whole process under uvloop, with a store and a scorer in memory."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import uvloop
from pathlib import Path
from tests.support.sidecar_world import World, fill, models
from kar_sidecar.server.process import serve
world = World(Path({str(world.folder)!r}))
fill(world.store)
world.scorer.models |= models({world.release_id!r})
def ready(addresses):
    print("ready", addresses.grpc, flush=True)
uvloop.run(serve(world.settings(), store=world.store, scorer=world.scorer, ready=ready))
print("stopped", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("ready 127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, rest) == (0, "stopped\n")
