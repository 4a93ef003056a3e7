"""Owns the faults that are put into released texts, one at a time, to see whether the quality gates find them."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from kar_bench.studies.gates.phrases import (
    CONTACTS,
    FOREIGN,
    JOBS,
    LATER_GUESSED,
    LATER_LISTED,
    LATER_STATED,
    OTHER_YEARS,
    PERSONAL,
    PRAISE,
    REFUSALS,
)
from kar_offline.check import Subject
from kar_offline.check.fact_consistency import GENRE_WORDS
from kar_offline.check.name_matching import title_forms
from kar_offline.dataset.dataset import Dataset
from kar_offline.prompts.scenario import Scenario
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["CORRUPTIONS", "Corruption", "EntityRef", "Material"]

EntityRef = tuple[EntityKind, str]
"""A kind of entity, and the entity's id."""


@dataclass(frozen=True, slots=True)
class Material:
    """Released texts, and what is known about their entities."""

    dataset: Dataset
    texts: Mapping[EntityRef, str]
    """Released texts."""
    subjects: Mapping[EntityRef, Subject]
    titles: Mapping[str, str]
    """By item id, without year and other names, as texts write them."""
    factors: Sequence[str]
    """The factors that the prompt asks about."""

    @staticmethod
    def of(
        dataset: Dataset, texts: Mapping[EntityRef, str], known: Mapping[EntityRef, Subject], scenario: Scenario
    ) -> "Material":
        """Collect the texts of a dataset's entities; `known` is by entity, too."""
        titles = {item.id: _without_year(str(item.facts.get(scenario.item.title) or "")) for item in dataset.items}
        return Material(dataset, texts, known, titles, scenario.item.factors)

    def other_entity(self, chance: random.Random, key: EntityRef) -> EntityRef:
        """Another entity of the same kind."""
        return chance.choice([other for other in self.texts if other[0] == key[0] and other != key])


Corrupt = Callable[[random.Random, EntityRef, Material], str | None]
"""Makes an entity's text with one fault; None: this text cannot have it."""


class Corruption(NamedTuple):
    """One fault, and how it is put into a text."""

    name: str
    kinds: tuple[EntityKind, ...]
    """Kinds of entities whose texts can have it."""
    gates: tuple[str, ...]
    """The gates that should find it."""
    corrupt: Corrupt
    withheld: str = ""
    """A fact about users that the scenario must not allow, so that the text is at fault."""


def _without_year(title: str) -> str:
    """A title without its year and other names."""
    return re.sub(r"\s*\(.*", "", title)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[a-z\d)'][.!?])\s+(?=[A-Z'])", text)


def _with_sentence(chance: random.Random, text: str, sentence: str) -> str:
    """A text with one more sentence somewhere after its first."""
    sentences = _sentences(text)
    sentences.insert(chance.randint(1, len(sentences)), sentence)
    return " ".join(sentences)


def _add_one_of(phrases: Sequence[str]) -> Corrupt:
    return lambda chance, key, material: _with_sentence(chance, material.texts[key], chance.choice(phrases))


def _another_text(chance: random.Random, key: EntityRef, material: Material) -> str:
    return material.texts[material.other_entity(chance, key)]


def _another_year(chance: random.Random, key: EntityRef, material: Material) -> str | None:
    years = material.subjects[key].years
    if not years:
        return None
    year = min(years[0] + chance.choice((-1, 1)) * chance.randint(5, 30), 2025)
    return _with_sentence(chance, material.texts[key], chance.choice(OTHER_YEARS).format(year=year))


def _another_genre(chance: random.Random, key: EntityRef, material: Material) -> str | None:
    known = {genre.lower() for genre in material.subjects[key].genres}
    others = [word for word, genre in GENRE_WORDS.items() if not known.intersection((word, genre))]
    return (
        _with_sentence(chance, material.texts[key], f"It is a {chance.choice(others)} film.")
        if known and others
        else None
    )


def _renamed(
    chance: random.Random, key: EntityRef, material: Material, people: Callable[[Subject], Sequence[str]]
) -> str | None:
    """The text with the names of another item's people in place of its own people's."""
    text, own = material.texts[key], people(material.subjects[key])
    others = [name for name in people(material.subjects[material.other_entity(chance, key)]) if name not in own]
    named = [name for name in own if name in text]
    if not named or len(others) < len(named):
        return None
    for name, other in zip(named, chance.sample(others, len(named)), strict=True):
        text = text.replace(name, other)
        if " " in name and " " in other:
            text = re.sub(rf"\b{re.escape(name.split()[-1])}\b", other.split()[-1], text)
    return text


def _another_director(chance: random.Random, key: EntityRef, material: Material) -> str | None:
    return _renamed(chance, key, material, lambda subject: subject.directors)


def _another_cast(chance: random.Random, key: EntityRef, material: Material) -> str | None:
    return _renamed(chance, key, material, _cast_only)


def _cast_only(subject: Subject) -> list[str]:
    return [name for name in subject.cast if name not in subject.directors]


