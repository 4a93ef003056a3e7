"""Owns chunks: cutting texts that are too long for an encoder, batching the chunks, and joining their vectors again."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kar_offline.encoders.text_encoder import EncodedTexts

__all__ = ["Chunk", "batches", "even_spans", "join_chunks"]

T = TypeVar("T")


class Chunk(NamedTuple, Generic[T]):
    """A part of a text."""

    row: int
    """Row of the text."""
    parts: int
    """Number of chunks of the text."""
    length: int
    """Tokens or characters; the chunk's weight in the mean of its text."""
    content: T


def even_spans(length: int, limit: int) -> list[tuple[int, int]]:
    """Starts and ends of the fewest parts of at most `limit`, of nearly equal length; an empty text has one part.

    >>> even_spans(5, 4)
    [(0, 2), (2, 5)]
    """
    count = max(-(-length // limit), 1)
    return list(pairwise(length * part // count for part in range(count + 1)))


def batches(
    chunks: Iterable[Chunk[T]], batch_length: int, *, overhead: int = 0, max_chunks: int | None = None
) -> Iterator[Sequence[Chunk[T]]]:
    """Batch chunks of nearly equal length, the longest first.

    Args:
        chunks: The chunks, in any order.
        batch_length: Maximal length of a batch whose chunks are all padded to the longest. A chunk that is longer
            makes a batch of its own.
        overhead: Length that the model adds to each chunk, such as special tokens.
        max_chunks: Maximal number of chunks in a batch; None: no limit.
    """
    by_length = sorted(chunks, key=lambda chunk: chunk.length, reverse=True)
    start = 0
    while start < len(by_length):
        count = max(batch_length // max(by_length[start].length + overhead, 1), 1)
        stop = start + min(count, max_chunks or count)
        yield by_length[start:stop]
        start = stop


def join_chunks(batches: Iterable[tuple[Sequence[Chunk[T]], NDArray[np.float32], int]]) -> Iterator[EncodedTexts]:
    """Yield texts as soon as all their chunks are encoded.

    A text's vector is the mean of its chunks' vectors, weighted by length and scaled to unit length.

    Args:
        batches: n chunks, their vectors [n, D], and the number of tokens that were encoded.
    """
    incomplete: dict[int, tuple[int, NDArray[np.float32]]] = {}
    for chunks, vectors, tokens in batches:
        rows, sums = [], []
        for chunk, vector in zip(chunks, vectors, strict=True):
            missing, sum_before = incomplete.pop(chunk.row, (chunk.parts, np.zeros_like(vector)))
            weighted_sum = sum_before + vector * max(chunk.length, 1)
            if missing > 1:
                incomplete[chunk.row] = missing - 1, weighted_sum
            else:
                rows.append(chunk.row)
                sums.append(weighted_sum)
        complete = np.array(sums, dtype=np.float32).reshape(-1, vectors.shape[1])  # (texts, D)
        unit = complete / np.maximum(np.linalg.norm(complete, axis=1, keepdims=True), 1e-12)
        yield EncodedTexts(rows, unit, tokens)
