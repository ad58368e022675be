"""Rollout -> reward, by a task's grader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from understudy.tasks import Grader, as_grade
from understudy.types import Rollout


def grade_rollouts(rollouts: Sequence[Rollout], grader: Grader, decode: Callable[[Sequence[int]], str]) -> list[float]:
    """One reward per rollout. ``decode`` turns completion ids into the text a grader reads (special tokens left
    out)."""
    return [as_grade(grader(r.prompt, decode(r.completion_ids), r.finish_reason)).reward for r in rollouts]
