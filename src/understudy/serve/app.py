"""The ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from understudy.serve.engine import Engine
from understudy.serve.gate import Gate
from understudy.serve.openapi import PATHS
from understudy.serve.replies import ApiError
from understudy.serve.service import Service
from understudy.serve.settings import ServeSettings


def create_app(
    engine: Engine,
    settings: ServeSettings | None = None,
    *,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
) -> Starlette:
    """The application over a loaded model; its thread runs from here on, until the lifespan's end or
    ``app.state.service.batcher.close()``.

    ``api_key``: the bearer token to ask for, None for none. ``hosts``: see ``Gate``. A server that is about to stop
    says so by ``app.state.service.stopping``.
    """
    service = Service(engine, settings or ServeSettings(), token=api_key is not None)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.batcher.close(timeout=0)

    routes = [
        Route("/health", service.health),
        Route("/version", service.version),
        Route("/metrics", service.metrics_page),
        Route("/openapi.json", service.openapi),
        Route("/v1/models", service.models),
        Route("/v1/head", service.head),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/score", service.score, methods=["POST"]),
    ]
    gate = Middleware(
        Gate,
        metrics=service.metrics,
        routes=PATHS,
        stopping=lambda: service.stopping(),
        api_key=api_key,
        hosts=hosts,
    )
    app = Starlette(routes=routes, middleware=[gate], exception_handlers={HTTPException: _no_route}, lifespan=lifespan)
    app.state.service = service
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405, in the form of all other errors."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; GET /openapi.json lists the routes"
    raise ApiError(error.status_code, message, code="no_route", headers=error.headers)
