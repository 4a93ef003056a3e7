"""The keys that a request reads; test_ranker.py covers whole requests, test_partial_reads.py failed reads."""

import pytest

from kar.ranking.v1.ranking_pb2 import Candidates, RankRequest, User
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.ranking.fetch import entity_keys, nothing_read
from kar_sidecar.ranking.request import read_query
from kar_sidecar.store import EntityKey

pytestmark = pytest.mark.unit


def test_one_batch_reads_the_user_and_every_candidate(world):
    query = read_query(RankRequest(user=User(id="u"), candidates=Candidates(ids=["a", "b", "a"])), world.served(), 9)
    assert entity_keys(query) == [
        EntityKey(USER, "u"),
        EntityKey(ITEM, "a"),
        EntityKey(ITEM, "b"),
        EntityKey(ITEM, "a"),
    ]


def test_without_a_read_every_key_has_an_absent_record(world):
    query = read_query(RankRequest(user=User(id="u1"), candidates=Candidates(ids=["a", "b", "a"])), world.served(), 9)
    fetched = nothing_read(query, world.served(), "knowledge")  # which reads features and vectors
    assert fetched.records == [(None, None)] * 4
    assert (fetched.user.history.item_ids, fetched.user.features_written_at_ms) == ((), 0)
    assert (fetched.user.fault, fetched.rated_vectors) == ("", [])
