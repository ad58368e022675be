"""A limit on the time that code from outside may take in this thread."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class TimeIsUp(BaseException):
    """The block took too long. No ``Exception``: code that catches those must not keep it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the block when ``seconds`` are over.

    In the main thread alone, where Python handles signals; elsewhere the block has no limit. A single long call into C
    is waited for: what may be busy there for ever needs a process of its own (``tasks.bounded``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(number: int, frame: object) -> None:
        raise TimeIsUp

    begun = time.monotonic()
    handler = signal.signal(signal.SIGALRM, on_alarm)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:  # somebody else's timer, which goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-6), interval)
