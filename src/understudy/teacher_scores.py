"""Rollout -> Scores. Owns the teacher's view: which teacher marks a row and which prompt it reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.backends.protocols import Teacher
from understudy.errors import NonFiniteError, RunError, ServerUnavailable
from understudy.types import Rollout, ScoreKind, Scores, TokenSequence, TopkScores

log = logging.getLogger("understudy")


def teacher_view(rollout: Rollout) -> TokenSequence:
    """The sequence the teacher reads: its own prompt where it has one, and the student's completion, token for
    token."""
    prompt = rollout.prompt
    prompt_ids = prompt.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
    return TokenSequence(prompt_ids, rollout.completion_ids)


Ids = Sequence[Sequence[Sequence[int]]]  # [rollout][position][k]


def score_rollouts(
    teachers: Mapping[str, Teacher],
    rollouts: Sequence[Rollout],
    kind: ScoreKind,
    *,
    topk: int = 0,
    ids: Ids | None = None,
) -> list[Scores]:
    """Every rollout marked by the teacher its prompt names, in the given order. ``ids``: for kind "chosen".

    Raises RunError naming the rollout when a score is missing, misaligned or not finite: never a zero in its place.
    """
    scores: list[Scores | None] = [None] * len(rollouts)
    for name, own in _by_teacher(rollouts).items():
        asked: dict[str, Any] = {} if ids is None else {"ids": [ids[i] for i in own]}
        answers = teachers[name].score([teacher_view(rollouts[i]) for i in own], kind, topk=topk, **asked)
        for i, score in zip(own, answers, strict=True):
            _check(score, rollouts[i], f"teacher {name!r}")
            if isinstance(score, TopkScores):
                _check_topk(score, rollouts[i], f"teacher {name!r}", topk)
            scores[i] = score
    return [score for score in scores if score is not None]


def score_reachable(
    teachers: Mapping[str, Teacher],
    rollouts: Sequence[Rollout],
    kind: ScoreKind,
    *,
    topk: int = 0,
    ids: Ids | None = None,
    may_be_away: frozenset[str] = frozenset(),
) -> list[Scores | None]:
    """``score_rollouts``, with None for those of a teacher that ``may_be_away``, and is.

    Raises:
        ServerUnavailable: a teacher is away that may not be, or all of ``teachers`` are.
    """
    scores: list[Scores | None] = [None] * len(rollouts)
    away: dict[str, ServerUnavailable] = {}
    for name, own in _by_teacher(rollouts).items():
        try:
            asked = None if ids is None else [ids[i] for i in own]
            answers = score_rollouts(teachers, [rollouts[i] for i in own], kind, topk=topk, ids=asked)
        except ServerUnavailable as error:
            if name not in may_be_away:
                raise
            away[name] = error
            log.warning("teacher %r is away, %d completions go unmarked: %s", name, len(own), error)
            continue
        for i, score in zip(own, answers, strict=True):
            scores[i] = score
    if away and away.keys() == teachers.keys():
        raise next(iter(away.values()))
    return scores


def _by_teacher(rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
    """Which rollouts are whose."""
    names = sorted({rollout.prompt.teacher for rollout in rollouts})
    return {name: [i for i, r in enumerate(rollouts) if r.prompt.teacher == name] for name in names}


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
            kind = RunError if math.isfinite(value) else NonFiniteError
            raise kind(
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
            kind = RunError if math.isfinite(mass) else NonFiniteError
            raise kind(
                f"{place} has alternatives of probability {mass:.4g} in all; expected at most 1, from one distribution "
                "over the whole vocabulary"
            )
