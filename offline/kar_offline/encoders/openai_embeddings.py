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

from kar_offline.encoders.chunks import Chunk, batches, join_chunks
from kar_offline.encoders.text_encoder import EncodedTexts, gather
from kar_offline.openai_http.endpoint import Endpoint, RefusedError, Verdict, parse_json, verdict_of
from kar_sidecar.errors import InputError

__all__ = ["CHUNK_CHARS", "EndpointEncoder"]

CHUNK_CHARS: Final = 1500
"""Characters of a chunk: about 375 tokens of English. The smallest common encoders take 512 tokens."""
CHARS_PER_TOKEN: Final = 4
"""Characters of an English token, for endpoints that report no token count."""
BATCH_CHARS: Final = 32_000
"""Maximal characters of a request."""
BATCH_TEXTS: Final = 32
"""Maximal texts of a request; the default limit of TEI and other servers."""
MAX_ANSWER_BYTES: Final = 64 << 20
"""Longer answers are refused."""

EncodedBatch = tuple[Sequence[Chunk[str]], NDArray[np.float32], int]
"""n chunks, their vectors [n, D], and the number of tokens that were encoded."""


class EndpointEncoder:
    """A model behind `<base_url>/embeddings`.

    Only the endpoint can count tokens, and some endpoints truncate long texts silently. Therefore a text of more
    than `chunk_chars` characters is cut at spaces, and its vector is the mean of its chunks' vectors, weighted by
    characters and scaled to unit length. An invalid answer (a missing vector, numbers that are not finite) is requested
    again.

    Args:
        base_url: See `Endpoint`.
        model: The model's name at the endpoint.
        key: See `Endpoint`.
        chunk_chars: Maximal characters of a chunk.
        concurrency: Maximal requests in flight.
        **options: Further arguments of `Endpoint`.
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
            InputError: see `Endpoint`.
        """
        self._endpoint = Endpoint(base_url, key, connections=concurrency, **options)
        self._model, self._concurrency, self.chunk_chars = model, concurrency, chunk_chars
        self._dim = 0
        address = httpx.URL(self._endpoint.base_url)
        # The address is part of the id: two endpoints may serve different weights under one name. `netloc` is without
        # credentials.
        self.encoder_id = f"{model}@{address.netloc.decode()}{address.path}/{chunk_chars}"

    @property
    def dim(self) -> int:
        """Number of components D; the first call may send a text of one word, because only an answer reveals D.

        Raises:
            UnavailableError, InputError: see `stream`.
        """
        if not self._dim:
            list(self.stream(["text"]))
        return self._dim

    def stream(self, texts: Sequence[str]) -> Iterator[EncodedTexts]:
        """See `TextEncoder`: the longest texts first.

        Raises:
            UnavailableError: no valid answer after all attempts.
            InputError: the endpoint refuses the request, or the number of components changes between answers.
        """
        planned = batches(self._chunks(texts), BATCH_CHARS, max_chunks=BATCH_TEXTS)
        yield from join_chunks(self._encoded_batches(planned))

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

    def _encoded_batches(self, planned: Iterable[Sequence[Chunk[str]]]) -> Iterator[EncodedBatch]:
        """Answers as they arrive; the event loop runs only while the caller waits for the next one."""
        with asyncio.Runner() as runner:
            answers = self._answers(planned)

            async def next_answer() -> EncodedBatch | None:
                return await anext(answers, None)

            while (encoded := runner.run(next_answer())) is not None:
                yield encoded

    async def _answers(self, planned: Iterable[Sequence[Chunk[str]]]) -> AsyncGenerator[EncodedBatch, None]:
        remaining = iter(planned)
        running: set[asyncio.Task[EncodedBatch]] = set()
        async with self._endpoint:
            try:
                while True:
                    while len(running) < self._concurrency and (batch := next(remaining, None)):
                        running.add(asyncio.create_task(self._request(batch)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _request(self, batch: Sequence[Chunk[str]]) -> EncodedBatch:
        texts = [chunk.content for chunk in batch]
        try:
            answer = await self._endpoint.call(
                "POST",
                "/embeddings",
                lambda content: _read_answer(content, texts),
                largest_bytes=MAX_ANSWER_BYTES,
                content=json.dumps({"model": self._model, "input": texts}).encode(),
                headers={"Content-Type": "application/json"},
            )
        except RefusedError as error:
            if verdict_of(error.http_status) is not Verdict.OWN_FAULT:
                raise
            raise InputError(
                f"{self._endpoint.base_url} refused with {error.reason}: if a text is too long, lower --chunk-chars, "
                "otherwise correct the model; then run this again"
            ) from error
        vectors, tokens = answer.value
        dim = vectors.shape[1]
        if self._dim not in (0, dim):
            raise InputError(
                f"{self._endpoint.base_url} gave vectors of {self._dim} components, then of {dim}: have it serve one "
                f"model as {self._model!r}, then run this again"
            )
        self._dim = dim
        return batch, vectors, tokens


def _read_answer(content: bytes, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
    """The vectors [n, D] of n texts, scaled to unit length, and the token count of an answer.

    Raises:
        ValueError: the answer is invalid.
    """
    answer = parse_json(content)
    try:
        data = sorted(answer["data"], key=lambda entry: entry["index"])
        if [entry["index"] for entry in data] != list(range(len(texts))):
            raise ValueError(f"{len(data)} vectors, not one for each of {len(texts)} texts")
        vectors = np.array([_components(entry["embedding"]) for entry in data], dtype=np.float64)
        tokens = (answer.get("usage") or {}).get("prompt_tokens")
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the answer is not a list of embeddings: {str(answer)[:80]!r}") from error
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if vectors.ndim != 2 or not np.all((lengths > 0) & np.isfinite(lengths)):
        raise ValueError("the answer has vectors that are zero or not finite")
    if not (type(tokens) is int and tokens >= 0):
        tokens = math.ceil(sum(map(len, texts)) / CHARS_PER_TOKEN)
    return (vectors / lengths).astype(np.float32), tokens


def _components(embedding: Any) -> Any:
    """Components of a vector: a list as it is, or decoded from base64."""
    return np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else embedding
