"""Requests that are retried, bounded and cancelled: against a server that misbehaves on purpose."""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fake_server import Answer, Asked, FakeServer

from understudy.backends.http import BadReply, Clock, Reply, Request, ServerClient, api_key_of, server_root
from understudy.config_served import ConnectionConfig, ServerConfig
from understudy.errors import ConfigError, RunError, ServerError, ServerUnavailable

KEY = "sk-secret-0123456789"


class Time:
    """A clock that a pause moves, and nothing else."""

    def __init__(self, jitter: float = 1.0) -> None:
        self.pauses: list[float] = []
        self.seconds = 0.0
        self.clock = Clock(now=lambda: self.seconds, sleep=self._sleep, jitter=lambda: jitter)

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.seconds += seconds
        await asyncio.sleep(0)


Serve = Callable[..., tuple[FakeServer, ServerClient]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """(answer, time, key, settings of the connection) -> a server and a client of it."""
    with contextlib.ExitStack() as stack:

        def start(
            answer: Callable[[Asked], Answer], time: Time | None = None, *, key: str | None = None, **settings: float
        ):
            server = stack.enter_context(FakeServer(answer))
            connection, clock = ConnectionConfig.model_validate(settings), (time or Time()).clock
            client = ServerClient(server.url, name="maths", api_key=key, connection=connection, clock=clock)
            return server, stack.enter_context(client)

        yield start


def get(path: str = "/x", *, body: object = None, what: str = "") -> Request[object]:
    return Request("POST" if body is not None else "GET", path, body, parse=Reply.json, what=what)


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    """One answer after the other; the last one from then on."""
    left = list(answers)
    return lambda asked: left.pop(0) if len(left) > 1 else left[0]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_request_and_its_reply(serve: Serve):
    server, client = serve(lambda asked: Answer({"sum": sum(asked.body["ids"])}, headers={"ETag": '"a"'}))
    request = Request("POST", "/v1/add", {"ids": [1, 2, 3]}, parse=lambda reply: reply)
    reply = client.call(request)
    assert (reply.status, reply.json(), reply.headers["etag"]) == (200, {"sum": 6}, '"a"')
    assert (server.asked[0].method, server.asked[0].path) == ("POST", "/v1/add")
    assert server.asked[0].headers["content-type"] == "application/json"
    assert "authorization" not in server.asked[0].headers


def test_replies_come_in_the_order_of_requests_and_few_at_a_time(serve: Serve):
    # The first is answered last.
    server, client = serve(
        lambda asked: Answer(asked.path, delay=0.2 if asked.path == "/0" else 0.01), max_concurrency=4
    )
    assert client.map([get(f"/{i}") for i in range(20)]) == [f"/{i}" for i in range(20)]
    assert client.map([]) == []
    assert server.most_at_once <= 4
    assert server.connections <= 4, "connections are used again"
    assert len(server.asked) == 20


def test_one_connection_serves_requests_in_a_row(serve: Serve):
    server, client = serve(lambda asked: Answer(1))
    for _ in range(5):
        client.call(get())
    assert server.connections == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_statuses_that_pass_are_tried_again(serve: Serve, status: int):
    time = Time()
    _, client = serve(in_turn(Answer("no", status), Answer("no", status), Answer(7)), time)
    assert client.call(get()) == 7
    assert time.pauses == [0.5, 1.0]  # exponential; the jitter of this clock is all of it


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 408, 409, 413, 422, 501])
def test_other_statuses_are_final(serve: Serve, status: int):
    time = Time()
    answer = Answer({"error": {"message": "context\n too long" + "." * 600}}, status, {"location": "http://else/"})
    server, client = serve(lambda asked: answer, time)
    with pytest.raises(ServerError) as caught:
        client.call(get("/v1/x", what="prompt 17"))
    assert len(server.asked) == 1
    assert time.pauses == []
    assert caught.value.status == status
    assert not isinstance(caught.value, ServerUnavailable)
    start = f"server 'maths' at {client.root}, GET /v1/x (prompt 17): status {status}: "
    message = "a redirect to http://else/, which is not followed" if status == 301 else "context too long" + "." * 484
    assert str(caught.value) == start + message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"object": "error", "message": "bad"}', "bad"),
        (b'{"error": "plain"}', "plain"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b"<html>\x1b[31m</html>\xff", "<html>�[31m</html>�"),
        (b"", "no message"),
        (b"[1]", "[1]"),
    ],
)
def test_a_refusal_says_what_the_server_said(serve: Serve, content: bytes, message: str):
    _, client = serve(lambda asked: Answer(content, 400))
    with pytest.raises(ServerError) as caught:
        client.call(get())
    assert str(caught.value).endswith(f"status 400: {message}")


