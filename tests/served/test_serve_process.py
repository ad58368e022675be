"""The command as a process: how it starts, what it refuses, how it stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import metric, wait_for

from understudy import cli
from user import run_cli

Printed = pytest.CaptureFixture[str]


class Server:
    """``understudy serve teacher`` on a free port. ``lines``: its log so far."""

    def __init__(self, checkpoint: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "understudy", "serve", "teacher", str(checkpoint), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--num-threads", "1", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        self.raw: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.raw.extend(iter(self.process.stderr.readline, ""))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.raw)]

    def event(self, name: str) -> dict[str, Any]:
        return next((line for line in self.lines if line.get("event") == name), {})

    def wait(self) -> int:
        code = self.process.wait(30)
        self._reader.join(10)
        return code

    def close(self) -> None:
        self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def serving(checkpoint: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(checkpoint, *arguments, **environment)
    try:
        wait_for(lambda: server.event("listening") or server.process.poll() is not None, seconds=60)
        server.url = server.event("listening")["url"].replace("0.0.0.0", "127.0.0.1")
        yield server
    finally:
        server.close()


def write(client: httpx2.Client, tokens: int) -> httpx2.Response:
    body = {"prompt": [1, 2], "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
    return client.post("/v1/completions", json=body)


def test_requests_in_flight_are_answered_before_it_stops(checkpoint: Path) -> None:
    options = ["--api-key-env", "TEACHER_KEY", "--max-logprobs", "5", "--vocab-size", "300", "--served-model-name", "t"]
    with (
        serving(checkpoint, *options, "--host", "0.0.0.0", TEACHER_KEY="k3y") as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer k3y"
        entry = client.get("/v1/models").json()["data"][0]
        assert (entry["id"], entry["max_logprobs"], entry["vocab_size"]) == ("t", 5, 300)
        assert client.post("/tokenize", json={"prompt": "April"}).status_code == 200
        waiting = [pool.submit(write, client, 120) for _ in range(4)]  # one is written at a time
        wait_for(lambda: metric(client, "understudy_queued_sequences") >= 3)
        server.process.send_signal(signal.SIGTERM)
        replies = [future.result() for future in waiting]
        assert [reply.status_code for reply in replies] == [200] * 4
        assert [len(reply.json()["choices"][0]["token_ids"]) for reply in replies] == [120] * 4
        assert server.wait() == 0
        assert [line["event"] for line in server.lines if "event" in line][-1] == "stopped"
        assert [line["status"] for line in server.lines if line.get("route") == "/v1/completions"] == [200] * 4
        with pytest.raises(httpx2.ConnectError):
            client.get("/health")
        assert "k3y" not in "".join(server.raw)
        assert "April" not in "".join(server.raw)


def test_what_takes_longer_than_the_grace_period_is_given_up(checkpoint: Path) -> None:
    with (
        serving(checkpoint, "--grace-seconds", "0", "--max-model-len", "125") as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        waiting = [pool.submit(write, client, 120) for _ in range(12)]
        wait_for(lambda: metric(client, "understudy_queued_sequences") >= 5)
        server.process.send_signal(signal.SIGINT)
        replies = [future.result() for future in waiting]
        assert server.wait() == 0
    given_up = [reply for reply in replies if reply.status_code == 503]
    assert given_up
    assert {reply.json()["error"]["code"] for reply in given_up} == {"shutting_down"}
    assert all(reply.status_code in (200, 503) for reply in replies)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Printed, *arguments: object) -> str:
    assert run_cli(monkeypatch, "serve", "teacher", *arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_no_token_no_network(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        text = refused(monkeypatch, capsys, checkpoint, "--host", host)
        assert "--api-key-env" in text
        assert host in text
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    text = refused(monkeypatch, capsys, checkpoint, "--api-key-env", "TEACHER_KEY")
    assert "a variable that is not set" in text
    for key, got in (("", "an empty variable"), ("a key", "spaces"), ("kéy", "beyond ASCII")):
        monkeypatch.setenv("TEACHER_KEY", key)
        text = refused(monkeypatch, capsys, checkpoint, "--host", "0.0.0.0", "--api-key-env", "TEACHER_KEY")
        assert got in text
        assert not key or key not in text


def test_what_cannot_be_served(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Address already in use" in refused(monkeypatch, capsys, checkpoint, "--port", taken.getsockname()[1])
    free = ("--port", 0)
    assert "no such folder" in refused(monkeypatch, capsys, checkpoint / "nowhere", *free)
    assert "--host" in refused(monkeypatch, capsys, checkpoint, "--host", "no.such.host.invalid")
    assert "at most the model's 320" in refused(monkeypatch, capsys, checkpoint, *free, "--vocab-size", 321)
    assert "1 to the model's context" in refused(monkeypatch, capsys, checkpoint, *free, "--max-model-len", 999)
    assert "max_batch_tokens" in refused(monkeypatch, capsys, checkpoint, *free, "--max-batch-tokens", 0)
    assert "port" in refused(monkeypatch, capsys, checkpoint, "--port", 70000)
    assert "fast" in refused(monkeypatch, capsys, checkpoint, *free, "--device", "fast")


def test_missing_packages_are_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    text = refused(monkeypatch, capsys, checkpoint)
    assert "`uvicorn` is not installed" in text
    assert 'pip install "understudy[serve]"' in text


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    assert run_cli(monkeypatch, "serve", "teacher", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "understudy serve teacher checkpoints/teacher" in text
    for option in ("--api-key-env", "--max-batch-sequences", "--log-prompts", "--grace-seconds"):
        assert option in text
    assert cli.app["serve"]
