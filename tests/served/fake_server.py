"""A server on loopback that answers as a test says: with any status and body, late, byte by byte, or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Asked:
    """A request as it came in; ``headers`` by lower-case name."""

    method: str
    path: str
    headers: Mapping[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class Answer:
    """``body``: bytes are sent as they are, anything else as JSON. ``delay``: seconds before the answer.

    ``drip``: seconds between its bytes. ``reset``: close the connection instead. ``close``: close it afterwards.
    """

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    reset: bool = False
    close: bool = False

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class FakeServer:
    """``answer`` is called for every request, in the server's thread. ``asked`` holds them in the order they came,
    ``connections`` counts connections, ``under_way`` requests not yet answered and ``most_at_once`` the most there
    were, ``hung_up`` clients that left before their answer. ``port`` 0: a free one."""

    def __init__(self, answer: Callable[[Asked], Answer], *, port: int = 0) -> None:
        self.answer, self.port = answer, port
        self.asked: list[Asked] = []
        self.connections = self.most_at_once = self.hung_up = 0
        self.client_left = threading.Event()
        self.under_way = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path."""
        return [asked.body for asked in self.asked if asked.path == path]

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _shut_down(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (asked := await _read(reader)) is not None:
                self.asked.append(asked)
                self.under_way += 1
                self.most_at_once = max(self.most_at_once, self.under_way)
                try:
                    if not await self._reply(asked, reader, writer):
                        break
                finally:
                    self.under_way -= 1
        except (asyncio.CancelledError, ConnectionError):
            pass  # a task of start_server that is cancelled is reported as an error otherwise
        finally:
            writer.close()

    async def _reply(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        answer = self.answer(asked)
        if answer.delay and await self._left_within(answer.delay, reader):
            return False
        if answer.reset:
            return False
        content = answer.content
        headers = {"content-type": "application/json", **answer.headers, "content-length": str(len(content))}
        lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        for i in range(len(content) if answer.drip else 0):
            writer.write(content[i : i + 1])
            if await self._left_within(answer.drip, reader):
                return False
        writer.write(b"" if answer.drip else content)
        await writer.drain()
        return not answer.close

    async def _left_within(self, seconds: float, reader: asyncio.StreamReader) -> bool:
        """Wait; whether the client closed its side meanwhile."""
        try:
            data = await asyncio.wait_for(reader.read(1), seconds)
        except TimeoutError:
            return False
        assert data == b"", "a request before the answer to the last one"
        self.hung_up += 1
        self.client_left.set()
        return True


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    """The next request; None when the client closed the connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *rest = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    content = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, content)
