"""The window of requests, pauses and Retry-After, worked out by hand."""

import asyncio
from datetime import UTC, datetime

import pytest

from understudy.backends.http_retry import Gate, backoff_seconds, retry_after_seconds


def test_the_window_halves_once_a_round_and_grows_by_one_a_window():
    gate = Gate(8)
    assert gate.window == 8
    gate.succeeded()
    assert gate.window == 8  # never above what it started with
    for _ in range(5):
        gate.overloaded(0)  # five of the same round
    assert (gate.window, gate.round) == (4, 1)
    gate.overloaded(1)
    gate.overloaded(2)
    gate.overloaded(3)
    assert gate.window == 1  # never below
    gate.succeeded()
    assert gate.window == 2  # 1 + 1/1
    gate.succeeded()
    assert gate.window == 2  # 2 + 1/2
    gate.succeeded()
    assert gate.window == 2  # 2.5 + 1/2.5 = 2.9
    gate.succeeded()
    assert gate.window == 3


def test_places_are_given_in_order_and_cancelled_ones_passed_on():
    async def scenario() -> list[str]:
        gate, order, release = Gate(1), [], asyncio.Event()

        async def request(name: str) -> None:
            async with gate.place():
                order.append(name)
                await release.wait()

        tasks = {name: asyncio.create_task(request(name)) for name in "abcd"}
        await asyncio.sleep(0)
        tasks["b"].cancel()  # while it waits
        await asyncio.sleep(0)
        tasks["a"].cancel()  # with the place: it goes to c
        await asyncio.sleep(0)
        tasks["c"].cancel()  # handed the place, not yet running
        release.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        async with asyncio.timeout(5), gate.place():
            return order

    assert asyncio.run(scenario()) == ["a", "d"]


def test_backoff_doubles_up_to_a_cap():
    assert [backoff_seconds(n, 1.0) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff_seconds(10_000, 0.5) == 15
    assert backoff_seconds(3, 0.0) == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0),
        ("Wed, 31 Dec 2025 23:59:00 GMT", 0.0),
        ("-3", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("soon", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after(value: str, seconds: float):
    assert retry_after_seconds({"retry-after": value}, datetime(2026, 1, 1, tzinfo=UTC)) == seconds


def test_retry_after_absent():
    assert retry_after_seconds({}) == 0.0
