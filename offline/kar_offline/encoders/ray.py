"""Owns encoding on many machines: Ray Data hands texts out to actors, each with an encoder of its own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.encoders.text_encoder import Encoded, TextEncoder, gather
from kar_sidecar.errors import UnavailableError

__all__ = ["OnRay"]

BLOCK_TEXTS: Final = 256
"""Texts that an actor takes at once; a killed run loses at most the blocks under way."""


class _Block:
    """Runs in an actor: encodes a block of texts."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def __call__(self, block: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        texts = block["text"].tolist()
        vectors = np.zeros((len(texts), self._encoder.dim), dtype=np.float32)
        tokens = 0
        for encoded in self._encoder.stream(texts):
            vectors[encoded.rows] = encoded.vectors
            tokens += encoded.tokens
        # The tokens of a block stand beside its first text.
        return {"row": block["row"], "vector": vectors, "tokens": np.array([tokens, *[0] * (len(texts) - 1)])}


class OnRay:
    """An encoder that has `workers` Ray actors encode blocks of texts; what comes back is the same up to rounding.

    Args:
        inner: Travels to the actors before it has loaded anything.
        workers: Actors.
        address: Of a running cluster, such as "auto"; None: a cluster inside this machine, for as long as it is used.
    """

    def __init__(self, inner: TextEncoder, workers: int, address: str | None = None) -> None:
        """Remember the options; nothing is started yet."""
        self._inner, self._workers, self._address = inner, workers, address
        self.encoder_id, self.dim = inner.encoder_id, inner.dim

    def stream(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """See `TextEncoder`: block by block, as they get ready.

        Raises:
            ModuleNotFoundError: ray is not installed (extra `ray`).
            UnavailableError: there is no cluster at the address, or an actor ended.
        """
        if not texts:
            return
        import ray
        from ray.exceptions import RayError

        own = not ray.is_initialized()
        try:
            if own:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster in here reports to nobody
                ray.init(self._address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            rows = ray.data.from_items([{"row": row, "text": text} for row, text in enumerate(texts)])
            size = min(BLOCK_TEXTS, -(-len(texts) // self._workers))
            encoded = rows.map_batches(
                _Block, fn_constructor_args=(self._inner,), batch_size=size, concurrency=self._workers
            )
            for block in encoded.iter_batches(batch_size=None):
                yield Encoded(block["row"].tolist(), block["vector"], int(block["tokens"].sum()))
        except (ConnectionError, RayError) as error:
            raise UnavailableError(f"Ray did not encode ({error}): start the cluster, then run this again") from error
        finally:
            if own and ray.is_initialized():
                ray.shutdown()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)
