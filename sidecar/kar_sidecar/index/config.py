"""Owns the configuration that an index is built from, and the description of the built index with its recall."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isqrt
from typing import Any, Final, Literal, Self

from kar_sidecar.errors import InputError

__all__ = [
    "FLAT_UP_TO",
    "KINDS",
    "RECALL_AT",
    "STORAGES",
    "IndexConfig",
    "IndexDescription",
    "Kind",
    "MeasuredRecall",
    "Storage",
]

Kind = Literal["flat", "ivf", "hnsw"]
KINDS: Final[tuple[Kind, ...]] = ("flat", "ivf", "hnsw")
Storage = Literal["float32", "float16", "int8"]
STORAGES: Final[dict[Storage, str]] = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
"""Names of the storages in FAISS's index factory."""
FLAT_UP_TO: Final = 50_000
"""Largest number of vectors that is searched exactly by default: one query takes a few milliseconds."""
RECALL_AT: Final = 10
"""Number of nearest neighbours that recall is measured on."""


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """How to build an index. The defaults suit any number of vectors; a value of None is chosen by a rule.

    Raises:
        InputError: a value is out of range.
    """

    kind: Kind | None = None
    """None: flat up to `FLAT_UP_TO` vectors, hnsw above."""
    recall: float = 0.95
    """Required recall at 10: share of the 10 exact nearest neighbours that a search finds. A build below it fails."""
    storage: Storage = "float32"
    """Data type of the stored components."""
    lists: int | None = None
    """ivf: number of lists; None: 4 sqrt(n)."""
    probes: int | None = None
    """ivf: number of lists that a search reads; None: the smallest that reaches `recall`."""
    links: int = 16
    """hnsw: links per vector on a level (M); twice as many on the lowest level."""
    ef_construction: int = 40
    """hnsw: candidates kept while a vector is linked."""
    ef_search: int | None = None
    """hnsw: candidates kept while searching; None: the smallest number that reaches `recall`."""
    sample: int = 1000
    """Number of vectors that recall is measured with, at most a tenth of all."""
    seed: int = 1
    """Seed of the sample and of the ivf lists."""
    threads: int = 1
    """Threads that build. With one, the same vectors give the same bytes; with more, hnsw's links depend on timing."""

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"index kind {self.kind!r} is not known: choose from {', '.join(KINDS)}")
        if self.storage not in STORAGES:
            raise InputError(f"index storage {self.storage!r} is not known: choose from {', '.join(STORAGES)}")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall {self.recall:g} is not a share: give one above 0 and at most 1")
        minima = {"links": 2, "ef_construction": 1, "lists": 1, "probes": 1, "ef_search": 1, "sample": 1, "threads": 1}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"{name} {value} is too small: give at least {minimum}")

    def kind_for(self, count: int) -> Kind:
        """The kind of an index of `count` vectors."""
        return self.kind or ("flat" if count <= FLAT_UP_TO else "hnsw")

    def lists_for(self, count: int) -> int:
        """Lists of an ivf index of `count` vectors."""
        return max(1, min(self.lists or 4 * isqrt(count), count))

    def factory(self, count: int) -> str:
        """The index of `count` vectors, in the language of FAISS's index factory."""
        structure = {"flat": "", "ivf": f"IVF{self.lists_for(count)},", "hnsw": f"HNSW{self.links},"}
        return structure[self.kind_for(count)] + STORAGES[self.storage]


@dataclass(frozen=True, slots=True)
class MeasuredRecall:
    """The recall that a build measured."""

    at: int
    """Number of nearest neighbours, `RECALL_AT`."""
    value: float
    """Share of the exact nearest neighbours that the search found."""
    required: float
    queries: int
    """Number of queries; 0: too few vectors to measure with."""


@dataclass(frozen=True, slots=True)
class IndexDescription:
    """An index as it was built. `snapshot.json` holds these fields in this order, without the fields that are None."""

    kind: Kind
    storage: Storage
    dim: int
    count: int
    """Number of vectors."""
    lists: int | None = None
    links: int | None = None
    ef_construction: int | None = None
    probes: int | None = None
    ef_search: int | None = None
    recall: MeasuredRecall | None = None
    """None for an empty index."""

    def to_json(self) -> dict[str, Any]:
        """The fields of `snapshot.json`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The description in a snapshot's record; its other fields are ignored."""
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        if "recall" in values:
            values["recall"] = MeasuredRecall(**values["recall"])
        return cls(**values)
