"""Mathematical answers: where they stand in a completion, and whether they are right."""

from __future__ import annotations

import re

from understudy.tasks import bounded
from understudy.tasks.grade import Grade, answer_of
from understudy.tasks.imports import require
from understudy.types import FinishReason, Prompt

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def math(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
    r"""1 when the completion's answer is mathematically equal to the row's, as math-verify judges it.

    The completion's answer is the content of its last ``\boxed{...}``; without a box, the final expression that
    math-verify finds in the text. No such thing, or an empty box: ``has_answer`` is False. A completion cut at the cap
    is not searched: 0, no answer. The row's answer is a number, LaTeX, text that ends in "#### 18" (GSM8K's form), or
    a solution with a box.

    An answer that cannot be judged within ``bounded.LIMIT_SECONDS`` and ``bounded.LIMIT_BYTES``, or at which
    math-verify fails, earns 0. Works in every thread. Raises ValueError for a row's answer that cannot be read, which
    the answer alone decides and never the machine's speed; ConfigError without the `graders` extra.
    """
    require("math_verify", "grader math")
    gold = gold_of(answer_of(prompt))
    if finish_reason == "length":
        return Grade(0.0, has_answer=False)
    try:
        verdict = bounded.call("understudy.tasks.math_equality:compare", gold, boxed(completion), completion)
    except bounded.GaveUpError:
        return Grade(0.0, has_answer=bool(completion.strip()))
    except bounded.FailedError:
        if completion.strip():
            return Grade(0.0)
        verdict = "unreadable_gold"  # there is nothing else to fail at
    if verdict == "unreadable_gold":
        raise ValueError(f"prompt {prompt.index}: the answer {prompt.answer!r} holds no expression")
    return Grade(float(verdict == "right"), has_answer=verdict != "no_answer")


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` that is closed, without what surrounds an answer in prose: white space,
    bold face, a full stop. None without one."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        end = _closing(text, start)
        if end is not None:
            return text[start:end].strip().strip("*").removesuffix(".").strip()
    return None


def gold_of(answer: str) -> str:
    """A row's answer without the solution before it: after the last "####", or in the last box, or all of it."""
    _, marked, last = answer.rpartition("####")
    if marked:
        return last.strip()
    content = boxed(answer)
    return answer.strip() if content is None else content


def _closing(text: str, start: int) -> int | None:
    """Where the brace opened before ``start`` closes; escaped ones (of sets) do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
