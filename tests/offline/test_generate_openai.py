import asyncio
import json
import logging
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kar_offline.generate import Completion, OpenAIChat, Price, Retry
from kar_sidecar.errors import InputError, UnavailableError

pytestmark = pytest.mark.service

KEY = "sk-very-secret"
ANSWER = {
    "choices": [{"message": {"content": " A buddy comedy. "}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4},
}
HANG = -1


class Endpoint(ThreadingHTTPServer):
    """Plays one (status, body, headers) a call, then answers well; remembers calls and how many ran at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, str, dict[str, str]]] = []
        self.calls: list[tuple[str, dict[str, Any], str | None]] = []
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.gate: threading.Barrier | None = None
        self.running = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.calls.append((self.path, body, self.headers["authorization"]))
            server.running += 1
            server.most = max(server.most, server.running)
            status, text, headers = server.script.pop(0) if server.script else (200, json.dumps(ANSWER), {})
        if server.gate:
            server.gate.wait(10)
        if status == HANG:
            server.stopped.wait(10)
        with server.lock:
            server.running -= 1
        if status == HANG:
            return
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(text.encode()))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


class Sleeps(list[float]):
    """Stands in for the clock: remembers how long it was asked to wait, and does not."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


def ask(chat: OpenAIChat, *prompts: str) -> list[Completion]:
    async def main() -> list[Completion]:
        async with chat:
            return await asyncio.gather(*(chat.complete(prompt) for prompt in prompts))

    return asyncio.run(main())


def test_a_prompt_is_one_user_message_with_model_key_and_parameters(endpoint: Endpoint) -> None:
    chat = OpenAIChat(endpoint.url + "/", "tiny", KEY, parameters={"temperature": 0.5, "max_tokens": 9})
    assert ask(chat, "Which film?") == [Completion("A buddy comedy.", 7, 4)]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Which film?"}],
        "temperature": 0.5,
        "max_tokens": 9,
    }
    assert endpoint.calls == [("/v1/chat/completions", body, f"Bearer {KEY}")]
    assert chat.provenance == 'tiny {"max_tokens": 9, "temperature": 0.5}'


def test_without_a_key_no_authorization_is_sent(endpoint: Endpoint) -> None:
    ask(OpenAIChat(endpoint.url, "tiny"), "Which film?")
    assert endpoint.calls[0][2] is None


@pytest.mark.parametrize(
    "failure",
    [(429, "{}"), (500, "oops"), (503, ""), (200, "<html>"), (200, "{}"), (200, '{"choices": []}'), (200, "[1]")],
)
def test_what_may_pass_is_asked_again(endpoint: Endpoint, failure: tuple[int, str]) -> None:
    endpoint.script = [(*failure, {}), (*failure, {})]
    sleeps = Sleeps()
    chat = OpenAIChat(endpoint.url, "tiny", retry=Retry(3, base_s=2.0), rng=random.Random(1), sleep=sleeps)
    assert ask(chat, "Which film?")[0].text == "A buddy comedy."
    assert len(endpoint.calls) == 3
    assert 0 <= sleeps[0] <= 2.0
    assert 0 <= sleeps[1] <= 4.0


def test_retry_after_is_obeyed_up_to_the_longest_wait(endpoint: Endpoint) -> None:
    endpoint.script = [(429, "", {"retry-after": "7"}), (429, "", {"retry-after": "3600"})]
    sleeps = Sleeps()
    ask(OpenAIChat(endpoint.url, "tiny", retry=Retry(3, 0.0, longest_s=30.0), sleep=sleeps), "Which film?")
    assert sleeps == [7.0, 30.0]


def test_attempts_end(endpoint: Endpoint) -> None:
    endpoint.script = [(500, "", {})] * 9
    chat = OpenAIChat(endpoint.url, "tiny", retry=Retry(4), sleep=Sleeps())
    with pytest.raises(UnavailableError, match=r"no answer in 4 attempts \(last: status 500\)"):
        ask(chat, "Which film?")
    assert len(endpoint.calls) == 4


def test_a_hanging_endpoint_is_given_up(endpoint: Endpoint) -> None:
    endpoint.script = [(HANG, "", {})]
    chat = OpenAIChat(endpoint.url, "tiny", timeout_s=0.2, retry=Retry(1))
    with pytest.raises(UnavailableError, match=r"no answer within 0\.2 s"):
        ask(chat, "Which film?")


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:1/v1 gave no answer .*ConnectError"):
        ask(OpenAIChat("http://127.0.0.1:1/v1", "tiny", retry=Retry(2), sleep=Sleeps()), "Which film?")


def test_a_refusal_is_not_asked_again_and_hides_the_key(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.script = [(401, f"Incorrect API key: {KEY}", {})]
    with pytest.raises(InputError, match=r"status 401: Incorrect API key: \*\*\*;"):
        ask(OpenAIChat(endpoint.url, "tiny", KEY), "Which film?")
    assert len(endpoint.calls) == 1
    assert KEY not in caplog.text


def test_a_model_that_declines_gives_an_empty_text(endpoint: Endpoint) -> None:
    endpoint.script = [(200, '{"choices": [{"message": {"content": null}}]}', {})]
    assert ask(OpenAIChat(endpoint.url, "tiny"), "Which film?") == [Completion("", 0, 0)]


def test_no_more_requests_are_in_flight_than_agreed(endpoint: Endpoint) -> None:
    # The barrier lets calls pass in pairs only, so both connections are in use at once.
    endpoint.gate = threading.Barrier(2)
    ask(OpenAIChat(endpoint.url, "tiny", concurrency=2), *(f"Film {i}?" for i in range(6)))
    assert endpoint.most == 2
    assert sorted(body["messages"][0]["content"] for _, body, _ in endpoint.calls) == [f"Film {i}?" for i in range(6)]


def test_cost_is_known_only_with_prices() -> None:
    assert OpenAIChat("http://x", "tiny").cost_usd(10, 10) is None
    assert OpenAIChat("http://x", "tiny", price=Price(2.0, 10.0)).cost_usd(500_000, 100_000) == 2.0


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="not an HTTP address"):
        OpenAIChat("localhost:8000", "tiny")
    with pytest.raises(InputError, match="'messages' belongs to the request"):
        OpenAIChat("http://x", "tiny", parameters={"messages": []})
