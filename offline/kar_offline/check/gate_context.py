"""Owns the context of the gates: facts about the entity (`Subject`) and demands on its text (`Rules`)."""

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
"""Synonyms of the noun by which a scenario calls an item."""
MAKERS: Final = ("author", "authors", "artist", "artists", "writers", "director")
"""Names of facts that hold names of people."""
PEOPLE: Final = re.compile(
    r"\b(?:directors?|actors?|cast|authors?|writers?|artists?|performers?|singers?|musicians?)\b"
)
INSTRUCTION: Final = 5
"""Length of a run of words that an answer does not share with an instruction by chance."""
COMMON: Final = frozenset(("and", "or", "of", "the", "a", "in"))
NOTHING: Final = Names.of(())
TEMPLATE_CODE: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Subject:
    """Facts about the entity of a text. Names are folded (see `name_matching`)."""

    entity: EntityKind
    id: str
    names: Names = NOTHING
    """Item: its titles, its makers and its cast. User: the titles of all items."""
    titles: frozenset[str] = frozenset()
    """Item: its titles. User: the titles of the items that the prompt shows."""
    later: frozenset[str] = frozenset()
    """User: titles of items after the cut-off that the prompt does not show."""
    directors: tuple[str, ...] = ()
    """Item: its directors, as catalogues write them; empty if unknown."""
    cast: tuple[str, ...] = ()
    """Item: its cast, as catalogues write it; empty if unknown."""
    years: tuple[int, ...] = ()
    """Item: years of release, by one or several catalogues."""
    genres: frozenset[str] = frozenset()
    """Item: genres as catalogues write them."""
    withheld: Mapping[str, str] = field(default_factory=dict)
    """User: facts that the scenario does not allow in prompts, by the name of the fact."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The demands of a scenario on texts about one kind of entity."""

    language: str
    """ISO 639-1."""
    words: tuple[int, int]
    """Smallest and largest number of words."""
    allowed: frozenset[str]
    """The facts that a text may mention."""
    nouns: tuple[str, ...]
    """Nouns for an item."""
    factors: tuple[str, ...] = ()
    """The aspects that the prompt asks for, folded; only those of several words."""
    instructions: frozenset[tuple[str, ...]] = frozenset()
    """Every run of `INSTRUCTION` words in the template's own lines, folded."""
    people: bool = False
    """Whether the prompt asks for people, such as "director and leading actors"."""
    vocabulary: frozenset[str] = frozenset()
    """Words of the factors and of the facts' names: a text with these as labels before colons is a list, not prose."""

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
    """The facts about every entity of a dataset, by kind and id."""
    titles = [str(item.facts.get(scenario.item.title) or "") for item in dataset.items]
    forms = [frozenset(title_forms(title)) for title in titles]
    all_titles = Names.of(frozenset().union(*forms))
    by_entity: dict[tuple[EntityKind, str], Subject] = {}
    for item, title in zip(dataset.items, titles, strict=True):
        by_entity[ITEM, item.id] = _item(item, title, facts)
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
        by_entity[USER, user.id] = Subject(USER, user.id, all_titles, shown, later - shown, withheld=withheld)
    return by_entity


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
