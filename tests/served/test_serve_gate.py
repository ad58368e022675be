"""Who gets in, what is too much, what is said about errors, and what is counted and logged."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx2
import pytest
from serving import NAME, client_of, listening, metric, wait_for

from understudy.serve.app import create_app
from understudy.serve.engine import Engine
from understudy.serve.gate import JsonLines
from understudy.serve.settings import ServeSettings

KEY = "s3cret-token"
ONE = {"sequences": [{"prompt_ids": [1, 2], "completion_ids": [3, 4]}]}
TEXT = "Natalia sold clips"


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What the server has logged, as it would be written."""
    stream, log = io.StringIO(), logging.getLogger("understudy.serve")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.removeHandler(handler)
    log.setLevel(level)


class Held(NamedTuple):
    entered: threading.Event
    release: threading.Event


@pytest.fixture
def held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The model waits in every batch until it is released."""
    held, original = Held(threading.Event(), threading.Event()), engine.score

    def score(*arguments: Any, **options: Any) -> Any:
        held.entered.set()
        assert held.release.wait(20)
        return original(*arguments, **options)

    monkeypatch.setattr(engine, "score", score)
    yield held
    held.release.set()


def error_of(reply: httpx2.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# Authentication


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer wrong",
        b"Bearer s3cret-toke",
        b"Bearer s3cret-token2",
        b"Basic s3cret-token",
        b"s3cret-token",
        "Bearer s3cret-tokén".encode(),
        b"Bearer s3cret-tok\xe9n",
    ],
)
def test_without_the_token_nothing_but_health(engine: Engine, authorization: bytes | None) -> None:
    headers = {} if authorization is None else {b"Authorization": authorization}
    with client_of(engine, api_key=KEY) as client:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/score"), ("GET", "/metrics"), ("GET", "/nowhere")):
            reply = client.request(method, path, headers=headers)
            error = error_of(reply, 401)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert KEY not in reply.text
        assert client.get("/health", headers=headers).json() == {"status": "ok"}


def test_with_the_token(engine: Engine) -> None:
    with client_of(engine, api_key=KEY) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/score", json=ONE).status_code == 200
        # The scheme's name may be written in any case.
        assert client.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_without_a_token_other_names_than_localhost_are_refused(engine: Engine) -> None:
    app = create_app(engine, hosts=["localhost", "127.0.0.1", "[::1]"])
    with listening(app) as url, httpx2.Client(base_url=url) as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example:8000", "[::2]:80", ""):
            assert error_of(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "host_not_allowed"


def test_pages_cannot_post_without_asking(client: httpx2.Client) -> None:
    body = json.dumps(ONE)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = client.post("/v1/score", content=body, headers={"Content-Type": kind})
        assert error_of(reply, 415)["code"] == "not_json"
    kind = "application/JSON; charset=utf-8"
    assert client.post("/v1/score", content=body, headers={"Content-Type": kind}).status_code == 200


# Limits


def test_long_bodies(engine: Engine) -> None:
    with client_of(engine, max_body_bytes=200) as client:
        long = {"prompt": "x" * 300}
        assert error_of(client.post("/v1/completions", json=long), 413)["code"] == "body_too_large"
        chunks = (b"x" * 100 for _ in range(5))  # a body whose length is not announced
        reply = client.post("/v1/score", content=chunks, headers={"Content-Type": "application/json"})
        assert error_of(reply, 413)["code"] == "body_too_large"
        assert client.post("/v1/score", json=ONE).status_code == 200


def test_large_requests(engine: Engine) -> None:
    with client_of(engine, max_request_sequences=3, max_request_tokens=40) as client:

        def refused(path: str, body: Any, fragment: str) -> None:
            error = error_of(client.post(path, json=body), 413)
            assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
            assert fragment in error["message"]

        refused("/v1/score", {"sequences": ONE["sequences"] * 4}, "4 sequences")
        refused("/v1/score", {"sequences": [{"prompt_ids": [1] * 30, "completion_ids": [1] * 11}]}, "41 tokens")
        refused("/v1/completions", {"prompt": [[1], [2]], "n": 2}, "4 sequences")
        refused("/v1/completions", {"prompt": [1], "max_tokens": 20, "n": 2}, "42 tokens")
        assert client.post("/v1/completions", json={"prompt": [1] * 10, "max_tokens": 10, "n": 2}).status_code == 200


def test_a_reply_has_a_size_too(client: httpx2.Client) -> None:
    sequences = [{"prompt_ids": [1], "completion_ids": [2] * 126}] * 200
    error = error_of(client.post("/v1/score", json={"sequences": sequences, "kind": "topk", "topk": 300}), 413)
    assert "numbers in a reply" in error["message"]


def test_a_full_queue(engine: Engine, held: Held) -> None:
    with client_of(engine, max_queued_sequences=2) as client, ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, "/v1/score", json=ONE)
        assert held.entered.wait(20)
        second = pool.submit(client.post, "/v1/score", json={"sequences": ONE["sequences"] * 2})
        wait_for(lambda: metric(client, "understudy_queued_sequences") == 2)
        reply = client.post("/v1/score", json=ONE)
        error = error_of(reply, 429)
        assert (error["type"], error["code"], reply.headers["retry-after"]) == ("rate_limit_error", "queue_full", "1")
        held.release.set()
        assert [f.result().status_code for f in (first, second)] == [200, 200]
        assert client.post("/v1/score", json=ONE).status_code == 200


# Errors


def test_unknown_models_and_routes(client: httpx2.Client) -> None:
    for path, body in (
        ("/v1/score", ONE),
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        error = error_of(client.post(path, json=body | {"model": "other"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'other'" in error["message"]
        assert NAME in error["message"]
        assert client.post(path, json=body | {"model": NAME}).status_code == 200
    assert error_of(client.get("/v1/chat/completions"), 404)["code"] == "no_route"
    reply = client.get("/v1/score")
    assert error_of(reply, 405)["code"] == "no_route"
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"[" * 9999]
)
def test_bodies_that_are_no_requests(client: httpx2.Client, body: bytes) -> None:
    reply = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert error_of(reply, 400)["type"] == "invalid_request_error"


def test_a_model_that_fails_answers_500_and_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    with client_of(engine) as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "score", lambda *_, **__: 1 / 0)
            error = error_of(client.post("/v1/score", json=ONE), 500)
            assert (error["type"], error["code"]) == ("server_error", "failed")
        assert client.post("/v1/score", json=ONE).status_code == 200
    [failed] = [line for line in lines() if line["event"] == "batch_failed"]
    assert "ZeroDivisionError" in failed["traceback"]


def test_a_fault_of_our_own_answers_500_without_quoting_the_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    def encode(text: str, **_: Any) -> Any:
        raise RuntimeError(f"cannot encode {text}")

    with client_of(engine) as client:
        monkeypatch.setattr(engine, "encode", encode)
        error = error_of(client.post("/v1/completions", json={"prompt": TEXT}), 500)
        assert (error["type"], error["code"]) == ("server_error", "internal")
    [line] = [line for line in lines() if line["event"] == "request"]
    assert (line["level"], line["error"], line["status"]) == ("error", "RuntimeError", 500)
    assert any("encode" in entry for entry in line["traceback"])
    assert TEXT not in json.dumps(line) + json.dumps(error)


def test_scores_that_are_no_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = engine.head.weight
    before = weight[7].clone()
    with client_of(engine) as client:
        weight[7] = float("-inf")  # its logit is infinite, or not a number
        try:
            for kind in ({"kind": "sampled"}, {"kind": "topk", "topk": 3}, {"kind": "chosen", "ids": [[[7], [7]]]}):
                error = error_of(client.post("/v1/score", json=ONE | kind), 422)
                assert (error["code"], error["type"]) == ("not_finite", "invalid_request_error")
                assert "sequence 0, position 0" in error["message"]
            reply = client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 0, "prompt_logprobs": 2})
            assert error_of(reply, 422)["code"] == "not_finite"
        finally:
            weight[7] = before
        assert client.post("/v1/score", json=ONE).status_code == 200


# Clients that leave


def test_a_client_that_leaves_is_forgotten(engine: Engine, held: Held, lines: Lines) -> None:
    with client_of(engine) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/score", json=ONE)
        assert held.entered.wait(20)
        body = json.dumps({"sequences": ONE["sequences"] * 5}).encode()
        host = client.base_url.host, client.base_url.port
        with socket.create_connection(host) as leaving:
            head = (
                f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            leaving.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_for(lambda: metric(client, "understudy_queued_sequences") >= 5)
        wait_for(lambda: metric(client, "understudy_dropped_sequences_total") == 5)
        assert metric(client, "understudy_queued_sequences") == 0
        held.release.set()
        assert first.result().status_code == 200
        assert client.post("/v1/score", json=ONE).status_code == 200
    assert [line["code"] for line in lines() if line["status"] == 499] == ["client_left"]


def test_a_client_that_leaves_in_the_middle_of_its_body(engine: Engine, lines: Lines) -> None:
    with client_of(engine) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
            head = (
                b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
            )
            leaving.sendall(head)
        wait_for(lambda: any(line["status"] == 499 for line in lines()))
        assert client.post("/v1/score", json=ONE).status_code == 200


def test_time_is_up(engine: Engine, held: Held) -> None:
    with client_of(engine, request_seconds=0.2) as client:
        for _ in range(2):  # the second waits behind the first, and is dropped from the queue
            reply = client.post("/v1/score", json=ONE)
            assert error_of(reply, 503)["code"] == "timeout"
            assert "retry-after" in reply.headers
        wait_for(lambda: metric(client, "understudy_dropped_sequences_total") == 1)
        held.release.set()
        assert client.post("/v1/score", json=ONE).status_code == 200


def test_other_routes_answer_while_the_model_works(engine: Engine, held: Held) -> None:
    with client_of(engine) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/score", json=ONE)
        assert held.entered.wait(20)
        start = time.monotonic()
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/tokenize", json={"prompt": TEXT}).status_code == 200
        assert client.get("/v1/head").status_code == 200
        assert time.monotonic() - start < 5
        held.release.set()
        assert first.result().status_code == 200


def test_a_server_that_stops_says_so(engine: Engine) -> None:
    app = create_app(engine, ServeSettings())
    with listening(app) as url, httpx2.Client(base_url=url) as client:
        app.state.service.stopping = lambda: True
        reply = client.get("/health")
        assert (reply.status_code, reply.json()) == (503, {"status": "shutting down"})
        assert error_of(client.post("/v1/score", json=ONE), 503)["code"] == "shutting_down"
        app.state.service.stopping = lambda: False
        app.state.service.batcher.close()
        assert client.get("/health").status_code == 503
        assert error_of(client.post("/v1/score", json=ONE), 503)["code"] == "shutting_down"


def test_without_a_server(engine: Engine) -> None:
    """The application answers in process too."""

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/score", json=ONE)

    app = create_app(engine)
    try:
        assert len(asyncio.run(ask()).json()["scores"]) == 1
    finally:
        app.state.service.batcher.close()


# Counting and logging


def test_metrics(engine: Engine) -> None:
    with client_of(engine) as client:
        for _ in range(2):
            client.post("/v1/score", json=ONE)
        client.post("/v1/score", json={})
        client.get("/a/path/of/your/own")
        client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 3, "ignore_eos": True})
        assert metric(client, "understudy_requests_total", route="/v1/score", status="200") == 2
        assert metric(client, "understudy_requests_total", route="/v1/score", status="400") == 1
        assert metric(client, "understudy_requests_total", route="other", status="404") == 1
        assert metric(client, "understudy_request_seconds_count", route="/v1/score") == 3
        assert metric(client, "understudy_scored_tokens_total") == 8
        assert metric(client, "understudy_batch_sequences_count") == 2
        assert metric(client, "understudy_generated_tokens_total") == 3
        # Five completions of one prompt: it goes through the model once.
        shared = [{"prompt_ids": [1] * 20, "completion_ids": [i]} for i in range(5)]
        client.post("/v1/score", json={"sequences": shared}).raise_for_status()
        assert metric(client, "understudy_reused_prefix_tokens_total") == (80 if engine.shares_prompts else 0)


def test_the_log_says_what_was_done_but_not_what_was_asked(engine: Engine, lines: Lines) -> None:
    with client_of(engine) as client:
        reply = client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 2}, headers={"X-Request-Id": "me-1"})
        assert reply.headers["x-request-id"] == "me-1"
        assert reply.json()["id"] == "cmpl-me-1"
        client.post("/v1/completions", json={"prompt": TEXT, "model": TEXT}, headers={"X-Request-Id": "{not an id}"})
        client.post("/v1/completions", json={"prompt": TEXT, TEXT: 1})
        client.post(f"/{TEXT}", json={})
    first, second, third, fourth = [line for line in lines() if line["event"] == "request"]
    assert first["time"].endswith("+00:00")
    assert (first["route"], first["method"], first["status"]) == ("/v1/completions", "POST", 200)
    assert (first["sequences"], first["request_id"]) == (1, "me-1")
    assert first["tokens"] == len(engine.encode(TEXT)) + 2
    assert first["milliseconds"] > 0
    assert len(second["request_id"]) == 32
    assert [line["code"] for line in (second, third, fourth)] == ["model_not_found", None, "no_route"]
    assert "Natalia" not in json.dumps([first, second, third, fourth])


def test_prompts_are_logged_on_request(engine: Engine, lines: Lines) -> None:
    with client_of(engine, log_prompts=True) as client:
        client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1})
        client.post("/v1/score", json=ONE)
    first, second = [line for line in lines() if line["event"] == "request"]
    assert first["request"] == {"prompt": TEXT, "max_tokens": 1}
    assert second["request"] == ONE