def test_retry_after_is_honoured(serve: Serve):
    time = Time(jitter=0.0)
    answers = in_turn(
        Answer("", 429, {"retry-after": "7"}), Answer("", 503, {"Retry-After": "2.5"}), Answer("", 503), Answer(1)
    )
    _, client = serve(answers, time)
    assert client.call(get()) == 1
    assert time.pauses == [7.0, 2.5, 0.0]


def test_retry_after_beyond_patience_is_not_waited_for(serve: Serve):
    time = Time()
    _, client = serve(lambda asked: Answer("", 429, {"retry-after": "3600"}), time)
    with pytest.raises(ServerUnavailable, match=r"asks to wait 3600 s more"):
        client.call(get())
    assert time.pauses == []


def test_patience_ends(serve: Serve):
    time = Time()
    _, client = serve(lambda asked: Answer({"error": "busy"}, 503), time)
    with pytest.raises(ServerUnavailable) as caught:
        client.call(get(), patience_seconds=5)
    assert time.pauses == [0.5, 1.0, 2.0, 1.5]  # the last attempt at the very end
    assert caught.value.status == 503
    text = "no success for 5 s (connection.patience_seconds), tried 5 times; the last time: status 503: busy"
    assert text in str(caught.value)


def test_without_patience_there_is_one_attempt(serve: Serve):
    server, client = serve(lambda asked: Answer("", 500), patience_seconds=0)
    with pytest.raises(ServerUnavailable, match="tried once"):
        client.call(get())
    assert len(server.asked) == 1


def test_any_success_restarts_patience():
    """One request fails for 25 s in all with a patience of 10 s, since others are answered meanwhile."""
    time, tried = Time(), []
    helper: list[ServerClient] = []

    def answer(asked: Asked) -> Answer:
        if asked.path == "/other":
            return Answer("fine")
        tried.append(time.seconds)
        return Answer("done") if time.seconds >= 25 else Answer("", 502)

    async def sleep(seconds: float) -> None:
        time.seconds += seconds
        if time.seconds < 25:
            await asyncio.get_running_loop().run_in_executor(None, helper[0].call, get("/other"))

    clock = Clock(now=lambda: time.seconds, sleep=sleep, jitter=lambda: 1.0)
    connection = ConnectionConfig(patience_seconds=10)
    with FakeServer(answer) as server, ServerClient(server.url, name="a", connection=connection, clock=clock) as client:
        helper.append(client)
        assert client.call(get("/slow")) == "done"
    assert tried == [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 25.5]


def test_patience_starts_with_the_request_when_the_last_success_is_long_ago(serve: Serve):
    time = Time()
    _, client = serve(in_turn(Answer(1), Answer("", 503), Answer(2)), time, patience_seconds=10)
    client.call(get())
    time.seconds += 3600  # the trainer had other things to do
    assert client.call(get()) == 2


def test_a_request_that_fails_alone_is_given_up():
    """Status 500 again and again, while the server answers others: nothing that patience helps."""
    helper: list[ServerClient] = []

    async def sleep(seconds: float) -> None:
        await asyncio.get_running_loop().run_in_executor(None, helper[0].call, get("/fine"))

    def answer(asked: Asked) -> Answer:
        return Answer({"error": "boom"}, 500) if asked.path == "/poison" else Answer(1)

    with FakeServer(answer) as server, ServerClient(server.url, name="a", clock=Clock(sleep=sleep)) as client:
        helper.append(client)
        with pytest.raises(ServerError, match=r"prompt 3.*boom \(tried 5 times, while other requests") as caught:
            client.call(get("/poison", what="prompt 3"))
    assert not isinstance(caught.value, ServerUnavailable)
    assert caught.value.status == 500


def test_no_server_at_all():
    time = Time()
    client = ServerClient(f"http://127.0.0.1:{closed_port()}", name="gone", clock=time.clock)
    with client, pytest.raises(ServerUnavailable, match=r"'gone' .* no connection \(ConnectError"):
        client.call(get(), patience_seconds=1)
    assert time.pauses == [0.5, 0.5]


def test_a_server_that_is_restarted_under_way():
    """Requests that were sent, and those that wait, are answered by the next one on the same port."""
    some_sent = threading.Event()

    def answer(asked: Asked) -> Answer:
        if asked.path == "/5":
            some_sent.set()
        return Answer(asked.path, delay=0.02)

    first = FakeServer(answer).__enter__()
    results: list[list[object]] = []
    with ServerClient(first.url, name="a", connection=ConnectionConfig(max_concurrency=4)) as client:
        thread = threading.Thread(target=lambda: results.append(client.map([get(f"/{i}") for i in range(40)])))
        thread.start()
        assert some_sent.wait(5)
        first.__exit__()
        with FakeServer(answer, port=first.port) as second:
            thread.join()
    assert results == [[f"/{i}" for i in range(40)]]
    assert len(first.asked) < 40
    assert len(second.asked) > 0


