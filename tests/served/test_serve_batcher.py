"""What is scored together, what is dropped, and what a failure reaches: the queue alone, over a model that can be held
up; then the real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from serving import as_json, client_of, metric, random_sequences, wait_for

from understudy.serve.batcher import Batcher, Closed, GenerateWork, NotFinite, QueueFull, ScoreWork, WorkFailed
from understudy.serve.engine import Decoding, Engine, Scored
from understudy.serve.metrics import Metrics
from understudy.types import TokenSequence


class HeldEngine:
    """Scores every token with its own number, once ``release`` is set; keeps what it was given."""

    shares_prompts = True

    def __init__(self, batch_tokens: int = 1000) -> None:
        self.batch_tokens = batch_tokens
        self.batches: list[list[TokenSequence]] = []
        self.entered, self.release = threading.Event(), threading.Event()

    def score(self, sequences: Sequence[TokenSequence], kind: str, *, k: int, ids: Any) -> list[Scored]:
        self.batches.append(list(sequences))
        self.entered.set()
        assert self.release.wait(20)
        if any(666 in s.completion_ids for s in sequences):
            raise ValueError("a bad number")
        return [Scored([float("nan") if i == 667 else float(i) for i in s.completion_ids]) for s in sequences]

    def reused_tokens(self, sequences: Sequence[TokenSequence]) -> int:
        return 0


Queue = tuple[HeldEngine, Batcher, Metrics]


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> Iterator[Queue]:
    """A queue whose thread is held up in a first batch; ``indirect`` parameters are options."""
    options = {"max_sequences": 100, "max_queued": 8, "batch_tokens": 1000} | getattr(request, "param", {})
    engine, metrics = HeldEngine(options.pop("batch_tokens")), Metrics()
    batcher = Batcher(cast(Engine, engine), metrics, **options)
    first = batcher.submit(work([0]))
    assert engine.entered.wait(20)
    engine.batches.clear()
    yield engine, batcher, metrics
    engine.release.set()
    assert batcher.close(20)
    assert first.done()


def work(*completions: Sequence[int], prompt: int = 1, **options: Any) -> ScoreWork:
    return ScoreWork([TokenSequence([prompt] * 10, list(ids)) for ids in completions], "sampled", **options)


def value(registry: CollectorRegistry, name: str) -> float:
    return registry.get_sample_value(name) or 0.0


def logprobs(future: Future[Any]) -> list[list[float]]:
    return [list(score.logprobs) for score in future.result(20)]


def test_what_waits_together_is_scored_together_equal_prompts_side_by_side(queue: Queue) -> None:
    engine, batcher, metrics = queue
    futures = [batcher.submit(work([i, i], [i + 10], prompt=i % 2)) for i in range(3)]
    assert value(metrics.registry, "understudy_queued_sequences") == 6
    engine.release.set()
    assert [logprobs(future) for future in futures] == [[[i, i], [i + 10]] for i in range(3)]
    [batch] = engine.batches
    assert [s.completion_ids for s in batch] == [[0, 0], [10], [2, 2], [12], [1, 1], [11]]
    assert value(metrics.registry, "understudy_queued_sequences") == 0


@pytest.mark.parametrize("queue", [{"batch_tokens": 10}], indirect=True)
def test_a_batch_holds_a_few_passes_and_a_shared_prompt_counts_once(queue: Queue) -> None:
    engine, batcher, _ = queue
    # Four passes of ten tokens: a prompt of ten, then completions of eight.
    future = batcher.submit(work(*([i] * 8 for i in range(5))))
    longer = batcher.submit(work([9] * 100))
    engine.release.set()
    assert logprobs(future) == [[i] * 8 for i in range(5)]
    assert logprobs(longer) == [[9] * 100]
    assert [[s.completion_ids[0] for s in batch] for batch in engine.batches] == [[0, 1, 2], [3, 4], [9]]


@pytest.mark.parametrize("queue", [{"max_sequences": 1}], indirect=True)
def test_each_alone(queue: Queue) -> None:
    engine, batcher, _ = queue
    futures = [batcher.submit(work([1], [2])), batcher.submit(work([3]))]
    engine.release.set()
    assert [logprobs(future) for future in futures] == [[[1], [2]], [[3]]]
    assert [len(batch) for batch in engine.batches] == [1, 1, 1]


def test_kinds_do_not_mix_and_the_oldest_goes_first(queue: Queue) -> None:
    engine, batcher, _ = queue
    futures = [batcher.submit(work([i], k=k)) for i, k in enumerate((5, 7, 5, 7))]
    engine.release.set()
    assert [logprobs(future) for future in futures] == [[[0]], [[1]], [[2]], [[3]]]
    assert [[s.completion_ids[0] for s in batch] for batch in engine.batches] == [[0, 2], [1, 3]]


def test_cancelled_work_is_dropped(queue: Queue) -> None:
    engine, batcher, metrics = queue
    dropped, kept = batcher.submit(work([1], [2])), batcher.submit(work([3]))
    assert dropped.cancel()
    assert value(metrics.registry, "understudy_queued_sequences") == 1
    assert value(metrics.registry, "understudy_dropped_sequences_total") == 2
    engine.release.set()
    assert logprobs(kept) == [[3]]
    assert [[s.completion_ids for s in batch] for batch in engine.batches] == [[[3]]]


def test_work_that_has_begun_can_be_cancelled_too(queue: Queue) -> None:
    engine, batcher, _ = queue
    future = batcher.submit(work([1]))
    engine.release.set()
    wait_for(lambda: engine.batches)
    future.cancel()
    assert logprobs(batcher.submit(work([2]))) == [[2]]


def test_a_failure_reaches_its_batch_and_nothing_else(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    engine, batcher, _ = queue
    together = [batcher.submit(work([1])), batcher.submit(work([666]))]
    other = batcher.submit(work([2], k=3))
    engine.release.set()
    for future in together:
        with pytest.raises(WorkFailed):
            future.result(20)
    assert logprobs(other) == [[2]]
    assert batcher.alive
    assert "ValueError" in caplog.text


@pytest.mark.parametrize("queue", [{"max_sequences": 1}], indirect=True)
def test_the_rest_of_failed_work_is_not_done(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    engine, batcher, _ = queue
    failed, after = batcher.submit(work([666], [1], [2])), batcher.submit(work([3]))
    engine.release.set()
    with pytest.raises(WorkFailed):
        failed.result(20)
    assert logprobs(after) == [[3]]
    assert [batch[0].completion_ids for batch in engine.batches] == [[666], [3]]


def test_a_score_that_is_no_number_is_named(queue: Queue) -> None:
    engine, batcher, _ = queue
    bad, good = batcher.submit(work([1, 2], [3, 667])), batcher.submit(work([4]))
    engine.release.set()
    with pytest.raises(NotFinite) as error:
        bad.result(20)
    assert (error.value.sequence, error.value.position) == (1, 1)
    assert logprobs(good) == [[4]]


def test_a_full_queue_refuses(queue: Queue) -> None:
    engine, batcher, _ = queue
    large = batcher.submit(work(*([i] for i in range(20))))  # nothing waits: it is taken whatever its size
    with pytest.raises(QueueFull):
        batcher.submit(work([1]))
    second_part = batcher.submit(work([2]), admitted=True)
    engine.release.set()
    assert len(logprobs(large)) == 20
    assert logprobs(second_part) == [[2]]


def test_closing_drops_what_waits(queue: Queue) -> None:
    engine, batcher, _ = queue
    future = batcher.submit(work([1]))
    assert not batcher.close(timeout=0)  # it is in the middle of a batch
    with pytest.raises(Closed):
        future.result(20)
    with pytest.raises(Closed):
        batcher.submit(work([2]))
    engine.release.set()
    assert batcher.close(20)
    assert not batcher.alive


# The real model


def test_a_completion_nobody_waits_for_is_broken_off(engine: Engine) -> None:
    batcher = Batcher(engine, Metrics(), max_sequences=8, max_queued=8)
    try:
        steps = []
        original = engine.generate

        def generate(*arguments: Any, dropped: Any, **options: Any) -> Any:
            def asked() -> bool:
                steps.append(future.done() or (len(steps) == 3 and future.cancel()))
                return dropped()

            return original(*arguments, dropped=asked, **options)

        engine.generate = generate  # type: ignore[method-assign]
        future = batcher.submit(GenerateWork([[1, 2]], Decoding(max_tokens=100)))
        scored = batcher.submit(ScoreWork(random_sequences(1), "sampled"))
        assert len(scored.result(20)) == 1
        assert len(steps) == 4
        assert future.cancelled()
    finally:
        del engine.generate
        batcher.close()


def scored_one_by_one_and_at_once(engine: Engine, **settings: Any) -> tuple[list[Any], list[Any], float]:
    """Replies to the same requests, one after the other and all at once, and the sequences per batch of the latter."""
    requests = [
        {"sequences": as_json(random_sequences(3, seed=i % 4, prompts=1 + i % 2)), "kind": "topk", "topk": 4}
        for i in range(12)
    ]
    with client_of(engine, **settings) as client:

        def scores(body: Any) -> Any:
            return client.post("/v1/score", json=body).raise_for_status().json()["scores"]

        alone = [scores({**body, "sequences": [s]})[0] for body in requests for s in body["sequences"]]
        before = [metric(client, f"understudy_batch_sequences_{name}") for name in ("sum", "count")]
        with ThreadPoolExecutor(12) as pool:
            together = [row for rows in pool.map(scores, requests) for row in rows]
        after = [metric(client, f"understudy_batch_sequences_{name}") for name in ("sum", "count")]
        if engine.shares_prompts and settings.get("max_batch_sequences") != 1:
            assert metric(client, "understudy_reused_prefix_tokens_total") > 0
    return alone, together, (after[0] - before[0]) / (after[1] - before[1])


def test_batched_answers_equal_those_alone(engine: Engine) -> None:
    alone, together, size = scored_one_by_one_and_at_once(engine)
    assert size > 3  # requests have three sequences each: some were scored together
    for one, other in zip(alone, together, strict=True):
        assert other["ids"] == one["ids"]
        assert other["logprobs"] == pytest.approx(one["logprobs"], abs=1e-5)
        for row, expected in zip(other["topk_logprobs"], one["topk_logprobs"], strict=True):
            assert row == pytest.approx(expected, abs=1e-5)


def test_with_batches_of_one_neighbours_change_nothing(engine: Engine) -> None:
    alone, together, size = scored_one_by_one_and_at_once(engine, max_batch_sequences=1)
    assert size == 1
    assert together == alone
