"""Errors become statuses; the text of an unexpected exception goes to the log only."""

import grpc
import pytest
from tests.support.running_sidecar import rank_request, refused, with_sidecar

from kar.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc

pytestmark = pytest.mark.service


def test_our_errors_become_statuses_with_their_message(world):
    async def body(sidecar, channel):
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        no_user = rank_request(user=ranking_pb2.User())
        assert "user.id is empty" in await refused(stub.Rank(no_user), grpc.StatusCode.INVALID_ARGUMENT)
        elsewhere = rank_request(release_id="elsewhere")
        assert "'elsewhere' is not loaded" in await refused(stub.Rank(elsewhere), grpc.StatusCode.FAILED_PRECONDITION)

    with_sidecar(world, body)


@pytest.mark.parametrize("message", [b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["no message", "no UTF-8"])
def test_bytes_that_are_not_a_request_are_an_invalid_argument(world, message):
    async def body(sidecar, channel):
        call = channel.unary_unary("/kar.ranking.v1.RankingService/Rank")
        assert "send a protobuf" in await refused(call(message), grpc.StatusCode.INVALID_ARGUMENT)

    with_sidecar(world, body)


def test_an_unexpected_exception_is_internal_and_its_text_is_only_logged(world, caplog):
    async def body(sidecar, channel):
        world.store.fault = RuntimeError("swordfish")
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity="ENTITY_KIND_USER", ids=["u1"])
        return await refused(stub.BatchGetKnowledge(request), grpc.StatusCode.INTERNAL)

    details = with_sidecar(world, body)
    assert "swordfish" not in details
    [logged] = [record for record in caplog.records if record.message.startswith("internal_error")]
    request_id = details.split()[1]
    assert request_id in logged.message
    assert "swordfish" in str(logged.exc_info)
