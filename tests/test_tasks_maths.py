"""The maths grader: where an answer is looked for, and what counts as equal."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest

from understudy.config import RowsConfig
from understudy.rows import read_rows
from understudy.tasks import GRADERS, Grade, bounded
from understudy.tasks.maths import boxed, gold_of
from understudy.types import FinishReason, Prompt

pytest.importorskip("math_verify", reason="the `graders` extra is not installed")
DATA = os.environ.get("UNDERSTUDY_DATA")
RIGHT, WRONG, NONE = Grade(1.0), Grade(0.0), Grade(0.0, has_answer=False)


def grade(gold: str | None, completion: str, finish_reason: FinishReason = "stop") -> float | Grade:
    return GRADERS["math"](Prompt(0, [1], "?", answer=gold), completion, finish_reason)


def box(gold: str, answer: str) -> float | Grade:
    return grade(gold, f"So we get $\\boxed{{{answer}}}$.")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18"),
        ("18", "18.0"),
        ("18", "36/2"),
        ("18", "18."),
        ("18", "**18**"),
        ("18", r"\$18"),
        ("Half of it.\n#### 1,450", "1450"),
        ("1450", "1{,}450"),
        (r"11,\! 111,\! 100", "11111100"),
        ("025", "25"),
        ("25", "025"),
        (r"\frac{3}{2}", r"\dfrac32"),
        (r"\frac{3}{2}", "1.5"),
        (r"1\frac{4}{5}", r"\frac95"),
        (r"\frac{1}{3}", "0.333333"),  # six decimals are enough
        (r"3\sqrt{13}", r"\sqrt{117}"),
        ("p - q", "-q+p"),
        (r"50\%", "0.5"),
        (r"50\%", r"50\%"),
        ("50", r"50\%"),
        ("1,-2", "-2, 1"),
        (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
        (r"(2,\infty)", r"(2, \infty)"),
        (r"x \in [-2,7]", "[-2,7]"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
        (r"90^\circ", "90"),
        (r"864 \mbox{ inches}^2", "864"),
        ("18", r"18\text{ dollars}"),
        ("x=5", "5"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        ("52_8", "52"),  # the base is the question's
        ("4343_6", "4343_7"),  # and is not looked at
    ],
)
def test_equal_answers(gold: str, answer: str) -> None:
    assert box(gold, answer) == RIGHT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "19"),
        ("18", "-18"),
        ("18", "180"),
        ("18", "18 dollars"),  # letters without \text are variables
        (r"\frac{3}{2}", r"\frac{2}{3}"),
        (r"\frac{1}{3}", "0.333"),
        (r"50\%", "5"),
        ("(1,2)", "(2,1)"),
        ("(3,4]", "[3,4]"),
        ("3, 5, 7", "3, 5"),
        ("3", "1, 2, 3, 4"),
        (r"(2,\infty)", "x > 2"),
        (r"\text{Evelyn}", "Navin"),
        (r"\text{(C)}", "D"),
        ("6 - 5i", "6 + 5i"),
    ],
)
def test_other_answers(gold: str, answer: str) -> None:
    assert box(gold, answer) == WRONG


def test_the_last_closed_box_is_the_answer() -> None:
    assert grade("2", r"Not \boxed{1} but \boxed{2}. Then \boxed{3") == RIGHT
    assert grade("1", r"Not \boxed{1} but \boxed{2}") == WRONG
    assert grade("18", r"\boxed{18} and then 19 more words") == RIGHT  # text after a box is not an answer
    assert boxed(r"\boxed {\frac{1}{\sqrt{2}}}!") == r"\frac{1}{\sqrt{2}}"
    assert boxed(r"\fbox{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed(r"\boxed{\left\{ x \right.}") == r"\left\{ x \right"  # braces that are escaped close nothing
    assert boxed("no box") is None
    assert boxed(r"\boxed{") is None


@pytest.mark.parametrize(
    "completion", ["16 - 3 - 4 = 9, times 2.\n#### 18", "The answer is 18.", "That makes $18$", "It is 36/2"]
)
def test_without_a_box_the_final_expression_counts(completion: str) -> None:
    assert grade("18", completion) == RIGHT
    assert grade("17", completion) == WRONG


@pytest.mark.parametrize("completion", ["", "I do not know.", r"\boxed{}", r"so 18, hence \boxed{ }"])
def test_no_answer(completion: str) -> None:
    assert grade("18", completion) == NONE


def test_a_truncated_completion_has_no_answer() -> None:
    assert grade("18", r"\boxed{18} and", "length") == NONE


def test_the_rows_answer_is_what_stands_after_the_solution() -> None:
    assert gold_of("2 * 9 = <<2*9=18>>18\n#### 18") == "18"
    assert gold_of(r"Hence \boxed{\frac12}.") == r"\frac12"
    assert gold_of(r" \frac12 ") == r"\frac12"


@pytest.mark.parametrize("gold", [None, "", "####"])
def test_a_row_without_an_answer_is_refused_before_anything_is_sampled(gold: str | None) -> None:
    with pytest.raises(ValueError, match="prompt 0"):
        grade(gold, "")


def test_an_endless_expression_is_wrong_and_harms_no_later_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The binomial is one call into C, which no signal interrupts."""
    monkeypatch.setattr(bounded.call, "__kwdefaults__", {"seconds": 0.5})
    endless = r"\binom{10^9}{500000000}"
    start = time.perf_counter()
    assert box("7", endless) == WRONG
    assert time.perf_counter() - start < 3
    assert box("7", "7") == RIGHT


