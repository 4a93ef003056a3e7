"""Owns MovieLens-1M out of a folder that the user names: GroupLens' own files, or tables without times.

GroupLens' folder holds `ratings.dat`, `movies.dat` and `users.dat` (double colons, Latin-1). The other form is
`ratings.tsv.xz`, `movies.tsv.xz` and `users.tsv.xz` (tabs, a header line), in which `order`, an event's place among its
user's, stands for the time: events of different users cannot be compared then.
"""

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.movielens import Movie, MovieLens, Person, Rating, to_dataset
from kar_offline.dataset.splits import SEED
from kar_offline.dataset.stage import Split, write_dataset
from kar_offline.stage_runner import StageResult
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import IntegrityError, NotFoundError

__all__ = ["build_movielens_1m", "read_folder"]

NAMES: Final = ("users", "movies", "ratings")
COUNTS: Final = (6_040, 3_883, 1_000_209)
"""Rows of `NAMES`."""
AGES: Final = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56 or older"}
OCCUPATIONS: Final = (
    *("other", "academic or educator", "artist", "clerical or administrative", "student", "customer service"),
    *("doctor or health care", "executive or managerial", "farmer", "homemaker", "school pupil", "lawyer"),
    *("programmer", "retired", "sales or marketing", "scientist", "self-employed", "technician or engineer"),
    *("tradesman or craftsman", "unemployed", "writer"),
)
"""By GroupLens' code."""

Row = TypeVar("Row")


def read_folder(folder: Path) -> tuple[MovieLens, bool]:
    """The data in normal form, and whether they have times.

    Raises:
        NotFoundError: the folder holds neither form.
        IntegrityError: a line is not in the format; the text names it.
    """
    users, movies, ratings = _files(folder)
    return MovieLens.of(_read(users, _person), _read(movies, _movie), _read(ratings, _rating)), _has_times(ratings)


def build_movielens_1m(
    work: WorkFolder,
    folder: Path,
    users: int | None = None,
    seed: int = SEED,
    history_length: int = 30,
    *,
    split: Split | None = None,
) -> StageResult:
    """Run the stage `dataset`: verify the folder's MovieLens-1M and write `work`/dataset.

    Args:
        work: The work folder.
        folder: Where the data are.
        users: Keep only so many users (for quick trials); None keeps all.
        seed: Seed of the choice of users and of the default split.
        history_length: The number of events before a target that models read.
        split: How to split; default: users, fold 0, by `seed`.

    Raises:
        NotFoundError: the folder does not hold the data.
        IntegrityError: they are broken or not whole; the text names the file.
        PreconditionError: a split by time is asked of data without times.
        InputError: too few users or a history shorter than 1.
    """
    files = _files(folder)

    def make() -> tuple[Dataset, dict[str, Any]]:
        data, times = read_folder(folder)
        for file, rows, expected in zip(files, (data.users, data.items, data.ratings), COUNTS, strict=True):
            if len(rows) != expected:
                raise IntegrityError(f"{file} has {len(rows):,} rows instead of {expected:,}: get MovieLens-1M again")
        dataset = to_dataset(data, "ml-1m", seed=seed, history_length=history_length, users=users, shared_clock=times)
        return dataset, {"source": str(folder)}

    hashes = [file_sha256(file) for file in files]
    params = {"dataset": "ml-1m", "files": hashes, "users": users, "seed": seed}
    return write_dataset(work, make, split=split or Split(seed=seed), history_length=history_length, params=params)


def _files(folder: Path) -> list[Path]:
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
    try:
        text, separator, first = (
            (file.read_text(encoding="latin-1"), "::", 1)
            if _has_times(file)
            else (lzma.decompress(file.read_bytes()).decode(), "\t", 2)
        )
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} cannot be read ({error}): get MovieLens-1M again") from error
    rows = []
    for number, line in enumerate(text.split("\n")[first - 1 :], first):
        if line:
            try:
                rows.append(parse(*line.rstrip("\r").split(separator)))
            except (TypeError, ValueError, LookupError) as error:
                raise IntegrityError(f"{file}:{number} is no line of MovieLens-1M ({error}): restore it") from error
    return rows


def _person(user: str, gender: str, age: str, occupation: str, _zip: str) -> Person:
    return Person(int(user), AGES[int(age)], gender, OCCUPATIONS[int(occupation)])


def _movie(item: str, title: str, genres: str) -> Movie:
    return Movie(int(item), " ".join(title.split()), tuple(sorted(genres.split("|"))))


def _rating(user: str, item: str, stars: str, time: str) -> Rating:
    return Rating(int(user), int(item), int(stars), int(time))
