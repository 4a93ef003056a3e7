"""No sample comes before what its user's text was written from, and no text shows a later event, whatever arrives."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import PROMPT_EVENTS, Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TRAIN
from kar_offline.prompts import Renderer, load_scenario

pytestmark = pytest.mark.unit

Event = tuple[int, int, int]  # user, time, item
USERS, ITEMS = 3, 40
RENDERER = Renderer(load_scenario())

events = st.tuples(st.integers(0, USERS - 1), st.integers(0, 12), st.integers(0, ITEMS - 1))
logs = st.lists(events, max_size=90)
refreshes = st.lists(st.tuples(logs, st.sets(st.integers(0, USERS - 1))), min_size=1, max_size=4)


def columns(log: Sequence[Event]) -> dict[str, np.ndarray]:
    user, time, item = (np.array([event[n] for event in log], np.int64) for n in range(3))
    return {"user": user, "time": time, "item": item, "rating": np.full(len(log), 4, np.float32)}


def first(log: Sequence[Event]) -> Dataset:
    users = [Entity(f"u{row}", {}, {}) for row in range(USERS)]
    items = [Entity(f"i{row}", {}, {"title": f"<{row}>"}) for row in range(ITEMS)]
    schema = records_pb2.FeatureSchema(history_length=3)
    return Dataset.from_events("made", schema, users, items, **columns(log), positive_above=3)


def of_user(log: Sequence[Event], user: int) -> list[Event]:
    """In the order of time, then item; events that are the same stay as they came."""
    return sorted(event for event in log if event[0] == user)


@settings(deadline=None, max_examples=40)
@given(logs, refreshes)
def test_texts_and_samples_never_meet(log: list[Event], schedule: list[tuple[list[Event], set[int]]]) -> None:
    dataset = first(log)
    known = list(log)
    texts = {user: of_user(log, user)[: int(dataset.cutoff[user])] for user in range(USERS)}
    for arrived, due in schedule:
        dataset = dataset.extended([], [], **columns(arrived))
        known += arrived
        dataset = dataset.advanced(np.array(sorted(due), np.int64))
        texts |= {user: of_user(known, user) for user in due}
        for user in range(USERS):
            own, cutoff, text = of_user(known, user), int(dataset.cutoff[user]), texts[user]
            # What the text knows lies before the cut-off, event by event, and its number is a cut-off at most.
            before = list(own[:cutoff])
            for event in text:
                before.remove(event)
            assert len(text) <= cutoff
            sampled = dataset.sample_events[dataset.event_user[dataset.sample_events] == user]
            rows = zip(dataset.event_time[sampled].tolist(), dataset.event_item[sampled].tolist(), strict=True)
            assert [(user, *row) for row in rows] == own[cutoff:]
            # Nothing but what was known at the refresh is shown, the latest of it first of all.
            if user in due and own:
                prompt = RENDERER.about_user(dataset, user)
                shown = {item for item in range(ITEMS) if f"<{item}>" in prompt.prompt}
                assert shown == {item for _, _, item in text[-PROMPT_EVENTS:]}
                assert prompt.history_cutoff == len(text) == cutoff


def test_an_event_that_comes_late_falls_before_the_cutoff() -> None:
    dataset = first([(0, 10, 1), (0, 20, 2), (0, 30, 3), (0, 40, 4)])
    assert dataset.cutoff.tolist() == [2, 0, 0]
    late = dataset.extended([], [], **columns([(0, 15, 9), (0, 35, 8), (1, 5, 7)]))
    assert late.event_item.tolist() == [1, 9, 2, 3, 8, 4, 7]
    assert late.cutoff.tolist() == [3, 0, 0]
    assert late.event_item[late.sample_events].tolist() == [3, 8, 4, 7]


def test_prompts_show_the_last_events_before_a_cutoff_that_moved() -> None:
    dataset = first([(0, time, time) for time in range(10)]).extended(
        [], [], **columns([(0, 10 + n, 10 + n % 25) for n in range(30)])
    )
    assert dataset.prompt_events(0) == slice(0, 5)
    moved = dataset.advanced(np.array([0]))
    assert (moved.written_from(0), moved.prompt_events(0)) == (slice(0, 40), slice(10, 40))
    assert not len(moved.sample_events)
    assert dataset.cutoff[0] == 5


def test_new_entities_follow_those_that_are_there() -> None:
    dataset = first([(0, 1, 1), (0, 2, 2)])
    grown = dataset.extended(
        [Entity("new", {}, {})],
        [Entity("film", {}, {"title": "<film>"})],
        user=np.array([USERS]),
        item=np.array([ITEMS]),
        rating=np.array([5.0]),
        time=np.array([9]),
    )
    assert [user.id for user in grown.users] == ["u0", "u1", "u2", "new"]
    assert (grown.items[-1].id, grown.offsets.tolist()) == ("film", [0, 2, 2, 2, 3])
    assert (grown.cutoff.tolist(), grown.event_split.tolist()) == ([1, 0, 0, 0], [*dataset.event_split, TRAIN])