def test_a_slow_machine_says_nothing_about_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blank completion in the middle of training must not end the run because the judge had no time."""
    monkeypatch.setattr(bounded.call, "__kwdefaults__", {"seconds": 0.5})
    endless = r"\binom{10^9}{500000000}"
    assert grade(endless, "") == NONE
    assert grade(endless, r"\boxed{7}") == WRONG


def test_an_answer_at_which_the_judge_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise bounded.FailedError("Traceback")

    monkeypatch.setattr(bounded, "call", fail)
    assert box("7", "7") == WRONG
    with pytest.raises(ValueError, match="prompt 0"):  # before sampling: with nothing else to read, it is the row's
        grade("7", "")


def test_any_thread_may_grade() -> None:
    graded: list[float | Grade] = []
    threads = [threading.Thread(target=lambda n=n: graded.append(box("3", str(n)))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded.count(RIGHT) == 1
    assert graded.count(WRONG) == 5


def near_miss(answer: str) -> str | None:
    """The answer with its first number one higher; None without a number."""
    changed = re.sub(r"\d+", lambda digits: str(int(digits[0]) + 1), answer, count=1)
    return changed if changed != answer else None


def value(answer: str) -> str:
    """x = 5 is the answer 5."""
    return answer.rpartition("=")[2].strip()


@pytest.mark.skipif(DATA is None or not Path(DATA).is_dir(), reason="UNDERSTUDY_DATA names no folder of data sets")
@pytest.mark.parametrize(
    ("path", "form", "count", "near"),
    [
        ("gsm8k/test.jsonl", "gsm8k", 1319, 1319),
        ("math500/test.jsonl", "math500", 500, 489),
        ("aime2024/aime2024.jsonl", "aime24", 30, 30),
    ],
)
def test_every_published_answer(path: str, form: str, count: int, near: int) -> None:
    """In a box: each is right for its own problem, wrong with one number changed, wrong for the next problem that has
    another answer."""
    assert DATA is not None
    rows = read_rows(RowsConfig.model_validate({"path": str(Path(DATA) / path), "format": form}))
    golds = [row.values["answer"] for row in rows]
    misses = [(gold, near_miss(gold)) for gold in golds]
    misses = [(gold, miss) for gold, miss in misses if miss is not None]
    others = [next(x for x in golds[i:] + golds if value(x) != value(gold)) for i, gold in enumerate(golds)]
    assert (len(golds), len(misses)) == (count, near)
    assert [gold for gold in golds if box(gold, gold) != RIGHT] == []
    assert [(gold, miss) for gold, miss in misses if box(gold, miss) != WRONG] == []
    assert [(gold, other) for gold, other in zip(golds, others, strict=True) if box(gold, other) != WRONG] == []
