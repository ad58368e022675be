"""The steps of a run one by one, or some of them under way while an earlier one trains."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

Stage = Callable[[Any], Any]


def ahead(
    steps: Iterable[int], stages: Sequence[Stage], *, lag: int, cancel: Callable[[], None] = lambda: None
) -> Generator[tuple[int, Any], None, None]:
    """(step, what the stages make of it) in order. The first stage gets the step, each other what the one before made.

    With ``lag`` 0 a step begins when it is asked for, in this thread. Else the ``lag`` steps after the one that is
    handed out are under way meanwhile, each stage in a thread of its own: step s begins no earlier than step s - lag is
    handed out. An error of a stage is raised when its step is asked for. Closing the iterator, or an error, drops what
    has not begun and waits for what has; ``cancel`` is called first, to make that short.
    """
    remaining = iter(steps)
    if lag == 0:
        for step in remaining:
            yield step, _in_this_thread(step, stages)
        return
    workers = [ThreadPoolExecutor(1, f"understudy-stage-{number}") for number in range(len(stages))]
    try:
        # With the one that is handed out, lag + 1 steps have begun.
        under_way = [(step, _begin(step, stages, workers)) for step in islice(remaining, lag)]
        while under_way:
            under_way += [(step, _begin(step, stages, workers)) for step in islice(remaining, 1)]
            step, made = under_way.pop(0)
            yield step, made.result()
    except BaseException:
        cancel()
        raise
    finally:
        # All are told before any is waited for: a stage may be waiting for the one before.
        for wait in (False, True):
            for worker in workers:
                worker.shutdown(wait=wait, cancel_futures=True)


def _in_this_thread(step: int, stages: Sequence[Stage]) -> Any:
    made: Any = step
    for stage in stages:
        made = stage(made)
    return made


def _begin(step: int, stages: Sequence[Stage], workers: Sequence[ThreadPoolExecutor]) -> Future[Any]:
    """Queue a step at every stage. Each worker takes steps in order, so that waiting for the stage before holds up
    nothing that could go on."""
    made: Future[Any] = Future()
    made.set_result(step)
    for stage, worker in zip(stages, workers, strict=True):
        made = worker.submit(lambda stage=stage, before=made: stage(before.result()))
    return made
