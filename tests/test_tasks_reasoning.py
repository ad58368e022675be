"""reasoning-gym: the same problems every time, marked by their own generator."""

from __future__ import annotations

from typing import Any

import pytest

from understudy import ConfigError
from understudy.config import RowsConfig
from understudy.rows import Row, read_rows
from understudy.tasks import GRADERS, Grade, as_grade, bounded
from understudy.types import FinishReason, Prompt

pytest.importorskip("reasoning_gym", reason="the `graders` extra is not installed")


def made(generator: str, **keys: Any) -> list[Row]:
    return read_rows(RowsConfig.model_validate({"path": f"reasoning_gym:{generator}", **keys}))


def grade(row: Row, completion: str, finish_reason: FinishReason = "stop") -> Grade:
    prompt = Prompt(row.index, [1], "?", metadata=row.values)
    return as_grade(GRADERS["reasoning_gym"](prompt, completion, finish_reason))


def test_rows_are_questions_with_the_generators_entry() -> None:
    rows = made("leg_counting", options={"size": 3, "seed": 7, "max_animals": 4})
    entries = [row.values["reasoning_gym"]["entry"] for row in rows]
    asked = [f"{entry['question']}\n\nPut the final answer between <answer> and </answer>." for entry in entries]
    assert [row.values["messages"] for row in rows] == [[{"role": "user", "content": text}] for text in asked]
    assert [row.values["answer"] for row in rows] == [entry["answer"] for entry in entries]
    assert [row.where for row in rows] == [f"reasoning_gym:leg_counting[{i}]" for i in range(3)]
    assert all(entry["metadata"]["num_animals"] <= 4 for entry in entries)
    assert made("leg_counting", chat=False)[0].values["prompt"].endswith("</answer>.")


def test_problems_are_a_function_of_the_options() -> None:
    def values(**options: Any) -> list[Any]:
        return [(row.values["messages"], row.values["answer"]) for row in made("chain_sum", options=options)]

    assert values(size=4) == values(size=4, seed=0)
    assert values(size=4) == values(size=9)[:4]
    assert values(size=4, seed=1) != values(size=4)
    assert len(made("chain_sum")) == 500
    assert len(made("chain_sum", limit=5)) == 5


def test_the_generator_marks_the_answer() -> None:
    [row] = made("leg_counting", options={"size": 1})
    gold = row.values["answer"]
    assert grade(row, f"<answer> {gold} </answer>") == Grade(1.0)
    assert grade(row, gold) == Grade(1.0)
    assert grade(row, f"<answer>1</answer> no, <answer>{gold}</answer>") == Grade(1.0)
    assert grade(row, f"<answer>{gold}</answer> no, <answer>{int(gold) + 1}</answer>").reward == 0.0
    # The generator's own rule for an answer with other text around it: the share of the text that is the answer.
    text = f"I count {gold} legs"
    assert grade(row, text) == Grade(pytest.approx(len(gold) / len(text)))


def test_several_right_answers() -> None:
    """Any arithmetic that reaches the target counts, not the stored one alone."""
    [row] = made("countdown", options={"size": 1, "min_numbers": 2, "max_numbers": 2, "operators": ["+"], "seed": 1})
    one, two = row.values["reasoning_gym"]["entry"]["metadata"]["numbers"]
    assert [grade(row, answer).reward for answer in (f"{one} + {two}", f"{two}+{one}")] == [1.0, 1.0]
    assert grade(row, f"{two}*1").reward < 0.1


def test_no_answer() -> None:
    [row] = made("leg_counting", options={"size": 1})
    for completion in ("", "  ", "<answer> </answer>"):
        assert grade(row, completion) == Grade(0.0, has_answer=False)
    assert grade(row, row.values["answer"], "length") == Grade(0.0, has_answer=False)


@pytest.mark.parametrize("error", [bounded.GaveUpError, bounded.FailedError])
def test_an_answer_that_cannot_be_marked_is_wrong(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = made("leg_counting", options={"size": 1})

    def call(*_: Any) -> None:
        raise error

    monkeypatch.setattr(bounded, "call", call)
    assert grade(row, "8") == Grade(0.0)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt 3 does not come from reasoning_gym"):
        GRADERS["reasoning_gym"](Prompt(3, [1], "?", answer="5"), "", "stop")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("leg_countin", {}, "did you mean leg_counting"),
        ("composite", {}, "generator composite"),
        ("leg_counting", {"max_animal": 3}, "did you mean max_animals"),
        ("leg_counting", {"max_animals": 0}, "options {"),
        ("leg_counting", {"size": "many"}, "options {"),
    ],
)
def test_what_cannot_be_made(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(path, options=options)
