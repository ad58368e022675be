"""Scores of ragged batches are those of a scorer that knows no batches: one plain forward pass per prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import ARCHITECTURES, EOS, prompt_of, rollout_of, teacher_of, tiny_model, trainer_of
from understudy.batching import micro_batches
from understudy.head_kernels import Projection
from understudy.objectives import CrossEntropy, FullDivergence
from understudy.teacher_scores import score_rollouts
from understudy.types import HiddenScores, TokenSequence, TopkScores, TrainingExample

SEQUENCES = [
    TokenSequence([1, 2, 3], [4, 5, EOS]),
    TokenSequence([4], [1, 2, 3, 4, 5, 1, 2, 3]),
    TokenSequence([5, 4, 3, 2, 1, 5, EOS, 3, 2], [EOS]),
    TokenSequence([EOS, EOS], [3, 1, EOS]),
    TokenSequence([3, 1, 4, 1, 5, 2], [2, 2, 4, 4]),
]
TOKENS = sum(len(s.completion_ids) for s in SEQUENCES)


@torch.no_grad()
def one_prefix_at_a_time(
    model: Any, sequence: TokenSequence, *, temperature: float = 1.0, width: int = 6
) -> list[float]:
    logprobs = []
    for t, token in enumerate(sequence.completion_ids):
        prefix = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids[:t]]])
        logits = model(input_ids=prefix, use_cache=False).logits[0, -1, :width].double()
        logprobs.append(float((logits / temperature).log_softmax(-1)[token]))
    return logprobs


@pytest.mark.parametrize("batch_tokens", [1, 25, 10**6])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_scores_equal_a_token_by_token_scorer(architecture: str, batch_tokens: int) -> None:
    model = tiny_model(architecture, seed=3)
    teacher = teacher_of(model, temperature=0.8, batch_tokens=batch_tokens)
    scores = teacher.compute_logprobs(SEQUENCES)
    for sequence, logprobs in zip(SEQUENCES, scores, strict=True):
        assert len(logprobs) == len(sequence.completion_ids)  # nothing for the prompt
        expected = one_prefix_at_a_time(model, sequence, temperature=0.8)
        assert logprobs == pytest.approx(expected, abs=1e-11)
    assert trainer_of(model, temperature=0.8).compute_logprobs(SEQUENCES) == [
        pytest.approx(row, abs=1e-11) for row in scores
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_scores_are_float32_close(architecture: str) -> None:
    model = tiny_model(architecture, seed=3, dtype=torch.float32)
    for sequence, logprobs in zip(SEQUENCES, teacher_of(model).compute_logprobs(SEQUENCES), strict=True):
        assert logprobs == pytest.approx(one_prefix_at_a_time(model, sequence), abs=2e-5)


def test_padded_vocabularies_are_cut_and_renormalised() -> None:
    """A model with 8 rows where 6 ids exist: the other two get no probability, in any kind of score."""
    model = tiny_model(seed=3, vocab_size=8)
    teacher = teacher_of(model, vocab_size=6)
    expected = [one_prefix_at_a_time(model, s, width=6) for s in SEQUENCES]
    assert expected != [one_prefix_at_a_time(model, s, width=8) for s in SEQUENCES]
    for kind in ("sampled", "topk", "hidden"):
        for score, row in zip(teacher.score(SEQUENCES, kind, topk=99), expected, strict=True):
            assert score.teacher_logprobs == pytest.approx(row, abs=1e-11)
            if isinstance(score, TopkScores):
                assert {tuple(sorted(ids)) for ids in score.ids} == {(0, 1, 2, 3, 4, 5)}
                assert torch.tensor(score.logprobs).exp().sum(-1).tolist() == pytest.approx([1.0] * len(row))
    assert trainer_of(model, vocab_size=6).compute_logprobs(SEQUENCES) == [
        pytest.approx(r, abs=1e-11) for r in expected
    ]


def test_alternatives_are_the_best_ones_best_first() -> None:
    model = tiny_model(seed=3)
    for sequence, score in zip(SEQUENCES, teacher_of(model).score(SEQUENCES, "topk", topk=2), strict=True):
        assert isinstance(score, TopkScores)
        for t in range(len(sequence.completion_ids)):
            prefix = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids[:t]]])
            logprobs = model(input_ids=prefix).logits[0, -1].log_softmax(-1)
            order = logprobs.argsort(descending=True)[:2]
            assert score.ids[t] == order.tolist()
            assert score.logprobs[t] == pytest.approx(logprobs[order].tolist(), abs=1e-11)


def test_the_head_runs_on_completion_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = Projection.logits

    def counted(projection: Projection, hidden: torch.Tensor, low: int, high: int, out: torch.Tensor) -> torch.Tensor:
        assert (low, high) == (0, 6)  # a vocabulary this small is one tile: rows are counted once
        rows.append(len(hidden))
        return logits(projection, hidden, low, high, out)

    trainer, teacher = trainer_of(tiny_model(seed=1)), teacher_of(tiny_model(seed=3))
    monkeypatch.setattr(Projection, "logits", counted)

    def seen() -> int:
        total = sum(rows)
        rows.clear()
        return total

    teacher.compute_logprobs(SEQUENCES)
    assert seen() == TOKENS
    scores = teacher.score(SEQUENCES, "hidden")
    assert seen() == TOKENS
    trainer.compute_logprobs(SEQUENCES)
    assert seen() == TOKENS
    examples = [
        TrainingExample(
            s.prompt_ids, s.completion_ids, [True] * len(s.completion_ids), teacher_hidden=score.teacher_hidden
        )
        for s, score in zip(SEQUENCES, scores, strict=True)
        if isinstance(score, HiddenScores)
    ]
    for packing in (False, True):
        [batch] = micro_batches(examples, micro_batch_tokens=10**6, packing=packing)
        trainer.forward_backward(batch, CrossEntropy())
        assert seen() == TOKENS
        trainer.forward_backward(batch, FullDivergence({"default": teacher.head}))
        assert seen() == 2 * TOKENS  # the student's head and the teacher's


def test_each_teacher_reads_its_own_prompt_and_marks_its_own_rows() -> None:
    """Two teachers, one of them with privileged context, rows interleaved: scores come back in the given order."""
    models = {"a": tiny_model(seed=3), "b": tiny_model(seed=4)}
    teachers = {name: teacher_of(model) for name, model in models.items()}
    rollouts, expected = [], []
    for i, sequence in enumerate(SEQUENCES * 2):
        name, context = "ab"[i % 2], [5, 5, 1, *sequence.prompt_ids] if i % 3 else None
        prompt = prompt_of(sequence.prompt_ids, i, teacher=name, teacher_prompt_ids=context)
        rollouts.append(rollout_of(prompt, sequence.completion_ids, [-1.0] * len(sequence.completion_ids)))
        read = TokenSequence(context or sequence.prompt_ids, sequence.completion_ids)
        expected.append(one_prefix_at_a_time(models[name], read))
    scores = score_rollouts(teachers, rollouts, "sampled")
    assert [list(score.teacher_logprobs) for score in scores] == [pytest.approx(row, abs=1e-11) for row in expected]


def test_scoring_leaves_no_graph_and_no_gradient() -> None:
    model = tiny_model(seed=3)
    for score in teacher_of(model).score(SEQUENCES, "hidden"):
        assert isinstance(score, HiddenScores)
        assert not score.teacher_hidden.requires_grad
    assert all(p.grad is None for p in model.parameters())
