"""Errors in OpenAI's form, and JSON replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

_FORMS = {
    "prompt": "text, a list of texts, a list of token ids (0 or more), or a list of such lists",
    "stop": "a text or a list of texts",
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. ``code``: for programs; ``param``: the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        super().__init__(message)

    def response(self) -> Response:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json_response({"error": error}, status=self.status, headers=self.headers)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Floats are written so that they are read back bit for bit."""
    return Response(to_json(content), status, headers, "application/json")


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def from_validation(error: ValidationError) -> ApiError:
    """What pydantic found wrong first, as 400."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    if not place:
        return bad_request(f"the body is not what this route takes: {first['msg']}")
    if place[0] in _FORMS and len(place) > 1:  # pydantic says what is wrong with it in each of its forms
        return bad_request(f"{place[0]}: expected {_FORMS[place[0]]}, none of them empty", param=place[0])
    return bad_request(f"{'.'.join(place)}: {first['msg']}", param=place[0])
