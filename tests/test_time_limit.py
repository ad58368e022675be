"""The limit on blocks of other people's code."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from understudy.time_limit import TimeIsUp, time_limit


def test_a_block_is_ended_though_it_catches_everything_it_knows() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(1)
            except Exception:
                continue

    begun = time.monotonic()
    with pytest.raises(TimeIsUp), time_limit(0.05):
        stubborn()
    assert time.monotonic() - begun < 5


def test_a_block_that_ends_leaves_nothing_behind() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with time_limit(0.05):
        pass
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    time.sleep(0.1)


def test_limits_nest() -> None:
    """The outer one goes on, less what the inner one took."""
    with time_limit(30.0):
        with pytest.raises(TimeIsUp), time_limit(0.05):
            time.sleep(5)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 20 < left < 29.96
    with pytest.raises(TimeIsUp), time_limit(0.05), time_limit(30.0):
        time.sleep(0.2)


def test_other_threads_have_none() -> None:
    seen = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        seen.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
