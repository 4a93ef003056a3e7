"""A real gRPC server in this process, on loopback ports of the system's choice."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.support.paths import ROOT

from kar.admin.v1 import admin_pb2, admin_pb2_grpc
from kar.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from kar.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc
from kar.records.v1 import records_pb2
from kar_sidecar.client import KarClient
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import IncompleteError, InputError, IntegrityError, PreconditionError, UnavailableError
from kar_sidecar.server.process import SERVICES, Sidecar
from kar_sidecar.store import EntityKey

pytestmark = pytest.mark.service

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PATIENCE_S = 30


def with_sidecar(world, body, *, wait=True, **changes):
    """Run `body(sidecar, channel)` against a sidecar that is ready, unless `wait` is False."""

    async def run():
        ready = asyncio.Event()
        sidecar = Sidecar(world.settings(**changes), world.store, world.scorer, ready=lambda _: ready.set())
        async with sidecar, grpc.aio.insecure_channel(sidecar.addresses.grpc) as channel:
            if wait:
                await asyncio.wait_for(ready.wait(), PATIENCE_S)
            return await asyncio.wait_for(body(sidecar, channel), PATIENCE_S)

    return asyncio.run(run())


async def refused(call, status):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == status
    return caught.value.details()


def rank_request(**more):
    return ranking_pb2.RankRequest(
        **{
            "user": ranking_pb2.User(id="u1"),
            "candidates": ranking_pb2.Candidates(ids=["i2", "i1"]),
            "experiment_overrides": {"knowledge": "knowledge"},
            **more,
        }
    )


def test_it_ranks_over_the_wire(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        named = await stub.Rank(rank_request(request_id="mine"))
        unnamed = [await stub.Rank(rank_request()) for _ in range(2)]
        return named, unnamed

    named, unnamed = with_sidecar(world, body)
    assert (named.request_id, list(named.order), named.rung) == ("mine", [1, 0], ranking_pb2.RUNG_KNOWLEDGE)
    assert len({answer.request_id for answer in unnamed} | {""}) == 3


def test_the_callers_deadline_rules(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        world.scorer.hanging |= set(world.scorer.models)
        return await stub.Rank(rank_request(), timeout=1.0)

    answer = with_sidecar(world, body, deadline_margin_ms=500)
    assert answer.rung == ranking_pb2.RUNG_CALLER
    assert "knowledge model" in answer.reason


def test_our_errors_become_statuses_with_their_sentence(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        no_user = rank_request(user=ranking_pb2.User())
        assert "user.id is empty" in await refused(stub.Rank(no_user), grpc.StatusCode.INVALID_ARGUMENT)
        elsewhere = rank_request(release_id="elsewhere")
        assert "'elsewhere' is not loaded" in await refused(stub.Rank(elsewhere), grpc.StatusCode.FAILED_PRECONDITION)

    with_sidecar(world, body)


@pytest.mark.parametrize("message", [b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["no message", "no UTF-8"])
def test_bytes_that_are_no_request_are_the_callers_fault(world, message):
    async def body(sidecar, channel):
        call = channel.unary_unary("/kar.ranking.v1.RankingService/Rank")
        assert "send a protobuf" in await refused(call(message), grpc.StatusCode.INVALID_ARGUMENT)

    with_sidecar(world, body)


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63), 253_402_300_800])
def test_a_history_of_no_time_is_refused(world, seconds):
    async def body(sidecar, channel):
        request = rank_request()
        request.user.history.as_of.seconds = seconds
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        assert "as_of" in await refused(stub.Rank(request), grpc.StatusCode.INVALID_ARGUMENT)

    with_sidecar(world, body)


def test_a_fault_of_ours_is_internal_logged_and_not_told(world, caplog):
    async def body(sidecar, channel):
        world.store.fault = RuntimeError("swordfish")
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity="ENTITY_KIND_USER", ids=["u1"])
        return await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.INTERNAL)

    told = with_sidecar(world, body)
    assert "swordfish" not in told
    [logged] = [record for record in caplog.records if record.message.startswith("internal_error")]
    request_id = told.split()[1]
    assert request_id in logged.message
    assert "swordfish" in str(logged.exc_info)


def test_vectors_that_were_not_read_are_named(world):
    async def body(sidecar, channel):
        keys, parts = [EntityKey(ITEM, "i1"), EntityKey(ITEM, "i2")], ["vaaaaaaaaaaaa"]
        [first, _] = world.store.read(keys, parts)
        world.store.fault = IncompleteError("1 of 2 records were not read: wait", [first, (None,)], [1])
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity="ENTITY_KIND_ITEM", ids=["i1", "i2"])
        return await stub.BatchGetKnowledge(request)

    answer = with_sidecar(world, body)
    assert list(answer.unread) == [1]
    assert list(answer.levels) == [
        records_pb2.KNOWLEDGE_LEVEL_FULL,
        records_pb2.KNOWLEDGE_LEVEL_NEUTRAL,
    ]
    np.testing.assert_array_equal(np.frombuffer(answer.vectors, "<f4"), [2, 2, 0.25, 0.75])


@pytest.mark.parametrize("mode", ["prestored", "encoded"])
def test_knowledge_comes_with_levels_texts_and_its_space(world, mode):
    async def body(sidecar, channel):
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        request = knowledge_pb2.BatchGetKnowledgeRequest(
            entity="ENTITY_KIND_ITEM", ids=["i2", "i4", "i1"], include_texts=True
        )
        users = knowledge_pb2.BatchGetKnowledgeRequest(entity="ENTITY_KIND_USER", ids=["u2"])
        return await stub.BatchGetKnowledge(request), await stub.BatchGetKnowledge(users)

    items, users = with_sidecar(world, body, mode=mode)
    assert items.release_id == world.release_id
    assert items.space == world.served(mode).space
    dtype, dim = {"prestored": ("<f4", 2), "encoded": ("<f2", 3)}[mode]
    neutral = {"prestored": [0.25, 0.75], "encoded": [0, 0, 0]}[mode]
    np.testing.assert_array_equal(
        np.frombuffer(items.vectors, dtype).reshape(3, dim), [[3] * dim, neutral, [2] * dim], strict=False
    )
    assert list(items.levels) == [
        records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR,
        records_pb2.KNOWLEDGE_LEVEL_NEUTRAL,
        records_pb2.KNOWLEDGE_LEVEL_FULL,
    ]
    assert [text.text for text in items.texts] == ["", "", "A film."]
    assert items.texts[2].template == "factual/1"
    assert list(users.levels) == [records_pb2.KNOWLEDGE_LEVEL_NEUTRAL]
    assert users.vectors == world.served(mode).neutral[0].astype(dtype).tobytes()
    assert len(users.texts) == 0


def test_knowledge_is_refused_when_asked_for_wrongly(world):
    async def body(sidecar, channel):
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        for entity, ids in ((0, ["a"]), (1, []), (1, [""]), (1, ["a"] * 4)):
            request = knowledge_pb2.BatchGetKnowledgeRequest(entity=entity, ids=ids)
            await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.INVALID_ARGUMENT)
        world.store.fault = UnavailableError("the store is gone: start it")
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity=1, ids=["a"])
        told = await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.UNAVAILABLE)
        assert told == "the store is gone: start it"

    with_sidecar(world, body, max_candidates=3)


def test_knowledge_from_a_store_that_hangs_is_a_deadline_error(world):
    gate = threading.Event()

    async def body(sidecar, channel):
        world.store.gate = gate.wait
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity=1, ids=["a"])
        told = await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.DEADLINE_EXCEEDED)
        gate.set()
        assert "within 5.0 ms" in told

    with_sidecar(world, body, store_timeout_ms=5)


def test_what_is_not_built_says_so(world):
    async def body(sidecar, channel):
        report = feedback_pb2_grpc.FeedbackServiceStub(channel).ReportOutcomes(feedback_pb2.ReportOutcomesRequest())
        assert "not built yet" in await refused(report, grpc.StatusCode.UNIMPLEMENTED)

    with_sidecar(world, body)


def test_releases_are_listed_and_switched(world):
    other = world.add_release(backbone="din", created_s=2)

    async def body(sidecar, channel):
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        ranking = ranking_pb2_grpc.RankingServiceStub(channel)
        listed = (await admin.ListReleases(admin_pb2.ListReleasesRequest())).releases
        assert [(one.release_id, one.active, one.loaded) for one in listed] == [
            (other, False, False),
            (world.release_id, True, True),
        ]
        switched = await admin.ActivateRelease(admin_pb2.ActivateReleaseRequest(release_id=other))
        assert (switched.release_id, switched.previous_release_id) == (other, world.release_id)
        assert (await ranking.Rank(rank_request())).backbone == "din"
        assert (await ranking.Rank(rank_request(release_id=world.release_id))).backbone == "dcnv2"
        unknown = admin.ActivateRelease(admin_pb2.ActivateReleaseRequest(release_id="nothing"))
        await refused(unknown, grpc.StatusCode.FAILED_PRECONDITION)
        empty = admin.ActivateRelease(admin_pb2.ActivateReleaseRequest())
        await refused(empty, grpc.StatusCode.INVALID_ARGUMENT)

    with_sidecar(world, body)


async def until(stub, status, service=""):
    """Wait for health to say `status`, on its own stream."""
    async for said in stub.Watch(health_pb2.HealthCheckRequest(service=service)):
        if said.status == status:
            return


def test_health_follows_the_models_and_requests_are_answered_meanwhile(world):
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


def test_health_knows_no_strangers(world):
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


def test_metrics_have_a_port_of_their_own(world):
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


def test_the_start_is_logged_with_its_facts(world, caplog):
    caplog.set_level(logging.INFO, "kar_sidecar")

    async def body(sidecar, channel):
        return sidecar.addresses

    addresses = with_sidecar(world, body)
    where = f"grpc={addresses.grpc} metrics={addresses.metrics}"
    what = f"release={world.release_id} space=aaaaaaaaaaaa mode=prestored"
    assert f"listening {where} {what}" in [record.message for record in caplog.records]


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
            said = []

            async def follow():
                async for change in watch:
                    said.append(change.status)
                    if change.status == NOT_SERVING:
                        go_on.set()
                        watch.cancel()  # an open stream is a request, too: stopping would wait for it
                        return

            following = asyncio.ensure_future(follow())
            while not said:
                await asyncio.sleep(0)
        await following
        answer = await open_request
        await channel.close()
        return said, answer

    said, answer = asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert said == [SERVING, NOT_SERVING]
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


def test_the_client_ranks_and_reads_knowledge(world):
    def use(address):
        with KarClient(address, timeout_s=PATIENCE_S) as client:
            ranking = client.rank(
                "u1",
                ["i2", "i1"],
                arm="knowledge",
                request_id="mine",
                user_features={"gender": "F"},
                item_features={"year": [None, 1980], "genres": [["Drama", "Action"], None]},
                history=[("i1", 5)],
                explain=True,
            )
            assert ranking.response.request_id == "mine"
            assert (ranking.arm, ranking.rung) == ("knowledge", "knowledge")
            assert ranking.response.explanation.inline_history_used
            tensors = world.scorer.calls[-1][1]
            np.testing.assert_array_equal(tensors["item_numeric"], [[-1], [-1]])
            np.testing.assert_array_equal(tensors["item_categorical"], [[3, 2], [2, 3]])
            np.testing.assert_array_equal(tensors["user_categorical"], [2])
            # 3 * 2 / 10 - 1 and 2 * 2 / 10 - 1
            [first, second] = ranking.ranked()
            assert (first[0], second[0]) == ("i2", "i1")
            assert first[1] == pytest.approx(1 / (1 + np.exp(0.4)))

            knowledge = client.knowledge("item", ["i1", "i4"], texts=True)
            assert (knowledge.release_id, knowledge.space_id) == (world.release_id, "aaaaaaaaaaaa")
            np.testing.assert_array_equal(knowledge.vectors, [[2, 2], [0.25, 0.75]])
            assert knowledge.levels == ("full", "neutral")
            assert knowledge.texts[0].text == "A film."
            assert client.knowledge("user", ["u1"]).texts == ()

            with pytest.raises(InputError, match=r"user\.id is empty"):
                client.rank("", ["i1"])
            world.scorer.down |= set(world.scorer.models)
            assert client.rank("u1", ["i1", "i2"], caller_scores=[0.25, 0.5]).ranked() == [("i2", 0.5), ("i1", 0.25)]
            [(item, score)] = client.rank("u1", ["i1"]).ranked()
            assert item == "i1"
            assert np.isnan(score)

    async def body(sidecar, channel):
        await asyncio.to_thread(use, sidecar.addresses.grpc)

    with_sidecar(world, body)


def test_the_client_says_when_nobody_answers(world):
    async def body(sidecar, channel):
        return sidecar.addresses.grpc

    gone = with_sidecar(world, body)
    with KarClient(gone, timeout_s=PATIENCE_S) as client, pytest.raises(UnavailableError):
        client.rank("u1", ["i1"])


def test_the_server_imports_no_torch():
    program = (
        "import kar_sidecar.server.process, sys; print([m for m in ('torch', 'onnx', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_sigterm_stops_the_process_cleanly(world):
    """The whole process under uvloop, on what a test can give it: a store and a scorer in memory."""
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
