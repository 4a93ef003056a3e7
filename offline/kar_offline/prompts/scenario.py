"""Owns scenarios: the words and the factor lists that prompts of one field (films, books, news) are made with."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kar_sidecar.errors import InputError, NotFoundError

__all__ = ["Question", "Scenario", "load_scenario"]

Word = Annotated[str, Field(min_length=1)]


class Question(BaseModel):
    """One kind of knowledge: the version of its template and the factors to ask about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: Word
    factors: Annotated[tuple[Word, ...], Field(min_length=1)]


class Scenario(BaseModel):
    """What a scenario file holds; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Word
    item: Word
    """Noun for one item."""
    items: Word
    """Noun for several items."""
    user: Word
    """Noun for one user."""
    title: Word
    """The fact that names an item."""
    ratings: Word
    """What rating values mean."""
    factual: Question
    reasoning: Question


def load_scenario(path: Path | None = None) -> Scenario:
    """Read a scenario from a TOML file; None reads the one of films.

    Raises:
        NotFoundError: no such file.
        InputError: not TOML, or a key is missing, unknown or empty.
    """
    source = path or resources.files(__package__) / "scenarios" / "movies.toml"
    if not source.is_file():
        raise NotFoundError(f"scenario file {path} does not exist: name another")
    try:
        return Scenario.model_validate(tomllib.loads(source.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"scenario file {source} is not valid ({wrong}): correct it") from error
    except ValueError as error:
        raise InputError(f"scenario file {source} is not TOML ({error}): correct it") from error
