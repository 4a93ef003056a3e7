"""Candidates and their order, computed by hand: value is traffic times staleness."""

import pytest

from kar_offline.refresh.policy import (
    KnowledgeState,
    Policy,
    Reason,
    RefreshCandidate,
    refresh_candidates,
    within_budget,
)
from kar_sidecar.errors import InputError

pytestmark = pytest.mark.unit


def test_growth_is_due_from_k_events_on_and_its_staleness_is_the_share_of_new_events() -> None:
    known = [
        KnowledgeState("user", "9", 4, events=39, cutoff=30),
        KnowledgeState("user", "10", 4, events=40, cutoff=30),
    ]
    assert refresh_candidates(known, Policy(10)) == [RefreshCandidate("user", "10", (Reason.GROWN,), 4, 0.25)]


def test_the_strongest_reason_comes_first() -> None:
    state = KnowledgeState("user", "a", 2, events=40, cutoff=10, expired=True, template_changed=True)
    [one] = refresh_candidates([state], Policy(10))
    assert (one.reasons, one.value) == ((Reason.EXPIRED, Reason.GROWN, Reason.TEMPLATE), 2)


def test_an_entity_without_a_text_is_new_and_nothing_else() -> None:
    [one] = refresh_candidates([KnowledgeState("item", "a", 3, has_text=False, expired=True)], Policy())
    assert (one.reasons, one.value) == ((Reason.NEW,), 3)


def test_the_most_valuable_comes_first_and_ties_keep_one_order() -> None:
    states = [
        KnowledgeState("user", "b", 1, has_text=False),
        KnowledgeState("item", "b", 1, has_text=False),
        KnowledgeState("item", "a", 1, season_changed=True),
        KnowledgeState("item", "c", 6, template_changed=True),
        KnowledgeState("item", "d", 9),
    ]
    found = refresh_candidates(states, Policy())
    assert [(one.kind, one.id, one.value) for one in found] == [
        ("item", "c", 1.5),
        ("item", "a", 1),
        ("item", "b", 1),
        ("user", "b", 1),
    ]
    chosen, waiting = within_budget(found, 3)
    assert ([one.id for one in chosen], [one.id for one in waiting]) == (["c", "a", "b"], ["b"])
    assert within_budget(found, None) == (found, [])
    assert within_budget(found, 0) == ([], found)


def test_only_the_reasons_that_count_make_due() -> None:
    state = KnowledgeState("item", "a", 1, expired=True, template_changed=True)
    [one] = refresh_candidates([state], Policy(reasons=frozenset({Reason.TEMPLATE})))
    assert (one.reasons, one.staleness) == ((Reason.TEMPLATE,), 0.25)
    assert refresh_candidates([state], Policy(reasons=frozenset({Reason.NEW}))) == []


def test_only_the_kinds_that_count_are_due() -> None:
    known = [KnowledgeState("item", "a", 1, has_text=False), KnowledgeState("user", "a", 9, has_text=False)]
    assert [one.kind for one in refresh_candidates(known, Policy(kinds=frozenset({"item"})))] == ["item"]


@pytest.mark.parametrize("choices", [{"grown_by": 0}, {"reasons": frozenset()}, {"kinds": frozenset()}])
def test_an_empty_policy_is_refused(choices: dict) -> None:
    with pytest.raises(InputError, match="--grown-by of at least 1, one reason and one kind"):
        Policy(**choices)
