"""Requests to stop: what is finished, what is left out, and when."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import understudy
from understudy import RunConfig
from understudy.stopping import StopNow, StopRequest
from user import save_model, tree, word_tokenizer, write_rows


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # it is seen between two instructions


def test_the_first_signal_is_a_request_and_the_second_ctrl_c_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    for first in (signal.SIGINT, signal.SIGTERM):
        with StopRequest().listening() as stop:
            send(first)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt) as second:
                send(signal.SIGINT)
            assert second.type is KeyboardInterrupt
    assert capfd.readouterr().err.count("this step is finished and saved first; Ctrl-C again stops at once") == 2


def test_a_second_sigterm_keeps_the_last_update(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(within_seconds=1000).listening() as stop:
        send(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(StopNow):
            send(signal.SIGTERM)
    assert "if it ends within 1000 seconds" in (said := capfd.readouterr().err)
    assert "the last update is saved" in said


def test_the_deadline_ends_what_waits() -> None:
    start = time.monotonic()
    with StopRequest(within_seconds=0.2).listening():
        send(signal.SIGTERM)
        with pytest.raises(StopNow):
            threading.Event().wait(60)
    assert 0.2 <= time.monotonic() - start < 30


def test_ctrl_c_has_no_deadline() -> None:
    with StopRequest(within_seconds=0.05).listening() as stop:
        send(signal.SIGINT)
        time.sleep(0.2)
    assert stop.requested


def save(stop: StopRequest, done: list[str]) -> None:
    with stop.whole():
        time.sleep(0.2)
        done.append("saved")


def test_an_update_and_its_record_are_not_torn_apart() -> None:
    done: list[str] = []
    with StopRequest(within_seconds=0.05).listening() as stop:
        send(signal.SIGTERM)
        stop.hold()
        time.sleep(0.2)
        done.append("recorded")
        with pytest.raises(StopNow):
            stop.release()
    with StopRequest(within_seconds=0.05).listening() as stop:
        send(signal.SIGTERM)
        with pytest.raises(StopNow):
            save(stop, done)
    assert done == ["recorded", "saved"]


def test_what_is_saved_afterwards_is_not_abandoned() -> None:
    done: list[str] = []
    with StopRequest(within_seconds=1000).listening() as stop:
        send(signal.SIGTERM)
        with pytest.raises(StopNow):
            send(signal.SIGTERM)
        save(stop, done)
    with StopRequest(within_seconds=1000).listening() as stop:
        send(signal.SIGTERM)
        stop.hold()
        send(signal.SIGTERM)
        stop.end()  # an error, say, has ended the run meanwhile
        save(stop, done)
        send(signal.SIGTERM)
    assert done == ["saved"] * 2


def test_the_deadline_leaves_time_to_save() -> None:
    start = time.monotonic()
    with StopRequest(within_seconds=60).listening() as stop:
        stop.saved_in(39.9)
        stop.saved_in(1.0)
        send(signal.SIGTERM)
        with pytest.raises(StopNow):
            time.sleep(60)
    assert 0.1 <= time.monotonic() - start < 30  # 60 - 1.5 * 39.9 seconds


def test_nothing_is_abandoned_after_the_block() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest(within_seconds=0.1).listening():
        send(signal.SIGTERM)
    time.sleep(0.3)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    seen: list[bool] = []

    def listen() -> None:
        with StopRequest().listening() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_run_that_is_stopped_in_a_step_returns_as_one_between_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy import loop

    original, calls = loop.sample_rollouts, [0]

    def slow(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            send(signal.SIGTERM)
            send(signal.SIGTERM)
        return original(*arguments, **keywords)

    monkeypatch.setattr("understudy.loop.sample_rollouts", slow)
    student = save_model(tmp_path / "student", word_tokenizer())
    teacher = save_model(tmp_path / "teacher", word_tokenizer(), seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i}"} for i in range(8)])
    content = tree(student, teacher, rows, tmp_path / "run", optim={"num_steps": 4})
    result = understudy.distill(RunConfig.model_validate(content), quiet=True)
    assert (result.interrupted_at, result.stop_requested) == (2, True)
    assert result.student == tmp_path / "run" / "checkpoints" / "step_000002"
    assert (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()
    assert (tmp_path / "run" / "report.html").exists()
