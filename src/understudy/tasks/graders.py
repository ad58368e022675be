"""The graders by name, and how a user's own function is found."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from understudy.errors import ConfigError
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


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float:
    """1 when the whole completion is the answer (white space folded) and it ended by itself."""
    finished = finish_reason == "stop"
    return float(finished and " ".join(completion.split()) == " ".join(_answer(prompt).split()))


def last_number(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float:
    """1 when the last number of a finished completion equals the answer's last number (GSM8K's gold form included)."""
    written, wanted = _NUMBER.findall(completion), _NUMBER.findall(_answer(prompt))
    if not wanted:
        raise ValueError(f"prompt {prompt.index}: the answer {prompt.answer!r} holds no number")
    same = bool(written) and float(written[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))
    return float(finish_reason == "stop" and same)


def ledger(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float:
    """The ledger world's: every item worked through and the last value right."""
    from understudy.worlds.ledger import Ledger

    return Ledger().grade(prompt.text, _answer(prompt), completion, finish_reason)


GRADERS: Mapping[str, Grader] = MappingProxyType(
    {"exact_match": exact_match, "last_number": last_number, "ledger": ledger}
)


def load_grader(name: str) -> Grader:
    """A grader by name, or "package.module:function". Raises ConfigError for one that cannot be found."""
    if name in GRADERS:
        return GRADERS[name]
    module, _, function = name.partition(":")
    try:
        grader = getattr(importlib.import_module(module), function) if function else None
    except (ImportError, AttributeError) as error:
        raise _unknown(name, str(error)) from None
    if not callable(grader):
        raise _unknown(name, name)
    return grader  # pyright: ignore[reportReturnType]


def _unknown(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"grader {name}",
        got=got,
        expected=f'one of {", ".join(GRADERS)}, or "package.module:function"',
        remedy="a function takes (prompt, completion text, finish_reason) and returns a number",
    )


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(f"prompt {prompt.index} has no answer to grade against")
    return prompt.answer
