"""Requests to a server: retried, bounded in number and time, many at once. Asynchronous inside, plain calls outside.

One background thread with an event loop serves every client of the process. Replies are parsed off that loop, so that
a large one does not hold up the others' deadlines.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urlsplit

import httpx2

from understudy.backends.http_loop import background_loop
from understudy.backends.http_retry import (
    MESSAGE_CHARACTERS,
    OVERLOADED,
    PASSING,
    Gate,
    TryAgain,
    backoff_seconds,
    retry_after_seconds,
    server_message,
)
from understudy.config_served import ConnectionConfig, ServerConfig
from understudy.errors import ConfigError, ServerError, ServerUnavailable

log = logging.getLogger("understudy")

T = TypeVar("T")
R = TypeVar("R")

BAD_REPLIES = 3  # retries of a malformed reply: a truncated one passes, a server of another kind does not
LONE_ERRORS = 5  # times a request may fail with status 500 while the server answers others
CONNECT_SECONDS = 10.0  # an address that swallows packets is found out sooner than a long reply
KEEPALIVE_SECONDS = 4.0  # uvicorn, hence vLLM and SGLang, closes idle connections after 5
WARNING_SECONDS = 60.0  # between two warnings about one server


class BadReply(Exception):
    """Raised by a request's ``parse``: the reply is malformed. Retried a few times, then a ServerError."""


@dataclass(frozen=True)
class Reply:
    """A whole reply of status 2xx. ``headers``: names in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """The content as JSON. NaN and Infinity are read as numbers, so that who reads them can say where they stand.

        Raises:
            BadReply: it is no JSON, or an object has a key twice.
        """
        try:
            return json.loads(self.content, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise BadReply(f"the reply is no JSON: {error}; it starts {self.content[:60]!r}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a key twice")
    return values


@dataclass(frozen=True)
class Request(Generic[T]):
    """``path`` from the server's root, e.g. "/v1/completions"; ``body`` is sent as JSON.

    ``parse`` runs in a thread of its own and must not change anything; what it raises besides BadReply is final.
    ``what`` names the request in errors. ``timeout_seconds``: instead of the connection's.
    """

    method: str
    path: str
    body: Any = None
    parse: Callable[[Reply], T] = field(kw_only=True)
    what: str = ""
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class Clock:
    """Time, as tests replace it. ``jitter``: uniform in [0, 1), from no generator that anything else draws from."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = field(default_factory=lambda: random.Random().random)


