"""The RPCs over the wire: ranking, knowledge, releases, and the one that is not built."""

import threading

import grpc
import numpy as np
import pytest
from tests.support.running_sidecar import rank_request, refused, with_sidecar

from kar.admin.v1 import admin_pb2, admin_pb2_grpc
from kar.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from kar.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc
from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import IncompleteError, UnavailableError
from kar_sidecar.store import EntityKey

pytestmark = pytest.mark.service


def test_it_ranks_over_the_wire(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        named = await stub.Rank(rank_request(request_id="mine"))
        unnamed = [await stub.Rank(rank_request()) for _ in range(2)]
        return named, unnamed

    named, unnamed = with_sidecar(world, body)
    assert (named.request_id, list(named.order), named.rung) == ("mine", [1, 0], ranking_pb2.RUNG_KNOWLEDGE)
    assert len({answer.request_id for answer in unnamed} | {""}) == 3


def test_the_callers_deadline_limits_the_time_to_score(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        world.scorer.hanging |= set(world.scorer.models)
        return await stub.Rank(rank_request(), timeout=1.0)

    answer = with_sidecar(world, body, deadline_margin_ms=500)
    assert answer.rung == ranking_pb2.RUNG_CALLER
    assert "knowledge model" in answer.reason


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63), 253_402_300_800])
def test_a_history_with_an_invalid_time_is_refused(world, seconds):
    async def body(sidecar, channel):
        request = rank_request()
        request.user.history.as_of.seconds = seconds
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        assert "as_of" in await refused(stub.Rank(request), grpc.StatusCode.INVALID_ARGUMENT)

    with_sidecar(world, body)


def test_unread_vectors_are_named(world):
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


def test_invalid_requests_for_knowledge_are_refused(world):
    async def body(sidecar, channel):
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        for entity, ids in ((0, ["a"]), (1, []), (1, [""]), (1, ["a"] * 4)):
            request = knowledge_pb2.BatchGetKnowledgeRequest(entity=entity, ids=ids)
            await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.INVALID_ARGUMENT)
        world.store.fault = UnavailableError("the store is gone: start it")
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity=1, ids=["a"])
        details = await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.UNAVAILABLE)
        assert details == "the store is gone: start it"

    with_sidecar(world, body, max_candidates=3)


def test_knowledge_from_a_store_that_hangs_is_a_deadline_error(world):
    gate = threading.Event()

    async def body(sidecar, channel):
        world.store.gate = gate.wait
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity=1, ids=["a"])
        details = await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.DEADLINE_EXCEEDED)
        gate.set()
        assert "within 5.0 ms" in details

    with_sidecar(world, body, store_timeout_ms=5)


def test_an_rpc_that_is_not_built_is_unimplemented(world):
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
        assert [(release.release_id, release.active, release.loaded) for release in listed] == [
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
