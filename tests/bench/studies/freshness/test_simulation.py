"""A simulated budget: the days of a month by hand, the calls that budgets buy, and template-made texts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tests.support.event_logs import GENRES, random_event_log

from kar_bench.studies.freshness.simulation import NEVER, Month, preference_text, simulate
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.refresh.policy import Reason
from kar_sidecar.errors import InputError, PreconditionError


def month_of(dataset):
    return Month.of(dataset, share=0.5, days=2)


def test_the_days_of_a_month_by_hand(small_log):
    month = month_of(small_log)
    # Four of eight events come before day 2; the month is days 2 and 3.
    assert (month.first, month.end) == (2, 4)
    assert month.dataset.event_user.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert month.event_day.tolist() == [0, 0, 1, 3, 1, 2, 2]
    assert month.dataset.event_split.tolist() == [TRAIN, TRAIN, VALIDATION, TEST, VALIDATION, TEST, TEST]
    assert month.dataset.samples(TEST).tolist() == [3, 5, 6]
    assert month.item_day.tolist() == [0, 0, 1, NEVER]
    assert month.events_by_morning.tolist() == [0, 0, 2, 3, 0, 1, 1]


def test_a_log_without_a_clock_or_without_a_month_is_refused(small_log):
    with pytest.raises(PreconditionError, match="has no times"):
        month_of(replace(small_log, shared_clock=False))
    with pytest.raises(InputError, match="begins after a share"):
        Month.of(small_log, share=1, days=2)
    with pytest.raises(PreconditionError, match="too few events"):
        Month.of(small_log, share=0.01, days=2)


def test_one_call_a_day_by_hand(small_log):
    # Evening 0: user 0 with two events before items with one each. Evening 1: item 0 with two before all with one.
    # Evening 2: user 1 with three before items 1 and 2 with two. Evening 3: item 1 with three.
    history = simulate(month_of(small_log), ("item", "user"), 1)
    assert [(call.day, call.kind, call.row, call.cutoff, call.reason) for call in history.calls] == [
        (0, "user", 0, 2, Reason.NEW),
        (1, "item", 0, 0, Reason.NEW),
        (2, "user", 1, 3, Reason.NEW),
        (3, "item", 1, 0, Reason.NEW),
    ]
    assert history.waiting.tolist() == [2, 3, 2, 1]
    assert history.asked_on(4).tolist() == [1, 3, NEVER, NEVER]
    # User 0 has a text on days 1 and 3, user 1 would from day 3 on.
    assert history.version_at(month_of(small_log)).tolist() == [-1, -1, 0, 0, -1, -1, -1]


@pytest.mark.parametrize("kinds", [("item",), ("item", "user")])
def test_no_budget_asks_nothing_and_any_number_leaves_nothing_waiting(kinds):
    month = month_of(random_event_log())
    nothing, everything = simulate(month, kinds, 0), simulate(month, kinds, None)
    assert nothing.calls == ()
    assert nothing.waiting[-1] >= len(np.unique(month.dataset.event_item))
    assert not everything.waiting.any()
    assert {call.row for call in everything.calls if call.kind == "item"} == set(month.dataset.event_item.tolist())
    assert {call.kind for call in everything.calls} == set(kinds)


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_day_never_takes_more_calls_than_its_budget(budget):
    history = simulate(month_of(random_event_log()), ("item", "user"), budget)
    calls_of_day = Counter(call.day for call in history.calls)
    assert max(calls_of_day.values()) == budget
    # What waits is asked about before a call is left over.
    assert all(history.waiting[day] == 0 for day in range(len(history.waiting)) if calls_of_day[day] < budget)


def test_texts_about_users_know_what_there_was_on_their_evening_and_are_in_use_the_day_after():
    month = month_of(random_event_log())
    history = simulate(month, ("item", "user"), 4)
    start = month.dataset.offsets
    for call in history.versions:
        own = month.event_day[start[call.row] : start[call.row + 1]]
        assert call.cutoff == np.sum(own <= call.day)
    version = history.version_at(month)
    for event, number in enumerate(version.tolist()):
        earlier = [
            at
            for at, call in enumerate(history.versions)
            if call.row == month.dataset.event_user[event] and call.day < month.event_day[event]
        ]
        assert number == (earlier[-1] if earlier else -1)
        if number >= 0:
            assert history.versions[number].cutoff <= event - start[month.dataset.event_user[event]]
    grown = [call for call in history.versions if call.reason is Reason.GROWN]
    assert grown
    for call in grown:
        before = [one for one in history.versions if one.row == call.row and one.day < call.day][-1]
        assert call.cutoff - before.cutoff >= 10


def test_a_template_made_text_by_hand():
    films = [Entity(str(n), {}, {"title": f"Film {n}", "genres": [GENRES[n % 3]]}) for n in range(4)]
    # Mean 3: War +2 - 1 = 1, Drama 1, Comedy -2.
    refused = preference_text(list(zip(films, [5, 4, 1, 2], strict=True)))
    assert refused == "Likes the genres Drama, War. Enjoyed Film 0, Film 1. Likes less the genres Comedy. " + (
        "Did not enjoy Film 2, Film 3."
    )
    assert preference_text([(Entity("7", {}, {}), 3.0)]) == "Enjoyed 7."
