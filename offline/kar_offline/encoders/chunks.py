"""Owns how texts that are too long for an encoder are cut into chunks, batched, and made whole again."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kar_offline.encoders.text_encoder import Encoded

__all__ = ["Chunk", "batches", "even_cuts", "join"]

T = TypeVar("T")


class Chunk(NamedTuple, Generic[T]):
    """A part of a text."""

    row: int
    """Its text's."""
    parts: int
    """Of its text."""
    length: int
    """In the units that batches are measured in; also what it counts among the parts."""
    content: T


def even_cuts(length: int, most: int) -> list[tuple[int, int]]:
    """Begins and ends of the fewest parts of nearly equal length, and of at most `most`; nothing has one part, too."""
    count = max(-(-length // most), 1)
    return list(pairwise(length * i // count for i in range(count + 1)))


def batches(
    chunks: Iterable[Chunk[T]], size: int, *, extra: int = 0, most: int | None = None
) -> Iterator[Sequence[Chunk[T]]]:
    """Chunks in batches of nearly equal length, the longest first.

    Args:
        chunks: In any order.
        size: Of a batch at most, when all its chunks are padded to the longest; one chunk is a batch anyway.
        extra: What comes on top of each chunk's length.
        most: Chunks of a batch.
    """
    left = sorted(chunks, key=lambda chunk: chunk.length, reverse=True)
    start = 0
    while start < len(left):
        count = max(size // max(left[start].length + extra, 1), 1)
        stop = start + min(count, most or count)
        yield left[start:stop]
        start = stop


def join(pieces: Iterable[tuple[Sequence[Chunk[T]], NDArray[np.float32], int]]) -> Iterator[Encoded]:
    """Texts as soon as all their chunks are there: the mean of these, weighted by length, scaled to unit length.

    Args:
        pieces: Chunks, their vectors [n, D], and the tokens that they took.
    """
    waiting: dict[int, tuple[int, NDArray[np.float32]]] = {}
    for chunks, vectors, tokens in pieces:
        rows, sums = [], []
        for chunk, vector in zip(chunks, vectors, strict=True):
            missing, before = waiting.pop(chunk.row, (chunk.parts, np.zeros_like(vector)))
            total = before + vector * max(chunk.length, 1)
            if missing > 1:
                waiting[chunk.row] = missing - 1, total
            else:
                rows.append(chunk.row)
                sums.append(total)
        found = np.array(sums, dtype=np.float32).reshape(-1, vectors.shape[1])
        yield Encoded(rows, found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12), tokens)
