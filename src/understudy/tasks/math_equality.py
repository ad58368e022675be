"""Whether two answers are the same mathematics, by math-verify (`graders` extra). Runs where ``bounded`` runs it."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from math_verify import (  # pyright: ignore[reportMissingImports]
    ExprExtractionConfig,
    LatexExtractionConfig,
    parse,
    verify,
)

Verdict = Literal["right", "wrong", "no_answer", "unreadable_gold"]
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def compare(gold: str, answer: str | None, text: str) -> Verdict:
    """``answer``, or the final expression of ``text`` where that is None, against ``gold``."""
    expected = _parsed(gold)
    if not expected:
        return "unreadable_gold"
    if answer is None:
        # Without a box only what parses is an answer; a box says by itself that its content is one.
        found = parse(text, _TARGETS, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    else:
        found = _parsed(answer)
    if not found:
        return "no_answer"
    return "right" if verify(expected, found, timeout_seconds=None) else "wrong"


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> list:
    """What an answer stands for: an expression, the text it was read from, or both."""
    return parse(f"\\boxed{{{answer}}}", _TARGETS, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
