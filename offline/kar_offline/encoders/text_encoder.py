"""Owns the Protocols of text encoders and of the models inside them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["EncodedTexts", "TextEncoder", "TokenModel", "gather"]


class EncodedTexts(NamedTuple):
    """Vectors of n of the texts that an encoder was given."""

    rows: Sequence[int]
    """Positions of the n texts in the sequence that the encoder was given."""
    vectors: NDArray[np.float32]
    """[n, D], each of unit length."""
    tokens: int
    """Tokens encoded since the previous `EncodedTexts`."""


class TextEncoder(Protocol):
    """Turns texts into vectors. The vector of a text does not depend, up to rounding, on the other texts."""

    @property
    def encoder_id(self) -> str:
        """Names everything that the vectors depend on: weights, tokenizer, pooling, chunk length."""

    @property
    def dim(self) -> int:
        """Number of components D of a vector."""

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        """Yield every text once, as soon as it is encoded, in an order that the encoder chooses.

        Long texts are encoded in chunks; nothing is truncated.
        """

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors [n, D] of n texts, in their order."""


def gather(encoder: TextEncoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors [n, D] of n texts in their order, collected from `encoder.stream`."""
    vectors = np.zeros((len(texts), encoder.dim), dtype=np.float32)
    for encoded in encoder.stream(texts):
        vectors[encoded.rows] = encoded.vectors
    return vectors


class TokenModel(Protocol):
    """Turns token ids into token vectors. Several threads may call it at once."""

    def one_core_each(self) -> AbstractContextManager[None]:
        """A context in which each call runs on the core of the calling thread alone."""

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token vectors [b, T, D] of token ids [b, T]; `mask` [b, T] is 1 at tokens and 0 at padding."""
