"""Owns the text encoder behind an OpenAI-compatible embeddings endpoint: vLLM, TEI, llama.cpp, hosted services."""

import asyncio
import base64
import json
import math
import textwrap
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray

from kar_offline.encoders.chunks import Chunk, batches, join
from kar_offline.encoders.text_encoder import Encoded, gather
from kar_offline.openai_http.endpoint import Endpoint, RefusedError, Verdict, parse_json, verdict_of
from kar_sidecar.errors import InputError

__all__ = ["CHUNK_CHARS", "EndpointEncoder"]

CHUNK_CHARS: Final = 1500
"""About 375 tokens of English: below the 512 that the smallest usual encoders take."""
CHARS_PER_TOKEN: Final = 4
"""Of English; where an endpoint does not tell what it counted."""
BATCH_CHARS: Final = 32_000
BATCH_TEXTS: Final = 32
"""What servers take by default, among them TEI."""
LARGEST_ANSWER_BYTES: Final = 64 << 20

Piece = tuple[Sequence[Chunk[str]], NDArray[np.float32], int]
"""Chunks, their vectors [n, D], the tokens that they took."""


class EndpointEncoder:
    """A model behind `<base_url>/embeddings`.

    Only the endpoint knows its tokens, and some cut texts silently that are too long for them. So a text of more than
    `chunk_chars` characters is cut at spaces, and its vector is the mean of its chunks', weighted by characters.
    Vectors are scaled to unit length. A broken answer (not as many vectors as texts, numbers that are not finite) is
    asked for again.

    Args:
        base_url: As of `Endpoint`.
        model: The name that the endpoint knows the model by.
        key: As of `Endpoint`.
        chunk_chars: Characters of a chunk.
        concurrency: Requests in flight at once.
        **options: As of `Endpoint`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        *,
        chunk_chars: int = CHUNK_CHARS,
        concurrency: int = 8,
        **options: Any,
    ) -> None:
        """Check the address; nothing is sent yet.

        Raises:
            InputError: as of `Endpoint`.
        """
        self._endpoint = Endpoint(base_url, key, connections=concurrency, **options)
        self._model, self._concurrency, self.chunk_chars = model, concurrency, chunk_chars
        self._dim = 0
        address = httpx.URL(self._endpoint.base_url)
        # Another endpoint may have other weights under the name; who may hold a key in front of the host is left out.
        self.encoder_id = f"{model}@{address.netloc.decode()}{address.path}/{chunk_chars}"

    @property
    def dim(self) -> int:
        """Number of components D. Only an answer tells, so the first call may send a text of one word.

        Raises: as `stream`.
        """
        if not self._dim:
            list(self.stream(["text"]))
        return self._dim

    def stream(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """See `TextEncoder`: the longest texts first.

        Raises:
            UnavailableError: no answer after all attempts.
            InputError: the endpoint refuses the request, or its vectors change their number of components.
        """
        cut = batches(self._chunks(texts), BATCH_CHARS, most=BATCH_TEXTS)
        yield from join(self._pieces(cut))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        return gather(self, texts)

    def _chunks(self, texts: Sequence[str]) -> Iterator[Chunk[str]]:
        for row, text in enumerate(texts):
            parts = [text]
            if len(text) > self.chunk_chars:
                parts = textwrap.wrap(text, self.chunk_chars, break_on_hyphens=False) or [" "]
            for part in parts:
                yield Chunk(row, len(parts), len(part), part)

    def _pieces(self, cut: Iterable[Sequence[Chunk[str]]]) -> Iterator[Piece]:
        """Answers as they come, in a loop that runs only while one is waited for."""
        with asyncio.Runner() as runner:
            answers = self._answers(cut)

            async def following() -> Piece | None:
                return await anext(answers, None)

            while (piece := runner.run(following())) is not None:
                yield piece

    async def _answers(self, cut: Iterable[Sequence[Chunk[str]]]) -> AsyncGenerator[Piece, None]:
        left = iter(cut)
        running: set[asyncio.Task[Piece]] = set()
        async with self._endpoint:
            try:
                while True:
                    while len(running) < self._concurrency and (batch := next(left, None)):
                        running.add(asyncio.create_task(self._ask(batch)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _ask(self, batch: Sequence[Chunk[str]]) -> Piece:
        texts = [chunk.content for chunk in batch]
        try:
            got = await self._endpoint.call(
                "POST",
                "/embeddings",
                lambda content: _read(content, texts),
                largest_bytes=LARGEST_ANSWER_BYTES,
                content=json.dumps({"model": self._model, "input": texts}).encode(),
                headers={"Content-Type": "application/json"},
            )
        except RefusedError as error:
            if verdict_of(error.http_status) is not Verdict.OWN_FAULT:
                raise
            raise InputError(
                f"{self._endpoint.base_url} refused with {error.reason}: where it says that a text is too long, lower "
                "--chunk-chars, else correct the model, then run this again"
            ) from error
        vectors, tokens = got.value
        dim = vectors.shape[1]
        if self._dim not in (0, dim):
            raise InputError(
                f"{self._endpoint.base_url} gave vectors of {self._dim} components, then of {dim}: have it serve one "
                f"model as {self._model!r}, then run this again"
            )
        self._dim = dim
        return batch, vectors, tokens


def _read(content: bytes, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
    """The vectors [n, D] of unit length and the tokens that an answer gives to n texts.

    Raises:
        ValueError: it is broken.
    """
    answer = parse_json(content)
    try:
        data = sorted(answer["data"], key=lambda entry: entry["index"])
        if [entry["index"] for entry in data] != list(range(len(texts))):
            raise ValueError(f"{len(data)} vectors, not one for each of {len(texts)} texts")
        vectors = np.array([_numbers(entry["embedding"]) for entry in data], dtype=np.float64)
        tokens = (answer.get("usage") or {}).get("prompt_tokens")
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the answer is no list of embeddings: {str(answer)[:80]!r}") from error
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if vectors.ndim != 2 or not np.all((lengths > 0) & np.isfinite(lengths)):
        raise ValueError("the answer has vectors that are zero or not finite")
    if not (type(tokens) is int and tokens >= 0):
        tokens = math.ceil(sum(map(len, texts)) / CHARS_PER_TOKEN)
    return (vectors / lengths).astype(np.float32), tokens


def _numbers(embedding: Any) -> Any:
    """A list as it is, or what base64 holds."""
    return np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else embedding
