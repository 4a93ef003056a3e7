from dataclasses import replace

import pytest

from kar.records.v1 import records_pb2
from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.name_matching import Names, Words, fold
from kar_offline.check.relevance import leak, subject
from kar_offline.prompts.scenario import load_scenario

pytestmark = pytest.mark.unit

RULES = Rules.of(load_scenario("movies"), "item")
PEOPLE = ("Michael Mann", "Al Pacino", "Robert De Niro", "Val Kilmer", "Jon Voight")


def item(title: str, *people: str) -> Subject:
    titles = frozenset((fold(title),))
    return Subject("item", "1", Names.of((*titles, *map(fold, people))), titles)


def user(shown: tuple[str, ...], later: tuple[str, ...] = (), others: tuple[str, ...] = ()) -> Subject:
    return Subject(
        "user",
        "1",
        Names.of(map(fold, (*shown, *later, *others))),
        frozenset(map(fold, shown)),
        frozenset(map(fold, later)),
    )


def outcome(gate: str, text: str, about: Subject) -> str:
    words = Words.of(text)
    mentions = tuple(words.mentions(about.names))
    found = subject(words, about, RULES, mentions) if gate == "subject" else leak(words, about, RULES, mentions)
    assert bool(found.reason) == (found.outcome != records_pb2.OUTCOME_PASSED)
    return records_pb2.Outcome.Name(found.outcome).removeprefix("OUTCOME_").lower()


@pytest.mark.parametrize(
    ("text", "about", "expected"),
    [
        ("Michael Mann's crime epic.", item("Heat", *PEOPLE), "passed"),
        ("Heat, with Al Pacino.", item("Heat", *PEOPLE), "passed"),
        ("Heat is a must-see for lovers of cinema.", item("Heat", *PEOPLE), "failed"),
        ("Heat is a must-see for lovers of cinema.", item("Heat", *PEOPLE[:4]), "passed"),
        ("George Lucas's space adventure.", item("Heat", *PEOPLE), "failed"),
        ("George Lucas's space adventure.", item("Heat"), "unknown"),
        ("A gripping film about crime and its price.", item("Heat"), "failed"),
        ("A gripping film about the heat of crime.", item("Heat"), "failed"),
        ("M is about a killer.", item("M"), "passed"),
        ("A story by James M. Cain.", item("Heat"), "unknown"),
        ("", item("Heat"), "failed"),
        ("word", item("Heat"), "failed"),
        ("Anything at all.", Subject("item", "1"), "unknown"),
    ],
)
def test_a_text_about_an_item_names_it_or_its_people(text: str, about: Subject, expected: str) -> None:
    assert outcome("subject", text, about) == expected


def test_people_are_missed_only_where_they_were_asked_for() -> None:
    scenario = load_scenario("movies")
    silent = scenario.item.model_copy(update={"factors": ("genre", "plot and theme")})
    rules = Rules.of(scenario.model_copy(update={"item": silent}), "item")
    words, about = Words.of("Heat is a must-see for lovers of cinema."), item("Heat", *PEOPLE)
    mentions = tuple(words.mentions(about.names))
    assert subject(words, about, rules, mentions).outcome == records_pb2.OUTCOME_PASSED
    assert subject(words, about, RULES, mentions).outcome == records_pb2.OUTCOME_FAILED


SHOWN = ("Heat", "Casino", "The Usual Suspects")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Loves Heat and 'Casino'.", "passed"),
        ("Loves crime and suspense.", "failed"),
        ("Loves Heat, but 'Big', 'Jaws' and 'Fargo' fail.", "failed"),
        ("Loves Heat, but not the Jaws films.", "passed"),
        ("", "failed"),
    ],
)
def test_a_text_about_a_user_names_what_the_prompt_shows(text: str, expected: str) -> None:
    assert outcome("subject", text, user(SHOWN, others=("Big", "Jaws", "Fargo"))) == expected


def test_a_user_without_a_history_cannot_be_told() -> None:
    assert outcome("subject", "Loves Heat.", user((), others=("Heat",))) == "unknown"
    assert outcome("leak", "Loves Heat.", user((), others=("Heat",))) == "passed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Gave five stars to 'Big'.", "failed"),
        ("Gave five stars to Pulp Fiction.", "failed"),
        ("Five stars go to Heat, Big and Casino.", "failed"),
        ("They should enjoy 'Big' and Pulp Fiction.", "passed"),
        ("Loves Heat. Offer Pulp Fiction next.", "passed"),
        ("Expect praise for L.A. Confidential and Pulp Fiction. Loves Heat.", "passed"),
        ("Recommended crime. Pulp Fiction got five stars.", "failed"),
        ("A big fan of heat.", "passed"),
        ("Big hopes are dashed by Casino.", "passed"),
        ("Loves the Pulp Fiction school of crime.", "passed"),
        ("Both Star Wars sequels get five.", "passed"),
        ("Star Wars and its sequels get five.", "passed"),
        ("Free Willy 3 gets two.", "passed"),
        ("Free Willy gets two.", "failed"),
        ("Calls Sling Blade a marvel.", "passed"),  # short for what the prompt shows
        ("", "passed"),
    ],
)
def test_what_came_later_is_told_from_guesses_series_and_words(text: str, expected: str) -> None:
    shown = (*SHOWN, "Some Folks Call It a Sling Blade")
    about = user(shown, later=("Big", "Pulp Fiction", "Star Wars", "Free Willy", "Sling Blade"))
    assert outcome("leak", text, about) == expected


def test_what_nobody_rated_is_no_leak() -> None:
    assert outcome("leak", "Gave five stars to 'Big'.", user(SHOWN, others=("Big",))) == "passed"


def test_guesses_are_told_in_english_alone() -> None:
    german = replace(RULES, language="de")
    about, words = user(SHOWN, later=("Big",)), Words.of("Liebt Heat und bestimmt auch 'Big'.")
    mentions = tuple(words.mentions(about.names))
    assert leak(words, about, german, mentions).outcome == records_pb2.OUTCOME_UNKNOWN
    assert leak(words, about, RULES, mentions).outcome == records_pb2.OUTCOME_FAILED


def test_headlines_need_not_be_repeated() -> None:
    headlines = ("Rain delays the opening of the new bridge", "Harbour workers end their strike after nine days")
    assert outcome("subject", "Reads about weather and work.", user(headlines)) == "unknown"
    assert outcome("subject", "Reads about weather and work.", user((*headlines, "Heat", "Big"))) == "failed"
    assert outcome("subject", "Read 'Rain delays the opening of the new bridge'.", user(headlines)) == "passed"


def test_items_have_no_cut_off() -> None:
    assert outcome("leak", "Heat is like 'Big'.", item("Heat")) == "passed"
