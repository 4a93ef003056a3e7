"""Owns the interface of providers, which answer prompts: questions, answers, and a provider in memory for tests."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType, TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import BudgetError, KarError

__all__ = [
    "Answer",
    "CachedAnswer",
    "Failure",
    "Log",
    "Origin",
    "PendingBatch",
    "Provider",
    "Question",
    "Reply",
    "ScriptedModel",
    "each",
]


class Question(NamedTuple):
    """One prompt to be answered."""

    entity: EntityKind
    id: str
    prompt: str
    prompt_sha256: str
    history_cutoff: int = 0
    """Number of the user's events up to the prompt's cut-off; 0 for items."""


class Origin(NamedTuple):
    """The source of a text that was not written for this prompt."""

    llm: str
    template: str
    created_at: datetime | None
    confidence: str


class Reply(NamedTuple):
    """A text that a model wrote."""

    text: str
    """Empty: the model wrote nothing."""
    input_tokens: int
    output_tokens: int
    finish: str = "stop"
    """Why the text ended; "length": it reached the largest number of tokens that the model may write."""
    latency_ms: float = 0.0
    """Time from the first attempt to the answer."""
    requests: int = 1
    """Number of requests, refused and failed ones included; 0: nothing was sent."""
    maybe_charged: int = 0
    """Number of attempts that ended without an answer, such as by a timeout, and may have been charged for."""
    origin: Origin | None = None
    """Set where the text was not written for this prompt."""


class Failure(NamedTuple):
    """One question without an answer, such as one that is too long or was blocked; others may have answers."""

    reason: str
    requests: int = 1
    maybe_charged: int = 0
    """As in `Reply`."""


class Answer(NamedTuple):
    """A question with its outcome."""

    question: Question
    outcome: Reply | Failure


class CachedAnswer(NamedTuple):
    """The outcome of a question that need not be asked again: from the ledger, a pack or an existing record."""

    outcome: Reply | Failure
    answered_at: datetime


class PendingBatch(NamedTuple):
    """Questions that a provider accepted in an earlier run and still works on: a batch job."""

    handle: str
    """The provider's name for the batch."""
    questions: Sequence[Question]


class Log(Protocol):
    """Notes what a provider sends. Each note is on disk when the call returns."""

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        """Note that questions are about to be sent; must be called before they are.

        Args:
            questions: The questions.
            handle: The name under which the provider finds them again after a crash; empty: it cannot.

        Raises:
            BudgetError: the questions could cost more than the rest of the budget; nothing was noted or may be sent.
        """

    def pending_batches(self) -> Sequence[PendingBatch]:
        """The batches of earlier runs that have no answer yet."""


class Provider(Protocol):
    """Answers questions. Use as an async context manager, which opens and closes its connections or processes."""

    @property
    def provider(self) -> str:
        """The kind of provider: "openai", "openai-batch", "local", "pack"."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Request parameters, JSON-able."""

    @property
    def provenance(self) -> str:
        """The model and its parameters, as knowledge records name them; equal only where answers are comparable."""

    @property
    def concurrency(self) -> int:
        """Largest number of questions under way at once."""

    @property
    def attempts(self) -> int:
        """Largest number of attempts at one question; each may be charged for."""

    async def __aenter__(self) -> Self:
        """Connect."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""

    def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """Answer questions, each once, in any order, as answers come.

        Questions that are already in `log.pending_batches()` are not sent again; their answers are waited for.

        Raises:
            UnavailableError: no answer after all attempts.
            InputError: the endpoint refuses all requests (wrong key, model or parameters).
            BudgetError: the log refused a question; the answers under way were given before.
        """

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """The cost of these tokens, in US dollars; None where prices are unknown."""

    def worst_usd(self, question: Question) -> float | None:
        """Highest possible cost of one attempt at a question, in US dollars; None where prices are unknown."""


async def each(
    complete: Callable[[Question], Awaitable[Reply | Failure]],
    questions: Sequence[Question],
    log: Log,
    concurrency: int,
) -> AsyncGenerator[Answer, None]:
    """Ask single questions, `concurrency` at once; providers without batches implement `ask` with this function.

    When the log refuses a question because of the budget, the answers under way are awaited first: they may cost less
    than was reserved for them. When `complete` raises, nothing more is sent; the answers under way come first, then
    the error.
    """

    async def answer(question: Question) -> Answer:
        return Answer(question, await complete(question))

    unsent = iter(questions)
    next_question = next(unsent, None)
    running: set[asyncio.Task[Answer]] = set()
    stopped: KarError | None = None
    try:
        while True:
            while stopped is None and next_question is not None and len(running) < concurrency:
                try:
                    log.sending([next_question])
                except BudgetError as error:
                    stopped = None if running else error
                    break
                running.add(asyncio.create_task(answer(next_question)))
                next_question = next(unsent, None)
            if not running:
                break
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    answered = task.result()
                except KarError as error:
                    stopped = stopped or error
                    continue
                yield answered
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    if stopped is not None:
        raise stopped


class ScriptedModel:
    """Answers with the text that `script` returns, or raises its error; tokens are words. `asked` holds all prompts."""

    provider: Final = "scripted"
    attempts: Final = 1
    parameters: Final[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        script: Callable[[str], str],
        *,
        model: str = "scripted",
        concurrency: int = 1,
        price: Callable[[int, int], float | None] = lambda read, written: None,
    ) -> None:
        """Make a model that calls `script` with each prompt; `price` gives the cost of tokens read and written."""
        self.script, self.model, self.concurrency, self.cost_usd = script, model, concurrency, price
        self.provenance = model
        self.asked: list[str] = []

    async def __aenter__(self) -> Self:
        """Do nothing."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """See `Provider`."""
        return each(self.complete, questions, log, self.concurrency)

    def worst_usd(self, question: Question) -> float | None:
        """The cost of the prompt's words and an answer of 100 tokens."""
        return self.cost_usd(len(question.prompt.split()), 100)

    async def complete(self, question: Question) -> Reply:
        """Answer one question."""
        self.asked.append(question.prompt)
        text = self.script(question.prompt)
        return Reply(text, len(question.prompt.split()), len(text.split()))
