"""``/v1/completions``: from a request to work for the model, and from its results to OpenAI's and vLLM's reply."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from understudy.serve.engine import Decoding, Engine, Scored, Written
from understudy.serve.limits import Limits
from understudy.serve.replies import bad_request
from understudy.serve.schemas import CompletionRequest
from understudy.types import TokenSequence

# Below this temperature logits would overflow; vLLM draws the line here too.
_GREEDY_BELOW = 1e-5
# Tokens of the prompt that decide how the first one written is spelt.
_TEXT_BEFORE = 8


@dataclass(frozen=True)
class Plan:
    """A checked request. ``given``: prompts as text, where they came as text. ``whole``: log-probabilities are wanted
    from the prompt's second token on, not only of what is written; ``k``: with so many alternatives; None: no
    log-probabilities at all."""

    request: CompletionRequest
    prompts: Sequence[Sequence[int]]
    given: Sequence[str | None]
    decoding: Decoding
    request_stop_ids: frozenset[int]
    whole: bool
    k: int | None

    @property
    def tokens(self) -> int:
        """Of prompts and completions, at most."""
        return sum(len(ids) + self.decoding.max_tokens for ids in self.prompts) * self.decoding.n


@dataclass(frozen=True)
class Text:
    """One of the reply's choices: a prompt's tokens, what was written after them, and the scores of these tokens from
    ``start`` on."""

    prompt: str | None
    prompt_ids: Sequence[int]
    written: Written
    start: int
    scores: Scored | None = None

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.written.ids]


def plan_of(request: CompletionRequest, engine: Engine, limits: Limits) -> Plan:
    """Check what can be checked before the model runs. Tokenises. Raises ApiError."""
    given, prompts = _prompts(request, engine)
    echo, max_tokens = bool(request.echo), 16 if request.max_tokens is None else request.max_tokens
    k = max(_alternatives(request, engine, limits), default=None)
    if max_tokens == 0 and not echo and request.prompt_logprobs is None:
        raise bad_request("max_tokens is 0: nothing would be written, echoed or scored; ask for 1", param="max_tokens")
    for ids in prompts:
        limits.check_ids(ids, "prompt")
        limits.check_length(len(ids), max_tokens)
    limits.check_ids(request.stop_token_ids or (), "stop_token_ids")
    own_stop_ids = frozenset(request.stop_token_ids or ())
    stop = request.stop or ()
    temperature = 1.0 if request.temperature is None else request.temperature
    decoding = Decoding(
        n=request.n or 1,
        max_tokens=max_tokens,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        seed=secrets.randbits(63) if request.seed is None else request.seed % 2**64,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=own_stop_ids | (frozenset() if request.ignore_eos else engine.end_ids),
    )
    whole = request.prompt_logprobs is not None or (echo and request.logprobs is not None)
    plan = Plan(request, prompts, given, decoding, own_stop_ids, whole, k)
    limits.check_size(len(prompts) * decoding.n, plan.tokens, 1 if k is None else k + 1)
    return plan


def _prompts(request: CompletionRequest, engine: Engine) -> tuple[list[str | None], list[list[int]]]:
    """Prompts as text, where they came so, and as ids."""
    prompt: Any = request.prompt
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    special = request.add_special_tokens is not False
    encoded = [engine.encode(p, special=special) if isinstance(p, str) else list(p) for p in prompts]
    if not all(encoded):
        raise bad_request("prompt: the text has no tokens; expected at least one", param="prompt")
    return [p if isinstance(p, str) else None for p in prompts], encoded


def _alternatives(request: CompletionRequest, engine: Engine, limits: Limits) -> list[int]:
    asked = {"logprobs": request.logprobs, "prompt_logprobs": request.prompt_logprobs}
    counts = {name: engine.vocab_size if k == -1 else k for name, k in asked.items() if k is not None}
    for name, k in counts.items():
        limits.check_alternatives(k, name)
    return [min(k, engine.vocab_size) for k in counts.values()]


def unscored(plan: Plan, groups: Sequence[Sequence[Written]] | None) -> list[Text]:
    """The choices before they are scored; ``groups``: what was written, None for nothing."""
    nothing = [[Written([], "length")] * plan.decoding.n for _ in plan.prompts]
    rows = zip(plan.given, plan.prompts, nothing if groups is None else groups, strict=True)
    return [Text(given, ids, written, 1 if plan.whole else len(ids)) for given, ids, group in rows for written in group]


def to_score(plan: Plan, texts: Sequence[Text]) -> list[TokenSequence]:
    """What has to be scored of these choices; those without a token to score are left out."""
    if plan.k is None:
        return []
    return [TokenSequence(text.ids[: text.start], text.ids[text.start :]) for text in _scorable(texts)]


def _scorable(texts: Sequence[Text]) -> list[Text]:
    return [text for text in texts if len(text.ids) > text.start]


def with_scores(texts: Sequence[Text], scores: Sequence[Scored]) -> list[Text]:
    """Scores of ``to_score``'s sequences, back with their choices."""
    remaining = iter(scores)
    return [replace(text, scores=next(remaining)) if len(text.ids) > text.start else text for text in texts]


