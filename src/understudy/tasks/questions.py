"""Short answers to questions over documents."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from understudy.tasks.grade import Grade, answer_of
from understudy.types import FinishReason, Prompt

# A word, with the decimals of a number and the sign before one; a hyphen within a word only separates.
_WORD = re.compile(r"(?<![\w.])-(?=\d)\w+(?:\.\d+)*|\w+(?:(?<=\d)\.\d+)*")
_ARTICLES = frozenset({"a", "an", "the"})


def questions(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
    """1 when one of the row's answers stands in the completion, word for word and in order, after ``words``.

    So a sentence around the answer does no harm, and neither do wrong answers beside the right one: ``details`` tells
    these apart, with ``exact`` (1 when the completion is the answer and nothing else) and ``token_f1`` (harmonic mean
    of the shares of shared words, the best over the answers). The answers are the row's "answer", a text or a list.

    ``has_answer`` is False for a completion without words. One cut at the cap is not searched: 0, no answer. Raises
    ValueError for a row without answers, or with one that holds no word.
    """
    answers = [words(answer) for answer in _answers(prompt)]
    if not all(answers):
        raise ValueError(f"prompt {prompt.index}: an answer among {_answers(prompt)!r} holds no word")
    written = [] if finish_reason == "length" else words(completion)
    details = {
        "exact": float(written in answers),
        "token_f1": max(_token_f1(written, answer) for answer in answers),
    }
    found = any(_contains(written, answer) for answer in answers)
    return Grade(float(found), has_answer=bool(written), details=details)


def words(text: str) -> list[str]:
    """``text`` as words to compare: compatible characters made one (NFKC), lower case, punctuation and symbols gone,
    commas within numbers too; "a", "an" and "the" left out unless there is nothing else. "3.5", "-2" and "3rd" are
    words. Scripts without spaces between words make one word of a whole phrase."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", text).casefold())
    found = _WORD.findall(text)
    return [word for word in found if word not in _ARTICLES] or found


def _answers(prompt: Prompt) -> Sequence[str]:
    """All of the row's answers: a list in "answer" arrives as metadata "answers"."""
    answers = prompt.metadata.get("answers") or [answer_of(prompt)]
    if not isinstance(answers, Sequence) or isinstance(answers, str):
        raise ValueError(f'prompt {prompt.index}: "answers" is {answers!r}, not a list of texts')
    return [str(answer) for answer in answers]


def _contains(written: Sequence[str], answer: Sequence[str]) -> bool:
    return any(written[i : i + len(answer)] == answer for i in range(len(written) - len(answer) + 1))


def _token_f1(written: Sequence[str], answer: Sequence[str]) -> float:
    """2 x shared words / all words, each word as often as it stands in both."""
    shared = sum((Counter(written) & Counter(answer)).values())
    return 2 * shared / (len(written) + len(answer))
