"""One thread that owns the model, and the queue of what it is asked: requests that wait together are scored together.

A piece of work is a future's: whoever no longer wants it cancels the future, and what has not begun is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import torch

from understudy.serve.engine import Decoding, Dropped, Engine, Scored, WorkKind
from understudy.serve.metrics import Metrics
from understudy.types import TokenSequence

log = logging.getLogger("understudy.serve")

# Work for so many passes is taken from the queue at once, so that like lengths and equal prompts find each other.
_PASSES = 4


class QueueFull(Exception):
    """Too much waits already."""


class Closed(Exception):
    """The server is shutting down."""


class WorkFailed(Exception):
    """The model failed at a batch; the log says how."""


class NotFinite(Exception):
    """A score that no number can stand for; ``sequence`` and ``position`` count from 0."""

    def __init__(self, sequence: int, position: int) -> None:
        self.sequence, self.position = sequence, position
        super().__init__(sequence, position)


@dataclass(frozen=True)
class ScoreWork:
    """Sequences to score: see ``Engine.score``. ``ids`` [sequence][T][k]."""

    sequences: Sequence[TokenSequence]
    kind: WorkKind
    k: int = 0
    ids: Sequence[Sequence[Sequence[int]]] | None = None

    @property
    def count(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class GenerateWork:
    """Prompts to continue: see ``Engine.generate``."""

    prompts: Sequence[Sequence[int]]
    how: Decoding

    @property
    def count(self) -> int:
        return len(self.prompts) * self.how.n


Work = ScoreWork | GenerateWork


class _Job:
    """A piece of work on its way: what has not begun (``waiting``, places), and what has come back."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.future: Future[Any] = Future()
        self.waiting = deque(range(work.count))
        self.results: list[Scored | None] = [None] * work.count
        self.left = work.count
        # Equal prompts have equal hashes; the few that are equal by accident only stand beside each other for nothing.
        sequences = work.sequences if isinstance(work, ScoreWork) else ()
        self.prompts = [hash(tuple(sequence.prompt_ids)) for sequence in sequences]


class Batcher:
    """``submit`` from any thread; ``close`` once.

    ``max_sequences``: scored together at most; 1 makes every reply independent of what else is asked.
    ``max_queued``: sequences that may wait, unless nothing waits.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, max_sequences: int, max_queued: int) -> None:
        self._engine, self._metrics = engine, metrics
        self._max_sequences, self._max_queued = max_sequences, max_queued
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="understudy-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether work is still being done."""
        return self._thread.is_alive() and not self._closed

    def submit(self, work: Work, *, admitted: bool = False) -> Future[Any]:
        """A list of ``Scored``, or of ``Written`` per prompt, once it is there.

        ``admitted``: the second part of a request whose first was taken; the queue's limit does not count.

        Raises QueueFull or Closed; the future may raise Closed, WorkFailed or NotFinite.
        """
        job = _Job(work)
        with self._changed:
            if self._closed:
                raise Closed
            queued = self._queued()
            if queued and not admitted and queued + work.count > self._max_queued:
                raise QueueFull
            self._jobs.append(job)
            self._metrics.queued.set(self._queued())
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._forget(job))
        return job.future

    def close(self, timeout: float | None = None) -> bool:
        """Drop what waits, end the thread after its batch. Whether it has ended within ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._changed.notify()
        for job in jobs:
            _fail(job, Closed())
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _queued(self) -> int:
        return sum(len(job.waiting) for job in self._jobs)

    def _forget(self, job: _Job) -> None:
        """Called when a job's future is done, or cancelled."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                if job.future.cancelled():
                    self._metrics.dropped.inc(len(job.waiting))
            self._metrics.queued.set(self._queued())

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._take()
                self._metrics.queued.set(self._queued())
            try:
                self._work(batch)
            except Dropped:
                pass
            except Exception as error:
                # The worker sees ids, never text; so may the log.
                log.error(
                    "a batch failed: %s",
                    type(error).__name__,
                    extra={"fields": {"event": "batch_failed", "traceback": traceback.format_exc()}},
                )
                for job in {job for job, _ in batch}:
                    _fail(job, WorkFailed())
            del batch  # results are the client's to keep

    def _take(self) -> list[tuple[_Job, int]]:
        """The oldest job, with what goes well with it: (job, place) pairs, equal prompts side by side."""
        oldest = self._jobs[0]
        if isinstance(oldest.work, GenerateWork):
            self._jobs.popleft()
            oldest.waiting.clear()
            return [(oldest, 0)]
        groups: dict[int, list[tuple[_Job, int]]] = {}
        for job in self._jobs:
            if isinstance(job.work, ScoreWork) and (job.work.kind, job.work.k) == (oldest.work.kind, oldest.work.k):
                for place in job.waiting:
                    groups.setdefault(job.prompts[place], []).append((job, place))
        budget = _PASSES * self._engine.batch_tokens
        batch: list[tuple[_Job, int]] = []
        for group in groups.values():
            for member, (job, place) in enumerate(group):
                budget -= self._tokens(job, place, shared=member > 0)
                if batch and (budget < 0 or len(batch) == self._max_sequences):
                    return self._taken(batch)
                batch.append((job, place))
        return self._taken(batch)

    def _tokens(self, job: _Job, place: int, *, shared: bool) -> int:
        assert isinstance(job.work, ScoreWork)
        sequence = job.work.sequences[place]
        prompt = 0 if shared and self._engine.shares_prompts else len(sequence.prompt_ids)
        return prompt + len(sequence.completion_ids)

    def _taken(self, batch: list[tuple[_Job, int]]) -> list[tuple[_Job, int]]:
        for job in {job for job, _ in batch}:
            own = {place for other, place in batch if other is job}
            job.waiting = deque(place for place in job.waiting if place not in own)
        self._jobs = deque(job for job in self._jobs if job.waiting)
        return batch

    def _work(self, batch: list[tuple[_Job, int]]) -> None:
        first = batch[0][0]
        if isinstance(first.work, GenerateWork):
            written = self._engine.generate(
                first.work.prompts, first.work.how, max_rows=min(256, self._max_sequences), dropped=first.future.done
            )
            self._metrics.generated.inc(sum(len(w.ids) for group in written for w in group))
            _finish(first, written)
            return
        sequences = [job.work.sequences[place] for job, place in batch if isinstance(job.work, ScoreWork)]
        ids = [job.work.ids[place] for job, place in batch if isinstance(job.work, ScoreWork) and job.work.ids]
        start = time.perf_counter()
        scores = self._engine.score(sequences, first.work.kind, k=first.work.k, ids=ids or None)
        self._metrics.scored(sequences, self._engine.reused_tokens(sequences), time.perf_counter() - start)
        for (job, place), score in zip(batch, scores, strict=True):
            job.results[place] = score
            job.left -= 1
            position = _first_bad(score)
            if position is not None:
                _fail(job, NotFinite(place, position))
            elif job.left == 0:
                _finish(job, job.results)


def _first_bad(score: Scored) -> int | None:
    """The first position with a score that is infinite or not a number."""
    if score.hidden is not None and not torch.isfinite(score.hidden).all():
        return int((~torch.isfinite(score.hidden).all(-1)).nonzero()[0])
    for position, value in enumerate(score.logprobs):
        row = score.topk_logprobs[position] if score.topk_logprobs is not None else ()
        if not (math.isfinite(value) and all(map(math.isfinite, row))):
            return position
    return None


def _finish(job: _Job, result: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled, or failed for another of its sequences
        job.future.set_result(result)


def _fail(job: _Job, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        job.future.set_exception(error)
