"""Owns the acts of the hostile endpoint: the right answer, and the ways to misbehave."""

import json
import random
from collections.abc import Mapping
from typing import Any

from tests.support.hostile_exchange import Act, Exchange, Mischief


async def answer(exchange: Exchange) -> None:
    """Give the right answer."""
    content = exchange.right()
    exchange.send(200, content)
    if exchange.route == "chat":
        exchange.server.answered[exchange.prompt] += 1


def reply(status: int, text: str | bytes = "", headers: Mapping[str, str] | None = None) -> Act:
    """Answer every request with this status and text."""

    async def act(exchange: Exchange) -> None:
        exchange.send(status, text if isinstance(text, bytes) else text.encode(), headers)

    return act


def body(value: Any) -> Act:
    """Answer with this JSON value; floats may be infinite."""
    return reply(200, json.dumps(value))


async def hang(exchange: Exchange) -> None:
    """Stay silent."""
    await exchange.leaves()


async def hang_in_body(exchange: Exchange) -> None:
    """Begin the right answer, then stay silent."""
    content = exchange.right()
    exchange.begin(200, {"content-length": str(len(content))})
    exchange.writer.write(content[: len(content) // 2])
    await exchange.leaves()


async def drip(exchange: Exchange) -> None:
    """Send a byte at a time: each read is quick, the whole answer takes long."""
    content = exchange.right()
    exchange.begin(200, {"content-length": str(len(content))})
    for start in range(len(content)):
        exchange.writer.write(content[start : start + 1])
        if await exchange.leaves(0.05):
            return


async def truncate(exchange: Exchange) -> None:
    """Announce the whole answer, send half of it, and close the connection."""
    content = exchange.right()
    exchange.begin(200, {"content-length": str(len(content))})
    exchange.writer.write(content[: len(content) // 2])
    exchange.close()


async def reset(exchange: Exchange) -> None:
    """Drop the connection."""
    exchange.close(hard=True)


async def do_then_reset(exchange: Exchange) -> None:
    """Do what the request asks for, then drop the connection before the answer."""
    exchange.right()
    exchange.close(hard=True)


async def flood(exchange: Exchange) -> None:
    """Send without end."""
    exchange.end()
    exchange.begin(200, {"content-type": "application/json"})
    while True:
        exchange.writer.write(b" " * 65536)
        await exchange.writer.drain()


PASSING: Mapping[str, Act] = {
    "hang": hang,
    "hang in body": hang_in_body,
    "drip": drip,
    "truncate": truncate,
    "reset": reset,
    "flood": flood,
    "429": reply(429, "{}"),
    "429 wait": reply(429, "{}", {"retry-after": "0.05"}),
    "500": reply(500, "oops"),
    "503": reply(503, "<html>busy</html>"),
    "garbage": reply(200, b"\x00\xff<html>"),
    "empty": reply(200, ""),
    "a list": body([1]),
    "no choices": body({"choices": []}),
    "choices of another type": body({"choices": {"0": 1}}),
    "content of another type": body({"choices": [{"message": {"content": ["a"]}}]}),
    "too deep": reply(200, "[" * 100_000),
}
"""Misbehaviour after which the same request may succeed."""


def seeded(seed: int, kinds: Mapping[str, Act] = PASSING, share: float = 0.6, limit: int = 3) -> Mischief:
    """Give a share of the prompts one to `limit` acts before their answer; the same in every run."""

    def act_at(prompt: str, nth: int) -> Act | None:
        rng = random.Random(f"{seed} {prompt}")
        plan = rng.choices(list(kinds.values()), k=rng.randint(1, limit)) if rng.random() < share else []
        return plan[nth] if nth < len(plan) else None

    return act_at
