"""Rollout -> Scores. Owns the teacher's view: which teacher marks a row and which prompt it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from understudy.backends.protocols import Teacher
from understudy.errors import RunError
from understudy.types import Rollout, ScoreKind, Scores, TokenSequence, TopkScores


def teacher_view(rollout: Rollout) -> TokenSequence:
    """The sequence the teacher reads: its own prompt where it has one, and the student's completion, token for
    token."""
    prompt = rollout.prompt
    prompt_ids = prompt.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
    return TokenSequence(prompt_ids, rollout.completion_ids)


def score_rollouts(
    teachers: Mapping[str, Teacher], rollouts: Sequence[Rollout], kind: ScoreKind, *, topk: int = 0
) -> list[Scores]:
    """Every rollout marked by the teacher its prompt names, in the given order.

    Raises RunError naming the rollout when a score is missing, misaligned or not finite: never a zero in its place.
    """
    scores: list[Scores | None] = [None] * len(rollouts)
    for name in sorted({rollout.prompt.teacher for rollout in rollouts}):
        own = [i for i, rollout in enumerate(rollouts) if rollout.prompt.teacher == name]
        answers = teachers[name].score([teacher_view(rollouts[i]) for i in own], kind, topk=topk)
        for i, score in zip(own, answers, strict=True):
            _check(score, rollouts[i], f"teacher {name!r}")
            if isinstance(score, TopkScores):
                _check_topk(score, rollouts[i], f"teacher {name!r}", topk)
            scores[i] = score
    return [score for score in scores if score is not None]


def score_reference(reference: Teacher, rollouts: Sequence[Rollout], kind: ScoreKind) -> list[Scores]:
    """Every rollout marked by the reference model, which reads what the student read. Raises as ``score_rollouts``."""
    sequences = [TokenSequence(rollout.prompt.prompt_ids, rollout.completion_ids) for rollout in rollouts]
    scores = reference.score(sequences, kind)
    for score, rollout in zip(scores, rollouts, strict=True):
        _check(score, rollout, "reference")
    return scores


def _check(score: Scores, rollout: Rollout, who: str) -> None:
    logprobs = score.teacher_logprobs
    where = f"{who}, prompt {rollout.prompt.index}"
    if len(logprobs) != len(rollout.completion_ids):
        raise RunError(f"{where}: got {len(logprobs)} scores for {len(rollout.completion_ids)} completion tokens")
    for position, value in enumerate(logprobs):
        if not math.isfinite(value) or value > 1e-3:
            raise RunError(
                f"{where}: token {rollout.completion_ids[position]} at completion position {position} has "
                f"log-probability {value}; expected a finite value <= 0"
            )


def _check_topk(score: TopkScores, rollout: Rollout, who: str, topk: int) -> None:
    """Alternatives that are not distinct tokens of one distribution would be counted twice, or for too much."""
    where = f"{who}, prompt {rollout.prompt.index}"
    if not len(score.ids) == len(score.logprobs) == len(rollout.completion_ids):
        raise RunError(
            f"{where}: got alternatives for {len(score.ids)} positions ({len(score.logprobs)} with log-probabilities); "
            f"expected {len(rollout.completion_ids)}, one per completion token"
        )
    for position, (ids, logprobs) in enumerate(zip(score.ids, score.logprobs, strict=True)):
        place = f"{where}: completion position {position}"
        if not len(ids) == len(logprobs) <= topk or len(ids) != len(score.ids[0]):
            raise RunError(f"{place} has {len(ids)} alternatives and {len(logprobs)} log-probabilities of the {topk}")
        if len(set(ids)) != len(ids) or min(ids) < 0:
            raise RunError(f"{place} has alternatives {list(ids)}; expected different token ids")
        mass = sum(map(math.exp, logprobs))
        if not mass <= 1 + 1e-3:
            raise RunError(
                f"{place} has alternatives of probability {mass:.4g} in all; expected at most 1, from one distribution "
                "over the whole vocabulary"
            )
