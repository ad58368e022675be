"""Rollouts by the hundred with numbers as models give them, for pages whose size and speed count."""

from __future__ import annotations

import base64
import json
import math
import random
import string
import zlib
from collections.abc import Mapping
from typing import Any

NUM_TOKENS = 256
PROMPT_WORDS = 150


def big_rollouts(count: int, *, alternatives: bool = True) -> list[dict[str, Any]]:
    """``count`` rollouts of 256 tokens from a vocabulary of 3,000 words, common ones more often; every number that a
    page can show, and five alternatives of both models unless they are left out. Each answers a prompt of its own, of
    150 words of random letters, which no packing makes shorter than their letters' entropy."""
    draw = random.Random(0)
    words = [f" w{i}" for i in range(3000)]
    return [_rollout(draw, words, number, alternatives) for number in range(count)]


def unpacked(block: Mapping[str, Any]) -> Any:
    """What a page's script reads of a block of JSON."""
    return json.loads(zlib.decompress(base64.b64decode(block["bytes"])))


def _rollout(draw: random.Random, words: list[str], number: int, alternatives: bool) -> dict[str, Any]:
    """As a small model marks it: half of the tokens certain, half open."""
    ids = [min(len(words) - 1, int(draw.paretovariate(0.8))) for _ in range(NUM_TOKENS)]
    student = [-draw.expovariate(1.2 if draw.random() < 0.5 else 30.0) for _ in ids]
    teacher = [min(-1e-4, own - draw.gauss(0.1, 0.5)) for own in student]
    tokens = [words[i] for i in ids]
    made: dict[str, Any] = {
        "step": 0,
        "prompt_index": number,
        "sample_index": 0,
        "task": "sums",
        "prompt_text": f"{' '.join(_word(draw) for _ in range(PROMPT_WORDS))}. What do they say of this? {number}",
        "prompt_ids": [draw.randrange(len(words)) for _ in range(PROMPT_WORDS)],
        "completion_text": "".join(tokens),
        "completion_ids": ids,
        "completion_tokens": tokens,
        "finish_reason": "stop",
        "reward": 1.0,
        "sampler_logprobs": student,
        "teacher_logprobs": teacher,
        "trainer_logprobs": [own + draw.gauss(0, 1e-3) for own in student],
        "advantages": [q - p for p, q in zip(student, teacher, strict=True)],
        "student_entropy": [draw.expovariate(1.0) for _ in ids],
        "teacher_entropy": [draw.expovariate(1.0) for _ in ids],
    }
    if alternatives:
        made["teacher_topk"] = _topk(draw, words, ids, teacher)
        made["student_topk"] = _topk(draw, words, ids, student)
    return made


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9)))


def _topk(draw: random.Random, words: list[str], ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    """The written token and four others, which share most of the rest."""
    rows = []
    for token, logprob in zip(ids, logprobs, strict=True):
        rest, row = 1 - math.exp(logprob), [(token, logprob)]
        for _ in range(4):
            share = rest * draw.uniform(0.5, 0.95)
            rest -= share
            row.append((min(len(words) - 1, int(draw.paretovariate(0.6))), math.log(max(share, 1e-9))))
        rows.append(sorted(row, key=lambda pair: -pair[1]))
    return {
        "ids": [[token for token, _ in row] for row in rows],
        "tokens": [[words[token] for token, _ in row] for row in rows],
        "logprobs": [[logprob for _, logprob in row] for row in rows],
    }