def reply(plan: Plan, engine: Engine, texts: Sequence[Text], *, request_id: str) -> dict[str, Any]:
    """OpenAI's reply with vLLM's additions."""
    prompt_tokens = sum(map(len, plan.prompts))
    completion_tokens = sum(len(text.written.ids) for text in texts)
    return {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": engine.name,
        "choices": [_choice(plan, engine, i, text) for i, text in enumerate(texts)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _choice(plan: Plan, engine: Engine, index: int, text: Text) -> dict[str, Any]:
    request = plan.request
    written, stop_reason = _written_text(plan, engine, text)
    if request.echo:
        skip = request.skip_special_tokens is not False
        written = (engine.decode(text.prompt_ids, skip_special=skip) if text.prompt is None else text.prompt) + written
    choice = {
        "index": index,
        "text": written,
        "finish_reason": text.written.finish_reason,
        "stop_reason": stop_reason,
        "logprobs": None if request.logprobs is None else _logprobs(engine, text, request.logprobs, bool(request.echo)),
        "prompt_logprobs": None if request.prompt_logprobs is None else _prompt_logprobs(plan, engine, text),
    }
    if request.return_token_ids:
        choice |= {"token_ids": list(text.written.ids), "prompt_token_ids": list(text.prompt_ids)}
    return choice


def _written_text(plan: Plan, engine: Engine, text: Text) -> tuple[str, str | int | None]:
    """The completion's text without what ended it, and what that was (None: the model's end, or the length)."""
    ids = list(text.written.ids)
    if ids and ids[-1] in plan.decoding.stop_ids:
        last = ids.pop()
        is_own_end = last in engine.end_ids and not plan.request.ignore_eos
        return _continuation(plan, engine, text.prompt_ids, ids), None if is_own_end else last
    written = _continuation(plan, engine, text.prompt_ids, ids)
    if text.written.finish_reason == "length":
        return written, None
    found = [(place, stop) for stop in plan.decoding.stop if (place := written.find(stop)) >= 0]
    if not found:  # the stop text lies in special tokens that were left out
        return written, next((stop for stop in plan.decoding.stop if stop in engine.decode(ids)), None)
    place, stop = min(found)
    return written[:place], stop


def _continuation(plan: Plan, engine: Engine, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` as it stands behind the prompt: some tokenizers drop a text's first space."""
    skip = plan.request.skip_special_tokens is not False
    before = list(prompt_ids[-_TEXT_BEFORE:])
    start, both = engine.decode(before, skip_special=skip), engine.decode([*before, *ids], skip_special=skip)
    # A character may begin in one and end in the other.
    return both[len(start) :] if both.startswith(start) else engine.decode(ids, skip_special=skip)


def _logprobs(engine: Engine, text: Text, k: int, echo: bool) -> dict[str, Any]:
    """OpenAI's lists over the tokens written, or with ``echo`` over all; the first token of all has no scores."""
    first = 0 if echo else len(text.prompt_ids)
    tokens = [engine.token_text(token) for token in text.ids[first:]]
    numbers: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for position in range(first, len(text.ids)):
        if position < text.start or text.scores is None:
            numbers.append(None)
            top.append(None)
            continue
        own = text.scores.logprobs[position - text.start]
        numbers.append(own)
        best = reversed(_best(text.scores, position - text.start, k))  # of equal texts the likeliest stays
        row = {engine.token_text(token): value for token, value in best}
        top.append(row | {engine.token_text(text.ids[position]): own})
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": top, "text_offset": offsets[:-1]}


def _best(scores: Scored, position: int, k: int) -> list[tuple[int, float]]:
    if scores.ids is None or scores.topk_logprobs is None:
        return []
    return list(zip(scores.ids[position], scores.topk_logprobs[position], strict=True))[:k]


def _prompt_logprobs(plan: Plan, engine: Engine, text: Text) -> list[dict[str, Any] | None]:
    """vLLM's: nothing for the first token, then the token itself with its rank and the likeliest ones."""
    asked = plan.request.prompt_logprobs
    k = engine.vocab_size if asked == -1 else asked or 0
    rows: list[dict[str, Any] | None] = [None]
    for position, token in enumerate(text.prompt_ids[1:]):
        assert text.scores is not None
        assert text.scores.ranks is not None
        own = {"logprob": text.scores.logprobs[position], "rank": text.scores.ranks[position]}
        row = {str(token): own | {"decoded_token": engine.token_text(token)}}
        for rank, (other, value) in enumerate(_best(text.scores, position, k), start=1):
            if other != token:
                row[str(other)] = {"logprob": value, "rank": rank, "decoded_token": engine.token_text(other)}
        rows.append(row)
    return rows
