"""Owns requests to an OpenAI-compatible endpoint: timeouts, retries, back-off, and the meaning of HTTP statuses."""

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from types import TracebackType
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar

import httpx

from kar_sidecar.errors import InputError, UnavailableError

__all__ = [
    "CallResult",
    "Endpoint",
    "RefusedError",
    "Retry",
    "Verdict",
    "error_message",
    "parse_json",
    "storable",
    "verdict_of",
]

LARGEST_ANSWER_BYTES: Final = 4 << 20
"""Largest accepted answer, unless a call allows more; a longer answer counts as broken."""
T = TypeVar("T")


class Verdict(Enum):
    """The meaning of an HTTP status for a request."""

    GOOD = auto()
    AGAIN = auto()
    """The request may succeed when it is sent again."""
    OWN_FAULT = auto()
    """This request is at fault (too long, not allowed); others may succeed."""
    REFUSED = auto()
    """The endpoint refuses all requests: wrong address, key or model."""


def verdict_of(status: int) -> Verdict:
    """The meaning of an HTTP status; no other code interprets statuses."""
    if 200 <= status < 300:
        return Verdict.GOOD
    if status in (400, 413, 422):
        return Verdict.OWN_FAULT
    return Verdict.AGAIN if status in (408, 409, 425, 429) or status >= 500 else Verdict.REFUSED


CUT_SHORT: Final = (408, 502, 504)
"""Statuses of a proxy that stopped waiting for the model; the model may have gone on, and may charge for the answer."""


class Retry(NamedTuple):
    """How often to send a request, and how long to wait in between: random, up to `base_s` * 2**attempt.

    In addition, all requests wait as long as a server's `Retry-After` says. Each wait is at most `longest_s` seconds.
    """

    attempts: int = 6
    base_s: float = 0.5
    longest_s: float = 30.0


class CallResult(NamedTuple, Generic[T]):
    """The result of a call."""

    value: T
    requests: int
    """Number of attempts."""
    maybe_charged: int
    """Number of attempts without an answer that may have been charged for."""


class RefusedError(InputError):
    """The endpoint refuses a request, and would refuse it again; `reason` says why, in short."""

    def __init__(self, text: str, status: int = 0, reason: str = "") -> None:
        super().__init__(text)
        self.http_status, self.reason, self.requests, self.maybe_charged = status, reason, 1, 0


class _TransientError(Exception):
    """A failed attempt that may be repeated: the reason, and whether it may have been charged for."""

    def __init__(self, reason: str, *, maybe_charged: bool) -> None:
        super().__init__(reason)
        self.maybe_charged = maybe_charged


