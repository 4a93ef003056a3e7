"""The Python client against a running sidecar."""

import asyncio

import numpy as np
import pytest
from tests.support.running_sidecar import PATIENCE_S, with_sidecar

from kar_sidecar.client import KarClient
from kar_sidecar.errors import InputError, UnavailableError

pytestmark = pytest.mark.service


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


def test_the_client_raises_when_no_server_answers(world):
    async def body(sidecar, channel):
        return sidecar.addresses.grpc

    gone = with_sidecar(world, body)
    with KarClient(gone, timeout_s=PATIENCE_S) as client, pytest.raises(UnavailableError):
        client.rank("u1", ["i1"])
