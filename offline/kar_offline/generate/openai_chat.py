"""Owns chat with a model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, hosted services."""

import json
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from kar_offline.generate.provider import Answer, Failure, Log, Question, Reply, each
from kar_offline.openai_http.endpoint import Endpoint, RefusedError, Retry, Verdict, parse_json, storable, verdict_of
from kar_sidecar.errors import InputError

__all__ = ["DEFAULT_PARAMETERS", "ChatModel", "OpenAIChat", "Price", "Retry", "read_completion"]

DEFAULT_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType({"temperature": 0.0, "max_tokens": 400})
LENGTHS: Final = ("max_tokens", "max_completion_tokens")
"""Parameters that limit the tokens of an answer."""
FIRST_REFUSALS: Final = 5
"""This number of refused questions before the first answer means that the request itself is wrong."""
CHARS_PER_TOKEN: Final = 4
TEMPLATE_TOKENS: Final = 64
"""Largest number of tokens that a chat template adds to a prompt."""


class Price(NamedTuple):
    """US dollars for a million tokens."""

    input: float
    output: float


class ChatModel(Endpoint):
    """Base of the chat models at an endpoint; a subclass implements `ask`. Each prompt is one user message.

    Args:
        base_url: As for `Endpoint`.
        model: The model's name at the endpoint.
        key: As for `Endpoint`.
        parameters: Further members of the request body, such as temperature; they enter the provenance. Without
            `max_tokens` or `max_completion_tokens` the limit is 400 tokens.
        price: Price of tokens; None: not known.
        concurrency: Questions under way at once.
        **options: As for `Endpoint`.
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
        **options: Any,
    ) -> None:
        """Check the request; nothing is opened yet.

        Raises:
            InputError: a parameter is wrong, or as for `Endpoint`.
        """
        super().__init__(base_url, key, connections=concurrency, **options)
        self.model, self.parameters, self.concurrency, self._price = model, _checked(parameters), concurrency, price

    @property
    def provenance(self) -> str:
        """The model's name and its parameters."""
        return f"{self.model} {json.dumps(self.parameters, sort_keys=True)}"

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """The cost of these tokens; None where prices are unknown."""
        if self._price is None:
            return None
        return (input_tokens * self._price.input + output_tokens * self._price.output) / 1e6

    def worst_usd(self, question: Question) -> float | None:
        """See `Provider`; a token has at least one byte of UTF-8, which bounds the tokens of the prompt."""
        longest = max(self.parameters[name] for name in LENGTHS if name in self.parameters)
        return self.cost_usd(len(question.prompt.encode("utf-8", "replace")) + TEMPLATE_TOKENS, longest)

    def body(self, prompt: str) -> dict[str, Any]:
        """The body of the request for one completion."""
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.parameters}


class OpenAIChat(ChatModel):
    """Answers through `<base_url>/chat/completions`, one request for each question; arguments as for `ChatModel`."""

    provider = "openai"
    _refused, _answered = 0, False

    @property
    def attempts(self) -> int:
        """See `Provider`."""
        return self._retry.attempts

    def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """See `Provider`. If the endpoint refuses only this question, the outcome is a `Failure`."""
        return each(self._outcome, questions, log, self.concurrency)

    async def _outcome(self, question: Question) -> Reply | Failure:
        try:
            outcome = await self.complete(question)
        except RefusedError as error:
            if verdict_of(error.http_status) is not Verdict.OWN_FAULT:
                raise
            self._refused += 1
            if self._refused >= FIRST_REFUSALS and not self._answered:
                raise InputError(
                    f"{self.base_url} refused each of the first {FIRST_REFUSALS} questions (last: {error.reason}): "
                    "correct the model or the parameters, then run this again"
                ) from error
            return Failure(f"refused with {error.reason}", error.requests, error.maybe_charged)
        self._answered = True
        return outcome

    async def complete(self, question: Question) -> Reply | Failure:
        """Answer one question, with retries; errors as for `Endpoint.call`."""
        started_s = time.perf_counter()
        outcome, requests, maybe_charged = await self.call(
            "POST",
            "/chat/completions",
            lambda content: read_completion(parse_json(content), question.prompt),
            content=json.dumps(self.body(question.prompt)).encode(),
            headers={"Content-Type": "application/json"},
        )
        outcome = outcome._replace(requests=requests, maybe_charged=outcome.maybe_charged + maybe_charged)
        if isinstance(outcome, Reply):
            return outcome._replace(latency_ms=(time.perf_counter() - started_s) * 1e3)
        return outcome


def _checked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Checked request parameters, with a limit to an answer's length.

    Raises:
        InputError: a parameter belongs to the request itself, or has a wrong value.
    """
    if reserved := {"model", "messages", "stream", "n"} & parameters.keys():
        raise InputError(f"parameter {min(reserved)!r} belongs to the request itself: leave it out")
    limited = any(name in parameters for name in LENGTHS)
    checked = dict(parameters) if limited else {**parameters, LENGTHS[0]: DEFAULT_PARAMETERS[LENGTHS[0]]}
    for name in LENGTHS:
        if name in checked and not (type(checked[name]) is int and checked[name] > 0):
            raise InputError(f"parameter {name!r} is {checked[name]!r}: give a whole number above 0")
    try:
        json.dumps(checked, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the parameters cannot be sent as JSON ({error}): give numbers and texts") from error
    return checked


def read_completion(answer: Any, prompt: str) -> Reply | Failure:
    """The outcome of a prompt from the body of a chat completion.

    If the endpoint gives no plausible number of tokens, one token for each four characters is assumed.

    Raises:
        ValueError: the body is not a chat completion.
    """
    try:
        choice, usage = answer["choices"][0], answer.get("usage")
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        if not (text is None or isinstance(text, str)):
            raise TypeError("its content is no text")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer is not a chat completion: {str(answer)[:80]!r}") from error
    if finish == "content_filter":
        return Failure("blocked by a content filter", maybe_charged=1)  # the text before the filter may be charged for
    text = storable(text or "")
    tokens = (_tokens(usage, "prompt_tokens", prompt), _tokens(usage, "completion_tokens", text))
    return Reply(text, *tokens, finish=storable(finish)[:40] if isinstance(finish, str) else "stop")


def _tokens(usage: Any, name: str, text: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 1e9 else math.ceil(len(text) / CHARS_PER_TOKEN)
