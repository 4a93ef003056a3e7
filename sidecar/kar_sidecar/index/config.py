"""Owns what an index is made of: its kind, its parameters, and the recall that it must reach to be used."""

from dataclasses import dataclass
from math import isqrt
from typing import Final, Literal

from kar_sidecar.errors import InputError

__all__ = ["FLAT_UP_TO", "KINDS", "RECALL_AT", "STORAGES", "IndexConfig", "Kind", "Storage"]

Kind = Literal["flat", "ivf", "hnsw"]
KINDS: Final[tuple[Kind, ...]] = ("flat", "ivf", "hnsw")
Storage = Literal["float32", "float16", "int8"]
STORAGES: Final[dict[Storage, str]] = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
"""What FAISS's index factory calls each."""
FLAT_UP_TO: Final = 50_000
"""Vectors that are searched exactly unless told otherwise: one query takes a few milliseconds."""
RECALL_AT: Final = 10
"""Neighbours among which recall is measured."""


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """How to build an index. The defaults suit any number of vectors; what is None is chosen by a rule.

    Raises:
        InputError: a value is out of range.
    """

    kind: Kind | None = None
    """None: flat up to `FLAT_UP_TO` vectors, hnsw above."""
    recall: float = 0.95
    """Least share of the exact 10 nearest that a search finds; a build that does not reach it fails."""
    storage: Storage = "float32"
    """What a component is kept in."""
    lists: int | None = None
    """ivf: lists; None: 4 sqrt(n)."""
    probes: int | None = None
    """ivf: lists that a search looks into; None: the fewest that reach `recall`."""
    links: int = 16
    """hnsw: links of a vector on a level (M); twice as many on the lowest."""
    ef_construction: int = 40
    """hnsw: candidates kept while a vector is linked."""
    ef_search: int | None = None
    """hnsw: candidates kept while searching; None: the fewest that reach `recall`."""
    sample: int = 1000
    """Vectors that recall is measured with, at most a tenth of all."""
    seed: int = 1
    """Of that sample and of the lists."""
    threads: int = 1
    """Cores that build. With one, the same vectors give the same bytes; more link hnsw in an order of chance."""

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"index kind {self.kind!r} is not known: choose from {', '.join(KINDS)}")
        if self.storage not in STORAGES:
            raise InputError(f"index storage {self.storage!r} is not known: choose from {', '.join(STORAGES)}")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall {self.recall:g} is no share: give one above 0 and at most 1")
        least = {"links": 2, "ef_construction": 1, "lists": 1, "probes": 1, "ef_search": 1, "sample": 1, "threads": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} {value} is too small: give at least {low}")

    def kind_for(self, count: int) -> Kind:
        """The kind of an index of `count` vectors."""
        return self.kind or ("flat" if count <= FLAT_UP_TO else "hnsw")

    def lists_for(self, count: int) -> int:
        """Lists of an ivf index of `count` vectors."""
        return max(1, min(self.lists or 4 * isqrt(count), count))

    def factory(self, count: int) -> str:
        """The index of `count` vectors, as FAISS's index factory writes it."""
        structure = {"flat": "", "ivf": f"IVF{self.lists_for(count)},", "hnsw": f"HNSW{self.links},"}
        return structure[self.kind_for(count)] + STORAGES[self.storage]
