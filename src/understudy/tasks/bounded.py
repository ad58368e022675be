"""Calls that may never return, in a process of their own that can be ended.

Graders hand what a model wrote to computer algebra, to other people's parsers and to a user's own code, and some texts
would keep those busy for years. Python cannot interrupt them: its signal handlers work in the main thread only, and
wait until a power or a binomial of large integers is done. So another process does this work, a call at a time; it is
ended when the time is up, and the next call starts a new one. It sees nothing of the run but a call's arguments.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from typing import Any

from understudy.errors import RunError
from understudy.tasks.imports import imported

LIMIT_SECONDS = 5.0  # an ordinary answer takes a few milliseconds
LIMIT_BYTES = 4 << 30  # of address space: enough for every import, too little to fill a machine before the time is up
IMPORT_SECONDS = 600.0  # a grader's module may load a model of its own
_LATE_SECONDS = 0.5  # the process ends itself; where its own timer was taken from it, it is ended so much later


class GaveUpError(Exception):
    """A call took longer than it may, or more memory, or ended its process."""


class FailedError(Exception):
    """The function raised; the message is its traceback."""


class Helper:
    """A process that performs calls, one at a time; the module it imported and what they keep there stays from call to
    call. Safe in every thread. ``limit_bytes``: of its address space; None: no limit, and it may log and warn."""

    def __init__(self, *, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._paths = ""
        atexit.register(self.stop)

    def call(self, function: str, *arguments: Any, seconds: float) -> Any:
        """``function`` ("package.module:function") of ``arguments``, run elsewhere; its value must have a form in JSON.

        Importing the module does not count as time. Raises GaveUpError when ``seconds`` are over, memory is out or the
        process ends, FailedError when the function raises, RunError when the module cannot be imported.
        """
        request = pickle.dumps((function, arguments, seconds))
        with self._lock:
            try:
                return self._ask(function, request, seconds)
            except FailedError:
                raise
            except BaseException:  # whatever stopped the talk half-way, Ctrl-C included: the next one starts anew
                self._end()
                raise

    def stop(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._end()

    def refresh(self) -> None:
        """End the process if this one looks for modules elsewhere by now."""
        if self._paths != _search_path():
            self.stop()

    def _ask(self, function: str, request: bytes, seconds: float) -> Any:
        process = self._told(request)
        if self._line(process, IMPORT_SECONDS) != b"ready":
            raise RunError(f"the process that grades ended while it imported {function}; its message stands above")
        line = self._line(process, seconds + _LATE_SECONDS)
        if not line:
            raise GaveUpError(f"{function}: {self._reason(seconds, ended=line is not None)}")
        reply = json.loads(line)
        if "error" in reply:
            raise FailedError(reply["error"])
        return reply["value"]

    def _reason(self, seconds: float, *, ended: bool) -> str:
        code = self._end(patience=1.0 if ended else 0.0)
        if self._limit_bytes is not None:
            return f"more than {seconds:g} seconds or {self._limit_bytes >> 30} GiB"
        if code is None or code == -signal.SIGALRM:
            return f"more than {seconds:g} seconds"
        return f"its process ended with {f'exit code {code}' if code >= 0 else signal.Signals(-code).name}"

    def _told(self, request: bytes) -> subprocess.Popen[bytes]:
        """The process, with the request written. The system may end it between calls, for its memory say: then another
        one gets the request."""
        try:
            return self._write(request)
        except OSError:
            self._end()
            return self._write(request)

    def _write(self, request: bytes) -> subprocess.Popen[bytes]:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(request)
        process.stdin.flush()
        return process

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            # It sees the modules that this process sees. Grading needs one thread, and each of a numerical library's
            # own would reserve address space.
            self._paths, self._unread = _search_path(), b""
            environment = os.environ | {"PYTHONPATH": self._paths}
            if self._limit_bytes is not None:
                environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            code = f"from {__name__} import serve; serve({self._limit_bytes}, {IMPORT_SECONDS})"
            # A group of its own: what a grader starts is ended with it, and Ctrl-C is the run's to handle.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line, without its end; empty when the process ends, None when the time is up."""
        assert process.stdout is not None
        poller, end = select.poll(), time.monotonic() + seconds
        poller.register(process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                return None
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return b""
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _end(self, *, patience: float = 0.0) -> int | None:
        """End the process, and what it started. Its exit code where it ended by itself, within ``patience`` seconds."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        code = process.returncode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # closing flushes, and there is nobody left to read
                pipe.close()
        return code


_shared = Helper(limit_bytes=LIMIT_BYTES)


def call(function: str, *arguments: Any, seconds: float = LIMIT_SECONDS) -> Any:
    """``Helper.call`` of the one process, limited in memory too, that the package's own graders share."""
    return _shared.call(function, *arguments, seconds=seconds)


def _search_path() -> str:
    return os.pathsep.join(os.path.abspath(path) for path in sys.path)


def serve(limit_bytes: int | None, import_seconds: float) -> None:
    """The other side: calls come in pickled, values go out as lines of JSON, until there are no more calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle
    if limit_bytes is not None:
        logging.disable()
        warnings.simplefilter("ignore")
        _limit_memory(limit_bytes)
    # What a function prints must not come between the replies, nor what it reads out of the requests.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    while True:
        try:
            name, arguments, seconds = pickle.load(requests)
        except EOFError:
            return
        # Left to its default, this signal ends the process without asking Python, whatever C code it is in, and even
        # when nobody waits for the reply any more.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, import_seconds)
        function = imported(name)
        print("ready", file=replies, flush=True)
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


def _limit_memory(limit_bytes: int) -> None:
    if sys.platform == "linux":  # elsewhere this limit is not kept, or refused
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
