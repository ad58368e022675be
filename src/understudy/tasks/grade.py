"""What a grader says of a completion, and what it is asked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from understudy.types import FinishReason, Prompt


@dataclass(frozen=True)
class Grade:
    """What a completion earned. ``has_answer``: whether anything was found that could be an answer (False is a format
    failure). ``details``: further numbers that an evaluation averages, by name."""

    reward: float
    has_answer: bool = True
    details: Mapping[str, float] = field(default_factory=dict)


Grader = Callable[[Prompt, str, FinishReason], float | Grade]


def as_grade(value: float | Grade) -> Grade:
    """A plain number as a ``Grade``."""
    return value if isinstance(value, Grade) else Grade(float(value))


def answer_of(prompt: Prompt) -> str:
    """The row's answer. Raises ValueError where there is none."""
    if prompt.answer is None:
        raise ValueError(f"prompt {prompt.index} has no answer to grade against")
    return prompt.answer
