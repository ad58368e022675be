"""Calls that may never return, in a process of their own that can be ended.

Graders hand what a model wrote to computer algebra and to other people's parsers, and some texts would keep those busy
for years. Python cannot interrupt them: its signal handlers work in the main thread only, and wait until a power or a
binomial of large integers is done. So one process per run does this work, a call at a time; the system ends it when the
time is up, and the next call starts a new one. It holds no model and sees nothing of the run but a call's arguments.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from typing import Any

from understudy.errors import RunError
from understudy.tasks.imports import imported

LIMIT_SECONDS = 5.0  # an ordinary answer takes a few milliseconds
LIMIT_BYTES = 4 << 30  # of address space: enough for every import, too little to fill a machine before the time is up


class GaveUpError(Exception):
    """A call took longer than it may, or more memory."""


class FailedError(Exception):
    """The function raised; the message is its traceback."""


def call(function: str, *arguments: Any, seconds: float = LIMIT_SECONDS) -> Any:
    """``function`` ("package.module:function") of ``arguments``, run elsewhere; its value must have a form in JSON.

    Importing the module does not count as time. Raises GaveUpError when ``seconds`` are over or memory is out,
    FailedError when the function raises, RunError when the module cannot be imported. Safe in every thread.
    """
    with _lock:
        try:
            return _ask(function, arguments, seconds)
        except FailedError:
            raise
        except BaseException:  # whatever stopped the talk half-way, Ctrl-C included: the next one starts anew
            _stop()
            raise


_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


def _ask(function: str, arguments: tuple[Any, ...], seconds: float) -> Any:
    process = _told(pickle.dumps((function, arguments, seconds)))
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise RunError(f"the process that grades ended while it imported {function}; its message stands above")
    line = process.stdout.readline()
    if not line:
        raise GaveUpError(f"{function}: more than {seconds:g} seconds or {LIMIT_BYTES >> 30} GiB")
    reply = json.loads(line)
    if "error" in reply:
        raise FailedError(reply["error"])
    return reply["value"]


def _told(request: bytes) -> subprocess.Popen[bytes]:
    """The process, with the request written. The system may end it between calls, for its memory say: then another
    one gets the request."""
    try:
        return _write(request)
    except OSError:
        _stop()
        return _write(request)


def _write(request: bytes) -> subprocess.Popen[bytes]:
    process = _running()
    assert process.stdin is not None
    process.stdin.write(request)
    process.stdin.flush()
    return process


def _running() -> subprocess.Popen[bytes]:
    global _process
    if _process is not None and _process.poll() is not None:
        _stop()
    if _process is None:
        # It sees the modules that this process sees. Grading needs one thread, and each of a numerical library's own
        # would reserve address space.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"]
        _process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    return _process


def _stop() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        for pipe in (_process.stdin, _process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # closing flushes, and there is nobody left to read
                pipe.close()
        _process = None


atexit.register(_stop)


def serve() -> None:
    """The other side: calls come in pickled, values go out as lines of JSON, until there are no more calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle
    logging.disable()
    warnings.simplefilter("ignore")
    _limit_memory()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the replies
    while True:
        try:
            name, arguments, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        function = imported(name)
        print("ready", file=replies, flush=True)
        # Left to its default, this signal ends the process without asking Python, whatever C code it is in, and even
        # when nobody waits for the reply any more.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = {"value": function(*arguments)}
        except MemoryError:
            return
        except Exception:
            reply = {"error": traceback.format_exc()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _limit_memory() -> None:
    if sys.platform == "linux":  # elsewhere this limit is not kept, or refused
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
