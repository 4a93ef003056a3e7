"""Owns the hostile endpoint: an OpenAI-compatible server for chat, files and batches that misbehaves as it is told.

It runs in a thread of the test's process, so its counts can be read while a subprocess talks to it. A way of answering
is an act: `hang`, `reset`, `reply(429, headers={"retry-after": "1"})` and so on. A request gets the next act of the
script of its route; a chat request without one, what `mischief` says; any other the right answer.
"""

import asyncio
import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Body = dict[str, Any] | bytes
Act = Callable[["Exchange"], Awaitable[None]]
Mischief = Callable[[str, int], Act | None]
"""What to do at the nth request, from 0, with a prompt; None: answer it."""

LIFE = ("validating", "in_progress", "finalizing", "completed")


def sha256(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def echo(prompt: str) -> str:
    """The default answer, which only this prompt can have."""
    return f"About {sha256(prompt)}: it is told well."


@dataclass
class Exchange:
    """A request, and the connection on which it is answered."""

    server: "Hostile"
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    done: bool = False
    """No longer counted as under way."""

    @property
    def route(self) -> str:
        """One of chat, upload, create, list, poll, content."""
        parts = self.path.strip("/").split("/")[1:]  # without the version
        match self.method, parts:
            case "POST", ["chat", "completions"]:
                return "chat"
            case "POST", ["files"]:
                return "upload"
            case "POST", ["batches"]:
                return "create"
            case "GET", ["batches"]:
                return "list"
            case "GET", ["batches", _]:
                return "poll"
            case "GET", ["files", _, "content"]:
                return "content"
        return "unknown"

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def prompt(self) -> str:
        return self.json["messages"][0]["content"]

    def end(self) -> None:
        """The client may send its next request from here on."""
        if not self.done and self.route == "chat":
            self.server.running -= 1
        self.done = True

    async def leaves(self, seconds: float | None = None) -> bool:
        """Whether the client closes the connection within the time; None: wait for that."""
        try:
            async with asyncio.timeout(seconds):
                await self.reader.read(1)  # clients here do not pipeline, so only the end comes
            return True
        except TimeoutError:
            return False

    def send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Write an answer, whole."""
        self.end()
        self.begin(status, {"content-length": str(len(content))} | dict(headers or {}))
        self.writer.write(content)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Write the first lines of an answer."""
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.writer.write("\r\n".join(lines).encode())

    def right(self) -> bytes:
        """The right answer's body; what it stands for has happened."""
        content = self.server.answer_to(self)
        return content if isinstance(content, bytes) else json.dumps(content).encode()

    def close(self, *, hard: bool = False) -> None:
        """Close the connection, or reset it."""
        self.end()
        if hard:
            raw = self.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        else:
            self.writer.close()


async def answer(exchange: Exchange) -> None:
    """Do what is asked for."""
    content = exchange.right()
    exchange.send(200, content)
    if exchange.route == "chat":
        exchange.server.answered[exchange.prompt] += 1


def reply(status: int, text: str | bytes = "", headers: Mapping[str, str] | None = None) -> Act:
    """Answer so, whatever is asked for."""

    async def act(exchange: Exchange) -> None:
        exchange.send(status, text if isinstance(text, bytes) else text.encode(), headers)

    return act


def body(value: Any) -> Act:
    """Answer with this JSON, where floats may be infinite."""
    return reply(200, json.dumps(value))


async def hang(exchange: Exchange) -> None:
    """Say nothing."""
    await exchange.leaves()


async def hang_in_body(exchange: Exchange) -> None:
    """Begin well, then say nothing."""
    content = exchange.right()
    exchange.begin(200, {"content-length": str(len(content))})
    exchange.writer.write(content[: len(content) // 2])
    await exchange.leaves()


async def drip(exchange: Exchange) -> None:
    """Send a byte at a time: no single read waits long, all of them do."""
    content = exchange.right()
    exchange.begin(200, {"content-length": str(len(content))})
    for at in range(len(content)):
        exchange.writer.write(content[at : at + 1])
        if await exchange.leaves(0.05):
            return


async def truncate(exchange: Exchange) -> None:
    """Promise more than what comes."""
    content = exchange.right()
    exchange.begin(200, {"content-length": str(len(content))})
    exchange.writer.write(content[: len(content) // 2])
    exchange.close()


async def reset(exchange: Exchange) -> None:
    """Drop the connection."""
    exchange.close(hard=True)


async def do_then_reset(exchange: Exchange) -> None:
    """Do what is asked for, then drop the connection before the answer."""
    exchange.right()
    exchange.close(hard=True)


async def flood(exchange: Exchange) -> None:
    """Send without end."""
    exchange.end()
    exchange.begin(200, {"content-type": "application/json"})
    while True:
        exchange.writer.write(b" " * 65536)
        await exchange.writer.drain()


PASSING: Mapping[str, Act] = {
    "hang": hang,
    "hang in body": hang_in_body,
    "drip": drip,
    "truncate": truncate,
    "reset": reset,
    "flood": flood,
    "429": reply(429, "{}"),
    "429 wait": reply(429, "{}", {"retry-after": "0.05"}),
    "500": reply(500, "oops"),
    "503": reply(503, "<html>busy</html>"),
    "garbage": reply(200, b"\x00\xff<html>"),
    "empty": reply(200, ""),
    "a list": body([1]),
    "no choices": body({"choices": []}),
    "choices of another type": body({"choices": {"0": 1}}),
    "content of another type": body({"choices": [{"message": {"content": ["a"]}}]}),
    "too deep": reply(200, "[" * 100_000),
}
"""Misbehaviour after which the same request may succeed."""


def seeded(seed: int, kinds: Mapping[str, Act] = PASSING, share: float = 0.6, most: int = 3) -> Mischief:
    """A share of the prompts meet one to `most` acts before they are answered: the same ones in every run."""

    def act_at(prompt: str, nth: int) -> Act | None:
        rng = random.Random(f"{seed} {prompt}")
        plan = rng.choices(list(kinds.values()), k=rng.randint(1, most)) if rng.random() < share else []
        return plan[nth] if nth < len(plan) else None

    return act_at


@dataclass
class Plan:
    """How a batch goes."""

    life: tuple[str, ...] = LIFE
    """Its states, one further at each look; the last one stays."""
    results: Callable[[list[str]], tuple[list[str], list[str]]] = lambda lines: (lines, [])
    """Makes the lines of the output and of the error file from the right lines."""
    errors: Any = None


class Hostile:
    """The server, between enter and exit.

    Args:
        answers: Makes the answer to a prompt.
        mischief: What to do at chat requests that no script covers.
        hold_s: How long the right answer to a chat request takes.
        together: So many chat requests have to be under way before any is answered.
    """

    def __init__(
        self,
        answers: Callable[[str], str] = echo,
        *,
        mischief: Mischief = lambda prompt, nth: None,
        hold_s: float = 0.0,
        together: int = 1,
    ) -> None:
        self.answers, self.mischief, self.hold_s, self.together = answers, mischief, hold_s, together
        self.scripts: defaultdict[str, list[Act]] = defaultdict(list)
        """By route: what to do at the next requests; `answer` does what is asked for."""
        self.plans: list[Plan] = []
        """How the next batches go."""
        self.page = 100
        """The most batches that a page of the list holds."""
        self.blind = 0
        """So many further looks at the list do not show a batch."""
        self.requests: list[Exchange] = []
        self.prompts: Counter[str] = Counter()
        """Requests by prompt: of chat, and lines of batches that were made."""
        self.answered: Counter[str] = Counter()
        """Right answers by prompt that were sent whole."""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        """As the API shows them, in the order in which they were made."""
        self.running = self.most = 0
        """Chat requests under way, now and at most."""
        self.faults: list[Exception] = []
        """What went wrong in here, such as a request that no client may send; raised at exit."""
        self._lives: dict[str, tuple[str, ...]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def routes(self) -> list[str]:
        """The routes of all requests, in their order."""
        return [exchange.route for exchange in self.requests]

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if kind is None and self.faults:
            raise self.faults[0]

    async def _start(self) -> asyncio.Server:
        self._gate = asyncio.Barrier(self.together)
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # lets transports close

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing():
                exchange = await self._read(reader, writer)
                try:
                    await self._act(exchange)
                    await writer.drain()
                finally:
                    exchange.end()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except Exception as error:
            self.faults.append(error)
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        address = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        return Exchange(self, reader, writer, method, address.path, query, headers, content)

    async def _act(self, exchange: Exchange) -> None:
        self.requests.append(exchange)
        script, act = self.scripts[exchange.route], None
        if exchange.route == "chat":
            self.running += 1
            self.most = max(self.most, self.running)
            nth = self.prompts[exchange.prompt]
            self.prompts[exchange.prompt] += 1
            await self._gate.wait()
            act = script.pop(0) if script else self.mischief(exchange.prompt, nth)
            if act is None and self.hold_s and await exchange.leaves(self.hold_s):
                return
        elif script:
            act = script.pop(0)
        await (act or answer)(exchange)

    def answer_to(self, exchange: Exchange) -> Body:
        """Do what a request asks for; the body of the answer."""
        identity = exchange.path.strip("/").split("/")[2:3]
        match exchange.route:
            case "chat":
                return self.completion(exchange.prompt)
            case "upload":
                return self._upload(exchange)
            case "create":
                return self._create(exchange.json)
            case "list":
                return self._list(exchange.query)
            case "poll":
                return self._poll(identity[0])
            case "content":
                return self.files[identity[0]]
        return {"error": {"message": f"there is no {exchange.path}"}}

    def completion(self, prompt: str) -> dict[str, Any]:
        """The right answer to a prompt; tokens are words."""
        text = self.answers(prompt)
        return {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())},
        }

    def _upload(self, exchange: Exchange) -> Body:
        form = message_from_bytes(f"Content-Type: {exchange.headers['content-type']}\r\n\r\n".encode() + exchange.body)
        parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        assert parts["purpose"].get_payload(decode=True) == b"batch"
        identity = f"file-{len(self.files)}"
        self.files[identity] = parts["file"].get_payload(decode=True)
        return {"id": identity, "object": "file", "purpose": "batch"}

    def _create(self, order: dict[str, Any]) -> Body:
        assert order["endpoint"] == "/v1/chat/completions"
        assert order["completion_window"] == "24h"
        identity = f"batch-{len(self.batches)}"
        plan = self.plans.pop(0) if self.plans else Plan()
        lines = [json.loads(line) for line in self.files[order["input_file_id"]].splitlines()]
        right = []
        for number, line in enumerate(lines):
            assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
            prompt = line["body"]["messages"][0]["content"]
            self.prompts[prompt] += 1
            response = {"status_code": 200, "request_id": f"r{number}", "body": self.completion(prompt)}
            right.append(json.dumps({"id": f"l{number}", "custom_id": line["custom_id"], "response": response}))
        output, errors = plan.results(right)
        batch = {
            "id": identity,
            "object": "batch",
            "endpoint": order["endpoint"],
            "input_file_id": order["input_file_id"],
            "metadata": order.get("metadata"),
            "status": plan.life[0],
            "created_at": int(time.time()),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "errors": plan.errors,
        }
        for name, found in (("output", output), ("error", errors)):
            if found:
                batch[f"{name}_file_id"] = f"{identity}-{name}"
                self.files[f"{identity}-{name}"] = "".join(line + "\n" for line in found).encode()
        self.batches[identity], self._lives[identity] = batch, plan.life
        return self._shown(batch)

    def _poll(self, identity: str) -> Body:
        batch = self.batches[identity]
        self._lives[identity] = self._lives[identity][1:] or self._lives[identity]
        batch["status"] = self._lives[identity][0]
        return self._shown(batch)

    def _shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        ended = batch["status"] in ("completed", "expired", "cancelled")
        hidden = set() if ended else {"output_file_id", "error_file_id"}
        more = {"completed_at": batch["created_at"] + 60} if ended else {}
        return {name: value for name, value in batch.items() if name not in hidden} | more

    def _list(self, query: dict[str, str]) -> Body:
        newest = [] if self.blind else list(reversed(self.batches.values()))
        self.blind = max(self.blind - 1, 0)
        after = next((at for at, batch in enumerate(newest, 1) if batch["id"] == query.get("after")), 0)
        size = min(int(query.get("limit", 20)), self.page)
        shown = newest[after : after + size]
        return {
            "object": "list",
            "data": [self._shown(batch) for batch in shown],
            "has_more": after + size < len(newest),
        }


@dataclass
class Notes:
    """A log in memory: what was told to be sent, and what earlier runs left open."""

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
    """Time that passes when somebody sleeps; `slept` remembers for how long."""

    def __init__(self) -> None:
        self.now_s, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)
