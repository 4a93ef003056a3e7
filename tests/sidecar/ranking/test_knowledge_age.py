"""Ages of served vectors are counted, and expired vectors are marked, in Rank and in BatchGetKnowledge."""

import numpy as np
import pytest
from tests.support.ranking import rank, rank_request, read_knowledge

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.store import EntityKey, vector_part
from kar_sidecar.store.records import encode_vectors
from kar_sidecar.telemetry import Telemetry

pytestmark = pytest.mark.unit

FULL, STALE = records_pb2.KNOWLEDGE_LEVEL_FULL, records_pb2.KNOWLEDGE_LEVEL_STALE
NEIGHBOUR, NEUTRAL = records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR, records_pb2.KNOWLEDGE_LEVEL_NEUTRAL
HOUR_MS = 3_600_000
WRITTEN_MS = 1_000_000
"""Time of writing of the tiny world's vectors; the vectors of i3 expired in 1970."""


def rank_items(world, *items, at_ms, arm="knowledge"):
    """The response for `items` at a time of day, and the telemetry."""
    telemetry = Telemetry()
    return rank(world, rank_request(*items, arm=arm, explain=True), telemetry=telemetry, at_ms=at_ms), telemetry


def batch(world, kind, *ids, at_ms):
    telemetry = Telemetry()
    return read_knowledge(world, kind, *ids, telemetry=telemetry, at_ms=at_ms), telemetry


def sample(telemetry, name, **labels):
    return telemetry.registry.get_sample_value(name, labels)


def ages(telemetry, entity, hours):
    return sample(telemetry, "kar_knowledge_age_hours_bucket", entity=entity, le=hours)


def test_ages_of_served_vectors_are_counted_by_hours(world):
    answer, telemetry = rank_items(world, "i1", "i2", "i3", "i4", at_ms=WRITTEN_MS + 24 * HOUR_MS)
    assert list(answer.item_levels) == [FULL, NEIGHBOUR, STALE, NEUTRAL]
    # i4 has no vector; a day is at most 24 hours.
    for entity, count in (("user", 1), ("item", 3)):
        assert [ages(telemetry, entity, le) for le in ("6.0", "24.0", "+Inf")] == [0, count, count]
        assert sample(telemetry, "kar_knowledge_age_hours_sum", entity=entity) == 24 * count
        assert sample(telemetry, "kar_knowledge_age_hours_count", entity=entity) == count
    assert sample(telemetry, "kar_knowledge_expired_total", entity="item") == 1
    assert sample(telemetry, "kar_knowledge_expired_total", entity="user") == 0
    assert answer.explanation.knowledge_written_at.ToMilliseconds() == WRITTEN_MS


def test_the_control_arm_reads_no_knowledge(world):
    answer, telemetry = rank_items(world, "i1", "i3", at_ms=WRITTEN_MS, arm="control")
    assert ages(telemetry, "item", "+Inf") == 0
    assert sample(telemetry, "kar_knowledge_expired_total", entity="item") == 0
    assert not answer.explanation.HasField("knowledge_written_at")


def write_affinity(world, *, expires_at_ms):
    """i1's and i3's affinity vectors, i3's with an expiry."""
    space = "cccccccccccc"
    for name, expiry in (("i1", 0), ("i3", expires_at_ms)):
        [blob] = encode_vectors(np.ones((1, 2)), space, written_at_ms=WRITTEN_MS, expires_at_ms=expiry)
        world.store.write(vector_part(space), [(EntityKey(ITEM, name), blob)])


def test_an_item_is_stale_when_only_its_affinity_vector_is_expired(affine):
    write_affinity(affine, expires_at_ms=WRITTEN_MS + 10)
    part = vector_part("aaaaaaaaaaaa")
    [blob] = encode_vectors(np.ones((1, 2)), "aaaaaaaaaaaa", written_at_ms=WRITTEN_MS)
    affine.store.write(part, [(EntityKey(ITEM, "i3"), blob)])
    answer, _ = rank_items(affine, "i1", "i3", at_ms=WRITTEN_MS + 9)
    assert list(answer.item_levels) == [FULL, FULL]
    answer, telemetry = rank_items(affine, "i1", "i3", at_ms=WRITTEN_MS + 10)
    assert list(answer.item_levels) == [FULL, STALE]
    # Of u1's last two rated items one is i3, the other has no vector.
    assert sample(telemetry, "kar_knowledge_expired_total", entity="history") == 1
    assert ages(telemetry, "history", "+Inf") == 1
    assert sample(telemetry, "kar_knowledge_expired_total", entity="item") == 1
    # Each item has two vectors, of knowledge and of affinity; the user's own is not read.
    assert (ages(telemetry, "item", "+Inf"), ages(telemetry, "user", "+Inf")) == (4, 0)


def test_batch_get_knowledge_gives_the_times_of_writing_and_counts_the_ages(world):
    answer, telemetry = batch(world, ITEM, "i1", "i3", "i4", at_ms=WRITTEN_MS + 2 * HOUR_MS)
    assert list(answer.levels) == [FULL, STALE, NEUTRAL]
    assert list(answer.written_at_ms) == [WRITTEN_MS, WRITTEN_MS, 0]
    assert [ages(telemetry, "item", le) for le in ("1.0", "6.0")] == [0, 2]
    assert sample(telemetry, "kar_knowledge_expired_total", entity="item") == 1
    assert sample(telemetry, "kar_knowledge_levels_total", entity="item", level="stale") == 1
    _, telemetry = batch(world, USER, "u1", at_ms=WRITTEN_MS)
    assert sample(telemetry, "kar_knowledge_levels_total", entity="user", level="full") == 1


def test_every_age_series_exists_from_the_start():
    telemetry = Telemetry()
    for entity in ("user", "item", "history"):
        assert ages(telemetry, entity, "+Inf") == 0
        assert sample(telemetry, "kar_knowledge_expired_total", entity=entity) == 0
