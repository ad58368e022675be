"""The routes world: text obeys the sums, the grader is exact, training runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from understudy.types import Prompt
from understudy.worlds import routes

PROMPT = "3 7 2 9 1 4 | 4 1 9 2 7 3 =>"
LEFT, RIGHT = "L 3 0 2 1 2 6", "R 4 5 4 6 3 6"


def test_both_routes_are_running_sums_that_end_in_the_total() -> None:
    # 3, 10, 12, 21, 22, 26 and 4, 5, 14, 16, 23, 26, modulo 10.
    assert routes.solution(PROMPT, "L") == LEFT
    assert routes.solution(PROMPT, "R") == RIGHT
    with pytest.raises(ValueError, match="expected 6 digits"):
        routes.solution("3 7 =>", "L")


def test_prompts_repeat_for_equal_seeds_and_show_the_digits_twice() -> None:
    rows = routes.prompt_rows(50, seed=3)
    assert rows == routes.prompt_rows(50, seed=3)
    assert rows != routes.prompt_rows(50, seed=4)
    for row in rows:
        words = row["prompt"].split()
        assert len(words) == routes.PROMPT_LENGTH
        assert words[:6] == words[7:13][::-1]
        assert row["answer"] == str(sum(map(int, words[:6])) % 10)
        assert routes.solution(row["prompt"], "L").split()[-1] == row["answer"]


def test_grades_are_by_route() -> None:
    prompt = Prompt(0, [0], PROMPT)
    left = routes.grade(prompt, LEFT, "stop")
    assert (left.reward, left.has_answer) == (1.0, True)
    assert left.details == {
        "left": 1.0,
        "right_left": 1.0,
        "right_left_count": 1.0,
        "right_right": 0.0,
        "right_right_count": 0.0,
    }
    assert routes.grade(prompt, RIGHT, "stop").reward == 1.0
    assert routes.grade(prompt, RIGHT, "stop").details["right_right"] == 1.0
    # A wrong sum on the way, though the total is right; the other route's sums; cut off; nothing.
    for text, reason in (("L 3 1 2 1 2 6", "stop"), ("L 4 5 4 6 3 6", "stop"), (LEFT, "length"), ("", "stop")):
        assert routes.grade(prompt, text, reason).reward == 0.0  # type: ignore[arg-type]
    assert not routes.grade(prompt, "", "stop").has_answer


@pytest.mark.parametrize(("role", "share", "slips"), [("teacher", 0.6, (0.08, 0.08)), ("start", 0.5, (0.03, 0.10))])
def test_text_has_the_documented_routes_and_slips(role: routes.Role, share: float, slips: tuple[float, float]) -> None:
    input_ids, prompt_length, loss_mask = next(routes.corpus(5, 8000, role))
    assert input_ids.shape == (8000, routes.PROMPT_LENGTH + routes.COMPLETION_LENGTH)
    assert loss_mask.shape == (8000, routes.COMPLETION_LENGTH)
    completion = input_ids[:, prompt_length:].numpy()
    left = completion[:, 0] == routes.TOKENS.index("L")
    assert left.mean() == pytest.approx(share, abs=0.02)
    assert (completion[:, -1] == routes.TOKENS.index(routes.EOS)).all()
    # A sum follows from the one before it, slipped or not.
    digits = np.where(left[:, None], input_ids[:, :6], input_ids[:, 7:13])
    sums = completion[:, 1:-1]
    before = np.concatenate([np.zeros((8000, 1), dtype=sums.dtype), sums[:, :-1]], axis=1)
    follows = sums == (before + digits) % 10
    for rate, own in zip(slips, (left, ~left), strict=True):
        # A random digit is the right one in a tenth of cases.
        assert 1 - follows[own].mean() == pytest.approx(0.9 * rate, abs=0.006)
    # The teacher learns only sums that follow; the start learns everything.
    if role == "teacher":
        assert follows[loss_mask[:, 1:-1].numpy()].all()
        assert (~loss_mask).float().mean() == pytest.approx(0.08 * 6 / 8, abs=0.003)
    else:
        assert loss_mask.all()


def test_equal_seeds_build_equal_models(tmp_path: Path) -> None:
    recipe = routes.Recipe(hidden_size=8, num_layers=1, steps=2)
    for name in ("one", "two"):
        routes.build(tmp_path / name, role="start", recipe=recipe, seed=3, log=lambda _: None)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
