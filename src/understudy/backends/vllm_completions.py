"""Completions of a vLLM server: what is asked for, and what of its replies is believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from understudy.backends.http import BadReply, Reply, Request, ServerClient
from understudy.backends.served_scores import choices_of
from understudy.config import SamplingConfig
from understudy.types import FinishReason, Prompt

T = TypeVar("T")

# Log-probabilities of tokens a model gave are at most 0, but for rounding; vLLM writes minus infinity as -9999.
HIGHEST, LOWEST = 1e-3, -9999.0

TOKEN_SECONDS = 0.1  # that a token may take on a busy server, beside the time any request may

# A server's own defaults (a model's generation_config.json) hold wherever a request is silent, and some would bend the
# distribution that the log-probabilities are of.
NEUTRAL: Mapping[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # stop_token_ids says what ends a completion
    "skip_special_tokens": False,  # stop strings are looked for in all of the text
}


@dataclass(frozen=True)
class Job:
    """Completions ``first`` to ``first + n`` of a prompt."""

    prompt: Prompt
    first: int
    n: int


@dataclass(frozen=True)
class Writing:
    """What the requests of one call have in common. ``fields``: whose weights write. ``timeout_seconds``: for a request
    of few tokens."""

    fields: Mapping[str, Any]
    sampling: SamplingConfig
    seed: int
    vocab_size: int
    stop_ids: frozenset[int]
    ends: Callable[[Sequence[int]], bool] | None
    timeout_seconds: float


@dataclass(frozen=True)
class Asked:
    """What a reply is held against.

    ``stop_ids`` end a completion, and ``ends`` (completion so far) -> whether a stop string does. ``stop``: the strings
    as the server is told them.
    """

    prompt_ids: Sequence[int]
    n: int
    max_tokens: int
    vocab_size: int
    stop_ids: frozenset[int] = frozenset()
    ends: Callable[[Sequence[int]], bool] | None = None
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Completion:
    """Tokens [T] and their log-probabilities [T]. ``finish_reason`` is None where the server ended it for a stop string
    that the run's own test does not see: it goes on."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None

    def reason(self) -> FinishReason:
        """Of one that has ended."""
        assert self.finish_reason is not None  # ``continued`` has seen to it
        return self.finish_reason


def jobs_of(prompts: Sequence[Prompt], group_size: int) -> list[Job]:
    """One per prompt; one that stands there again gets further completions."""
    seen: Counter[int] = Counter()
    jobs = []
    for prompt in prompts:
        jobs.append(Job(prompt, seen[prompt.index], group_size))
        seen[prompt.index] += group_size
    return jobs


