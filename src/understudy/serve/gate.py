"""What every request passes: its id, who may ask, how it is counted and logged, and what becomes of errors."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from understudy.serve.metrics import Metrics
from understudy.serve.replies import ApiError

log = logging.getLogger("understudy.serve")

# Answered without a token, for probes that have none.
PUBLIC = frozenset({"/health"})
# What a client may call its request.
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """ASGI middleware. ``stopping``: whether the server is shutting down. ``hosts``: names a Host header may have
    (None: any); without a token, a web page's script must not get in by a name that leads to this machine."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        routes: Collection[str],
        stopping: Callable[[], bool],
        api_key: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self._app, self._metrics, self._routes, self._stopping = app, metrics, routes, stopping
        self._api_key = None if api_key is None else api_key.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, headers, status = time.perf_counter(), Headers(scope=scope), 0
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        # Handlers add what they know: sequences, tokens.
        noted: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {}).update(noted=noted, began=start)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            try:
                self._check(scope["path"], headers)
                await self._app(scope, receive, sending)
            except ApiError as error:
                noted["code"] = error.code
                await error.response()(scope, receive, sending)
            except asyncio.CancelledError:
                if status or not self._stopping():
                    raise
                noted["code"] = "shutting_down"
                await shutting_down().response()(scope, receive, sending)
            except Exception as error:
                # Without its message, which may quote the request.
                noted |= {"error": type(error).__name__, "traceback": traceback.format_tb(error.__traceback__)}
                if status:
                    raise
                await ApiError(500, "the server failed; its log says more", code="internal").response()(
                    scope, receive, sending
                )
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            seconds = time.perf_counter() - start
            self._metrics.answered(route, status, seconds)
            fields = {"event": "request", "method": scope["method"], "route": route, "status": status}
            level = logging.ERROR if status >= 500 and "error" in noted else logging.INFO
            log.log(level, "request", extra={"fields": fields | {"milliseconds": round(1000 * seconds, 2)} | noted})

    def _check(self, path: str, headers: Headers) -> None:
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403,
                "this server asks for no token and answers to localhost alone; set --api-key-env to call it by another "
                "name",
                code="host_not_allowed",
            )
        if path in PUBLIC:
            return
        if self._api_key is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            # Bytes as they came: comparing text would fail on letters beyond ASCII.
            if not hmac.compare_digest(token.encode("latin-1"), self._api_key) or scheme.lower() != "bearer":
                raise ApiError(
                    401,
                    "expected the header Authorization: Bearer <the server's API key>",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._stopping():
            raise shutting_down()


def _host_name(host: str) -> str:
    """A Host header without its port."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.rpartition(":")[0] or host


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, the record's ``fields`` (by ``extra``), or else its message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        line |= fields if fields is not None else {"logger": record.name, "message": record.getMessage()}
        if fields is None and record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