class ServerClient:
    """Talks to one server. Any number of threads may call it.

    Retried are: no connection, a connection that broke, a deadline that passed, statuses 429, 500, 502, 503 and 504
    (after Retry-After where given), and malformed replies a few times. Nothing else is. The time for it is
    ``patience_seconds`` since the last success of any request to this server, or since the request was first sent
    where that is later. Once that has passed, a request is tried once, until one succeeds: nobody waits twice for a
    server that is lost. A server may get a request twice, and must not mind.

    Raises:
        ConfigError: a url or an API key that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        api_key: str | None = None,
        connection: ConnectionConfig | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.root = server_root(url)
        self.name = name
        self._who = f"server {name!r} at {self.root}"
        self._connection = connection or ConnectionConfig()
        self._clock = clock or Clock()
        self._gate = Gate(self._connection.max_concurrency)
        self._last_success = self._last_warning = float("-inf")
        self._lost = self._cancelled = False
        self._hide = _hider(api_key)
        self._http = _http_client(self.root, api_key, self._connection.max_concurrency)
        self._loop = background_loop()
        self._pid = os.getpid()
        self._closed = False
        self._under_way: set[Callable[[], None]] = set()  # each gives one ``map`` up

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; requests of other threads fail. A second time does nothing."""
        if not self._closed and self._pid == os.getpid():
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()

    def cancel(self) -> None:
        """End what is under way, and all that is asked from now on, with ServerUnavailable: the run is over."""
        self._cancelled = True
        for give_up in list(self._under_way):
            self._loop.call_soon_threadsafe(give_up)

    def call(self, request: Request[T], *, patience_seconds: float | None = None) -> T:
        """The parsed reply.

        Raises:
            ServerUnavailable: no success for longer than ``patience_seconds`` (absent: the connection's).
            ServerError: the server answered wrongly for good.
        """
        return self.map([request], patience_seconds=patience_seconds)[0]

    def map(self, requests: Sequence[Request[T]], *, patience_seconds: float | None = None) -> list[T]:
        """The parsed replies in the order of ``requests``, at most ``max_concurrency`` under way at a time. The first
        that fails for good cancels the rest. Raises as ``call``."""
        patience = self._connection.patience_seconds if patience_seconds is None else patience_seconds
        return self._wait(self._all(requests, patience))

    def _wait(self, work: Coroutine[Any, Any, R]) -> R:
        if self._closed or self._pid != os.getpid():
            work.close()
            reason = "is closed" if self._closed else "was made before this process was forked; make one in each"
            raise RuntimeError(f"the client of {self._who} {reason}")
        tasks: list[asyncio.Task[Any]] = []
        given_up = threading.Event()

        async def run() -> R:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            if given_up.is_set():
                work.close()
                raise asyncio.CancelledError
            return await work

        def give_up() -> None:
            given_up.set()
            for task in tasks:
                task.cancel()

        self._under_way.add(give_up)
        try:
            if self._cancelled:  # by now: a later one finds ``give_up`` there
                give_up()
            # Ctrl-C may come before this has returned a future to cancel.
            return asyncio.run_coroutine_threadsafe(run(), self._loop).result()
        except CancelledError:
            raise ServerUnavailable(f"{self._who}: the run ended before there was an answer") from None
        except BaseException:
            self._loop.call_soon_threadsafe(give_up)
            raise
        finally:
            self._under_way.discard(give_up)

    async def _all(self, requests: Sequence[Request[T]], patience: float) -> list[T]:
        replies: dict[int, T] = {}
        todo = iter(enumerate(requests))

        async def work() -> None:
            for i, request in todo:
                replies[i] = await self._answer(request, patience)

        workers = [asyncio.create_task(work()) for _ in range(min(len(requests), self._connection.max_concurrency))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [replies[i] for i in range(len(requests))]

    async def _answer(self, request: Request[T], patience: float) -> T:
        """Tries until there is an answer. It keeps its place while it pauses: a server in trouble sees fewer requests
        then, not others."""
        body = None if request.body is None else json.dumps(request.body, allow_nan=False).encode()
        async with self._gate.place():
            started, failures = self._clock.now(), list[TryAgain]()
            once = self._lost
            while True:
                gate_round = self._gate.round
                try:
                    value = await self._attempt(request, body)
                except TryAgain as failure:
                    failures.append(failure)
                else:
                    self._last_success, self._lost = self._clock.now(), False
                    self._gate.succeeded()
                    return value
                if failures[-1].overloaded:
                    self._gate.overloaded(gate_round)
                await self._clock.sleep(self._pause(request, failures, started, 0.0 if once else patience))

    async def _attempt(self, request: Request[T], body: bytes | None) -> T:
        """One request and its reply, parsed. Raises TryAgain or what is final."""
        seconds = request.timeout_seconds or self._connection.timeout_seconds
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(seconds):
                response = await self._http.request(
                    request.method, self.root + request.path, content=body, headers=headers
                )
        except TimeoutError:
            raise TryAgain(f"no whole reply within {seconds:g} s", overloaded=True) from None
        except httpx2.DecodingError as error:
            raise TryAgain(f"the reply cannot be decompressed: {error}", malformed=True) from None
        except httpx2.TransportError as error:
            raise self._broken(request, error) from None
        if response.status_code in PASSING:
            after = retry_after_seconds(response.headers)
            status, overloaded = response.status_code, response.status_code in OVERLOADED
            raise TryAgain(self._refusal(response), overloaded=overloaded, after=after, status=status)
        if not response.is_success:
            raise self._error(request, self._refusal(response), response.status_code)
        reply = Reply(response.status_code, response.headers, response.content)
        try:
            return await asyncio.get_running_loop().run_in_executor(None, request.parse, reply)
        except BadReply as error:
            raise TryAgain(f"malformed reply: {self._hide(str(error))}", malformed=True) from None

    def _pause(self, request: Request[Any], failures: list[TryAgain], started: float, patience: float) -> float:
        """Seconds until the next attempt. Raises ServerError or ServerUnavailable where there is none."""
        last, now = failures[-1], self._clock.now()
        left = max(started, self._last_success) + patience - now
        times = f"{len(failures)} times" if len(failures) > 1 else "once"
        malformed = sum(failure.malformed for failure in failures)
        if last.malformed and (malformed > BAD_REPLIES or left <= 0):
            raise self._error(request, f"{last} (tried {times})")
        lone = sum(failure.status == 500 for failure in failures)
        if lone >= LONE_ERRORS and self._last_success > started:
            raise self._error(request, f"{last} (tried {times}, while other requests were answered)", 500)
        if left <= 0 or last.after > left:
            asked = f", and asks to wait {last.after:g} s more" if last.after > max(left, 0) else ""
            waited = f"no success for {patience:g} s (connection.patience_seconds), " if patience else ""
            self._lost = self._lost or patience >= self._connection.patience_seconds
            raise ServerUnavailable(
                f"{self._describe(request)}: {waited}tried {times}; the last time: {last}{asked}",
                status=last.status,
            )
        if len(failures) >= 3 and now - self._last_warning >= WARNING_SECONDS:
            self._last_warning = now
            log.warning("%s: %s; trying again for up to %.0f s", self._describe(request), last, left)
        return max(last.after, min(left, backoff_seconds(len(failures), self._clock.jitter())))

    def _broken(self, request: Request[Any], error: httpx2.TransportError) -> Exception:
        """What to raise for a connection that failed."""
        text = self._hide(f"{type(error).__name__}: {error}".rstrip(": "))
        if _has_cause(error, ssl.SSLCertVerificationError) or isinstance(error, httpx2.LocalProtocolError):
            return self._error(request, f"no connection ({text})")
        missing = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
        return TryAgain(f"{'no connection' if missing else 'the connection broke'} ({text})")

    def _refusal(self, response: httpx2.Response) -> str:
        message = self._hide(server_message(response.content))[:MESSAGE_CHARACTERS]
        if response.is_redirect:
            message = f"a redirect to {self._hide(response.headers.get('location', '?'))}, which is not followed"
        return f"status {response.status_code}: {message or 'no message'}"

    def _describe(self, request: Request[Any]) -> str:
        return f"{self._who}, {request.method} {request.path}" + (f" ({request.what})" if request.what else "")

    def _error(self, request: Request[Any], text: str, status: int | None = None) -> ServerError:
        return ServerError(f"{self._describe(request)}: {text}", status=status)


def client_of(config: ServerConfig, *, name: str) -> ServerClient:
    """A client of the server that a section names. Raises ConfigError for a url or an API key that cannot be used."""
    assert config.url is not None
    return ServerClient(config.url, name=name, api_key=api_key_of(config), connection=config.connection)


def api_key_of(config: ServerConfig) -> str | None:
    """The API key that the environment holds for this server; None where none is asked for.

    Raises:
        ConfigError: the variable is not set, or empty.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        state = "an empty" if config.api_key_env in os.environ else "no"
        # Some write the key itself there; variables are written in capitals.
        name = config.api_key_env if config.api_key_env.isupper() else "<a name that is not shown: it may be a key>"
        raise ConfigError(
            f"api_key_env = {name}",
            got=f"{state} environment variable of that name",
            expected="one that holds the server's API key",
            remedy=f"export {name}=..., or drop api_key_env for a server without one",
        )
    return key


def server_root(url: str) -> str:
    """The url without a trailing /v1 or slash.

    Raises:
        ConfigError: it names no host, or has a user, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or "@" in url or "?" in url or "#" in url:
        raise ConfigError(
            "server url",
            got="one with a user or password" if "@" in url else repr(url.partition("?")[0].partition("#")[0]),
            expected='the address of a server without a query, like "http://127.0.0.1:8000/v1"',
            remedy="correct the url; an API key belongs into an environment variable that api_key_env names",
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _http_client(root: str, api_key: str | None, connections: int) -> httpx2.AsyncClient:
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key and api_key):
        raise ConfigError(
            "API key",
            got="one with blanks or characters that no HTTP header can hold",
            expected="printable ASCII characters",
            remedy="set the environment variable that api_key_env names to the key alone",
        )
    return httpx2.AsyncClient(
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        trust_env=not _is_loopback(root),  # proxies of the environment
        follow_redirects=False,
        # A request has one deadline for everything, and the gate bounds their number.
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_keepalive_connections=connections, keepalive_expiry=KEEPALIVE_SECONDS),
    )


def _is_loopback(root: str) -> bool:
    host = urlsplit(root).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _hider(api_key: str | None) -> Callable[[str], str]:
    """Takes the key out of a text, also as JSON writes it. A closure: no attribute shows the key."""
    forms = sorted({api_key, json.dumps(api_key)[1:-1]}, key=len, reverse=True) if api_key else []

    def hide(text: str) -> str:
        for form in forms:
            text = text.replace(form, "***")
        return text

    return hide


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    return error is not None and (isinstance(error, kind) or _has_cause(error.__cause__ or error.__context__, kind))
