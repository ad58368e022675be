"""Multiple choice: which letter a completion settles on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from understudy.config import RowsConfig
from understudy.rows import read_rows
from understudy.tasks import GRADERS, Grade
from understudy.tasks.choice import chosen_letter
from understudy.types import FinishReason, Prompt

DATA = os.environ.get("UNDERSTUDY_DATA")


def grade(gold: str | None, completion: str, finish_reason: FinishReason = "stop") -> float | Grade:
    return GRADERS["choice"](Prompt(0, [1], "?", answer=gold), completion, finish_reason)


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("Reasoning.\n\nFinal Answer: B", "B"),
        ("**Final Answer:** **B**", "B"),
        ("final answer: B. 0", "B"),
        ("Final Answer:\n\n(B) none", "B"),
        (r"Final Answer: $\boxed{\text{B}}$", "B"),
        ("The correct answer is option (B), as shown.", "B"),
        ("The answer is: B because ice melts.", "B"),
        (r"So \boxed{b}.", "B"),
        (r"So \boxed{\text{(B)}}.", "B"),
        (r"So \boxed{B. 0}.", "B"),
        ("It melts.\n\nB", "B"),
        ("(b).", "B"),
        # The last statement counts, whichever way it is put.
        ("Final Answer: A. Wait.\nFinal Answer: B", "B"),
        (r"\boxed{A} seemed right, but the answer is B.", "B"),
        (r"The answer is A, no: \boxed{B}", "B"),
        ("Final Answer: A\n\nB", "B"),
        ("The answer is B; the answer is not A", "B"),
        # Nothing is settled on.
        ("", None),
        ("B is likely, and so is C", None),
        ("Final Answer: none of them", None),
        ("Final Answer: G", None),
        ("Answer: A or B", None),
        ("Answer: **(B)** or **(C)**", None),
        ("The answer is B, or option C.", None),
        ("The answer is A bit unclear", None),
        ("Answer: **A** dog", None),
        ("Answer: B. It is A or C", "B"),
        ("Final Answer: B\n\nor so I think", "B"),
        ("The answer is B or something like it", "B"),
        ("The answer is Beth.", None),
        ("the answer is a dog", None),
        ("The answer is A's.", None),
        (r"\boxed{a+b}", None),
        (r"\boxed{}", None),
    ],
)
def test_statements(completion: str, letter: str | None) -> None:
    assert chosen_letter(completion) == letter
    assert grade("B", completion) == Grade(float(letter == "B"), has_answer=letter is not None)
    assert grade("C", completion) == Grade(0.0, has_answer=letter is not None)


@pytest.mark.parametrize(
    "completion", ["The answer is A because ice melts.", "Answer: A\nas shown", "Answer: A. bits", "Answer: (A) ice"]
)
def test_an_a_that_is_no_article(completion: str) -> None:
    assert chosen_letter(completion) == "A"


def test_a_truncated_completion_has_no_answer() -> None:
    assert grade("B", "Final Answer: B", "length") == Grade(0.0, has_answer=False)


@pytest.mark.parametrize("gold", [None, "", "G", "AB", "0"])
def test_a_rows_answer_is_a_letter(gold: str | None) -> None:
    with pytest.raises(ValueError, match="prompt 0"):
        grade(gold, "")


@pytest.mark.parametrize("gold", ["b", "(B)", " B. "])
def test_a_rows_letter_may_be_written_otherwise(gold: str) -> None:
    assert grade(gold, "Final Answer: B") == Grade(1.0)


@pytest.mark.skipif(DATA is None or not Path(DATA).is_dir(), reason="UNDERSTUDY_DATA names no folder of data sets")
def test_every_published_answer() -> None:
    assert DATA is not None
    path = Path(DATA) / "simplebench" / "simple_bench_public.json"
    rows = read_rows(RowsConfig(path=str(path), format="simplebench"))
    records = json.loads(path.read_text(encoding="utf-8"))["eval_data"]
    assert [row.values["answer"] for row in rows] == [record["answer"] for record in records]
    assert len(rows) == 10
    for row, record in zip(rows, records, strict=True):
        # The question alone, which lists every option, states nothing.
        assert row.values["messages"] == [{"role": "user", "content": record["prompt"].strip()}]
        assert chosen_letter(record["prompt"]) is None
        stated = [grade(record["answer"], f"{record['prompt']}\nFinal Answer: {letter}") for letter in "ABCDEF"]
        assert [result == Grade(1.0) for result in stated] == [letter == record["answer"] for letter in "ABCDEF"]