class Endpoint:
    """A client of an OpenAI-compatible endpoint. Use as an async context manager, which opens and closes connections.

    Args:
        base_url: Address including the version, such as "http://127.0.0.1:8000/v1".
        key: Bearer token; never logged, and removed from error texts.
        connections: Largest number of connections at once.
        timeout_s: Longest time of one attempt, in seconds.
        retry: How to repeat attempts after statuses 429 and 5xx, broken answers and timeouts.
        rng: Draws the waiting times.
        sleep: Waits a number of seconds.
        clock: Returns a monotonic time, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None = None,
        *,
        connections: int = 8,
        timeout_s: float = 120.0,
        retry: Retry = Retry(),  # noqa: B008  an immutable value
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check the address and the key; nothing is opened yet.

        Raises:
            InputError: `base_url` is not an HTTP address, or the key cannot stand in a header.
        """
        try:
            address = httpx.URL(base_url)
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            raise InputError(f"{base_url!r} is not an HTTP address: give one such as http://127.0.0.1:8000/v1")
        self.base_url, self._key = base_url.rstrip("/"), (key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("the key has characters that no key has: copy it again, without quotes or line ends")
        self._connections, self._timeout_s, self._retry = connections, timeout_s, retry
        self._rng, self._sleep, self._clock = rng or random.Random(), sleep, clock
        self._client: httpx.AsyncClient | None = None
        self._not_before = -math.inf

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        # A compressed answer can unpack to any size, so compression is not requested.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._client = httpx.AsyncClient(
            headers=headers,
            limits=httpx.Limits(max_connections=self._connections, max_keepalive_connections=self._connections),
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

    async def call(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], T],
        *,
        largest_bytes: int = LARGEST_ANSWER_BYTES,
        patience: float = 1.0,
        recover: Callable[[], Awaitable[T | None]] | None = None,
        **request: Any,
    ) -> CallResult[T]:
        """Send a request until it succeeds.

        Args:
            method: HTTP method.
            path: Path below the base address.
            read: Reads the body; raises ValueError if it is broken, and the request is then sent again.
            largest_bytes: Largest accepted body; a longer one counts as broken.
            patience: Longest time of one attempt, as a multiple of `timeout_s`.
            recover: Called before each further attempt; returns the result of an attempt with a lost answer, or None.
            **request: Further arguments of `httpx.AsyncClient.stream`.

        Raises:
            UnavailableError: no answer after all attempts.
            RefusedError: the endpoint refuses this request, or all requests (wrong address, key or model).
        """
        reason, maybe_charged, timeout_s = "", 0, patience * self._timeout_s
        for attempt in range(self._retry.attempts):
            await self._wait(attempt)
            if attempt and recover is not None and (recovered := await recover()) is not None:
                return CallResult(recovered, attempt, maybe_charged)
            try:
                async with asyncio.timeout(timeout_s):
                    content = await self._attempt(method, path, largest_bytes, request)
                return CallResult(read(content), attempt + 1, maybe_charged)
            except TimeoutError:
                reason, charged = f"no answer within {timeout_s:g} s", True
            except (ValueError, RecursionError) as error:
                reason, charged = str(error), True
            except _TransientError as error:
                reason, charged = str(error), error.maybe_charged
            except RefusedError as error:
                error.requests, error.maybe_charged = attempt + 1, maybe_charged
                raise
            maybe_charged += charged
        raise UnavailableError(
            f"{self.base_url} gave no answer in {self._retry.attempts} attempts (last: {self._hide(reason)}): "
            "check the endpoint, then run the same command to go on"
        )

    async def _wait(self, attempt: int) -> None:
        """Wait before an attempt: as long as the server asked for, and after a failure a random time more."""
        requested_s = max(self._not_before - self._clock(), 0.0)
        if attempt or requested_s:
            random_s = self._rng.uniform(0, self._retry.base_s * 2 ** max(attempt - 1, 0))
            await self._sleep(requested_s + min(random_s, self._retry.longest_s))

    async def _attempt(self, method: str, path: str, largest_bytes: int, request: dict[str, Any]) -> bytes:
        if self._client is None:
            raise RuntimeError("an endpoint is used outside of `async with`")
        content = bytearray()
        try:
            async with self._client.stream(method, self.base_url + path, **request) as response:
                wait_s = min(_retry_after_s(response.headers), self._retry.longest_s)
                self._not_before = max(self._not_before, self._clock() + wait_s)
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > largest_bytes:
                        raise ValueError(f"an answer of more than {largest_bytes:,} bytes")
        except httpx.RequestError as error:
            connected = not isinstance(error, httpx.ConnectError)
            raise _TransientError(f"{type(error).__name__}: {error}", maybe_charged=connected) from error
        status = response.status_code
        verdict = verdict_of(status)
        if verdict is Verdict.GOOD:
            return bytes(content)
        moved = f"it redirects to {response.headers['location']}" if "location" in response.headers else ""
        reason = self._hide(f"status {status}: {moved or error_message(bytes(content))}")
        if verdict is Verdict.AGAIN:
            raise _TransientError(reason, maybe_charged=status in CUT_SHORT)
        raise RefusedError(
            f"{self.base_url} refused with {reason}; correct the address, model, key or parameters, then run this "
            "again",
            status,
            reason,
        )

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after_s(headers: httpx.Headers) -> float:
    """Seconds that a server asks to wait; a date is compared with the server's own clock."""
    value = headers.get("retry-after", "")
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = (parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date", ""))).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return wait_s if wait_s > 0 else 0.0  # NaN is not above 0


def parse_json(content: bytes) -> Any:
    """The JSON value of a body; bytes that are not UTF-8 become U+FFFD.

    Raises:
        ValueError: the body is not JSON.
    """
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON: {text[:80]!r}") from error


def error_message(body: Any) -> str:
    """The message in the body of an error, as one line; the body is bytes, or JSON that was read from them."""
    if isinstance(body, bytes):
        try:
            body = parse_json(body)
        except ValueError:
            body = body.decode("utf-8", "replace")
    for name in ("error", "message"):
        body = (body.get(name) or body) if isinstance(body, dict) else body
    return " ".join(storable(str(body)).split())[:300] or "no reason given"


def storable(text: str) -> str:
    """Text that can be stored and shown: no control characters except line feeds, no halves of surrogate pairs."""
    text = re.sub("\r\n?|[\u0085\u2028\u2029]", "\n", text).replace("\t", " ")
    return re.sub("[\ud800-\udfff]", "\ufffd", re.sub("[\x00-\x09\x0b-\x1f\x7f-\x9f]", "", text)).strip()
