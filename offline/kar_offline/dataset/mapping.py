"""Owns the mapping file, which names the columns of a log and says what they mean."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kar_offline.dataset.columns import HIGHEST_RATING, TITLE
from kar_sidecar.errors import InputError, NotFoundError

__all__ = ["EntityColumns", "EventColumns", "LogMapping", "SeveralCategories", "load_mapping"]

Word = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EventColumns(_Section):
    """Section `[events]`: columns of the table with one event per row."""

    user: Word
    item: Word
    time: Word
    """Whole seconds since 1970, or ISO dates and times (UTC where they name no zone)."""
    rating: Word | Annotated[float, Field(ge=0, le=HIGHEST_RATING)]
    """The column, or one number for all events."""
    values: Mapping[str, float] = Field(default_factory=dict)
    """The number of each word in the rating column, such as `view = 1`, `purchase = 5`."""
    repeats: Literal["refuse", "first", "last"] = "refuse"
    """What to do if a user has several events with one item: refuse the log, or keep the first or the last event."""
    shared_clock: bool = True
    """False if `time` is only an event's position among its user's events."""


class SeveralCategories(_Section):
    """A feature with several categories in one cell."""

    separator: Word


class EntityColumns(_Section):
    """Sections `[users]` and `[items]`: columns of the table with one entity per row."""

    id: Word
    title: Word | None = None
    """The column that names the entity in prompts."""
    features: Mapping[Word, Literal["numeric", "categorical"] | SeveralCategories] = Field(default_factory=dict)
    facts: tuple[Word, ...] = ()
    """Columns that prompts may show. A language model sees no other column, except `title`."""

    @model_validator(mode="after")
    def _one_title(self) -> Self:
        if self.title not in (None, TITLE) and TITLE in self.facts:
            raise ValueError(f"{self.title!r} and the fact {TITLE!r} would both be the title: leave one out")
        return self


class LogMapping(_Section):
    """The content of a mapping file; unknown keys are refused."""

    name: Word
    positive_above: float
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Delimiter of CSV files."""
    events: EventColumns
    users: EntityColumns | None = None
    items: EntityColumns | None = None


def load_mapping(path: Path) -> LogMapping:
    """Read a mapping file.

    Raises:
        NotFoundError: there is no such file.
        InputError: it is not TOML, or a key is missing, unknown or wrong.
    """
    if not path.is_file():
        raise NotFoundError(f"mapping file {path} does not exist: name another")
    try:
        return LogMapping.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"mapping file {path} is not valid ({wrong}): correct it") from error
    except ValueError as error:
        raise InputError(f"mapping file {path} is not TOML ({error}): correct it") from error
