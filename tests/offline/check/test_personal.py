from dataclasses import replace

import pytest

from kar.records.v1 import records_pb2
from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.name_matching import Words
from kar_offline.check.personal import personal
from kar_offline.prompts.scenario import load_scenario

pytestmark = pytest.mark.unit

ITEM = Rules.of(load_scenario("movies"), "item")
USER = Rules.of(load_scenario("movies"), "user")
DEMOGRAPHICS = {"age", "gender", "occupation"}


def outcome(text: str, about: Subject, rules: Rules) -> str:
    found = personal(Words.of(text), about, rules)
    assert bool(found.reason) == (found.outcome != records_pb2.OUTCOME_PASSED)
    return records_pb2.Outcome.Name(found.outcome).removeprefix("OUTCOME_").lower()


@pytest.mark.parametrize(
    "text",
    [
        "Write to anna.berg@example.org today.",
        "Follow @late_night today.",
        "Call (555) 010-4477 today.",
        "Call 555-010-4477 today.",
        "Call +44 20 7946 0958 today.",
        "Call 030 1234567 today.",
        "Her number is 078-05-1120.",
        "Pay with 4111 1111 1111 1111 today.",
        "Lives at 12 Harbour View Road, Springfield 62704.",
        "Lives at 221B Baker Street, London NW1 6XE.",
    ],
)
def test_contact_details_fail_anywhere(text: str) -> None:
    assert outcome(text, Subject("item", "1"), ITEM) == "failed"
    assert outcome(text, Subject("user", "1"), USER) == "failed"


@pytest.mark.parametrize(
    "text",
    [
        "20,000 Leagues Under the Sea, 2001 and 8 1/2 span 1954-1968.",
        "From 1914 to 1918, in 12 weeks, on 10-11-1918, at 3:10 to Yuma.",
        "84 Charing Cross Road and 42nd Street are about addresses.",
        "He lives at 221B Baker Street, London.",
        "Room 4111 1111 1111 1112 is no card, for its check digit is wrong.",
        "A $200,000,000 film that took 1 843 201 268 dollars.",
        "",
    ],
)
def test_numbers_of_films_are_no_contact_details(text: str) -> None:
    assert outcome(text, Subject("item", "1"), ITEM) == "passed"


TELLING = [
    ("age", "A 34-year-old viewer likes crime."),
    ("age", "This fifty-six-year-old likes crime."),
    ("age", "A woman in her fifties likes crime."),
    ("age", "A young viewer of crime."),
    ("gender", "This viewer likes crime. He gives fives."),
    ("gender", "Her fives go to crime."),
    ("gender", "A marketing man with a liking for crime."),
    ("occupation", "An engineer with a liking for crime."),
    ("occupation", "Crime is what this librarian likes."),
]


@pytest.mark.parametrize(("fact", "text"), TELLING)
def test_demographics_follow_the_list_of_what_is_allowed(fact: str, text: str) -> None:
    assert {"age", "gender", "occupation"} == USER.allowed
    assert outcome(text, Subject("user", "1"), USER) == "passed"
    without = replace(USER, allowed=USER.allowed - {fact})
    found = personal(Words.of(text), Subject("user", "1"), without)
    assert found.outcome == records_pb2.OUTCOME_FAILED
    assert found.reason.startswith(f"tells the {fact}, which the scenario withholds")


@pytest.mark.parametrize(
    "text",
    [
        "A viewer of crime who likes a young hero, an old lawyer's tale and a 20-year-old film.",
        "This viewer likes what writers and directors do, and films in which students rebel.",
        "",
    ],
)
def test_people_in_films_tell_nothing_of_the_user(text: str) -> None:
    assert outcome(text, Subject("user", "1"), replace(USER, allowed=frozenset())) == "passed"


@pytest.mark.parametrize(
    ("withheld", "text", "expected"),
    [
        ({"name": "Maria Lopez"}, "What María López likes is crime.", "failed"),
        ({"name": "Maria Lopez"}, "What Maria likes is crime.", "passed"),
        ({"zip": "94043"}, "Crime is liked in 94043, too.", "failed"),
        ({"zip": "94043"}, "Crime is liked in 940433, too.", "passed"),
        ({"city": "Berlin"}, "Crime in Berlin is liked.", "failed"),
        ({"taste": "drama"}, "A drama of crime is liked.", "failed"),
        ({"taste": "drama"}, f"{'Crime is liked. ' * 11} A drama is liked.", "passed"),
        ({"note": "x (a+"}, "Crime is liked.", "passed"),
        ({"flag": "no"}, "There is no crime.", "passed"),
    ],
)
def test_withheld_facts_must_not_come_back(withheld: dict[str, str], text: str, expected: str) -> None:
    assert outcome(text, Subject("user", "1", withheld=withheld), USER) == expected


def test_what_is_withheld_of_users_is_nothing_to_items() -> None:
    assert (
        outcome("He is a 34-year-old engineer.", Subject("item", "1"), replace(ITEM, allowed=frozenset())) == "passed"
    )
