"""When a batch is read in part, a request lacks the entities that were not read, and nothing else."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
from tests.support.ranking import rank, rank_request, read_knowledge

from kar.ranking.v1 import ranking_pb2
from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import DeadlineError, IncompleteError, UnavailableError
from kar_sidecar.store import EntityKey, Record, Store
from kar_sidecar.store.memory import MemoryStore
from kar_sidecar.telemetry import Telemetry

pytestmark = pytest.mark.unit

NEUTRAL = records_pb2.KNOWLEDGE_LEVEL_NEUTRAL


class FaultyStore:
    """A `Store` that cannot read some entities, as if their server were lost."""

    blocking = False

    def __init__(self, store: Store, lost: Iterable[EntityKey]) -> None:
        self.store, self.lost = store, set(lost)
        self.write, self.remove_part = store.write, store.remove_part
        self.read_meta, self.write_meta, self.close = store.read_meta, store.write_meta, store.close

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        records = self.store.read(keys, parts, timeout_s)
        unread = [at for at, key in enumerate(keys) if key in self.lost]
        if not unread:
            return records
        if len(unread) == len(keys):
            raise DeadlineError("the server did not answer: add capacity")
        absent: Record = (None,) * len(parts)
        found = [absent if at in unread else record for at, record in enumerate(records)]
        raise IncompleteError(f"{len(unread)} of {len(keys)} records were not read: wait", found, unread)


def answers(world, lost, *requests):
    telemetry = Telemetry()
    faulty = replace(world, store=FaultyStore(world.store, lost))
    answer = rank(faulty, *requests, telemetry=telemetry)
    return answer, telemetry.registry.get_sample_value("kar_backend_failures_total", {"backend": "store"})


def test_unread_items_are_neutral_and_the_others_unchanged(world):
    whole = rank(world, rank_request())
    answer, failures = answers(world, [EntityKey(ITEM, "i1")], rank_request())
    assert answer.rung == ranking_pb2.RUNG_KNOWLEDGE
    assert answer.reason == "store: 1 of 4 records were not read: wait"
    assert failures == 1
    at = list(rank_request().candidates.ids).index("i1")
    assert [
        row for row, (ours, theirs) in enumerate(zip(answer.scores, whole.scores, strict=True)) if ours != theirs
    ] == [at]
    expected = list(whole.item_levels)
    expected[at] = NEUTRAL
    assert list(answer.item_levels) == expected
    assert answer.user_level == whole.user_level == records_pb2.KNOWLEDGE_LEVEL_FULL


def test_an_unread_user_counts_as_unknown_and_candidates_keep_their_knowledge(world):
    whole = rank(world, rank_request())
    answer, failures = answers(world, [EntityKey(USER, "u1")], rank_request())
    stranger = rank(world, rank_request(user="nobody"))
    assert list(answer.scores) == list(stranger.scores)
    assert list(answer.item_levels) == list(whole.item_levels)
    assert (answer.user_level, failures) == (NEUTRAL, 1)


def test_unread_rated_items_lack_only_their_affinity(affine):
    whole = rank(affine, rank_request())
    assert whole.user_level == records_pb2.KNOWLEDGE_LEVEL_FULL
    answer, failures = answers(affine, [EntityKey(ITEM, "i3")], rank_request())  # the last one that u1 rated
    assert answer.reason == "store: 1 of 2 records were not read: wait"
    assert failures == 1
    assert list(answer.item_levels) == list(whole.item_levels)
    assert answer.user_level == NEUTRAL


def test_a_batch_without_a_single_record_is_a_failed_read(world):
    answer, failures = answers(
        world, [EntityKey(USER, "u1"), *(EntityKey(ITEM, f"i{n}") for n in range(1, 5))], rank_request()
    )
    assert answer.reason == "store: the server did not answer: add capacity"
    assert set(answer.item_levels) == {NEUTRAL}
    assert failures == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (IncompleteError("1 of 1 records were not read: wait", [(None,)], [0]), nullcontext()),
        (UnavailableError("the server is gone: start it"), pytest.raises(UnavailableError, match="is gone")),
        (DeadlineError("the server did not answer: wait"), pytest.raises(DeadlineError, match="did not answer")),
        (TimeoutError(), pytest.raises(DeadlineError, match="no answer within 30000")),
    ],
)
def test_a_failed_read_of_batch_get_knowledge_is_counted_once(world, fault, told):
    telemetry = Telemetry()
    with told:
        read_knowledge(world, ITEM, "i1", telemetry=telemetry, before=lambda: setattr(world.store, "fault", fault))
    assert telemetry.registry.get_sample_value("kar_backend_failures_total", {"backend": "store"}) == 1


def test_callers_that_do_not_handle_partial_reads_see_an_unavailable_store():
    store = FaultyStore(MemoryStore(), [EntityKey(ITEM, "i1")])
    with pytest.raises(UnavailableError) as caught:
        store.read([EntityKey(ITEM, "i1"), EntityKey(ITEM, "i2")], ["a", "b"])
    assert isinstance(caught.value, IncompleteError)
    assert (caught.value.records, caught.value.unread) == ([(None, None), (None, None)], [0])
