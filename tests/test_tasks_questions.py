"""Short answers: what is the same word, and when an answer stands in a completion."""

from __future__ import annotations

from typing import Any

import pytest

from understudy.tasks import GRADERS, Grade, as_grade
from understudy.tasks.questions import words
from understudy.types import FinishReason, Prompt


def grade(gold: Any, completion: str, finish_reason: FinishReason = "stop") -> Grade:
    metadata = {"answers": gold} if not isinstance(gold, str | None) else {}
    answer = gold if isinstance(gold, str) else None
    return as_grade(
        GRADERS["questions"](Prompt(0, [1], "?", answer=answer, metadata=metadata), completion, finish_reason)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Head\tOffice, in *Lyon*!", ["head", "office", "in", "lyon"]),
        ("a", ["a"]),  # nothing else: vitamin A
        ("It costs $1,250,000.50.", ["it", "costs", "1250000.50"]),
        ("1,2 and 3,45", ["1", "2", "and", "3", "45"]),
        ("-5 to 10-20, v1.2; 3rd", ["-5", "to", "10", "20", "v1.2", "3rd"]),
        ("2024-05-01", ["2024", "05", "01"]),
        ("state-of-the-art", ["state", "of", "art"]),
        ("Anna's ﬁle", ["anna", "s", "file"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("¿?!", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("gold", "completion", "details"),
    [
        ("Lyon", "Lyon", (1.0, 1.0)),
        ("the Lyon office", "LYON office.", (1.0, 1.0)),
        ("Lyon", "It is in Lyon.", (0.0, 2 / 5)),
        ("Project Heron", "That was project Heron, I think", (0.0, 4 / 8)),
        (["Paris", "Lyon office"], "the Lyon office", (1.0, 1.0)),
        (["Paris", "Lyon office"], "our Lyon office", (0.0, 4 / 5)),
        ([3, 4], "It has 4", (0.0, 2 / 4)),
    ],
)
def test_answers_that_stand_in_the_completion(gold: Any, completion: str, details: tuple[float, float]) -> None:
    exact, token_f1 = details
    found = grade(gold, completion)
    assert (found.reward, found.has_answer) == (1.0, True)
    assert found.details == {"exact": exact, "token_f1": pytest.approx(token_f1)}


@pytest.mark.parametrize(
    ("gold", "completion", "token_f1"),
    [
        ("Lyon", "Lyons", 0.0),
        ("Lyon", "Berlyon", 0.0),
        ("project Heron", "Heron project", 1.0),  # in order
        ("project Heron", "project Blue Heron", 4 / 5),
        ("5", "5.5", 0.0),
        ("5", "-5", 0.0),
        ("1.5", "15", 0.0),
        (["Paris", "Lyon"], "Rome", 0.0),
        ("no no", "no", 2 / 3),
    ],
)
def test_answers_that_do_not(gold: Any, completion: str, token_f1: float) -> None:
    assert grade(gold, completion) == Grade(0.0, details={"exact": 0.0, "token_f1": pytest.approx(token_f1)})


@pytest.mark.parametrize(("completion", "reason"), [("", "stop"), ("...", "stop"), ("Lyon", "length")])
def test_no_answer(completion: str, reason: FinishReason) -> None:
    assert grade("Lyon", completion, reason) == Grade(0.0, has_answer=False, details={"exact": 0.0, "token_f1": 0.0})


@pytest.mark.parametrize("gold", [None, "?!", ["Lyon", ""], {"text": "Lyon"}, 3])
def test_a_row_needs_answers_of_words(gold: Any) -> None:
    with pytest.raises(ValueError, match="prompt 0"):
        grade(gold, "")
