"""Owns the normal form of MovieLens data, the same for every source, and its conversion to a dataset."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from kar.records.v1 import records_pb2
from kar_offline.dataset.columns import TITLE
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import SEED, SPLITS, hash_fraction, split_of
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError

__all__ = ["UNKNOWN_GENRE", "Movie", "MovieLens", "Person", "Rating", "choose_users", "to_dataset"]

POSITIVE_ABOVE: Final = 3.0
UNKNOWN_GENRE: Final = "unknown"
"""GroupLens' name of a missing genre."""
MAX_GENRES: Final = 6
"""Largest number of genres of a movie."""
GENDERS: Final = {"M": "male", "F": "female"}
ARTICLE: Final = re.compile(r"(?P<name>[^(]+), (?P<article>The|An?|La|Les?|L'|Il|Das|Der)(?= \()")


class Person(NamedTuple):
    """A user without the postal code. The age is in years, or a band such as "25-34"."""

    id: int
    age: int | str
    gender: str
    occupation: str


class Movie(NamedTuple):
    """An item; its title is written as GroupLens does: "Usual Suspects, The (1995)"."""

    id: int
    title: str
    genres: tuple[str, ...]

    @property
    def year(self) -> int | None:
        """Year of release; None if the title has none."""
        years = re.findall(r"\((\d{4})\)", self.title)
        return int(years[-1]) if years else None

    @property
    def name(self) -> str:
        """The title with its article in front: "The Usual Suspects (1995)"."""
        return ARTICLE.sub(r"\g<article> \g<name>", self.title, count=1).replace("L' ", "L'")


class Rating(NamedTuple):
    """One event. The time is in seconds since 1970, or the event's position among its user's events."""

    user: int
    item: int
    stars: int
    time: int


@dataclass(frozen=True, slots=True)
class MovieLens:
    """The data in normal form: users, items and ratings, each sorted by its fields."""

    users: tuple[Person, ...]
    items: tuple[Movie, ...]
    ratings: tuple[Rating, ...]

    @staticmethod
    def of(users: Iterable[Person], items: Iterable[Movie], ratings: Iterable[Rating]) -> "MovieLens":
        """Bring parsed rows into normal form."""
        return MovieLens(tuple(sorted(users)), tuple(sorted(items)), tuple(sorted(ratings)))

    def sha256(self) -> str:
        """SHA-256 of the content, hexadecimal; it does not depend on the source of the data."""
        digest = hashlib.sha256()
        for rows in (self.users, self.items, self.ratings):
            digest.update("".join(json.dumps(row) + "\n" for row in rows).encode())
        return digest.hexdigest()


def choose_users(user_ids: Sequence[str], count: int, seed: int) -> frozenset[str]:
    """Choose users by seeded hash, from each split in proportion to its size; no split stays empty.

    Raises:
        InputError: there are fewer users than splits.
    """
    if count < len(SPLITS):
        raise InputError(f"{count} users cannot fill {len(SPLITS)} splits: ask for more")
    place_in_split: dict[str, float] = {}
    for split in range(len(SPLITS)):
        members = sorted((i for i in user_ids if split_of(seed, i) == split), key=lambda i: hash_fraction(seed, i))
        place_in_split |= {user: rank / len(members) for rank, user in enumerate(members)}
    ordered = sorted(place_in_split, key=lambda user: (place_in_split[user], hash_fraction(seed, user)))
    return frozenset(ordered[:count])


def _schema(history_length: int, age_bands: bool) -> records_pb2.FeatureSchema:
    numeric, categorical = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
    feature = records_pb2.Feature
    return records_pb2.FeatureSchema(
        features=[
            feature(name="age", entity=USER.number, type=categorical, width=1)
            if age_bands
            else feature(name="age", entity=USER.number, type=numeric),
            feature(name="gender", entity=USER.number, type=categorical, width=1),
            feature(name="occupation", entity=USER.number, type=categorical, width=1),
            feature(name="year", entity=ITEM.number, type=numeric),
            feature(name="genres", entity=ITEM.number, type=categorical, width=MAX_GENRES),
        ],
        history_length=history_length,
    )


def _user(person: Person) -> Entity:
    features = {"age": person.age, "gender": person.gender, "occupation": person.occupation}
    return Entity(str(person.id), features, {**features, "gender": GENDERS[person.gender]})


def _item(movie: Movie) -> Entity:
    genres = [genre for genre in movie.genres if genre != UNKNOWN_GENRE]
    return Entity(str(movie.id), {"year": movie.year, "genres": genres}, {TITLE: movie.name, "genres": genres})


def to_dataset(
    data: MovieLens,
    name: str = "ml-100k",
    *,
    seed: int = SEED,
    history_length: int,
    users: int | None = None,
    shared_clock: bool = True,
) -> Dataset:
    """The dataset of some or all users and the items that they rated.

    Args:
        data: MovieLens in normal form.
        name: Name of the dataset.
        seed: Seed of the choice of users and of the split.
        history_length: Maximal number of events in the history of a sample.
        users: Number of users to keep; None keeps all.
        shared_clock: Whether times of different users can be compared.

    Raises:
        InputError: there are fewer users than splits.
    """
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
        _schema(history_length, age_bands=any(isinstance(person.age, str) for person in people)),
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
