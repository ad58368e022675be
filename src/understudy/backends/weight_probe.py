"""Does a server write with the trainer's weights? Asked with a few sequences after every push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.backends.http import BadReply, Reply, Request, ServerClient
from understudy.backends.protocols import Trainer
from understudy.backends.vllm_completions import NEUTRAL, Asked, parse_completions, parse_scores
from understudy.types import TokenSequence

LONGEST = 256  # completion tokens of a sequence that are compared
WRITTEN = 16  # tokens that the server writes for the comparison
FORCED = 4  # tokens of a sequence that are asked for one by one


@dataclass(frozen=True)
class Mismatch:
    """Absolute differences of log-probabilities, nats per token.

    ``weights``: between what the server and the trainer give the same tokens. ``cache``: between what the server gave
    tokens as it wrote them, continuing prompts that it has met, and what it gives them now. It computes the latter from
    nothing, and the former from keys and values in its prefix cache, which older weights may have left there.
    """

    weights_mean: float
    weights_max: float
    cache_mean: float
    cache_max: float

    @property
    def mean(self) -> float:
        """The larger of the two means."""
        return max(self.weights_mean, self.cache_mean)

    @property
    def max(self) -> float:
        """The larger of the two maxima."""
        return max(self.weights_max, self.cache_max)


@dataclass(frozen=True)
class Probe:
    """Sequences, and the trainer's log-probabilities of their completions' tokens under one version."""

    sequences: Sequence[TokenSequence]
    logprobs: Sequence[Sequence[float]]


def probe_of(trainer: Trainer, sequences: Sequence[TokenSequence]) -> Probe:
    """What the trainer makes of them now."""
    return Probe(sequences, trainer.compute_logprobs(sequences))


def fitting(sequences: Sequence[TokenSequence], *, most: int, max_model_len: int) -> list[TokenSequence]:
    """At most ``most`` of them, spread over all, as long as a comparison needs and the server takes. Those without a
    completion stay so."""
    chosen = [sequences[i * len(sequences) // most] for i in range(most)] if len(sequences) > most else sequences
    return [_fitting(list(s.prompt_ids), list(s.completion_ids)[:LONGEST], max_model_len) for s in chosen]


def _fitting(prompt: list[int], completion: list[int], max_model_len: int) -> TokenSequence:
    room = max_model_len - 1  # a request for scores has to ask for one new token
    if not completion:
        return TokenSequence(prompt[: max(1, room - WRITTEN)], [])
    ids = [*prompt, *completion][:room]
    start = min(len(prompt), len(ids) - 1)
    return TokenSequence(ids[:start], ids[start:])


def written(
    client: ServerClient,
    fields: Mapping[str, Any],
    sequences: Sequence[TokenSequence],
    *,
    vocab_size: int,
    max_model_len: int,
) -> list[tuple[TokenSequence, list[float]]]:
    """Each prompt as far as its completion goes, but for the last tokens, with as many that the server writes there:
    (what it wrote, the log-probabilities it gave it)."""
    begun = [_begin(s, max_model_len) for s in sequences]
    requests = [_write(fields, prompt, n, vocab_size, f"probe {i}") for i, (prompt, n) in enumerate(begun)]
    parts = zip(begun, client.map(requests), strict=True)
    return [(TokenSequence(prompt, own.ids), own.logprobs) for (prompt, _), [own] in parts]


def measure(
    client: ServerClient,
    fields: Mapping[str, Any],
    probe: Probe,
    *,
    vocab_size: int,
    max_model_len: int,
    forced: bool = False,
) -> Mismatch:
    """Compare, with the server alone: the trainer has said its part. Raises ServerError.

    ``forced``: log-probabilities of a few tokens, each as the only one that may be written, instead of a prompt's.
    These too come from keys and values in the cache.
    """
    own = written(client, fields, probe.sequences, vocab_size=vocab_size, max_model_len=max_model_len)
    sequences = [*probe.sequences, *(sequence for sequence, _ in own)]
    claims = [*probe.logprobs, *(logprobs for _, logprobs in own)]
    asked: list[tuple[int, int, Request[list[float]]]] = []  # (sequence, first completion position, request)
    for i, sequence in enumerate(sequences):
        length = len(sequence.completion_ids)
        if forced:
            places = sorted({j * length // FORCED for j in range(FORCED)})
            asked += [(i, t, _force(fields, sequence, t, vocab_size, f"probe {i}")) for t in places]
        else:
            asked.append((i, 0, _score(fields, sequence, f"probe {i}")))
    gaps: tuple[list[float], list[float]] = [], []
    for (i, start, _), scores in zip(asked, client.map([request for _, _, request in asked]), strict=True):
        mine = claims[i][start : start + len(scores)]
        gaps[i >= len(probe.sequences)].extend(abs(p - q) for p, q in zip(scores, mine, strict=True))
    weights, cache = gaps
    return Mismatch(sum(weights) / len(weights), max(weights), sum(cache) / len(cache), max(cache))


def complaint(mismatch: Mismatch, limit: float) -> str | None:
    """What is wrong with such a server, and what may be the cause; None for one that can be trusted."""
    if not mismatch.weights_mean <= limit:
        return (
            f"its log-probabilities differ from the trainer's by {mismatch.weights_mean:.4g} nats a token on average, "
            f"and by up to {mismatch.weights_max:.4g}; expected at most {limit:g} on average (sampler.max_mismatch). "
            "Another dtype (--dtype), another base model or configuration than the student's, quantised weights, or "
            "weights that were loaded in part would do this"
        )
    if not mismatch.cache_mean <= limit:
        return (
            "it has the trainer's weights, but what it gives tokens while it writes them differs from what it gives "
            f"them afterwards by {mismatch.cache_mean:.4g} nats a token on average, and by up to "
            f"{mismatch.cache_max:.4g}; expected at most {limit:g} on average (sampler.max_mismatch). A prefix cache "
            'that was not reset would do this (sampler.cache = "salt" keeps versions apart, '
            "--no-enable-prefix-caching does without one), or a --logprobs-mode other than raw_logprobs"
        )
    return None


def _begin(sequence: TokenSequence, max_model_len: int) -> tuple[list[int], int]:
    """A prompt to go on from, and how many tokens to write."""
    prompt, completion = list(sequence.prompt_ids), list(sequence.completion_ids)
    if not completion:
        return prompt, min(WRITTEN, max_model_len - 1 - len(prompt))
    n = min(WRITTEN, len(completion))
    return [*prompt, *completion[: len(completion) - n]], n


def _write(fields: Mapping[str, Any], prompt: list[int], n: int, vocab_size: int, what: str) -> Request[Any]:
    asked = Asked(prompt, n=1, max_tokens=n, vocab_size=vocab_size)
    body = {
        **fields,
        **NEUTRAL,
        "prompt": prompt,
        "max_tokens": n,
        "temperature": 1.0,
        "seed": 0,
        "logprobs": 0,
        "return_token_ids": True,
    }
    return Request("POST", "/v1/completions", body, parse=lambda reply: parse_completions(reply, asked), what=what)


def _score(fields: Mapping[str, Any], sequence: TokenSequence, what: str) -> Request[list[float]]:
    ids, start = [*sequence.prompt_ids, *sequence.completion_ids], len(sequence.prompt_ids)
    body = {**fields, **NEUTRAL, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "seed": 0, "prompt_logprobs": 0}
    return Request("POST", "/v1/completions", body, parse=lambda reply: parse_scores(reply, ids, start), what=what)


def _force(
    fields: Mapping[str, Any], sequence: TokenSequence, position: int, vocab_size: int, what: str
) -> Request[list[float]]:
    """The log-probability of one completion token, which is the only one allowed: what is allowed changes what is
    written, not the log-probabilities."""
    prompt = [*sequence.prompt_ids, *sequence.completion_ids[:position]]
    token = sequence.completion_ids[position]
    asked = Asked(prompt, n=1, max_tokens=1, vocab_size=vocab_size)

    def parse(reply: Reply) -> list[float]:
        [completion] = parse_completions(reply, asked)
        if completion.ids != [token]:
            raise BadReply(f"got token {completion.ids}; expected {token}, the only one allowed")
        return completion.logprobs

    body = {**fields, **NEUTRAL, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, "seed": 0}
    body |= {"allowed_token_ids": [token], "logprobs": 0, "return_token_ids": True}
    return Request("POST", "/v1/completions", body, parse=parse, what=what)
