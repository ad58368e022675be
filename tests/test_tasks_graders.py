"""The graders by name, the older ones, and a user's own function."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError, cli
from understudy.tasks import GRADERS, Grade, as_grade, load_grader
from understudy.types import FinishReason, Prompt


def grade(name: str, gold: str | None, completion: str, finish_reason: FinishReason = "stop") -> float | Grade:
    return GRADERS[name](Prompt(0, [1], "?", answer=gold), completion, finish_reason)


def test_a_number_is_a_grade_with_an_answer() -> None:
    assert as_grade(1) == Grade(1.0, True, {})
    assert as_grade(Grade(0.5, False)) == Grade(0.5, False)


def test_the_command_lists_every_grader() -> None:
    text = cli.eval_.__doc__ or ""
    assert [name for name in GRADERS if name not in text] == []


def test_exact_match() -> None:
    assert grade("exact_match", "a b", " a\n b ") == 1.0
    assert grade("exact_match", "a b", "a b c") == 0.0
    assert grade("exact_match", "a b", "a b", "length") == 0.0


def test_last_number() -> None:
    assert grade("last_number", "9 * 2 = 18\n#### 1,018", "so 9, hence 1018.0 eggs") == 1.0
    assert grade("last_number", "18", "18, or 19") == 0.0
    assert grade("last_number", "18", "18", "length") == 0.0
    assert grade("last_number", "-18", "-18") == 1.0
    with pytest.raises(ValueError, match="no number"):
        grade("last_number", "none", "")


@pytest.mark.parametrize("name", ["exact_match", "last_number", "math", "choice", "questions"])
def test_an_answer_is_needed(name: str) -> None:
    with pytest.raises(ValueError, match="prompt 0 has no answer"):
        grade(name, None, "")


@pytest.mark.parametrize(("name", "near"), [("maths", "math"), ("exact", "exact_match"), ("question", "questions")])
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        load_grader(name)


@pytest.mark.parametrize("name", ["my_graders:missing", "my_graders:number", "no_such_module:grade", ":grade", "x:"])
def test_a_function_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_graders.py").write_text("number = 3\ndef short(prompt, completion, reason): return 0.25\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_grader("my_graders:short")(Prompt(0, [1], "?"), "", "stop") == 0.25
    with pytest.raises(ConfigError, match="a function takes"):
        load_grader(name)


@pytest.mark.parametrize("name", ["math", "reasoning_gym"])
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> Any:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(ConfigError, match=r"understudy\[graders\]"):
        grade(name, "18", "")
