"""Owns the client of OpenAI-compatible chat endpoints: vLLM, llama.cpp, Ollama, hosted services."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final, NamedTuple, Self

import httpx

from kar_offline.generate.model import Completion
from kar_sidecar.errors import InputError, UnavailableError

__all__ = ["DEFAULT_PARAMETERS", "OpenAIChat", "Price", "Retry"]

DEFAULT_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType({"temperature": 0.0, "max_tokens": 400})
RETRIED: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class Price(NamedTuple):
    """US dollars for a million tokens."""

    input: float
    output: float


class Retry(NamedTuple):
    """How often to ask, and how long to wait between: random up to `base_s` * 2**attempt, at most `longest_s`.

    A server's `Retry-After` is obeyed up to `longest_s`.
    """

    attempts: int = 6
    base_s: float = 0.5
    longest_s: float = 30.0


class _TransientError(Exception):
    """The reason why an attempt failed that may be repeated, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class OpenAIChat:
    """A model behind `<base_url>/chat/completions`; each prompt is one user message.

    Args:
        base_url: Address up to and with the version, such as "http://127.0.0.1:8000/v1".
        model: The name that the endpoint knows the model by.
        key: Bearer token; never logged, and cut out of error texts.
        parameters: Further members of the request body, such as temperature; they enter the provenance.
        price: What tokens cost, where known.
        concurrency: Requests in flight at once.
        timeout_s: The longest time that one attempt may take.
        retry: What to do after 429, 5xx, broken answers and timeouts.
        rng: Draws the waiting times.
        sleep: Waits.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        *,
        parameters: Mapping[str, Any] = DEFAULT_PARAMETERS,
        price: Price | None = None,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        retry: Retry = Retry(),  # noqa: B008  an immutable value
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Check the address; nothing is opened yet.

        Raises:
            InputError: `base_url` is no HTTP address, or a parameter belongs to the request itself.
        """
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"{base_url!r} is not an HTTP address: give one such as http://127.0.0.1:8000/v1")
        if reserved := {"model", "messages", "stream"} & parameters.keys():
            raise InputError(f"parameter {sorted(reserved)[0]!r} belongs to the request itself: leave it out")
        self.base_url, self.model, self.concurrency = base_url.rstrip("/"), model, concurrency
        self.parameters = dict(parameters)
        self._key, self._price, self._timeout_s, self._retry = key, price, timeout_s, retry
        self._rng, self._sleep = rng or random.Random(), sleep
        self._client: httpx.AsyncClient | None = None

    @property
    def provenance(self) -> str:
        """The model's name and its parameters."""
        return f"{self.model} {json.dumps(self.parameters, sort_keys=True)}"

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """What so many tokens cost; None where prices are unknown."""
        if self._price is None:
            return None
        return (input_tokens * self._price.input + output_tokens * self._price.output) / 1e6

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            timeout=None,  # `asyncio.timeout` bounds a whole attempt; httpx would bound each single read
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection pool."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def complete(self, prompt: str) -> Completion:
        """Answer one prompt, with retries.

        Raises:
            UnavailableError: no answer after all attempts.
            InputError: the endpoint refuses the request (wrong key, model or parameters, a prompt too long).
        """
        for attempt in range(self._retry.attempts):
            try:
                return await self._attempt(prompt)
            except _TransientError as error:
                reason, wait_s = str(error), error.wait_s
            if attempt + 1 < self._retry.attempts:
                drawn_s = self._rng.uniform(0, self._retry.base_s * 2**attempt)
                await self._sleep(min(max(drawn_s, wait_s), self._retry.longest_s))
        raise UnavailableError(
            f"{self.base_url} gave no answer in {self._retry.attempts} attempts (last: {reason}): "
            "check the endpoint, then run the same command to go on"
        )

    async def _attempt(self, prompt: str) -> Completion:
        if self._client is None:
            raise RuntimeError("OpenAIChat is used outside of `async with`")
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.parameters}
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post(f"{self.base_url}/chat/completions", json=body)
        except TimeoutError:
            raise _TransientError(f"no answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error
        if response.status_code in RETRIED:
            after = response.headers.get("retry-after", "")
            raise _TransientError(f"status {response.status_code}", float(after) if after.isdecimal() else 0.0)
        if not response.is_success:
            raise InputError(
                f"{self.base_url} refused with status {response.status_code}: {self._detail(response)}; "
                "correct the address, model, key or parameters, then run this again"
            )
        try:
            answer = response.json()
            text = answer["choices"][0]["message"]["content"] or ""
            usage = answer.get("usage") or {}
            return Completion(
                text.strip(), int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _TransientError("the answer is not a chat completion") from error

    def _detail(self, response: httpx.Response) -> str:
        text = " ".join(response.text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300] or "no reason given"
