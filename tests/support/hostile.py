"""Owns the hostile endpoint: an OpenAI-compatible server for chat, files and batches that misbehaves on request.

It runs in a thread of the test's process, so tests can read its counts while a subprocess talks to it. An act
(`hostile_acts`) is a way to answer: `hang`, `reset`, `reply(429, headers={"retry-after": "1"})` and so on. A request
gets the next act in the script of its route. Without a script, a chat request gets the act that `mischief` chooses, and
any other request gets the right answer.
"""

import asyncio
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.support.asking import sha256
from tests.support.hostile_acts import answer
from tests.support.hostile_exchange import Act, Body, Exchange, Mischief

LIFE = ("validating", "in_progress", "finalizing", "completed")


def echo(prompt: str) -> str:
    """The default answer, different for every prompt."""
    return f"About {sha256(prompt)}: it is told well."


@dataclass
class Plan:
    """The course of a batch."""

    life: tuple[str, ...] = LIFE
    """Its states: each poll moves to the next one, and the last one stays."""
    results: Callable[[list[str]], tuple[list[str], list[str]]] = lambda lines: (lines, [])
    """Makes the lines of the output and of the error file from the right lines."""
    errors: Any = None


class Hostile:
    """The server, between enter and exit.

    Args:
        answers: Makes the answer to a prompt.
        mischief: Chooses the act for a chat request without a script.
        hold_s: Seconds that the right answer to a chat request takes.
        together: Number of chat requests that must be under way before any is answered.
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
        """By route: the acts of the next requests; the act `answer` gives the right answer."""
        self.plans: list[Plan] = []
        """The courses of the next batches."""
        self.page = 100
        """Maximal number of batches on a page of the list."""
        self.blind = 0
        """Number of further requests for the list that get an empty list."""
        self.requests: list[Exchange] = []
        self.prompts: Counter[str] = Counter()
        """Requests by prompt: chat requests, and lines of created batches."""
        self.answered: Counter[str] = Counter()
        """Right answers that were sent completely, by prompt."""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        """Batches as the API shows them, in the order of their creation."""
        self.running = self.most = 0
        """Chat requests under way: now, and the largest number so far."""
        self.faults: list[Exception] = []
        """Errors of the server, such as a request that no client may send; raised at exit."""
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
        """Do what a request asks for; returns the body of the answer."""
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
        for name, result_lines in (("output", output), ("error", errors)):
            if result_lines:
                batch[f"{name}_file_id"] = f"{identity}-{name}"
                self.files[f"{identity}-{name}"] = "".join(line + "\n" for line in result_lines).encode()
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
        after = next((number for number, batch in enumerate(newest, 1) if batch["id"] == query.get("after")), 0)
        size = min(int(query.get("limit", 20)), self.page)
        shown = newest[after : after + size]
        return {
            "object": "list",
            "data": [self._shown(batch) for batch in shown],
            "has_more": after + size < len(newest),
        }
