"""The graders by name, and how a user's own function is found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from understudy.errors import ConfigError, first_line
from understudy.tasks import bounded
from understudy.tasks.choice import choice
from understudy.tasks.grade import Grade, Grader, answer_of, as_grade
from understudy.tasks.ifeval import ifeval
from understudy.tasks.imports import imported, nearest, require
from understudy.tasks.maths import math
from understudy.tasks.own import own_grader, problem_with
from understudy.tasks.questions import questions
from understudy.types import FinishReason, Prompt

__all__ = ["GRADERS", "Grade", "Grader", "as_grade", "load_grader"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def exact_match(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float:
    """1 when the whole completion is the answer (white space folded) and it ended by itself."""
    finished = finish_reason == "stop"
    return float(finished and " ".join(completion.split()) == " ".join(answer_of(prompt).split()))


def last_number(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float:
    """1 when the last number of a finished completion equals the answer's last number (GSM8K's gold form included)."""
    written, wanted = _NUMBER.findall(completion), _NUMBER.findall(answer_of(prompt))
    if not wanted:
        raise ValueError(f"prompt {prompt.index}: the answer {prompt.answer!r} holds no number")
    same = bool(written) and float(written[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))
    return float(finish_reason == "stop" and same)


def ledger(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float:
    """The ledger world's: every item worked through and the last value right."""
    from understudy.worlds.ledger import Ledger

    return Ledger().grade(prompt.text, answer_of(prompt), completion, finish_reason)


def reasoning_gym(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
    """The mark, 0 to 1, of the generator that made the row up (path = "reasoning_gym:<generator>").

    The answer is what stands between the last <answer> and </answer>, or else the whole completion; where that is
    empty, ``has_answer`` is False. A completion cut at the cap is not searched: 0, no answer. An answer that the
    generator cannot read (its function raises) or not in ``bounded``'s limits earns 0. Raises ValueError for rows of
    another origin, ConfigError without the `graders` extra.
    """
    require("reasoning_gym", "grader reasoning_gym")
    source = prompt.metadata.get("reasoning_gym")
    if not isinstance(source, Mapping) or not {"generator", "options", "entry"} <= set(source):
        raise ValueError(f"prompt {prompt.index} does not come from reasoning_gym:<generator>")
    tagged = _TAGGED.findall(completion)
    answer = (tagged[-1] if tagged else completion).strip()
    if finish_reason == "length" or not answer:
        return Grade(0.0, has_answer=False)
    arguments = (source["generator"], source["options"], source["entry"], answer)
    try:
        return Grade(bounded.call("understudy.tasks.reasoning:score", *arguments))
    except (bounded.GaveUpError, bounded.FailedError):
        return Grade(0.0)


GRADERS: Mapping[str, Grader] = MappingProxyType(
    {
        "exact_match": exact_match,
        "last_number": last_number,
        "math": math,
        "choice": choice,
        "questions": questions,
        "ifeval": ifeval,
        "reasoning_gym": reasoning_gym,
        "ledger": ledger,
    }
)


def load_grader(name: str, *, timeout_seconds: float = 0.0) -> Grader:
    """A grader by name, or "package.module:function". Raises ConfigError for one that cannot be found.

    ``timeout_seconds``: for each call of a function from outside this package, which then runs in a process of its own
    (``own_grader``); 0: in this one. A program's own main module is nowhere else, so its functions run here.
    """
    if name in GRADERS:
        return GRADERS[name]
    if ":" not in name:
        raise _unknown(name, name)
    if timeout_seconds and name.partition(":")[0].partition(".")[0] not in ("__main__", "understudy"):
        if problem := problem_with(name):
            raise _unknown(name, problem)
        return own_grader(name, timeout_seconds)
    try:
        return imported(name)
    except Exception as error:  # a user's module, which may raise anything while it is imported
        raise _unknown(name, first_line(error)) from None


def _unknown(name: str, got: str) -> ConfigError:
    near = nearest(name, GRADERS)
    own = "a function takes (prompt, completion text, finish_reason) and returns a number"
    return ConfigError(
        f"grader {name}",
        got=got,
        expected=f'one of {", ".join(GRADERS)}, or "package.module:function"',
        remedy=f"did you mean {near}? Or: {own}" if near else own,
    )
