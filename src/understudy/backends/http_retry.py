"""When to try again, how long to wait, how many requests may be under way, and what a refusal says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

FIRST_SECONDS = 0.5  # the longest pause after a first failure; it doubles with each further one
LONGEST_SECONDS = 30.0  # ... up to this: a server that comes back is found within half a minute
MESSAGE_CHARACTERS = 500  # of a server's message in an error

# What a server, or the proxy before it, says while it is overloaded, restarting or broken for the moment.
PASSING = frozenset({429, 500, 502, 503, 504})
OVERLOADED = frozenset({429, 503, 504})


class TryAgain(Exception):
    """One attempt failed in a way that may pass.

    ``overloaded``: fewer requests at a time would help. ``after``: seconds the server asked to wait. ``malformed``: it
    did answer. ``status``: its status.
    """

    def __init__(
        self,
        reason: str,
        *,
        overloaded: bool = False,
        after: float = 0.0,
        malformed: bool = False,
        status: int | None = None,
    ) -> None:
        self.overloaded, self.after, self.malformed, self.status = overloaded, after, malformed, status
        super().__init__(reason)


class Gate:
    """Additive increase, multiplicative decrease: at most ``most`` requests at a time, half as many after an overload,
    and one more for every window of successes. Used within one event loop.

    Requests that left before the last halving say nothing about the smaller window; ``round`` counts halvings, and a
    request hands in the one it left in.
    """

    def __init__(self, most: int) -> None:
        self.round = 0
        self._most = most
        self._window = float(most)
        self._under_way = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def window(self) -> int:
        """How many requests may be under way."""
        return int(self._window)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, in order of arrival, and hold it."""
        if self._waiting or self._under_way >= self.window:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it was handed a place in the same moment
                    self._leave()
                raise
        else:
            self._under_way += 1
        try:
            yield
        finally:
            self._leave()

    def succeeded(self) -> None:
        """A request was answered."""
        self._window = min(float(self._most), self._window + 1 / self._window)
        self._hand_out()

    def overloaded(self, left_in_round: int) -> None:
        """A request was refused, or not answered in time, for the load."""
        if left_in_round == self.round:
            self.round += 1
            self._window = max(1.0, self._window / 2)

    def _leave(self) -> None:
        self._under_way -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._under_way < self.window:
            turn = self._waiting.popleft()
            if not turn.done():  # not cancelled while it waited
                self._under_way += 1
                turn.set_result(None)


def backoff_seconds(failures: int, jitter: float) -> float:
    """The pause after so many failures in a row: exponential, capped, and anywhere below that (``jitter`` in [0, 1)),
    so that clients do not come back at once."""
    return jitter * min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures - 1, 30))


def retry_after_seconds(headers: Mapping[str, str], now: datetime | None = None) -> float:
    """What the header Retry-After asks for, as seconds or as a date; 0 where it is absent or says nothing. A date is
    held against the server's own clock (the header Date), where it tells it: this machine's may be wrong."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        date = _date(value)
        if date is None:
            return 0.0
        seconds = (date - (_date(headers.get("date", "")) or now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def server_message(content: bytes) -> str:
    """What a refusal says: the message of an OpenAI or FastAPI error, else the whole content; on one line, printable.
    Not cut, so that a key can be taken out first."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        text = _message(json.loads(text)) or text
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def _message(tree: Any) -> str:
    """ "" where there is none."""
    for key in ("error", "message", "detail"):
        value = tree.get(key) if isinstance(tree, dict) else None
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            return _message(value)
        if isinstance(value, list):
            return json.dumps(value)
    return ""
