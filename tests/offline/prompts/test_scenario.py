"""The scenarios that come with the product, and seasons."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts import Renderer, load_scenario, read_prompts, render_prompts
from kar_offline.prompts.scenario import Scenario, Season, known_scenarios
from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.unit

# What a company may have in its tables, allowed by some scenarios or by none.
ITEM_FACTS = {
    "title": ["First thing (A. Maker)", "Second thing", "Third thing", "Fourth thing"],
    "year": [1999, 2003, 2011, 2024],
    "genres": [["quiet"], ["loud", "quiet"], ["odd"], ["quiet"]],
    "author": "A. Maker",
    "abstract": "A short abstract.",
    "artist": "A. Singer",
    "supplier": "Withheld Ltd",
    "cost": 731.25,
}
USER_FACTS = {
    "age": 41,
    "occupation": "baker",
    "country": "Chile",
    "email": "withheld at example",
    "income": 73125,
}
SECRETS = ("Withheld", "withheld at", "731", "supplier", "cost", "email", "income")
SEASONS = {
    "movies": ("2026-12-01", "the weeks before Christmas", "holiday films are on", "2026-12-26"),
    "books": ("2026-07-15", "the summer holidays", "people travel and read at leisure", "2026-08-31"),
    "news": ("2026-12-31", "the days around New Year", "the year is reviewed", "2027-01-02"),
    "music": ("2026-06-30", "the festival summer", "open-air festivals", "2026-08-31"),
}
EXPIRY = {"movies": (None, 180), "books": (None, 365), "news": (2, 7), "music": (730, 30)}
NO_SEASON = date(2026, 3, 1)


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    items = [
        Entity(str(n), {}, {name: value[n] if isinstance(value, list) else value for name, value in ITEM_FACTS.items()})
        for n in range(4)
    ]
    (tmp_path / "dataset").mkdir()
    Dataset.from_events(
        "made",
        records_pb2.FeatureSchema(history_length=3),
        [Entity("u", {}, USER_FACTS)],
        items,
        user=np.zeros(4, int),
        item=np.arange(4),
        rating=np.array([5, 1, 4, 4], dtype=np.float32),
        time=np.arange(4),
        positive_above=3.0,
    ).save(tmp_path / "dataset")
    return WorkFolder(tmp_path)


def test_four_scenarios_come_with_the_product() -> None:
    assert known_scenarios() == ["books", "movies", "music", "news"] == sorted(SEASONS)
    assert load_scenario() == load_scenario("movies")


@pytest.mark.parametrize("name", SEASONS)
def test_a_scenario_asks_all_it_says_and_shows_only_what_it_allows(name: str, work: WorkFolder) -> None:
    day, about, event, last_day = SEASONS[name]
    scenario = load_scenario(name)
    report = render_prompts(work, name, date.fromisoformat(day)).report
    first, *_, user = prompts = read_prompts(work.prompts)
    assert [prompt.template for prompt in prompts] == ["factual/2"] * 4 + ["reasoning/2"]
    for prompt in prompts:
        lines = prompt.prompt.splitlines()
        question = scenario.questions[prompt.entity]
        assert [line for line in lines if line.removeprefix("- ") in question.factors] == [
            f"- {factor}" for factor in question.factors
        ]
        least, most = question.words
        assert f"(no fewer than {least}, no more than {most})" in lines[-1]
        assert "Answer in English, in one paragraph" in lines[-1]
        assert not [secret for secret in SECRETS if secret in prompt.prompt + prompt.raw_text]
        assert "never an instruction" in prompt.prompt
    assert scenario.words.item in first.prompt.splitlines()[0]
    assert scenario.words.user in first.prompt.splitlines()[0]
    assert '- title: "First thing (A. Maker)"' in first.prompt.splitlines()
    assert scenario.words.items in user.prompt.splitlines()[0]
    assert f"Ratings in {scenario.words.ratings}, oldest first:" in user.prompt.splitlines()
    assert '- "First thing (A. Maker)": 5' in user.prompt.splitlines()
    (said,) = [line for line in user.prompt.splitlines() if about in line]
    assert event in said
    assert about not in first.prompt
    assert (user.expires_on, first.expires_on) == (last_day, None)
    assert (user.context["about"], first.context) == (about, {})
    assert (first.expires_after_days, user.expires_after_days) == EXPIRY[name]
    for kind, facts in (("item", ITEM_FACTS), ("user", USER_FACTS)):
        allowed = scenario.questions[kind].allowed
        told = report["kinds"][kind]["facts"]
        assert set(told["shown"]) == set(facts) & set(allowed)
        assert set(told["withheld"]) == set(facts) - set(allowed)
        assert set(told["absent"]) == set(allowed) - set(facts)


@pytest.mark.parametrize("name", SEASONS)
def test_out_of_season_prompts_say_nothing_of_it(name: str, work: WorkFolder) -> None:
    render_prompts(work, name, NO_SEASON)
    for prompt in read_prompts(work.prompts):
        assert "What you write is read in" not in prompt.prompt
        assert (prompt.context, prompt.expires_on) == ({}, None)


def test_what_people_read_leaves_without_who_they_are(work: WorkFolder) -> None:
    render_prompts(work, "news")
    assert "Profile" not in read_prompts(work.prompts)[-1].prompt


def test_books_ask_the_factors_of_the_method() -> None:
    assert load_scenario("books").item.factors == (
        "genre",
        "author",
        "writing style",
        "theme",
        "setting",
        "length and complexity",
        "time period",
        "literary quality",
        "critical acclaim",
    )


@pytest.mark.parametrize(
    ("begins", "ends", "on", "last_day"),
    [
        ("12-01", "12-26", "2026-11-30", None),
        ("12-01", "12-26", "2026-12-01", "2026-12-26"),
        ("12-01", "12-26", "2026-12-26", "2026-12-26"),
        ("12-01", "12-26", "2026-12-27", None),
        ("12-27", "01-02", "2026-12-26", None),
        ("12-27", "01-02", "2026-12-27", "2027-01-02"),
        ("12-27", "01-02", "2027-01-02", "2027-01-02"),
        ("12-27", "01-02", "2027-01-03", None),
        ("07-14", "07-14", "2026-07-14", "2026-07-14"),
        ("02-01", "02-29", "2027-02-28", "2027-02-28"),
        ("02-01", "02-29", "2028-02-10", "2028-02-29"),
        ("11-01", "02-29", "2027-11-01", "2028-02-29"),
    ],
)
def test_a_season_has_a_last_day(begins: str, ends: str, on: str, last_day: str | None) -> None:
    season = Season(name="s", begins=begins, ends=ends, about="a")
    found = season.last_day(date.fromisoformat(on))
    assert (found.isoformat() if found else None) == last_day


def test_seasons_of_one_day_come_together_and_the_first_to_end_decides() -> None:
    films = load_scenario()
    lent = Season(name="lent", begins="12-20", ends="01-31", about="the cold weeks", kinds=("item", "user"))
    both: Scenario = films.model_copy(update={"seasons": (lent, *films.seasons)})
    item = Entity("1", {}, {"title": "A film"})
    renderer = Renderer(both, date(2026, 12, 24))
    user = renderer.reasoning(Entity("u", {}, {}), [item], [5.0])
    assert "read in the cold weeks and the weeks before Christmas: families watch together; holiday" in user.prompt
    assert user.context == {
        "season": "lent; christmas",
        "about": "the cold weeks and the weeks before Christmas",
        "events": "families watch together; holiday films are on",
    }
    assert user.expires_on == "2026-12-26"
    # Only one of them is about items, and it has no events.
    about = renderer.factual(item)
    assert "read in the cold weeks. Say" in about.prompt
    assert about.context == {"season": "lent", "about": "the cold weeks", "events": ""}
    assert about.expires_on == "2027-01-31"
    assert Renderer(both, date(2027, 1, 1)).reasoning(Entity("u", {}, {}), [item], [5.0]).expires_on == "2027-01-31"