def _half_foreign(chance: random.Random, key: EntityRef, material: Material) -> str:
    sentences = _sentences(material.texts[key])
    return " ".join((*sentences[: len(sentences) // 2 + 1], chance.choice(FOREIGN)))


def _repeat_sentence(times: int) -> Corrupt:
    def corrupt(chance: random.Random, key: EntityRef, material: Material) -> str | None:
        long = [sentence for sentence in _sentences(material.texts[key]) if len(sentence.split()) >= 8]
        return " ".join((material.texts[key], *[chance.choice(long)] * times)) if long else None

    return corrupt


def _cut(chance: random.Random, key: EntityRef, material: Material) -> str | None:
    words = material.texts[key].split()
    kept = words[: chance.randint(len(words) // 2, len(words) - 2)]
    return None if kept[-1].rstrip("'\")").endswith((".", "!", "?")) else " ".join(kept)


def _short(chance: random.Random, key: EntityRef, material: Material) -> str:
    return " ".join(material.texts[key].split()[: chance.randint(3, 20)]).rstrip(",;:.") + "."


def _long(chance: random.Random, key: EntityRef, material: Material) -> str:
    others = (material.texts[material.other_entity(chance, key)] for _ in range(2))
    return " ".join((material.texts[key], *others))


def _list(chance: random.Random, key: EntityRef, material: Material) -> str:
    return "\n".join(f"- {sentence}" for sentence in _sentences(material.texts[key]))


def _headings(chance: random.Random, key: EntityRef, material: Material) -> str:
    first, *more = _sentences(material.texts[key])
    return f"**Overview**\n{first}\n\n**Details**\n{' '.join(more)}"


def _labels(chance: random.Random, key: EntityRef, material: Material) -> str:
    first, *more = _sentences(material.texts[key])
    return f"Title: {first} Genre: drama. Plot: {' '.join(more)}"


def _json(chance: random.Random, key: EntityRef, material: Material) -> str:
    return json.dumps({"text": material.texts[key]}, ensure_ascii=False)


def _chat(chance: random.Random, key: EntityRef, material: Material) -> str:
    opening = chance.choice(("Sure! ", "Here is a paragraph about it:\n\n", "<|im_start|>assistant\n", "Certainly, "))
    return opening + material.texts[key]


def _echo(chance: random.Random, key: EntityRef, material: Material) -> str:
    start = chance.randrange(len(material.factors) - 3)
    return f"Describe these factors: {', '.join(material.factors[start : start + 4])}. {material.texts[key]}"


def _vague(chance: random.Random, key: EntityRef, material: Material) -> str | None:
    title = material.titles[key[1]]
    return chance.choice(PRAISE).format(title=title) if title else None


def _later(chance: random.Random, key: EntityRef, material: Material) -> tuple[str, str] | None:
    """The title of an item that a user rated after the cut-off, and a title that the prompt shows."""
    dataset, subject = material.dataset, material.subjects[key]
    row = next(number for number, user in enumerate(dataset.users) if user.id == key[1])
    events, end = dataset.prompt_events(row), int(dataset.offsets[row + 1])
    later = [material.titles[dataset.items[item].id] for item in dataset.event_item[events.stop : end]]
    later = [title for title in later if title and title_forms(title)[0] in subject.later]
    shown = [material.titles[dataset.items[item].id] for item in dataset.event_item[events]]
    return (chance.choice(later), chance.choice(shown)) if later and shown else None


def _name_later(phrases: Sequence[str]) -> Corrupt:
    def corrupt(chance: random.Random, key: EntityRef, material: Material) -> str | None:
        titles = _later(chance, key, material)
        if titles is None:
            return None
        return _with_sentence(
            chance, material.texts[key], chance.choice(phrases).format(title=titles[0], other=titles[1])
        )

    return corrupt


def _state_personal(fact: str) -> Corrupt:
    def corrupt(chance: random.Random, key: EntityRef, material: Material) -> str:
        phrase = chance.choice(PERSONAL[fact]).format(age=chance.randint(15, 75), job=chance.choice(JOBS))
        return _with_sentence(chance, material.texts[key], phrase)

    return corrupt


ALL_KINDS: Final = tuple(EntityKind)
CORRUPTIONS: Final = (
    Corruption("a refusal added", ALL_KINDS, ("refusal",), _add_one_of(REFUSALS)),
    Corruption("the second half in another language", ALL_KINDS, ("language",), _half_foreign),
    Corruption("3 to 20 words of it", ALL_KINDS, ("length",), _short),
    Corruption("three texts in one", ALL_KINDS, ("length",), _long),
    Corruption("cut off in a sentence", ALL_KINDS, ("complete",), _cut),
    Corruption("a sentence repeated once", ALL_KINDS, ("repetition",), _repeat_sentence(1)),
    Corruption("a sentence repeated three times", ALL_KINDS, ("repetition",), _repeat_sentence(3)),
    Corruption("as a list", ALL_KINDS, ("shape",), _list),
    Corruption("with headings", ALL_KINDS, ("shape",), _headings),
    Corruption("with labels", ALL_KINDS, ("shape",), _labels),
    Corruption("as JSON", ALL_KINDS, ("shape",), _json),
    Corruption("opened as in a chat", ALL_KINDS, ("shape",), _chat),
    Corruption("the prompt's factors repeated", ALL_KINDS, ("shape",), _echo),
    Corruption("another film's text", (ITEM,), ("subject", "facts"), _another_text),
    Corruption("nothing but praise and the title", (ITEM,), ("subject",), _vague),
    Corruption("another director", (ITEM,), ("facts",), _another_director),
    Corruption("another cast", (ITEM,), ("facts", "subject"), _another_cast),
    Corruption("another year", (ITEM,), ("facts",), _another_year),
    Corruption("another genre", (ITEM,), ("facts",), _another_genre),
    Corruption("another user's text", (USER,), ("subject", "leak"), _another_text),
    Corruption("a later film, in quotes", (USER,), ("leak",), _name_later(LATER_STATED)),
    Corruption("a later film, in a list", (USER,), ("leak",), _name_later(LATER_LISTED)),
    Corruption("a later film, as a guess", (USER,), ("leak",), _name_later(LATER_GUESSED)),
    Corruption("contact details", ALL_KINDS, ("personal",), _add_one_of(CONTACTS)),
    *(Corruption(f"{fact}, where withheld", (USER,), ("personal",), _state_personal(fact), fact) for fact in PERSONAL),
)