def test_broken_connections_are_tried_again(serve: Serve):
    time = Time()
    answers = in_turn(Answer(reset=True), Answer(b'{"cut": ', headers={"x": "y"}, close=True), Answer(3))
    _, client = serve(answers, time)
    assert client.call(get()) == 3
    assert time.pauses == [0.5, 1.0]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000, b"1" * 5000, b'{"a": {"b": 1, "b": 1}}']
)
def test_malformed_replies_are_tried_three_times_more(serve: Serve, content: bytes):
    time = Time()
    server, client = serve(lambda asked: Answer(content), time)
    with pytest.raises(ServerError, match=r"malformed reply: .*\(tried 4 times\)") as caught:
        client.call(get())
    assert not isinstance(caught.value, ServerUnavailable)
    assert len(server.asked) == 4
    assert time.pauses == [0.5, 1.0, 2.0]


def test_a_malformed_reply_that_passes(serve: Serve):
    _, client = serve(in_turn(Answer(b"{"), Answer({"a": 1})))
    assert client.call(get()) == {"a": 1}


def test_what_a_parser_says_reaches_the_user(serve: Serve):
    def parse(reply: Reply) -> object:
        raise BadReply("no choices")

    def final(reply: Reply) -> object:
        raise RunError("-inf at 3")

    server, client = serve(lambda asked: Answer({}), patience_seconds=0)
    with pytest.raises(ServerError, match=r"malformed reply: no choices \(tried once\)"):
        client.call(Request("GET", "/", parse=parse))
    with pytest.raises(RunError, match="-inf at 3"):
        client.call(Request("GET", "/", parse=final))
    assert len(server.asked) == 2


def test_a_slow_drip_is_cut_at_the_deadline(serve: Serve):
    server, client = serve(lambda asked: Answer(list(range(1000)), drip=0.02), timeout_seconds=0.3, patience_seconds=0)
    start = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"no whole reply within 0\.3 s"):
        client.call(get())
    assert time.monotonic() - start < 5  # all of it would take a minute and a half
    assert server.client_left.wait(5)
    with pytest.raises(ServerUnavailable, match=r"no whole reply within 0\.1 s"):
        client.call(Request("GET", "/", parse=Reply.json, timeout_seconds=0.1))


def test_the_first_failure_for_good_cancels_the_rest(serve: Serve):
    def answer(asked: Asked) -> Answer:
        return Answer("", 400, delay=0.1) if asked.path == "/bad" else Answer(1, delay=60)

    server, client = serve(answer, max_concurrency=3)
    with pytest.raises(ServerError, match="status 400"):
        client.map([get("/a"), get("/bad"), get("/b"), get("/c")])
    assert server.client_left.wait(5)
    assert [asked.path for asked in server.asked].count("/c") == 0


def test_ctrl_c_cancels_what_is_under_way(serve: Serve):
    asked_for = threading.Event()

    def answer(asked: Asked) -> Answer:
        asked_for.set()
        return Answer(1, delay=60 if asked.path != "/quick" else 0)

    def press() -> None:
        asked_for.wait(5)
        os.kill(os.getpid(), signal.SIGINT)

    server, client = serve(answer)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.map([get("/a"), get("/b")])
    thread.join()
    assert server.client_left.wait(5)
    assert client.call(get("/quick")) == 1  # the client goes on


def test_threads_share_a_client_and_its_bound(serve: Serve):
    server, client = serve(lambda asked: Answer(asked.path, delay=0.005), max_concurrency=3)
    results: dict[str, list[object]] = {}

    def work(name: str) -> None:
        results[name] = client.map([get(f"/{name}{i}") for i in range(15)])

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [f"/{name}{i}" for i in range(15)] for name in "ab"}
    assert server.most_at_once <= 3


def test_an_overloaded_server_sees_fewer_requests(serve: Serve):
    """It takes two at a time and refuses further ones; everything is answered in the end."""

    def answer(asked: Asked) -> Answer:
        return Answer("", 429) if server.under_way > 2 else Answer(1, delay=0.01)

    server, client = serve(answer, max_concurrency=16)
    assert client.map([get(f"/{i}") for i in range(100)]) == [1] * 100
    assert client._gate.window < 8


def test_a_closed_client_says_so(serve: Serve):
    _, client = serve(lambda asked: Answer(1))
    client.call(get())
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="is closed"):
        client.call(get())


