"""Entropies and likeliest tokens: worked out by hand, and beside what the model says elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from tiny import teacher_of, tiny_model
from understudy.lm_head import LMHead
from understudy.next_tokens import next_tokens, next_tokens_of
from understudy.types import TokenSequence, TopkScores

SEQUENCES = [TokenSequence([1, 2], [3, 4, 0]), TokenSequence([5], [1] * 70)] + [TokenSequence([2], [4])] * 31


def test_by_hand() -> None:
    # Logits: a half, a quarter, a quarter; and a token that is never said.
    weight = torch.tensor([[0.25], [0.5], [0.25], [0.0]]).log()
    found = next_tokens(LMHead(weight), torch.tensor([[1.0], [1.0]]), topk=2, temperature=1.0)
    assert found.entropy == pytest.approx([1.5 * math.log(2)] * 2)
    assert [ids[0] for ids in found.ids] == [1, 1]
    assert found.logprobs == [pytest.approx([math.log(0.5), math.log(0.25)])] * 2
    # At temperature 1/2: two thirds, a sixth, a sixth.
    [entropy] = next_tokens(LMHead(weight), torch.tensor([[1.0]]), topk=0, temperature=0.5).entropy
    assert entropy == pytest.approx(2 / 3 * math.log(1.5) + 1 / 3 * math.log(6))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_as_the_model_marks(autocast: torch.dtype | None) -> None:
    dtype = torch.float64 if autocast is None else torch.float32
    model = teacher_of(tiny_model(dtype=dtype), temperature=0.7, autocast=autocast)
    logprobs, found = next_tokens_of(model, SEQUENCES, topk=9)
    assert logprobs == [pytest.approx(row, abs=1e-6) for row in model.compute_logprobs(SEQUENCES)]
    tops = model.score(SEQUENCES, "topk", topk=6)
    for sequence, own, top, written in zip(SEQUENCES, found, tops, logprobs, strict=True):
        assert isinstance(top, TopkScores)
        assert own.logprobs == [pytest.approx(row, abs=1e-6) for row in top.logprobs]  # of six tokens there are no nine
        for row, entropy in zip(own.logprobs, own.entropy, strict=True):
            assert entropy == pytest.approx(-math.fsum(math.exp(value) * value for value in row), abs=1e-6)
        for row, ids, token, value in zip(own.logprobs, own.ids, sequence.completion_ids, written, strict=True):
            assert row[ids.index(token)] == pytest.approx(value, abs=1e-6)


def test_as_a_plain_log_softmax_of_the_whole_text() -> None:
    model = tiny_model(vocab_size=6)
    for sequence, written, own in zip(SEQUENCES, *next_tokens_of(teacher_of(model), SEQUENCES, topk=3), strict=True):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, len(sequence.prompt_ids) - 1 : -1]
        chosen = logprobs.gather(-1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
        assert written == pytest.approx(chosen.tolist(), abs=1e-10)
        assert own.entropy == pytest.approx((-(logprobs.exp() * logprobs).sum(-1)).tolist(), abs=1e-10)
        best = logprobs.topk(3)
        assert own.ids == best.indices.tolist()
        assert own.logprobs == [pytest.approx(row, abs=1e-10) for row in best.values.tolist()]
