"""Owns the seams to text encoders and to what runs their models, and an encoder without a model for tests."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoded", "HashingEncoder", "TextEncoder", "TokenModel", "gather"]

WORD: Final = re.compile(r"\w+")


class Encoded(NamedTuple):
    """Some of the texts that an encoder was given."""

    rows: Sequence[int]
    """Which."""
    vectors: NDArray[np.float32]
    """Theirs [len(rows), D], each of unit length."""
    tokens: int
    """What they took."""


class TextEncoder(Protocol):
    """Turns texts into vectors. Equal texts have equal vectors, whatever texts come with them, up to rounding."""

    @property
    def encoder_id(self) -> str:
        """Names everything that the vectors depend on: weights, tokenizer, pooling."""

    @property
    def dim(self) -> int:
        """Number of components D."""

    def stream(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Encode texts, each once, in an order of the encoder's own, as they get ready. No text is cut off."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors [n, D] of n texts in their order: `gather` of `stream`."""


def gather(encoder: TextEncoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors [n, D] of n texts in their order, from what the encoder streams."""
    vectors = np.zeros((len(texts), encoder.dim), dtype=np.float32)
    for encoded in encoder.stream(texts):
        vectors[encoded.rows] = encoded.vectors
    return vectors


class TokenModel(Protocol):
    """Turns tokens into vectors; several threads may call it at once."""

    def one_core_each(self) -> AbstractContextManager[None]:
        """While this is entered, a call keeps to the core of its thread."""

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors [b, T, D] of the token ids [b, T], where `mask` [b, T] is 1 at tokens and 0 at padding."""


class HashingEncoder:
    """Bags of words: each word adds 1 to the component that its hash names. Fast, and similar for similar texts."""

    def __init__(self, dim: int = 16) -> None:
        """Make an encoder with `dim` components."""
        self.dim = dim
        self.encoder_id = f"hashing/{dim}"

    def stream(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """See `TextEncoder`: one by one, in their order; tokens are words. A text without words has a zero vector."""
        for row, text in enumerate(texts):
            vector = np.zeros(self.dim, dtype=np.float32)
            words = WORD.findall(text.lower())
            for word in words:
                vector[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % self.dim] += 1
            yield Encoded([row], vector[None] / max(float(np.linalg.norm(vector)), 1e-12), len(words))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)
