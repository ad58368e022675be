"""Steps in turn, and steps under way while an earlier one trains."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from understudy.overlap import ahead


class Log:
    """What began and what was handed out, in the order it happened."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._lock = threading.Lock()

    def add(self, event: str) -> None:
        with self._lock:
            self.events.append(event)

    def stage(self, name: str):
        def run(value):
            self.add(f"{name}{value}")
            return value

        return run


def test_without_lag_a_step_begins_when_it_is_asked_for() -> None:
    log = Log()
    threads = set()

    def square(value: int) -> int:
        threads.add(threading.current_thread())
        return value * value

    for step, made in ahead(range(2, 5), [log.stage("write"), square], lag=0):
        assert made == step * step
        log.add(f"train{step}")
    assert log.events == ["write2", "train2", "write3", "train3", "write4", "train4"]
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_results_come_in_order_and_no_step_begins_too_early(lag: int) -> None:
    trained = -1
    begun: list[tuple[int, int]] = []

    def write(step: int) -> int:
        begun.append((step, trained))
        return step

    order = []
    for step, made in ahead(range(6), [write, lambda value: 10 * value], lag=lag):
        assert made == 10 * step
        order.append(step)
        trained = step
    assert order == list(range(6))
    # Step s is asked for when s - 1 has trained, and lets s + lag begin.
    assert [step for step, _ in begun] == list(range(6))
    assert all(last >= step - lag - 1 for step, last in begun)


def test_the_next_step_is_written_while_one_trains() -> None:
    """Each waits for the other: in turn they would wait for ever."""
    training, written = threading.Event(), threading.Event()

    def write(step: int) -> int:
        if step == 1:
            assert training.wait(10)
            written.set()
        return step

    for step, _ in ahead(range(2), [write], lag=1):
        if step == 0:
            training.set()
            assert written.wait(10)


def test_stages_of_different_steps_overlap() -> None:
    """Step 1 is written while step 0 is marked."""
    marking, written = threading.Event(), threading.Event()

    def write(step: int) -> int:
        if step == 1:
            assert marking.wait(10)
            written.set()
        return step

    def mark(step: int) -> int:
        if step == 0:
            marking.set()
            assert written.wait(10)
        return step

    assert [made for _, made in ahead(range(2), [write, mark], lag=1)] == [0, 1]


def test_an_error_is_raised_at_its_own_step() -> None:
    def write(step: int) -> int:
        if step == 2:
            raise ValueError("step 2 cannot be written")
        return step

    steps = ahead(range(5), [write, lambda value: value], lag=2)
    assert [next(steps), next(steps)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="step 2 cannot"):
        next(steps)


def test_closing_drops_what_has_not_begun() -> None:
    begun: list[int] = []
    release = threading.Event()

    def write(step: int) -> int:
        begun.append(step)
        if step == 1:
            assert release.wait(10)
        return step

    with closing(ahead(range(9), [write, lambda value: value], lag=4)) as steps:
        assert next(steps) == (0, 0)
        while 1 not in begun:
            pass
        threading.Timer(0.05, release.set).start()
    assert begun == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("understudy-stage")]


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_under_way_is_cancelled_before_it_is_waited_for(failing: bool) -> None:
    cancelled = threading.Event()
    begun = threading.Event()

    def write(step: int) -> int:
        if step == 0:
            return step
        begun.set()
        assert cancelled.wait(10)
        return step

    steps = ahead(range(4), [write], lag=2, cancel=cancelled.set)
    assert next(steps) == (0, 0)
    assert begun.wait(10)
    if failing:
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt)
    else:
        steps.close()
    assert cancelled.is_set()


def test_nothing_is_cancelled_where_all_was_handed_out() -> None:
    def cancel() -> None:
        raise AssertionError

    assert [made for _, made in ahead(range(3), [lambda step: step], lag=1, cancel=cancel)] == [0, 1, 2]
