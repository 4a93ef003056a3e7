"""Owns the means to ask a provider in tests: questions, a log in memory, a clock that only `sleep` moves."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kar_offline.generate.provider import Answer, Provider, Question


def sha256(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def questions(*prompts: str) -> list[Question]:
    """Questions about items 0, 1, 2, ... with these prompts."""
    return [Question("item", str(number), prompt, sha256(prompt)) for number, prompt in enumerate(prompts)]


def ask(provider: Provider, questions: Sequence[Question], notes: "Notes | None" = None) -> list[Answer]:
    """The answers of a provider, which is opened and closed here."""

    async def main() -> list[Answer]:
        async with provider:
            return [answer async for answer in provider.ask(questions, notes or Notes())]

    return asyncio.run(main())


@dataclass
class Notes:
    """A log in memory: the questions sent, and the batches that earlier runs left pending."""

    open: list[Any] = field(default_factory=list)
    sent: list[tuple[list[str], str]] = field(default_factory=list)
    """Prompt hashes, and the handle."""
    refuse: Callable[[int], None] = lambda questions: None
    """Called with the number of questions before they are noted."""

    def sending(self, questions: Any, handle: str = "") -> None:
        self.refuse(len(questions))
        self.sent.append(([question.prompt_sha256 for question in questions], handle))

    def pending_batches(self) -> list[Any]:
        return self.open


class Clock:
    """Time that passes only in `sleep`; `slept` holds the seconds of each call."""

    def __init__(self) -> None:
        self.now_s, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)
