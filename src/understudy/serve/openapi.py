"""The OpenAPI document, from the pydantic models and a table of routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import understudy
from understudy.serve import schemas
from understudy.serve.gate import PUBLIC

_REFERENCE = "#/components/schemas/{model}"
_STATUS = {
    304: "Not changed",
    400: "Bad request",
    401: "No valid token",
    403: "Called by another name than localhost, without a token",
    404: "No such model",
    408: "The body took too long",
    413: "Too large",
    415: "Not JSON",
    422: "A score is infinite or not a number",
    429: "Too much waits; see Retry-After",
    500: "The model failed",
    503: "Shutting down, or time was up",
}


@dataclass(frozen=True)
class _Route:
    path: str
    summary: str
    reply: type[BaseModel] | None = None
    request: type[BaseModel] | None = None
    types: tuple[str, ...] = ()
    runs_model: bool = False


_ROUTES = (
    _Route("/health", "Whether the server takes work", schemas.HealthReply),
    _Route("/version", "The server's version", schemas.VersionReply),
    _Route("/metrics", "Prometheus metrics", types=("text/plain",)),
    _Route("/openapi.json", "This document", types=("application/json",)),
    _Route("/v1/models", "The model", schemas.ModelList),
    _Route("/tokenize", "Text to token ids", schemas.TokenizeReply, schemas.TokenizeRequest),
    _Route("/detokenize", "Token ids to text", schemas.DetokenizeReply, schemas.DetokenizeRequest),
    _Route(
        "/v1/completions",
        "Continue prompts, or score them",
        schemas.CompletionReply,
        schemas.CompletionRequest,
        runs_model=True,
    ),
    _Route(
        "/v1/score",
        "Score completions; for kind hidden, a safetensors file",
        schemas.ScoreReply,
        schemas.ScoreRequest,
        types=("application/octet-stream",),
        runs_model=True,
    ),
    _Route("/v1/head", "The LM head, as a safetensors file", types=("application/octet-stream",)),
)
PATHS = frozenset(route.path for route in _ROUTES)


def document(*, token: bool = False) -> dict[str, Any]:
    """OpenAPI 3.1. ``token``: whether the server asks for one."""
    models = {m for route in _ROUTES for m in (route.request, route.reply) if m is not None} | {schemas.ErrorReply}
    _, definitions = models_json_schema(
        [(m, "validation") for m in sorted(models, key=lambda m: m.__name__)], ref_template=_REFERENCE
    )
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if token:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "understudy serve teacher",
            "version": understudy.__version__,
            "description": "Scores and samples from one checkpoint. Log-probabilities are in nats, at temperature 1.",
        },
        "paths": {route.path: {"post" if route.request else "get": _operation(route, token)} for route in _ROUTES},
        "components": components,
    }


def _operation(route: _Route, token: bool) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": {}} for kind in route.types}
    if route.reply is not None:
        content["application/json"] = _schema(route.reply)
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": route.path.strip("/").replace("/", "_").replace(".", "_"),
        "security": [{"bearer": []}] if token and route.path not in PUBLIC else [],
        "responses": {"200": {"description": "Done", "content": content}, **_errors(route)},
    }
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": _schema(route.request)}}
    return operation


def _errors(route: _Route) -> dict[str, Any]:
    statuses = [403, 503] if route.path == "/health" else [401, 403, 503]
    if route.request is not None:
        statuses += [400, 404, 408, 413, 415]
    if route.runs_model:
        statuses += [422, 429, 500]
    error = {"application/json": _schema(schemas.ErrorReply)}
    replies: dict[str, Any] = {str(s): {"description": _STATUS[s], "content": error} for s in sorted(statuses)}
    if route.path == "/health":
        replies["503"]["content"] = {"application/json": _schema(schemas.HealthReply)}
    return replies | ({"304": {"description": _STATUS[304]}} if route.path == "/v1/head" else {})


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}
