"""Owns MovieLens-1M, read from a folder that the user names: GroupLens' own files, or tables without times.

GroupLens' files are `ratings.dat`, `movies.dat` and `users.dat` (double colons, Latin-1). The tables are
`ratings.tsv.xz`, `movies.tsv.xz` and `users.tsv.xz` (tabs, a header line). Their column `order`, an event's position
among its user's events, is read as the time; such times of different users cannot be compared.
"""

import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from kar_offline.dataset.movielens import Movie, MovieLens, Person, Rating, to_dataset
from kar_offline.dataset.source import SourcedDataset
from kar_offline.dataset.splits import SEED
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import IntegrityError, NotFoundError

__all__ = ["MovieLens1M", "read_folder"]

NAMES: Final = ("users", "movies", "ratings")
COUNTS: Final = (6_040, 3_883, 1_000_209)
"""Number of rows of each file of `NAMES`."""
AGES: Final = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56 or older"}
OCCUPATIONS: Final = (
    *("other", "academic or educator", "artist", "clerical or administrative", "student", "customer service"),
    *("doctor or health care", "executive or managerial", "farmer", "homemaker", "school pupil", "lawyer"),
    *("programmer", "retired", "sales or marketing", "scientist", "self-employed", "technician or engineer"),
    *("tradesman or craftsman", "unemployed", "writer"),
)
"""In the order of GroupLens' codes."""

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class MovieLens1M:
    """The source "MovieLens-1M"."""

    folder: Path
    users: int | None = None
    """Number of users to keep, for a quick trial; None keeps all."""
    seed: int = SEED
    """Seed of the choice of users."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Options and the content hash of each file.

        Raises:
            NotFoundError: the folder does not hold the data.
        """
        hashes = [file_sha256(file) for file in _files(self.folder)]
        return {"dataset": "ml-1m", "files": hashes, "users": self.users, "seed": self.seed}

    def read(self, history_length: int) -> SourcedDataset:
        """Read, check and convert the files.

        Raises:
            NotFoundError: the folder does not hold the data.
            IntegrityError: the data are corrupt or incomplete; the text names the file.
            InputError: there are fewer users than splits.
        """
        files = _files(self.folder)
        data, has_times = read_folder(self.folder)
        for file, rows, expected in zip(files, (data.users, data.items, data.ratings), COUNTS, strict=True):
            if len(rows) != expected:
                raise IntegrityError(f"{file} has {len(rows):,} rows instead of {expected:,}: get MovieLens-1M again")
        dataset = to_dataset(
            data,
            "ml-1m",
            seed=self.seed,
            history_length=history_length,
            users=self.users,
            shared_clock=has_times,
        )
        return SourcedDataset(dataset, str(self.folder))


def read_folder(folder: Path) -> tuple[MovieLens, bool]:
    """The data in normal form, and whether their events have times.

    Raises:
        NotFoundError: the folder does not hold the data.
        IntegrityError: a line has another format; the text names it.
    """
    users, movies, ratings = _files(folder)
    return MovieLens.of(_read(users, _person), _read(movies, _movie), _read(ratings, _rating)), _has_times(ratings)


def _files(folder: Path) -> list[Path]:
    """The files of `NAMES`, as GroupLens' own files or as tables."""
    for suffix in (".dat", ".tsv.xz"):
        files = [folder / f"{name}{suffix}" for name in NAMES]
        if all(file.is_file() for file in files):
            return files
    raise NotFoundError(
        f"{folder} does not hold MovieLens-1M: name a folder with users.dat, movies.dat and ratings.dat (or .tsv.xz)"
    )


def _has_times(file: Path) -> bool:
    return file.suffix == ".dat"


def _read(file: Path, parse: Callable[..., Row]) -> list[Row]:
    """The parsed lines of a file."""
    try:
        text, separator, first_line = (
            (file.read_text(encoding="latin-1"), "::", 1)
            if _has_times(file)
            else (lzma.decompress(file.read_bytes()).decode(), "\t", 2)
        )
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} cannot be read ({error}): get MovieLens-1M again") from error
    rows = []
    for number, line in enumerate(text.split("\n")[first_line - 1 :], first_line):
        if line:
            try:
                rows.append(parse(*line.rstrip("\r").split(separator)))
            except (TypeError, ValueError, LookupError) as error:
                raise IntegrityError(f"{file}:{number} is not a line of MovieLens-1M ({error}): restore it") from error
    return rows


def _person(user: str, gender: str, age: str, occupation: str, _zip: str) -> Person:
    return Person(int(user), AGES[int(age)], gender, OCCUPATIONS[int(occupation)])


def _movie(item: str, title: str, genres: str) -> Movie:
    return Movie(int(item), " ".join(title.split()), tuple(sorted(genres.split("|"))))


def _rating(user: str, item: str, stars: str, time: str) -> Rating:
    return Rating(int(user), int(item), int(stars), int(time))
