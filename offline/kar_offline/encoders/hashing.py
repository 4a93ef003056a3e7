"""Owns the text encoder without a model: hashed bags of words, for tests and trials."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.encoders.text_encoder import EncodedTexts, gather

__all__ = ["HashingEncoder"]

WORD: Final = re.compile(r"\w+")


class HashingEncoder:
    """Adds 1 to one component per word, which the word's hash selects. Similar texts get similar vectors.

    >>> first, second = HashingEncoder().encode(["a good film", "A film: good!"])
    >>> bool((first == second).all())
    True
    """

    def __init__(self, dim: int = 16) -> None:
        """Make an encoder of `dim` components."""
        self.dim = dim
        self.encoder_id = f"hashing/{dim}"

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        """See `TextEncoder`: one text at a time, in their order. Words are the tokens; no word gives a zero vector."""
        for row, text in enumerate(texts):
            vector = np.zeros(self.dim, dtype=np.float32)
            words = WORD.findall(text.lower())
            for word in words:
                vector[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % self.dim] += 1
            yield EncodedTexts([row], vector[None] / max(float(np.linalg.norm(vector)), 1e-12), len(words))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)
