"""Owns the seam to language models: what a model is asked and what it answers, and a model in memory for tests."""

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Protocol, Self

__all__ = ["Completion", "LanguageModel", "ScriptedModel"]


class Completion(NamedTuple):
    """One answer: its text (empty: the model declined) and the tokens read and written."""

    text: str
    input_tokens: int
    output_tokens: int


class LanguageModel(Protocol):
    """Answers prompts one at a time. Use as an async context manager, which opens and closes its connections."""

    @property
    def provenance(self) -> str:
        """The model and its parameters, as knowledge records name them; equal only where answers are comparable."""

    @property
    def concurrency(self) -> int:
        """How many prompts it wants at once."""

    async def __aenter__(self) -> Self:
        """Connect."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""

    async def complete(self, prompt: str) -> Completion:
        """Answer one prompt.

        Raises:
            UnavailableError: no answer after all attempts.
            InputError: the model refuses such requests, so another attempt is useless.
        """

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """What so many tokens cost; None where prices are unknown."""


class ScriptedModel:
    """Answers with what `script` returns or raises; tokens are words. `asked` holds the prompts so far."""

    def __init__(self, script: Callable[[str], str], *, provenance: str = "scripted", concurrency: int = 1) -> None:
        """Make a model that calls `script` with each prompt."""
        self.script, self.provenance, self.concurrency = script, provenance, concurrency
        self.asked: list[str] = []

    async def __aenter__(self) -> Self:
        """Do nothing."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    async def complete(self, prompt: str) -> Completion:
        """Answer one prompt."""
        self.asked.append(prompt)
        text = self.script(prompt)
        return Completion(text, len(prompt.split()), len(text.split()))

    def cost_usd(self, input_tokens: int, output_tokens: int) -> None:
        """Unknown."""
