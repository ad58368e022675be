"""Accuracy, its standard error and what stands beside it, by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tiny import prompt_of
from understudy import ConfigError, Prompt, Rollout, RunError
from understudy.config import EvalTaskConfig, SamplingConfig
from understudy.evaluation import (
    EVALUATION_SEED,
    EvalTask,
    Outcome,
    evaluate_tasks,
    outcome_metrics,
    read_outcomes,
    task_outcomes,
    temperature_name,
    write_outcomes,
)
from understudy.tasks import Grade


class Sampler:
    """Completion ``s`` of prompt ``i`` is the token ``10 i + s``; sampled ones of prompt 0 are cut."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int, int]] = []

    def set_policy_version(self, version: int) -> None: ...

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        self.calls.append((sampling.temperature, sampling.group_size, seed))
        cut = "length" if sampling.temperature else "stop"
        return [
            [
                Rollout(p, [10 * p.index + s], [-0.5], "stop" if p.index else cut, 0, 0)
                for s in range(sampling.group_size)
            ]
            for p in prompts
        ]


def task_of(grade: Callable[[int, int], float | Grade], *, problems: int = 4, **config: Any) -> EvalTask:
    """``grade`` gets the numbers of problem and completion."""
    prompts = [prompt_of([1], index) for index in range(problems)]
    return EvalTask(
        EvalTaskConfig(path="x", name="sums", grader="mine:grade", **config),
        prompts,
        lambda prompt, text, finish: grade(prompt.index, int(text) % 10),
        SamplingConfig(group_size=1),
    )


def decode(ids: Sequence[int]) -> str:
    return str(ids[0])


def evaluated(task: EvalTask) -> dict[str, float]:
    sampler: Any = Sampler()
    return evaluate_tasks(sampler, [task], decode)


def test_mean_error_and_truncation() -> None:
    """Rewards 0, 1, 1, 1: mean 3/4, sample variance 1/4, standard error sqrt(1/16)."""
    task = task_of(lambda problem, _: float(problem > 0), temperatures=(0.0, 0.6))
    sampler: Any = Sampler()
    assert evaluate_tasks(sampler, [task], decode) == {
        "eval/sums/greedy": 0.75,
        "eval/sums/greedy_se": pytest.approx(0.25),
        "eval/sums/greedy_truncated": 0.0,
        "eval/sums/greedy_no_answer": 0.0,
        "eval/sums/t0.6": 0.75,
        "eval/sums/t0.6_se": pytest.approx(0.25),
        "eval/sums/t0.6_truncated": 0.25,
        "eval/sums/t0.6_no_answer": 0.0,
    }
    assert sampler.calls == [(0.0, 1, EVALUATION_SEED), (0.6, 1, EVALUATION_SEED)]


def test_several_samples() -> None:
    """Problem 0: 0 of 5 right, problem 1: 2 of 5, problem 2: 4 of 5; greedy has one completion."""

    def grade(problem: int, sample: int) -> Grade:
        return Grade(1.0 if sample < 2 * problem else 0.0, has_answer=problem > 0 or sample > 0)

    sampler: Any = Sampler()
    metrics = evaluate_tasks(sampler, [task_of(grade, problems=3, samples=5)], decode)
    assert sampler.calls == [(0.0, 1, EVALUATION_SEED), (1.0, 5, EVALUATION_SEED)]
    assert metrics == {
        "eval/sums/greedy": pytest.approx(2 / 3),
        "eval/sums/greedy_se": pytest.approx(1 / 3),
        "eval/sums/greedy_truncated": 0.0,
        "eval/sums/greedy_no_answer": pytest.approx(1 / 3),
        "eval/sums/t1": pytest.approx(0.4),
        "eval/sums/t1_se": pytest.approx(0.4 / math.sqrt(3)),  # of the means 0, 0.4, 0.8
        "eval/sums/t1_truncated": pytest.approx(1 / 3),
        "eval/sums/t1_no_answer": pytest.approx(1 / 15),
        "eval/sums/t1_pass@1": pytest.approx(0.4),
        "eval/sums/t1_pass@2": pytest.approx((0 + 7 / 10 + 1) / 3),  # 3 of 10 pairs miss the two that are right
        "eval/sums/t1_pass@4": pytest.approx(2 / 3),
    }


def test_half_a_reward_is_no_pass() -> None:
    metrics = evaluated(task_of(lambda *_: 0.5, samples=2))
    assert (metrics["eval/sums/t1"], metrics["eval/sums/t1_pass@2"]) == (0.5, 0.0)


def test_details_are_averaged_and_counted_ones_divided() -> None:
    """Followed 0 of 1, 1 of 2, 2 of 3 and 3 of 4 instructions: 6/10, not the mean of the shares. ``words`` is given by
    half of the grades; a count without its detail is a detail."""

    def grade(problem: int, _: int) -> Grade:
        words = {"words": 10.0 * problem} if problem >= 2 else {}
        return Grade(0.0, details={"strict": problem, "strict_count": problem + 1, "line_count": 3.0, **words})

    metrics = evaluated(task_of(grade, temperatures=(0.0,)))
    details = {name.removeprefix("eval/sums/greedy_"): value for name, value in metrics.items() if "greedy_" in name}
    assert details == {
        "se": 0.0,
        "truncated": 0.0,
        "no_answer": 0.0,
        "strict": pytest.approx(0.6),
        "line_count": 3.0,
        "words": 25.0,
    }


