"""Owns scenarios: the questions about the entities of one field (films, books, news), and the facts that they may show.

A scenario file is TOML. The product comes with movies, books, news and music.
"""

import tomllib
from calendar import monthrange
from collections.abc import Mapping
from datetime import date
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError, NotFoundError

__all__ = ["Question", "Scenario", "Season", "known_scenarios", "load_scenario", "own_templates"]

Word = Annotated[str, Field(min_length=1)]
MonthDay = Annotated[str, Field(pattern=r"^(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$")]
DEFAULT: Final = "movies"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Words(_Strict):
    """The nouns that prompts use."""

    item: Word
    """Noun for one item."""
    items: Word
    """Noun for several items."""
    user: Word
    """Noun for one user."""
    ratings: Word
    """The meaning of rating values."""


class Question(_Strict):
    """The question about one kind of entity."""

    template: Word
    """Path and version of the prompt template, such as "factual/2"."""
    factors: Annotated[tuple[Word, ...], Field(min_length=1)]
    """The aspects to write about."""
    allowed: tuple[Word, ...]
    """The facts that may leave the company; prompts show no others, whatever the dataset holds."""
    words: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (20, 200)
    """Smallest and largest number of words of an acceptable answer."""
    expires_after_days: Annotated[int, Field(ge=1)] | None = None
    """Age in days from which an answer is stale; None: never."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.words[0] > self.words[1]:
            raise ValueError("words: the fewest come first, such as [20, 200]")
        return self


class ItemQuestion(Question):
    """The question about an item."""

    title: Word = "title"
    """The fact that names an item; it must be among `allowed`."""

    @model_validator(mode="after")
    def _title_allowed(self) -> Self:
        if self.title not in self.allowed:
            raise ValueError(f"allowed: add {self.title!r}, which names an item")
        return self


class Season(_Strict):
    """A period of each year that prompts mention while it lasts; the answers to these prompts expire with it."""

    name: Word
    begins: MonthDay
    """First day, as month-day, such as "12-01"."""
    ends: MonthDay
    """Last day; before `begins` where the season spans the turn of the year."""
    about: Word
    """The season's name in prompts, such as "the weeks before Christmas"."""
    events: tuple[Word, ...] = ()
    """Events of the season."""
    kinds: Annotated[tuple[EntityKind, ...], Field(min_length=1)] = (USER,)
    """The kinds of entities whose prompts mention the season."""

    @model_validator(mode="after")
    def _real_days(self) -> Self:
        for day in (self.begins, self.ends):
            date.fromisoformat(f"2024-{day}")  # a leap year; ValueError says what is wrong
        return self

    def last_day(self, on: date) -> date | None:
        """The last day of this season if it includes the day `on`; else None."""
        day = f"{on:%m-%d}"
        over_new_year = self.begins > self.ends
        if not ((self.begins <= day or day <= self.ends) if over_new_year else (self.begins <= day <= self.ends)):
            return None
        year = on.year + (over_new_year and day >= self.begins)
        month, last = map(int, self.ends.split("-"))
        return date(year, month, min(last, monthrange(year, month)[1]))  # 29 February is not in every year


class Limits(_Strict):
    """Limits of the dataset's text in a prompt, and of the answers."""

    title_chars: Annotated[int, Field(ge=8)] = 200
    """Largest number of characters of an item's title; a longer title is cut."""
    value_chars: Annotated[int, Field(ge=8)] = 600
    """Largest number of characters of any other fact."""
    output_tokens: Annotated[int, Field(ge=1)] = 400
    """Largest number of tokens that a model may write for one answer."""
    retries: Annotated[int, Field(ge=0)] = 0
    """How often to ask again after an answer fails a quality gate; each time is another call."""


class Scenario(_Strict):
    """The content of a scenario file; unknown keys are refused."""

    name: Word
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")] = "en"
    """The language of answers, ISO 639-1."""
    words: Words
    item: ItemQuestion
    user: Question
    seasons: tuple[Season, ...] = ()
    limits: Limits = Limits()

    @property
    def questions(self) -> Mapping[EntityKind, Question]:
        """The questions by entity kind."""
        return {ITEM: self.item, USER: self.user}


def known_scenarios() -> list[str]:
    """The names of the scenarios that come with the product."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load_scenario(name: str | Path | None = None) -> Scenario:
    """Read a scenario that comes with the product, by its name, or a TOML file; None: movies.

    Raises:
        NotFoundError: no such scenario.
        InputError: not TOML, or a key is missing, unknown or wrong.
    """
    names = known_scenarios()
    name = name or DEFAULT
    source = _folder() / f"{name}.toml" if str(name) in names else Path(name)
    if not source.is_file():
        raise NotFoundError(f"no scenario {str(name)!r} (known: {', '.join(names)}): name one of them, or a TOML file")
    try:
        return Scenario.model_validate(tomllib.loads(source.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"scenario file {source} is not valid ({wrong}): correct it") from error
    except ValueError as error:
        raise InputError(f"scenario file {source} is not TOML ({error}): correct it") from error


def own_templates(name: str | Path | None) -> Path | None:
    """The folder `templates` beside a scenario file, with the scenario's own templates; None if there is none."""
    folder = Path(name).parent / "templates" if name and str(name) not in known_scenarios() else None
    return folder if folder and folder.is_dir() else None


def _folder() -> Traversable:
    return resources.files(__package__) / "scenarios"
