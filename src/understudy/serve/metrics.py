"""What the server counts, in a registry of its own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from understudy.types import TokenSequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Names are those of ``/metrics``; the table in docs/serving.md says what they mean."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "understudy_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "understudy_request_seconds",
            "From a request's first byte to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queued = Gauge("understudy_queued_sequences", "Sequences that wait.", registry=self.registry)
        self.dropped = Counter(
            "understudy_dropped_sequences",
            "Sequences that were given up before they began: their client left, or time was up.",
            registry=self.registry,
        )
        self.scored_tokens = Counter(
            "understudy_scored_tokens", "Tokens of scored sequences, prompts included.", registry=self.registry
        )
        self.reused = Counter(
            "understudy_reused_prefix_tokens",
            "Prompt tokens that went through the model once for several sequences.",
            registry=self.registry,
        )
        self.generated = Counter("understudy_generated_tokens", "Tokens written.", registry=self.registry)
        self.batch_sequences = Histogram(
            "understudy_batch_sequences", "Sequences scored together.", buckets=_SIZES, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "understudy_batch_seconds", "Scoring one batch.", buckets=_SECONDS, registry=self.registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def scored(self, sequences: Sequence[TokenSequence], reused: int, seconds: float) -> None:
        """Count a batch."""
        self.scored_tokens.inc(sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences))
        self.reused.inc(reused)
        self.batch_sequences.observe(len(sequences))
        self.batch_seconds.observe(seconds)
