"""Owns the text encoder that runs a Hugging Face model on this machine: tokens, batches, pooled vectors."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kar_offline.encoders.chunks import Chunk, batches, even_spans, join_chunks
from kar_offline.encoders.encoder_folder import FILES, read_encoder_folder
from kar_offline.encoders.pooling import Pooling, pool
from kar_offline.encoders.text_encoder import EncodedTexts, TokenModel, gather
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import NotFoundError

__all__ = ["BATCH_TOKENS", "HuggingFaceEncoder", "Runtime"]

BATCH_TOKENS: Final = 512
"""Padded tokens of a batch, which one core works on: few enough to stay in its cache."""
PENDING_PER_THREAD: Final = 32
"""Batches submitted ahead per thread, so that a slow batch at the front of the queue leaves no thread idle."""

Runtime = Literal["torch", "onnx"]
T = TypeVar("T")
R = TypeVar("R")


class HuggingFaceEncoder:
    """An encoder from a local folder or the hub: safetensors only, no remote code.

    A text of more than `chunk_tokens` tokens is cut into the fewest chunks of nearly equal length. A chunk's vector is
    pooled from its token vectors, as in sentence-transformers. A text's vector is the mean of its chunks' vectors,
    weighted by their content tokens and scaled to unit length. Prompt prefixes that a folder may name are not used.

    Args:
        model: A folder, or a name on the hub, which is downloaded once.
        name: The model's name in `encoder_id`; default: the folder's or the hub's name.
        pooling: How token vectors become one; default: as the folder says for sentence-transformers, else "mean".
        chunk_tokens: Content tokens of a chunk, without special tokens. Default: the length that the model was trained
            with, as the folder says, else 256; both include special tokens.
        threads: Cores to use; default: all that this process may use. Each batch runs on one core, so that no batch
            waits for another where the cores are shared.
        runtime: The library that runs the model; "onnx" is a tenth faster. Vectors are the same up to rounding, so
            `encoder_id` does not name the runtime.
        cache: Folder of the exported ONNX graphs; default: the user's cache of downloads.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str | None = None,
        pooling: Pooling | None = None,
        chunk_tokens: int | None = None,
        threads: int | None = None,
        runtime: Runtime = "onnx",
        cache: Path | None = None,
    ) -> None:
        """Read the settings and hash the files; weights are loaded with the first text.

        Raises:
            NotFoundError: the model or one of its files is missing.
            UnsupportedError: the folder asks for a layer or pooling that is not supported.
        """
        settings = read_encoder_folder(Path(model) if Path(model).is_dir() else _download(str(model)))
        self.folder, self._pad_id, self._runtime, self._cache = settings.model, settings.pad_id, runtime, cache
        self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        probe = self._tokenizer.encode("a")
        content = [place for place, special in enumerate(probe.special_tokens_mask) if not special]
        self._prefix_ids, self._suffix_ids = probe.ids[: content[0]], probe.ids[content[-1] + 1 :]
        self.dim, self.pooling = settings.dim, pooling or settings.own_pooling()
        self.chunk_tokens = chunk_tokens or settings.max_tokens - self._special_tokens
        self.threads = threads or len(os.sched_getaffinity(0))
        hashes = "".join(file_sha256(self.folder / file) for file in FILES)
        self._digest = hashlib.sha256(hashes.encode()).hexdigest()[:12]
        self.encoder_id = f"{name or Path(model).name}@{self._digest}/{self.pooling}/{self.chunk_tokens}"

    @property
    def _special_tokens(self) -> int:
        """Special tokens around each chunk."""
        return len(self._prefix_ids) + len(self._suffix_ids)

    @cached_property
    def _model(self) -> TokenModel:
        if self._runtime == "onnx":
            from kar_offline.encoders.onnx import OnnxModel  # onnxruntime loads slowly

            return OnnxModel(self.graph)
        from kar_offline.encoders.pytorch import TorchModel  # torch and transformers load slowly

        return TorchModel(self.folder)

    @property
    def graph(self) -> Path:
        """The model's ONNX graph; exported into the cache first, if it is missing.

        Raises:
            UnsupportedError: the model cannot be exported.
        """
        from kar_offline.encoders.onnx import graph_file  # onnxruntime loads slowly

        return graph_file(self.folder, self._digest, self._cache)

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        """See `TextEncoder`: the longest texts first; special tokens are not counted."""
        model = self._model  # loaded before the threads start, which would each load it

        def encode_batch(
            batch: Sequence[Chunk[NDArray[np.int32]]],
        ) -> tuple[Sequence[Chunk[NDArray[np.int32]]], NDArray[np.float32], int]:
            return batch, self._pooled(model, batch), sum(chunk.length for chunk in batch)

        with model.one_core_each():
            planned = batches(self._chunks(texts), BATCH_TOKENS, overhead=self._special_tokens)
            yield from join_chunks(_map_in_order(encode_batch, planned, self.threads))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)

    def _chunks(self, texts: Sequence[str]) -> Iterator[Chunk[NDArray[np.int32]]]:
        for row, encoding in enumerate(self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)):
            ids = np.array(encoding.ids, dtype=np.int32)
            spans = even_spans(len(ids), self.chunk_tokens)
            for start, stop in spans:
                yield Chunk(row, len(spans), stop - start, ids[start:stop])

    def _pooled(self, model: TokenModel, batch: Sequence[Chunk[NDArray[np.int32]]]) -> NDArray[np.float32]:
        """Vectors [b, D] of a batch of chunks, the longest first."""
        rows = [np.concatenate((self._prefix_ids, chunk.content, self._suffix_ids)) for chunk in batch]
        ids = np.full((len(batch), max(len(rows[0]), 1)), self._pad_id, dtype=np.int64)  # (b, T)
        mask = np.zeros_like(ids)  # (b, T)
        mask[:, 0] = 1  # without special tokens, an empty text is one token of padding
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return pool(model(ids, mask), mask, self.pooling)


def _map_in_order(function: Callable[[T], R], batches: Iterable[T], threads: int) -> Iterator[R]:
    """Results of `function` on batches, in their order, computed by threads; a limited number is kept in memory."""
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[R]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(function, batch))
            if len(pending) > PENDING_PER_THREAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # loads slowly, and a local folder does not need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotFoundError(f"{name!r} is not a folder, and cannot be downloaded from the hub ({reason})") from error
