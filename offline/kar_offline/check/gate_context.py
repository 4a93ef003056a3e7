"""Owns what is known when a text is judged: of its entity (`Subject`), and of what was asked (`Rules`)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final

from kar_offline.check.facts import FactsTable, Film
from kar_offline.check.name_matching import Names, fold, person_forms, runs, title_forms, title_parts, year_of
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts.scenario import Scenario
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["Rules", "Subject", "subjects"]

NOUNS: Final[Mapping[str, tuple[str, ...]]] = {
    "film": ("film", "movie", "picture", "feature"),
    "book": ("book", "novel"),
}
"""Other words for what a scenario calls an item."""
MAKERS: Final = ("author", "authors", "artist", "artists", "writers", "director")
"""Facts of datasets that name people."""
PEOPLE: Final = re.compile(
    r"\b(?:directors?|actors?|cast|authors?|writers?|artists?|performers?|singers?|musicians?)\b"
)
INSTRUCTION: Final = 5
"""Words in a row of an instruction that no answer has by chance."""
COMMON: Final = frozenset(("and", "or", "of", "the", "a", "in"))
NOTHING: Final = Names.of(())
TEMPLATE_CODE: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is known of an entity that a text is about. Names are folded (see `names`)."""

    entity: EntityKind
    id: str
    names: Names = NOTHING
    """Item: its titles, and the people who made it or are in it. User: the titles of all items."""
    titles: frozenset[str] = frozenset()
    """Item: its titles. User: the titles of the items that the prompt shows."""
    later: frozenset[str] = frozenset()
    """User: the titles of items that came after the cut-off and that the prompt does not show."""
    directors: tuple[str, ...] = ()
    """Item: as written; empty where not known."""
    cast: tuple[str, ...] = ()
    """Item: as written; empty where not known."""
    years: tuple[int, ...] = ()
    """Item: when it came out, by one catalogue or several."""
    genres: frozenset[str] = frozenset()
    """Item: as catalogues write them."""
    withheld: Mapping[str, str] = field(default_factory=dict)
    """User: facts that the scenario does not allow in prompts, by name."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a scenario asks of the texts about one kind of entity."""

    language: str
    """ISO 639-1."""
    words: tuple[int, int]
    """The fewest and the most."""
    allowed: frozenset[str]
    """The facts that a text may mention."""
    nouns: tuple[str, ...]
    """What an item is called."""
    factors: tuple[str, ...] = ()
    """What was asked about, folded: those of several words."""
    instructions: frozenset[tuple[str, ...]] = frozenset()
    """Every few words in a row of the prompt's own lines, folded."""
    people: bool = False
    """Whether people were asked for, such as "director and leading actors"."""
    vocabulary: frozenset[str] = frozenset()
    """The words of factors and facts, which may be labels in a list but not in prose."""

    @staticmethod
    def of(scenario: Scenario, entity: EntityKind) -> "Rules":
        """The rules of a scenario, with the instructions of its template."""
        question = scenario.questions[entity]
        factors = tuple(folded for factor in question.factors if " " in (folded := fold(factor)))
        return Rules(
            language=scenario.language,
            words=question.words,
            allowed=frozenset(question.allowed),
            nouns=NOUNS.get(scenario.words.item, (scenario.words.item,)),
            factors=factors,
            instructions=frozenset(_runs(_template(question.template))),
            people=any(PEOPLE.search(factor) for factor in question.factors),
            vocabulary=frozenset(fold(" ".join((*question.factors, *question.allowed))).split()) - COMMON,
        )


def _template(name: str) -> str:
    source = resources.files("kar_offline.prompts").joinpath("templates", f"{name}.j2")
    return source.read_text() if source.is_file() else ""


def _runs(template: str) -> Iterator[tuple[str, ...]]:
    for line in TEMPLATE_CODE.split(template):
        yield from runs(fold(line).split(), INSTRUCTION)


def subjects(
    dataset: Dataset, scenario: Scenario, facts: FactsTable | None = None
) -> dict[tuple[EntityKind, str], Subject]:
    """What is known of every entity of a dataset, by kind and id."""
    titles = [str(item.facts.get(scenario.item.title) or "") for item in dataset.items]
    forms = [frozenset(title_forms(title)) for title in titles]
    every = Names.of(frozenset().union(*forms))
    found: dict[tuple[EntityKind, str], Subject] = {}
    for item, title in zip(dataset.items, titles, strict=True):
        found[ITEM, item.id] = _item(item, title, facts)
    for row, user in enumerate(dataset.users):
        events, end = dataset.prompt_events(row), int(dataset.offsets[row + 1])
        shown, later = (
            frozenset().union(*(forms[item] for item in set(dataset.event_item[part].tolist())))
            for part in (events, slice(events.stop, end))
        )
        withheld = {
            name: str(value)
            for name, value in user.facts.items()
            if name not in scenario.user.allowed and value not in (None, "")
        }
        found[USER, user.id] = Subject(USER, user.id, every, shown, later - shown, withheld=withheld)
    return found


def _item(item: Entity, title: str, facts: FactsTable | None) -> Subject:
    year = _year(item, title)
    film = (facts.find(title, year) if facts else None) or Film(title, year or 0)
    directors = tuple(dict.fromkeys((*_strings(item.facts.get("directors")), *film.directors)))
    cast = tuple(dict.fromkeys((*_strings(item.facts.get("cast")), *film.cast)))
    makers = [name for fact in MAKERS for name in _strings(item.facts.get(fact))]
    titles = frozenset((*title_forms(title), *title_parts(title)))
    people = [form for name in (*directors, *cast, *makers) for form in person_forms(name)]
    return Subject(
        ITEM,
        item.id,
        Names.of((*titles, *people)),
        titles,
        directors=directors,
        cast=cast,
        years=tuple(sorted({y for y in (year, film.year) if y})),
        genres=frozenset((*_strings(item.facts.get("genres")), *film.genres)),
    )


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(part for part in value if isinstance(part, str)) if isinstance(value, list | tuple) else ()


def _year(item: Entity, title: str) -> int | None:
    year = item.features.get("year", item.facts.get("year"))
    return int(year) if isinstance(year, int | float) and year == year else year_of(title)
