"""Owns one request to the hostile endpoint, and the connection on which it is answered."""

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.hostile import Hostile

Body = dict[str, Any] | bytes
Act = Callable[["Exchange"], Awaitable[None]]
Mischief = Callable[[str, int], Act | None]
"""Chooses the act for the nth request (from 0) with a prompt; None: the right answer."""


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
    """Whether the request no longer counts as under way."""

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
        """Count the request as no longer under way: the client may send its next one."""
        if not self.done and self.route == "chat":
            self.server.running -= 1
        self.done = True

    async def leaves(self, seconds: float | None = None) -> bool:
        """Whether the client closes the connection within the time; None: wait until it does."""
        try:
            async with asyncio.timeout(seconds):
                await self.reader.read(1)  # these clients do not pipeline, so only the end can come
            return True
        except TimeoutError:
            return False

    def send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Write a complete answer."""
        self.end()
        self.begin(status, {"content-length": str(len(content))} | dict(headers or {}))
        self.writer.write(content)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Write the first lines of an answer."""
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.writer.write("\r\n".join(lines).encode())

    def right(self) -> bytes:
        """Do what the request asks for; returns the body of the right answer."""
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