def test_the_key_is_sent_and_never_shown(serve: Serve, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    echo = Answer({"error": {"message": "x" * 495 + f" {KEY} is wrong"}}, 401)
    busy = Answer({"error": f"key {KEY} over its limit"}, 429)
    texts = []
    for answer in (echo, busy, Answer(f"{KEY} is no JSON".encode())):
        server, client = serve(lambda asked, answer=answer: answer, key=KEY)
        with pytest.raises(ServerError) as caught:
            client.call(get())
        texts += [str(caught.value), repr(caught.value), repr(client), str(vars(client)), repr(client._hide)]
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert "trying again" in caplog.text
    for text in [*texts, caplog.text]:
        assert "sk-secret" not in text
        assert "secret-0" not in text


@pytest.mark.parametrize("key", ["", "two words", "line\n", "schlüssel"])
def test_a_key_that_no_header_holds(key: str):
    with pytest.raises(ConfigError, match="API key") as caught:
        ServerClient("http://127.0.0.1:1", name="a", api_key=key)
    assert not key or key not in str(caught.value)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    config = ServerConfig(url="http://127.0.0.1:1", api_key_env="TEACHER_KEY")
    assert api_key_of(ServerConfig(url="http://127.0.0.1:1")) is None
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")
    assert api_key_of(config) == KEY
    monkeypatch.setenv("TEACHER_KEY", " ")
    with pytest.raises(ConfigError, match="an empty environment variable"):
        api_key_of(config)
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="no environment variable"):
        api_key_of(config)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("http://h:8000", "http://h:8000"),
        ("https://h/teacher/v1", "https://h/teacher"),
        ("http://[::1]:80/v1", "http://[::1]:80"),
        ("http://h/v10", "http://h/v10"),
    ],
)
def test_the_root_of_a_url(url: str, root: str):
    assert server_root(url) == root


@pytest.mark.parametrize(
    "url", ["h:80", "ftp://h", "http://", "http://u:pw@h", "http://h?a=1", "http://h#x", "http://h:x"]
)
def test_urls_that_are_refused(url: str):
    with pytest.raises(ConfigError) as caught:
        server_root(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_proxies_are_not_asked_for_loopback(serve: Serve, host: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server, _ = serve(lambda asked: Answer(1))
    with ServerClient(f"http://{host}:{server.port}/v1", name="a", clock=Time().clock) as client:
        assert client.call(get()) == 1
    other = ServerClient("http://teacher.example", name="a", clock=Time().clock)
    with other, pytest.raises(ServerUnavailable, match="no connection"):
        other.call(get(), patience_seconds=0)
    assert len(server.asked) == 1


def test_pauses_draw_from_no_shared_generator(serve: Serve):
    random.seed(0)
    state = random.getstate()
    clock = Clock(sleep=lambda seconds: asyncio.sleep(0))
    server, _ = serve(in_turn(Answer("", 503), Answer(1)))
    with ServerClient(server.url, name="a", clock=clock) as client:
        client.call(get())
    assert random.getstate() == state


def test_a_fork_makes_its_own_client(serve: Serve):
    _, client = serve(lambda asked: Answer(1))
    client.call(get())
    client._pid += 1
    with pytest.raises(RuntimeError, match="before this process was forked"):
        client.call(get())
    client._pid -= 1


def test_json_numbers_that_are_not_finite_are_left_to_the_reader():
    values = Reply(200, {}, b"[NaN, -Infinity, 1e999]").json()
    assert [str(value) for value in values] == ["nan", "-inf", "inf"]
    assert json.loads(b"[1]") == Reply(200, {}, b"[1]").json()


def test_nobody_waits_twice_for_a_server_that_is_lost(serve: Serve):
    time, engine = Time(), in_turn(*[Answer("no", 503)] * 40, Answer(7))
    server, client = serve(engine, time, patience_seconds=10)
    with pytest.raises(ServerUnavailable, match="no success for 10 s"):
        client.call(get())
    tried, waited = len(server.asked), len(time.pauses)
    assert tried > 3
    for _ in range(3):
        with pytest.raises(ServerUnavailable, match="tried once"):
            client.call(get())
    assert (len(server.asked), len(time.pauses)) == (tried + 3, waited)
    while len(server.asked) < 40:
        with pytest.raises(ServerUnavailable):
            client.call(get())
    assert client.call(get()) == 7  # and from here on it has its patience again


def test_an_impatient_request_does_not_make_the_server_a_lost_one(serve: Serve):
    time = Time()
    _, client = serve(in_turn(Answer("no", 503), Answer("no", 503), Answer(7)), time, patience_seconds=10)
    with pytest.raises(ServerUnavailable):
        client.call(get(), patience_seconds=0)
    assert client.call(get()) == 7


def test_what_is_under_way_can_be_cancelled(serve: Serve):
    _, client = serve(lambda asked: Answer(1, delay=30))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            client.call(get())
        except ServerUnavailable as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    client.cancel()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert [str(error).partition(": ")[2] for error in errors] == ["the run ended before there was an answer"] * 3
    with pytest.raises(ServerUnavailable, match="the run ended"):
        client.call(get())
