"""Owns what the store benchmark loads and reads: its options, and the records of made-up items."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM
from kar_sidecar.features import FeatureLayout
from kar_sidecar.store import FEATURES, TEXT, vector_part
from kar_sidecar.store.records import encode_vectors

__all__ = ["DIM", "LAYOUT", "SPACE", "VECTORS", "WRITTEN_AT_MS", "StoreBenchmarkOptions", "encoded_records", "item_ids"]

DIM: Final = 32
"""Components of a stored vector."""
SPACE: Final = "0123456789ab"
VECTORS: Final = vector_part(SPACE)
WRITTEN_AT_MS: Final = 1
ENCODED_AT_ONCE: Final = 1_000
LAYOUT: Final = FeatureLayout(
    records_pb2.FeatureSchema(
        features=[
            records_pb2.Feature(name="year", entity=ITEM.number, type=records_pb2.FEATURE_TYPE_NUMERIC),
            records_pb2.Feature(name="genres", entity=ITEM.number, type=records_pb2.FEATURE_TYPE_CATEGORICAL, width=4),
        ]
    ),
    ITEM,
)


@dataclass(frozen=True, slots=True)
class StoreBenchmarkOptions:
    """What is loaded, and how fast it is read meanwhile."""

    stores: Sequence[str] = ()
    """URLs; an LMDB path is a folder for temporary stores."""
    entities: int = 1_000_000
    reads_per_s: float = 100.0
    """Batches of 200 entities read a second."""
    quiet_s: float = 10.0
    """Seconds of reading before the load, and again after it."""
    text_bytes: int = 0
    """Length of each entity's text; 0: no texts."""

    @property
    def parts(self) -> list[str]:
        """Parts of each entity that are written."""
        return [FEATURES, VECTORS, *([TEXT] if self.text_bytes else [])]


def item_ids(numbers: Iterable[int]) -> list[str]:
    """Ids of items by their numbers."""
    return [f"item-{number:09d}" for number in numbers]


def encoded_records(part: str, first: int, count: int, options: StoreBenchmarkOptions) -> Iterator[bytes]:
    """One part of the items `first` to `first + count - 1`, each encoded when it is taken."""
    end = first + count
    if part == TEXT:
        yield from (f"{number:09d}".encode().ljust(options.text_bytes, b".") for number in range(first, end))
    elif part == FEATURES:
        row = LAYOUT.row({"year": 1995, "genres": ["Drama", "War"]})
        for number in range(first, end):
            row["year"] = number
            yield LAYOUT.encode(row, written_at_ms=WRITTEN_AT_MS)
    else:
        for start in range(first, end, ENCODED_AT_ONCE):
            yield from encode_vectors(
                _vectors(start, min(ENCODED_AT_ONCE, end - start)), SPACE, written_at_ms=WRITTEN_AT_MS
            )


def _vectors(first: int, rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(first).standard_normal((rows, DIM), dtype=np.float32)
