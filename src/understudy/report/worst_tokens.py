"""The tokens that the teacher disliked most, each with its context, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from understudy.report import formatting
from understudy.report.credit_data import reverse_kl, token_texts
from understudy.report.page import Row
from understudy.report.token_text import align, token_name, visible_text
from understudy.report.tokens import piece_text

WORST_SHOWN = 15
# Tokens of context around each.
CONTEXT_BEFORE, CONTEXT_AFTER = 10, 4


def worst_tokens(rollouts: Sequence[Row], count: int = WORST_SHOWN) -> list[dict[str, str]]:
    """The tokens with the largest reverse KL, each with its context and the teacher's first choice."""
    ranked = sorted(
        (
            (value, number, index)
            for number, rollout in enumerate(rollouts)
            for index, value in enumerate(reverse_kl(rollout))
            if value is not None and value > 0
        ),
        key=lambda item: (-item[0], item[1:]),
    )
    return [
        {"place": f"r{number}t{index}"} | _worst_row(rollouts[number], index, value)
        for value, number, index in ranked[:count]
    ]


def _worst_row(rollout: Row, index: int, value: float) -> dict[str, str]:
    tokens = token_texts(rollout)
    aligned = align(tokens, str(rollout.get("completion_text") or ""))
    gaps, bytes_of = aligned.gaps, aligned.pieces
    shown = [piece_text(bytes_of[i]) if i in bytes_of else visible_text(token) for i, token in enumerate(tokens)]
    # Line breaks would tear the table's row apart; their sign is enough here.
    pieces = [gap + own.rstrip("\n") for gap, own in zip(gaps, shown, strict=True)]
    start = max(0, index - CONTEXT_BEFORE)
    topk = rollout.get("teacher_topk")
    choice = "–"
    names = (topk.get("tokens") or topk["ids"])[index] if topk else None
    if topk and names and topk["logprobs"][index][0] is not None:
        choice = f"{token_name(str(names[0]))} ({_probability(float(topk['logprobs'][index][0]))})"
    return {
        "before": ("… " if start else "") + "".join(pieces[start:index]) + gaps[index],
        "token": shown[index].rstrip("\n"),
        "after": "".join(pieces[index + 1 : index + 1 + CONTEXT_AFTER]),
        "reverse_kl": f"{value:.2f}",
        "student": _probability(float(rollout["sampler_logprobs"][index])),
        "teacher": _probability(float(rollout["teacher_logprobs"][index])),
        "choice": choice,
        "prompt": str(rollout.get("prompt_index", "?")),
    }


def _probability(logprob: float) -> str:
    share = math.exp(logprob)
    return f"{100 * share:.1f} %" if share >= 1e-3 or share == 0 else f"{formatting.number(100 * share)} %"
