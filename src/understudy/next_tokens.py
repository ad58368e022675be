"""What could have stood at every position of a completion: entropies and likeliest tokens, for pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.backends.local import LocalTeacher
from understudy.lm_head import LMHead
from understudy.types import HiddenScores, TokenSequence

# Positions whose distribution over the vocabulary is held at once: 150,000 tokens take 40 MB in float32.
_POSITIONS_AT_ONCE = 64
# Completions whose hidden states wait at once: 256 tokens of 4,096 numbers take 4 MB.
_SEQUENCES_AT_ONCE = 32


@dataclass(frozen=True)
class NextTokens:
    """A model's next token at every position of a completion: ``entropy`` [T] in nats, over its whole vocabulary, and
    its ``k`` likeliest tokens, best first: ``ids`` and ``logprobs`` [T, k]."""

    entropy: Sequence[float]
    ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]


@torch.no_grad()
def next_tokens(head: LMHead, hidden: Tensor, *, topk: int, temperature: float) -> NextTokens:
    """Of each hidden state [T, H], wherever it lies; ``topk`` is cut to the vocabulary."""
    entropy: list[float] = []
    ids: list[list[int]] = []
    values: list[list[float]] = []
    for block in hidden.split(_POSITIONS_AT_ONCE):
        logprobs = head.logprobs(block.to(head.weight), temperature=temperature)
        best = logprobs.topk(min(topk, logprobs.shape[1]))
        entropy += torch.special.entr(logprobs.exp()).sum(-1).tolist()
        ids += best.indices.tolist()
        values += best.values.tolist()
    return NextTokens(entropy, ids, values)


def next_tokens_of(
    model: LocalTeacher, sequences: Sequence[TokenSequence], *, topk: int
) -> tuple[list[Sequence[float]], list[NextTokens]]:
    """Log-probabilities of every completion as ``model.compute_logprobs`` gives them, and its next tokens; in one
    forward pass."""
    logprobs: list[Sequence[float]] = []
    found: list[NextTokens] = []
    head, temperature = model.head, model.temperature
    for start in range(0, len(sequences), _SEQUENCES_AT_ONCE):
        for scores in model.score(sequences[start : start + _SEQUENCES_AT_ONCE], "hidden"):
            assert isinstance(scores, HiddenScores)
            logprobs.append(scores.teacher_logprobs)
            # As the log-probabilities were made, or the token that was written would have two.
            with torch.autocast(head.weight.device.type, model.autocast, enabled=model.autocast is not None):
                found.append(next_tokens(head, scores.teacher_hidden, topk=topk, temperature=temperature))
    return logprobs, found
