"""Owns the generation half of the throughput benchmark: `kar generate`'s way of asking against the bare server.

Both ask one llama.cpp server the same prompts, as many at once, for answers of the same length. `bare` posts them and
reads the answers, nothing else. `ours` is what `kar generate` does between prompts and verdicts: it notes each question
in a ledger on disk before it leaves and each answer as it comes, retries, counts, and judges every text.
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

from kar_bench.performance.throughput import BARE, OURS, Contender
from kar_offline.generate.ledger import Ledger
from kar_offline.generate.llama_cpp import LocalChat
from kar_offline.generate.openai_chat import OpenAIChat, Price
from kar_offline.generate.runner import work_through
from kar_offline.generate.stage import utc_now
from kar_offline.generate.task import GenerationTask
from kar_offline.work_folder import WorkFolder

__all__ = ["generation_contenders"]

CONCURRENCY: Final = 4
TOKENS: Final = 48
"""That an answer has."""
PARAMETERS: Final = MappingProxyType(
    # Answers of one length make turns alike; a server that remembers prompts would make the later turns faster.
    {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "cache_prompt": False, "seed": 1}
)


@contextmanager
def generation_contenders(cases: Sequence[GenerationTask]) -> Iterator[list[Contender]]:
    """The contenders of the task "generate", while a llama.cpp server with SmolLM2 runs.

    Args:
        cases: What to write about; each turn begins anew.

    Raises:
        UnavailableError: the model is neither cached nor to be downloaded.
        ModuleNotFoundError: xllamacpp is not installed (extra `local-llm`).
    """
    local = LocalChat(parameters=PARAMETERS, concurrency=CONCURRENCY)
    with asyncio.Runner() as runner:
        runner.run(local.__aenter__())
        try:
            chat = OpenAIChat(
                local.base_url, local.model, parameters=PARAMETERS, price=Price(0.0, 0.0), concurrency=CONCURRENCY
            )
            tokens = TOKENS * len(cases)
            prompts = [case.prompt.prompt for case in cases]
            yield [
                Contender("generate", "llama.cpp", BARE, tokens, partial(_bare, chat, prompts)),
                Contender("generate", "llama.cpp", OURS, tokens, partial(_ours, chat, cases)),
            ]
        finally:
            runner.run(local.__aexit__(None, None, None))


def _bare(chat: OpenAIChat, prompts: Sequence[str]) -> None:
    async def post(client: httpx.AsyncClient, turn: asyncio.Semaphore, prompt: str) -> None:
        async with turn:
            answer = await client.post(f"{chat.base_url}/chat/completions", json=chat.body(prompt))
            _check(answer.json())

    async def main() -> None:
        turn = asyncio.Semaphore(CONCURRENCY)
        async with httpx.AsyncClient(timeout=None) as client:
            await asyncio.gather(*(post(client, turn, prompt) for prompt in prompts))

    asyncio.run(main())


def _check(answer: dict[str, Any]) -> None:
    written = answer["usage"]["completion_tokens"]
    if written != TOKENS:
        raise RuntimeError(f"an answer has {written} tokens, not {TOKENS}")


def _ours(chat: OpenAIChat, cases: Sequence[GenerationTask]) -> None:
    fresh = [GenerationTask(case.prompt, case.subject, case.rules) for case in cases]
    with tempfile.TemporaryDirectory() as folder, Ledger.open(WorkFolder(Path(folder)), utc_now) as ledger:
        tally = asyncio.run(work_through(fresh, chat, ledger, retries=0))
    if tally.output_tokens != TOKENS * len(cases):
        raise RuntimeError(f"answers have {tally.output_tokens} tokens, not {TOKENS * len(cases)}")