def test_nothing_counted_gives_no_share() -> None:
    grade = Grade(1.0, details={"strict": 0.0, "strict_count": 0.0})
    assert "eval/sums/t1_strict" not in evaluated(task_of(lambda *_: grade))


@pytest.mark.parametrize("name", ["se", "truncated", "no_answer", "pass@2"])
def test_details_cannot_replace_what_every_evaluation_reports(name: str) -> None:
    with pytest.raises(RunError, match=rf"mine:grade.* {name};"):
        evaluated(task_of(lambda *_: Grade(1.0, details={name: 1.0}), samples=2))


@pytest.mark.parametrize(
    ("grade", "named"),
    [(float("nan"), "reward = nan"), (Grade(0.0, details={"length": float("inf")}), "length = inf")],
)
def test_numbers_that_are_not_finite_are_refused(grade: float | Grade, named: str) -> None:
    with pytest.raises(RunError, match=f"{named} for a completion of prompt 0"):
        evaluated(task_of(lambda *_: grade))


def test_one_problem_has_no_error() -> None:
    assert evaluated(task_of(lambda *_: 1.0, problems=1))["eval/sums/t1_se"] == 0.0


def test_names_of_temperatures() -> None:
    assert [temperature_name(t) for t in (0, 0.0, 1, 1.0, 0.6)] == ["greedy", "greedy", "t1", "t1", "t0.6"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"samples": 4, "temperatures": (0.0,)}, "samples = 4 needs a temperature above 0"),
        ({"temperatures": ()}, "at least one"),
        ({"temperatures": (1.0, -0.5)}, "none twice or below 0"),
        ({"temperatures": (1.0, 1.0)}, "none twice or below 0"),
        ({"samples": 0}, "samples"),
    ],
)
def test_tasks_that_cannot_work_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        EvalTaskConfig(path="x", **config)


# Outcomes


def outcomes_of(task: EvalTask) -> list[Outcome]:
    sampler: Any = Sampler()
    return task_outcomes(sampler, task, decode)


def test_outcomes_hold_every_completion(tmp_path: Path) -> None:
    task = task_of(lambda problem, s: Grade(float(s), s > 0, {"d": problem}), problems=2, samples=2)
    outcomes = outcomes_of(task)
    assert [(o.temperature, o.prompt_index, len(o.rewards)) for o in outcomes] == [
        (0.0, 0, 1),
        (0.0, 1, 1),
        (1.0, 0, 2),
        (1.0, 1, 2),
    ]
    write_outcomes(tmp_path, outcomes)
    [path] = (tmp_path / "evaluation").iterdir()
    assert path.name == "sums.jsonl"
    prompt = task.prompts[0]
    assert json.loads(path.read_text().splitlines()[2]) == {
        "schema_version": 1,
        "task": "sums",
        "grader": "mine:grade",
        "temperature": 1.0,
        "prompt_index": 0,
        "prompt_text": prompt.text,
        "answer": prompt.answer,
        "completions": ["0", "1"],
        "finish_reasons": ["length", "length"],
        "rewards": [0.0, 1.0],
        "has_answer": [False, True],
        "details": [{"d": 0.0}, {"d": 0.0}],
    }
    assert read_outcomes(tmp_path) == outcomes
    assert outcome_metrics(read_outcomes(tmp_path)) == evaluated(task)


def test_rows_have_the_documented_fields() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.MULTILINE)
    assert [name for name, _ in documented] == ["schema_version", *(field.name for field in fields(Outcome))]
    types = {field.name: str(field.type).replace("FinishReason", "str") for field in fields(Outcome)}
    assert {name: kind.replace("\\|", "|") for name, kind in documented} == {"schema_version": "int"} | types


def test_every_task_has_a_file_whatever_its_name(tmp_path: Path) -> None:
    tasks = [task_of(lambda *_: 1.0, problems=1) for _ in range(3)]
    names = ("maths/aime 2025", "..", "sums")
    outcomes = [
        outcome
        for task, name in zip(tasks, names, strict=True)
        for outcome in outcomes_of(EvalTask(task.config.model_copy(update={"name": name}), *vars_of(task)))
    ]
    write_outcomes(tmp_path, outcomes)
    assert len(list((tmp_path / "evaluation").iterdir())) == 3
    assert {outcome.task for outcome in read_outcomes(tmp_path)} == set(names)


def vars_of(task: EvalTask) -> tuple[Any, ...]:
    return task.prompts, task.grader, task.sampling


def test_texts_with_strange_line_ends_come_back(tmp_path: Path) -> None:
    sampler: Any = Sampler()
    outcomes = task_outcomes(sampler, task_of(lambda *_: 1.0), lambda ids: f"{ids[0] % 10}\u2028\x85\n")
    write_outcomes(tmp_path, outcomes)
    assert read_outcomes(tmp_path) == outcomes


def test_folders_without_outcomes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder without evaluation/\*\.jsonl"):
        read_outcomes(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_outcomes(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1, "task": "x"}', "KeyError"),
        ("{", "JSONDecodeError"),
        ("3", "TypeError"),
    ],
)
def test_files_of_another_form_are_refused(line: str, got: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "sums.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=got):
        read_outcomes(tmp_path)