def rollout_seed(seed: int, *identity: int) -> int:
    """The seed of a prompt's first completion; vLLM takes the one ``j`` above for completion ``j`` of a request. There
    is room for them in its 63 bits."""
    return int(np.random.SeedSequence([seed, *identity]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def request(job: Job, writing: Writing) -> Request[list[Completion]]:
    """For a job's ``n`` completions."""
    greedy = writing.sampling.temperature == 0
    asked = Asked(
        job.prompt.prompt_ids,
        n=1 if greedy else job.n,  # they are all the same, and vLLM refuses to write several
        max_tokens=writing.sampling.max_completion_tokens,
        vocab_size=writing.vocab_size,
        stop_ids=writing.stop_ids,
        ends=writing.ends,
        stop=writing.sampling.stop if writing.ends is not None else (),
    )
    copies = job.n if greedy else 1
    seed = rollout_seed(writing.seed, job.prompt.index) + job.first
    return _request(asked, writing, seed, lambda reply: parse_completions(reply, asked) * copies, job.prompt)


def continued(
    client: ServerClient, jobs: Sequence[Job], groups: Sequence[Sequence[Completion]], writing: Writing
) -> list[list[Completion]]:
    """The same, with those that have not ended gone on with. Raises ServerError."""
    whole = [list(group) for group in groups]
    open_ones = [(g, i) for g, group in enumerate(groups) for i, c in enumerate(group) if c.finish_reason is None]
    rests = client.map([_rest(jobs[g], i, groups[g][i], writing) for g, i in open_ones])
    for (g, i), completion in zip(open_ones, rests, strict=True):
        whole[g][i] = completion
    return whole


def _rest(job: Job, i: int, begun: Completion, writing: Writing) -> Request[Completion]:
    """For the whole of a completion that has ``begun``. Without stop strings: the test that counts is ``ends``."""
    ends = writing.ends
    asked = Asked(
        [*job.prompt.prompt_ids, *begun.ids],
        n=1,
        max_tokens=writing.sampling.max_completion_tokens - len(begun.ids),
        vocab_size=writing.vocab_size,
        stop_ids=writing.stop_ids,
        ends=None if ends is None else lambda ids: ends([*begun.ids, *ids]),
    )

    def parse(reply: Reply) -> Completion:
        [rest] = parse_completions(reply, asked)
        return Completion(begun.ids + rest.ids, begun.logprobs + rest.logprobs, rest.finish_reason)

    seed = rollout_seed(writing.seed, job.prompt.index, 1) + job.first + i
    return _request(asked, writing, seed, parse, job.prompt)


def _request(asked: Asked, writing: Writing, seed: int, parse: Callable[[Reply], T], prompt: Prompt) -> Request[T]:
    body = {
        **writing.fields,
        **NEUTRAL,
        "prompt": list(asked.prompt_ids),
        "n": asked.n,
        "max_tokens": asked.max_tokens,
        "temperature": writing.sampling.temperature,
        "top_p": writing.sampling.top_p,
        "top_k": writing.sampling.top_k,
        "seed": seed,
        "stop_token_ids": sorted(asked.stop_ids),
        "stop": list(asked.stop),
        "logprobs": 0,
        "return_token_ids": True,
    }
    seconds = writing.timeout_seconds + TOKEN_SECONDS * asked.max_tokens
    what = f"prompt {prompt.index}"
    return Request("POST", "/v1/completions", body, parse=parse, what=what, timeout_seconds=seconds)


def parse_completions(reply: Reply, asked: Asked) -> list[Completion]:
    """The ``n`` completions of a reply, by index.

    Raises:
        BadReply: it has others than were asked for, or they contradict themselves.
    """
    choices = choices_of(reply, asked.n)
    told = [choice["prompt_token_ids"] for choice in choices if choice.get("prompt_token_ids") is not None]
    others = [ids for ids in told if ids != list(asked.prompt_ids)]
    if others or not told:
        got = "none" if not told else f"others ({str(others[0])[:100]})"
        raise BadReply(f"prompt_token_ids: got {got}; expected the {len(asked.prompt_ids)} that were sent")
    return [_completion(choice, asked) for choice in choices]


def parse_scores(reply: Reply, ids: Sequence[int], start: int) -> list[float]:
    """The log-probabilities of ``ids[start:]``, ``start`` >= 1, from a reply with prompt_logprobs.

    Raises:
        BadReply: one is missing, or is none.
    """
    [choice] = choices_of(reply, 1)
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        got = len(rows) if isinstance(rows, list) else rows
        raise BadReply(f"prompt_logprobs: got {got!r} entries; expected {len(ids)}, one per prompt token")
    scores = []
    for i in range(start, len(ids)):
        entry = rows[i].get(str(ids[i])) if isinstance(rows[i], dict) else None
        value = entry.get("logprob") if isinstance(entry, dict) else None
        scores.append(_logprob(value, f"prompt token {ids[i]} at position {i}"))
    return scores


def _completion(choice: dict[str, Any], asked: Asked) -> Completion:
    where = f"choice {choice['index']}"
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    table = choice.get("logprobs")
    logprobs = table.get("token_logprobs") if isinstance(table, dict) else None
    if not isinstance(ids, list) or not isinstance(logprobs, list) or not len(ids) == len(logprobs) > 0:
        sizes = [len(part) if isinstance(part, list) else part for part in (ids, logprobs)]
        raise BadReply(f"{where}: got {sizes[0]} token_ids and {sizes[1]} token_logprobs; expected as many, at least 1")
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < asked.vocab_size]:
        raise BadReply(
            f"{where}: got token id {wrong[0]!r}; expected one of the vocabulary's 0 to {asked.vocab_size - 1}"
        )
    if len(ids) > asked.max_tokens:
        raise BadReply(f"{where}: got {len(ids)} tokens; expected at most {asked.max_tokens}")
    values = [_logprob(value, f"{where}, token {t}") for t, value in enumerate(logprobs)]
    if early := [t for t, i in enumerate(ids[:-1]) if i in asked.stop_ids]:
        raise BadReply(f"{where}: got {len(ids)} tokens though token {early[0]} is {ids[early[0]]}, which ends it")
    finish_reason = _finish_reason(ids, reason, asked, where)
    length = _length(ids, asked.ends)
    if length is not None:  # several tokens came at once, or the server's own reading of the string lags behind
        return Completion(ids[:length], values[:length], "stop")
    return Completion(ids, values, finish_reason)


def _finish_reason(ids: list[int], reason: object, asked: Asked, where: str) -> FinishReason | None:
    if ids[-1] in asked.stop_ids:
        if reason == "stop":
            return "stop"
    elif reason == "length" and len(ids) == asked.max_tokens:
        return "length"
    elif reason == "stop" and asked.stop:
        return "length" if len(ids) == asked.max_tokens else None
    raise BadReply(
        f"{where}: got finish_reason {reason!r} after {len(ids)} of at most {asked.max_tokens} tokens, the last "
        f"{ids[-1]}; expected stop after one of {sorted(asked.stop_ids)}, or length at the cap"
    )


def _length(ids: list[int], ends: Callable[[Sequence[int]], bool] | None) -> int | None:
    """Tokens up to the first that completes a stop string; None where none does."""
    if ends is None:
        return None
    return next((t for t in range(1, len(ids) + 1) if ends(ids[:t])), None)


def _logprob(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadReply(f"{where}: got log-probability {value!r}; expected a number")
    if not math.isfinite(value) or not LOWEST < value <= HIGHEST:
        raise BadReply(f"{where}: got log-probability {value}; expected a finite value, at most 0")
    return float(value)
