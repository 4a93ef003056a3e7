"""Owns the generation half of the throughput benchmark: `kar generate` against the bare llama.cpp server.

Both ask one server the same prompts, equally many at once, for answers of the same length.

bare  posts the prompts and reads the answers, nothing else
ours  notes each question in a ledger on disk before it is sent and each answer when it arrives, retries, counts, and
      judges every text, as `kar generate` does
"""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import httpx

from kar_bench.performance.throughput.measure import BARE, OURS, Contender
from kar_offline.generate.ledger import Ledger
from kar_offline.generate.llama_cpp import LocalChat
from kar_offline.generate.openai_chat import OpenAIChat, Price
from kar_offline.generate.runner import work_through
from kar_offline.generate.stage import utc_now
from kar_offline.generate.task import GenerationTask
from kar_offline.work_folder import WorkFolder

__all__ = ["generation_contenders"]

CONCURRENCY: Final = 4
ANSWER_TOKENS: Final = 48
PARAMETERS: Final = MappingProxyType(
    # Answers of one length make turns alike; a server that remembers prompts would make later turns faster.
    {"temperature": 0.0, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "cache_prompt": False, "seed": 1}
)


@contextmanager
def generation_contenders(tasks: Sequence[GenerationTask]) -> Iterator[list[Contender]]:
    """The contenders of the task "generate", while a llama.cpp server with SmolLM2 runs.

    Args:
        tasks: What to write about; each turn starts with unanswered copies.

    Raises:
        UnavailableError: the model is not cached and cannot be downloaded.
        ModuleNotFoundError: xllamacpp is not installed (extra `local-llm`).
    """
    local = LocalChat(parameters=PARAMETERS, concurrency=CONCURRENCY)
    with asyncio.Runner() as runner:
        runner.run(local.__aenter__())
        try:
            chat = OpenAIChat(
                local.base_url, local.model, parameters=PARAMETERS, price=Price(0.0, 0.0), concurrency=CONCURRENCY
            )
            tokens = ANSWER_TOKENS * len(tasks)
            prompts = [task.prompt.prompt for task in tasks]
            yield [
                Contender("generate", "llama.cpp", BARE, tokens, partial(_ask_server, chat, prompts)),
                Contender("generate", "llama.cpp", OURS, tokens, partial(_generate_as_product, chat, tasks)),
            ]
        finally:
            runner.run(local.__aexit__(None, None, None))


def _ask_server(chat: OpenAIChat, prompts: Sequence[str]) -> None:
    async def post(client: httpx.AsyncClient, slots: asyncio.Semaphore, prompt: str) -> None:
        async with slots:
            answer = await client.post(f"{chat.base_url}/chat/completions", json=chat.body(prompt))
            _check_length(answer.json())

    async def main() -> None:
        slots = asyncio.Semaphore(CONCURRENCY)
        async with httpx.AsyncClient(timeout=None) as client:
            await asyncio.gather(*(post(client, slots, prompt) for prompt in prompts))

    asyncio.run(main())


def _check_length(answer: dict[str, Any]) -> None:
    tokens = answer["usage"]["completion_tokens"]
    if tokens != ANSWER_TOKENS:
        raise RuntimeError(f"an answer has {tokens} tokens, not {ANSWER_TOKENS}")


def _generate_as_product(chat: OpenAIChat, tasks: Sequence[GenerationTask]) -> None:
    unanswered = [GenerationTask(task.prompt, task.subject, task.rules) for task in tasks]
    with tempfile.TemporaryDirectory() as folder, Ledger.open(WorkFolder(Path(folder)), utc_now) as ledger:
        tally = asyncio.run(work_through(unanswered, chat, ledger, retries=0))
    if tally.output_tokens != ANSWER_TOKENS * len(tasks):
        raise RuntimeError(f"answers have {tally.output_tokens} tokens, not {ANSWER_TOKENS * len(tasks)}")
