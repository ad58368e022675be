"""Rollout -> grade and reward, by a task's grader."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from understudy.errors import RunError
from understudy.tasks import Grade, Grader, as_grade
from understudy.types import Rollout


def grade_rollouts(rollouts: Sequence[Rollout], grader: Grader, decode: Callable[[Sequence[int]], str]) -> list[float]:
    """One reward per rollout. ``decode`` turns completion ids into the text a grader reads (special tokens left
    out). Raises as ``grades_of``."""
    return [grade.reward for grade in grades_of(rollouts, grader, decode)]


def grades_of(rollouts: Sequence[Rollout], grader: Grader, decode: Callable[[Sequence[int]], str]) -> list[Grade]:
    """One grade per rollout. Raises RunError for numbers that are not finite."""
    grades = [as_grade(grader(r.prompt, decode(r.completion_ids), r.finish_reason)) for r in rollouts]
    for rollout, grade in zip(rollouts, grades, strict=True):
        for name, value in {"reward": grade.reward, **grade.details}.items():
            if not math.isfinite(value):
                raise RunError(
                    f"the grader gave {name} = {value} for a completion of prompt {rollout.prompt.index}; "
                    "expected a finite number"
                )
    return grades
