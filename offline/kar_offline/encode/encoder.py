"""Owns the seam to text encoders, and an encoder without a model for tests."""

import hashlib
import re
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["HashingEncoder", "TextEncoder"]

WORD: Final = re.compile(r"\w+")


class TextEncoder(Protocol):
    """Turns texts into vectors. Equal texts have equal vectors, whatever texts come with them, up to rounding."""

    @property
    def encoder_id(self) -> str:
        """Names everything that the vectors depend on: weights, tokenizer, pooling."""

    @property
    def dim(self) -> int:
        """Number of components D."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The length of each text in the encoder's tokens."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors [n, D] of n texts, each of unit length. No text is cut off."""


class HashingEncoder:
    """Bags of words: each word adds 1 to the component that its hash names. Fast, and similar for similar texts."""

    def __init__(self, dim: int = 16) -> None:
        """Make an encoder with `dim` components."""
        self.dim = dim
        self.encoder_id = f"hashing/{dim}"

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of words of each text."""
        return [len(WORD.findall(text)) for text in texts]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors [n, D] of n texts, each of unit length; zero where there is no word."""
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in WORD.findall(text.lower()):
                vector[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % self.dim] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
