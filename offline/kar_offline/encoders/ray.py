"""Owns encoding on several machines: Ray Data distributes texts to actors, each with its own encoder."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.encoders.text_encoder import EncodedTexts, TextEncoder, gather
from kar_sidecar.errors import UnavailableError

__all__ = ["RayEncoder"]

BLOCK_TEXTS: Final = 256
"""Texts that an actor encodes at once. A killed run loses at most the blocks that are being encoded."""


class _EncodeBlock:
    """Encodes a block of texts, in an actor."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def __call__(self, block: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        texts = block["text"].tolist()
        vectors = np.zeros((len(texts), self._encoder.dim), dtype=np.float32)
        tokens = 0
        for encoded in self._encoder.stream(texts):
            vectors[encoded.rows] = encoded.vectors
            tokens += encoded.tokens
        # A block has one token count, and Ray wants columns of equal length: the count stands in the first row.
        return {"row": block["row"], "vector": vectors, "tokens": np.array([tokens, *[0] * (len(texts) - 1)])}


class RayEncoder:
    """Encodes blocks of texts in Ray actors; vectors equal those of the inner encoder up to rounding.

    Args:
        inner: The encoder; it is sent to the actors before it has loaded its weights.
        workers: Number of actors.
        address: Address of a running cluster, such as "auto"; None: start one on this machine while texts are encoded.
    """

    def __init__(self, inner: TextEncoder, workers: int, address: str | None = None) -> None:
        """Keep the options; nothing is started yet."""
        self._inner, self._workers, self._address = inner, workers, address
        self.encoder_id, self.dim = inner.encoder_id, inner.dim

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        """See `TextEncoder`: blocks in the order in which they are encoded.

        Raises:
            ModuleNotFoundError: ray is not installed (extra `ray`).
            UnavailableError: there is no cluster at the address, or an actor failed.
        """
        if not texts:
            return
        import ray
        from ray.exceptions import RayError

        starts_cluster = not ray.is_initialized()
        try:
            if starts_cluster:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports
                ray.init(self._address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            dataset = ray.data.from_items([{"row": row, "text": text} for row, text in enumerate(texts)])
            block_texts = min(BLOCK_TEXTS, -(-len(texts) // self._workers))
            encoded = dataset.map_batches(
                _EncodeBlock, fn_constructor_args=(self._inner,), batch_size=block_texts, concurrency=self._workers
            )
            for block in encoded.iter_batches(batch_size=None):
                yield EncodedTexts(block["row"].tolist(), block["vector"], int(block["tokens"].sum()))
        except (ConnectionError, RayError) as error:
            raise UnavailableError(f"Ray did not encode ({error}): start the cluster, then run this again") from error
        finally:
            if starts_cluster and ray.is_initialized():
                ray.shutdown()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)
