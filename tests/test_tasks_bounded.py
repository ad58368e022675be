"""Calls in a process of their own: values, errors, limits, and what is left afterwards."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from understudy.errors import RunError
from understudy.tasks import bounded


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module only this process knows of, imported by a process that starts now."""
    (tmp_path / "slow_module.py").write_text(
        "import time, sys\n"
        "def where(): print('between the replies'); import os; return os.getpid()\n"
        "def sleep(seconds): time.sleep(seconds); return seconds\n"
        "def fail(): raise KeyError('lost')\n"
        "def fill(): return len(bytearray(64 << 30))\n"
        "def leave(): sys.exit(3)\n"
    )
    (tmp_path / "broken_module.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    bounded._shared.stop()


def test_values_come_from_another_process_that_stays() -> None:
    first = bounded.call("slow_module:where")
    assert first != os.getpid()
    assert bounded.call("slow_module:where") == first


def test_a_call_that_takes_too_long_is_ended() -> None:
    bounded.call("slow_module:sleep", 0)
    start = time.perf_counter()
    with pytest.raises(bounded.GaveUpError, match=r"slow_module:sleep: more than 0.2 seconds"):
        bounded.call("slow_module:sleep", 60, seconds=0.2)
    assert time.perf_counter() - start < 5
    assert bounded.call("slow_module:sleep", 0.01) == 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_memory_is_limited() -> None:
    with pytest.raises(bounded.GaveUpError):
        bounded.call("slow_module:fill")
    assert bounded.call("slow_module:sleep", 0) == 0


def test_a_process_that_ends_is_replaced() -> None:
    with pytest.raises(bounded.GaveUpError):
        bounded.call("slow_module:leave")
    assert bounded.call("slow_module:sleep", 0) == 0


@pytest.mark.parametrize("noticed", [True, False])
def test_a_process_that_was_ended_between_calls_is_replaced(noticed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bounded.call("slow_module:where")
    process = bounded._shared._process
    assert process is not None
    process.kill()
    process.wait()
    if not noticed:  # it ends after it was looked at
        monkeypatch.setattr(process, "poll", lambda: None)
    assert bounded.call("slow_module:where") != first


def test_errors_arrive_with_their_traceback() -> None:
    before = bounded.call("slow_module:where")
    with pytest.raises(bounded.FailedError, match="KeyError: 'lost'"):
        bounded.call("slow_module:fail")
    assert bounded.call("slow_module:where") == before


def test_a_module_that_never_is_imported_ends_the_process_though_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "endless_module.py").write_text("import time\ntime.sleep(600)\n")
    command = [sys.executable, "-c", "from understudy.tasks.bounded import serve; serve(None, 0.2)"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(("endless_module:f", (), 1.0)))
        process.stdin.flush()
        assert process.wait(timeout=60) == -signal.SIGALRM


def test_a_module_that_cannot_be_imported_is_no_slow_answer() -> None:
    with pytest.raises(RunError, match="broken_module:grade"):
        bounded.call("broken_module:grade")
