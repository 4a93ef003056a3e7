"""Owns requests to an OpenAI-compatible address: timeouts, retries, back-off, and what each HTTP status means."""

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

__all__ = ["Endpoint", "Got", "RefusedError", "Retry", "Verdict", "parse_json", "said", "storable", "verdict_of"]

LARGEST_ANSWER_BYTES: Final = 4 << 20
T = TypeVar("T")


class Verdict(Enum):
    """What an HTTP status says about a request."""

    GOOD = auto()
    AGAIN = auto()
    """It may pass when sent again."""
    OWN_FAULT = auto()
    """This one is at fault (too long, not allowed); others may pass."""
    REFUSED = auto()
    """The endpoint refuses all such requests: wrong address, key or model."""


def verdict_of(status: int) -> Verdict:
    """The one table of HTTP statuses."""
    if 200 <= status < 300:
        return Verdict.GOOD
    if status in (400, 413, 422):
        return Verdict.OWN_FAULT
    return Verdict.AGAIN if status in (408, 409, 425, 429) or status >= 500 else Verdict.REFUSED


CUT_SHORT: Final = (408, 502, 504)
"""Statuses by which a proxy gives up on a model that may go on, and charge for it."""


class Retry(NamedTuple):
    """How often to ask, and how long to wait between: random up to `base_s` * 2**attempt, at most `longest_s`.

    A server's `Retry-After` holds for all requests and comes on top, itself up to `longest_s`.
    """

    attempts: int = 6
    base_s: float = 0.5
    longest_s: float = 30.0


class Got(NamedTuple, Generic[T]):
    """What a call returned."""

    value: T
    requests: int
    """Attempts that it took."""
    maybe_charged: int
    """Those of them that may have been charged for without an answer."""


class RefusedError(InputError):
    """The endpoint refuses a request with a status that will stay; `reason` says why, in short."""

    def __init__(self, text: str, status: int = 0, reason: str = "") -> None:
        super().__init__(text)
        self.http_status, self.reason, self.requests, self.maybe_charged = status, reason, 1, 0


class _TransientError(Exception):
    """The reason why an attempt failed that may be repeated, and whether it may have been charged for."""

    def __init__(self, reason: str, *, maybe_charged: bool) -> None:
        super().__init__(reason)
        self.maybe_charged = maybe_charged


class Endpoint:
    """An OpenAI-compatible address. Use as an async context manager, which opens and closes its connections.

    Args:
        base_url: Address up to and with the version, such as "http://127.0.0.1:8000/v1".
        key: Bearer token; never logged, and cut out of error texts.
        connections: The most at once.
        timeout_s: The longest time that one attempt may take.
        retry: What to do after 429, 5xx, broken answers and timeouts.
        rng: Draws the waiting times.
        sleep: Waits.
        clock: Seconds that only grow.
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
            InputError: `base_url` is no HTTP address, or the key no value of a header.
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
        # A packed answer can unpack to any size, so none is asked for.
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
    ) -> Got[T]:
        """Send a request until it succeeds.

        Args:
            method: Of HTTP.
            path: Beneath the base address.
            read: Takes the body apart; a ValueError says how it is broken, and it is asked for again.
            largest_bytes: A longer body is broken.
            patience: The timeout of an attempt, as a multiple of `timeout_s`.
            recover: Tells before each further attempt what the attempts before it achieved unseen, if anything.
            **request: As of `httpx.AsyncClient.stream`.

        Raises:
            UnavailableError: no answer after all attempts.
            RefusedError: the endpoint refuses the request: for its own fault, or whatever it asks (wrong address,
                key or model).
        """
        reason, maybe_charged, timeout_s = "", 0, patience * self._timeout_s
        for attempt in range(self._retry.attempts):
            await self._wait(attempt)
            if attempt and recover is not None and (found := await recover()) is not None:
                return Got(found, attempt, maybe_charged)
            try:
                async with asyncio.timeout(timeout_s):
                    content = await self._attempt(method, path, largest_bytes, request)
                return Got(read(content), attempt + 1, maybe_charged)
            except TimeoutError:
                reason, lost = f"no answer within {timeout_s:g} s", True
            except (ValueError, RecursionError) as error:
                reason, lost = str(error), True
            except _TransientError as error:
                reason, lost = str(error), error.maybe_charged
            except RefusedError as error:
                error.requests, error.maybe_charged = attempt + 1, maybe_charged
                raise
            maybe_charged += lost
        raise UnavailableError(
            f"{self.base_url} gave no answer in {self._retry.attempts} attempts (last: {self._hide(reason)}): "
            "check the endpoint, then run the same command to go on"
        )

    async def _wait(self, attempt: int) -> None:
        """Before an attempt: as long as the server asked everybody to wait, and after a failure a random time more."""
        asked_s = max(self._not_before - self._clock(), 0.0)
        if attempt or asked_s:
            drawn_s = self._rng.uniform(0, self._retry.base_s * 2 ** max(attempt - 1, 0))
            await self._sleep(asked_s + min(drawn_s, self._retry.longest_s))

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
            sent = not isinstance(error, httpx.ConnectError)
            raise _TransientError(f"{type(error).__name__}: {error}", maybe_charged=sent) from error
        status = response.status_code
        verdict = verdict_of(status)
        if verdict is Verdict.GOOD:
            return bytes(content)
        moved = f"it redirects to {response.headers['location']}" if "location" in response.headers else ""
        reason = self._hide(f"status {status}: {moved or said(bytes(content))}")
        if verdict is Verdict.AGAIN:
            raise _TransientError(reason, maybe_charged=status in CUT_SHORT)
        what = f"{self.base_url} refused with {reason}"
        raise RefusedError(
            f"{what}; correct the address, model, key or parameters, then run this again", status, reason
        )

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after_s(headers: httpx.Headers) -> float:
    """How long a server asks to wait; a date counts from the server's own clock."""
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
    """The value of a body, in which bytes that are no UTF-8 became U+FFFD.

    Raises:
        ValueError: it is not JSON.
    """
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON: {text[:80]!r}") from error


def said(body: Any) -> str:
    """What an error's body says, as one line: bytes, or JSON that was read from them."""
    if isinstance(body, bytes):
        try:
            body = parse_json(body)
        except ValueError:
            body = body.decode("utf-8", "replace")
    for name in ("error", "message"):
        body = (body.get(name) or body) if isinstance(body, dict) else body
    return " ".join(storable(str(body)).split())[:300] or "no reason given"


def storable(text: str) -> str:
    """Text that UTF-8 and people can take: no control characters but line feeds, no halves of surrogate pairs."""
    text = re.sub("\r\n?|[\u0085\u2028\u2029]", "\n", text).replace("\t", " ")
    return re.sub("[\ud800-\udfff]", "\ufffd", re.sub("[\x00-\x09\x0b-\x1f\x7f-\x9f]", "", text)).strip()
