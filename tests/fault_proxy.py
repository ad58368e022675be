"""A proxy that spoils replies by a seeded schedule, between a client and a server on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

STORM = 4  # requests that a storm answers in a row
PAST_DEADLINE = 1.5  # seconds that some replies take: longer than timeout_seconds of the runs behind this proxy


@dataclass(frozen=True)
class Answer:
    """A server's whole reply."""

    status: int
    kind: str
    body: bytes

    def encoded(self) -> bytes:
        head = f"HTTP/1.1 {self.status} X\r\nContent-Type: {self.kind}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        return head.encode() + self.body


def _lists(tree: Any) -> list[list[Any]]:
    """Every list in a JSON tree that holds something."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    own = [tree] if isinstance(tree, list) and tree else []
    return own + [found for child in children for found in _lists(child)]


def _logprobs(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every log-probability in a JSON tree: its only fractions."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    found = [(tree, key) for key, value in pairs if isinstance(value, float)]
    return found + [leaf for _, value in pairs for leaf in _logprobs(value)]


def _results(tree: Any) -> list[Any] | None:
    """The list with an entry per sequence."""
    return next((tree[key] for key in ("choices", "scores") if isinstance(tree, dict) and key in tree), None)


def _shorter(tree: Any, draw: random.Random) -> None:
    chosen = draw.choice(_lists(tree) or [[None]])
    chosen.pop(draw.randrange(len(chosen)))


def _longer(tree: Any, draw: random.Random) -> None:
    chosen = draw.choice(_lists(tree) or [[None]])
    chosen.insert(draw.randrange(len(chosen) + 1), copy.deepcopy(draw.choice(chosen)))


def _nan(tree: Any, draw: random.Random) -> None:
    if places := _logprobs(tree):
        container, key = draw.choice(places)
        container[key] = draw.choice([float("nan"), float("-inf"), float("inf"), None, "x", 7.5])


def _twice(tree: Any, draw: random.Random) -> None:
    if (results := _results(tree)) is not None:
        results.append(copy.deepcopy(draw.choice(results)))


def _reordered(tree: Any, draw: random.Random) -> None:
    if (results := _results(tree)) is not None:
        for _ in range(draw.randrange(1, max(2, len(results)))):
            results.append(results.pop(0))


SPOILED: dict[str, Callable[[Any, random.Random], None]] = {
    "wrong length": _shorter,
    "too long": _longer,
    "not a number": _nan,
    "duplicate": _twice,
    "reorder": _reordered,
}
FAULTS = ("delay", "drop", "drop early", "truncate", "garbage", "slow", "storm 429", "storm 500", *SPOILED)


@dataclass
class Schedule:
    """What happens to each request, by its number: a function of the seed. ``faults``: those that may."""

    seed: int
    share: float = 0.3
    faults: tuple[str, ...] = FAULTS
    done: Counter[str] = field(default_factory=Counter)
    _numbers: int = 0
    _storm: tuple[str, int] = ("", 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> tuple[str, random.Random]:
        with self._lock:
            draw = random.Random(f"{self.seed} {self._numbers}")
            self._numbers += 1
            name, left = self._storm
            if left:
                self._storm = name, left - 1
            else:
                name = draw.choice(self.faults) if draw.random() < self.share else ""
                if name.startswith("storm"):
                    self._storm = name, STORM - 1
            self.done[name] += 1
            return name, draw


class FaultProxy:
    """Forwards to ``upstream`` and spoils what comes back as ``schedule`` says. ``url``: where it listens."""

    def __init__(self, upstream: str, schedule: Schedule) -> None:
        self._host, self._port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self.schedule = schedule
        self.url = ""

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready()
        await stop.wait()
        server.close()
        await asyncio.sleep(0.01)  # connections that have just been taken get to their handler, which closes them

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while request := await _message(reader):
                    if not await self._answer(request, writer):
                        break
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        fault, draw = self.schedule.next()
        if fault == "drop early":
            return False
        if fault.startswith("storm"):
            writer.write(Answer(int(fault[-3:]), "application/json", b'{"error": {"message": "storm"}}').encoded())
            await writer.drain()
            return True
        answer = await self._upstream(request)
        if fault == "drop":
            return False
        if fault == "delay":
            await asyncio.sleep(0.02 * draw.random() if draw.random() < 0.9 else PAST_DEADLINE)
        sent = self._spoiled(answer, fault, draw).encoded()
        if fault == "truncate":
            writer.write(sent[: draw.randrange(len(sent))])
            await writer.drain()
            return False
        pause = 0.001 if draw.random() < 0.9 else PAST_DEADLINE / 7
        for part in _parts(sent, 7 if fault == "slow" else 1):
            writer.write(part)
            await writer.drain()
            if fault == "slow":
                await asyncio.sleep(pause)
        return True

    def _spoiled(self, answer: Answer, fault: str, draw: random.Random) -> Answer:
        if fault == "garbage":
            return Answer(
                answer.status, answer.kind, draw.choice([b"", b"<html>", b'{"choices": [', draw.randbytes(64)])
            )
        if fault not in SPOILED or answer.kind != "application/json":
            return answer
        tree = json.loads(answer.body)
        SPOILED[fault](tree, draw)
        return Answer(answer.status, answer.kind, json.dumps(tree).encode())

    async def _upstream(self, request: bytes) -> Answer:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            await writer.drain()
            reply = await _message(reader)
            if not reply:
                raise ConnectionResetError("the server closed the connection")
            head, body = _split(reply)
        finally:
            writer.close()
        lines = head.decode("latin-1").split("\r\n")
        kinds = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("content-type:")]
        return Answer(int(lines[0].split()[1]), kinds[0].partition(";")[0] if kinds else "", body)


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request or reply with a Content-Length, whole; nothing at the connection's end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    lengths = [
        int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    ]
    return head + (await reader.readexactly(lengths[0]) if lengths else b"")


def _split(message: bytes) -> tuple[bytes, bytes]:
    head, _, body = message.partition(b"\r\n\r\n")
    return head, body


def _parts(data: bytes, count: int) -> Iterator[bytes]:
    size = -(-len(data) // count)
    return (data[i : i + size] for i in range(0, len(data), size))


@contextlib.contextmanager
def faulty(upstream: str, schedule: Schedule) -> Iterator[str]:
    """The address of a proxy before ``upstream``."""
    proxy, ready = FaultProxy(upstream, schedule), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        await proxy.serve(ready.set, stop)
        # Handlers of connections taken at the last moment begin while others end.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="fault-proxy")
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy.url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
