"""Accuracy and its standard error, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tiny import prompt_of
from understudy import Prompt, Rollout
from understudy.config import EvalTaskConfig, SamplingConfig
from understudy.evaluation import EVALUATION_SEED, EvalTask, evaluate_tasks, temperature_name


class Sampler:
    def __init__(self) -> None:
        self.calls: list[tuple[float, int, int]] = []

    def set_policy_version(self, version: int) -> None: ...

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        self.calls.append((sampling.temperature, sampling.group_size, seed))
        cut = "length" if sampling.temperature else "stop"
        return [[Rollout(p, [p.index], [-0.5], "stop" if p.index else cut, 0, 0)] for p in prompts]


def test_mean_error_and_truncation() -> None:
    """Rewards 0, 1, 1, 1: mean 3/4, sample variance 1/4, standard error sqrt(1/16)."""
    prompts = [prompt_of([1], index) for index in range(4)]
    config = EvalTaskConfig(path="x", name="sums", temperatures=(0.0, 0.6))
    task = EvalTask(config, prompts, lambda p, text, finish: float(text != "0"), SamplingConfig(group_size=1))
    sampler: Any = Sampler()
    metrics = evaluate_tasks(sampler, [task], lambda ids: str(ids[0]))
    assert metrics == {
        "eval/sums/greedy": 0.75,
        "eval/sums/greedy_se": pytest.approx(0.25),
        "eval/sums/greedy_truncated": 0.0,
        "eval/sums/t0.6": 0.75,
        "eval/sums/t0.6_se": pytest.approx(0.25),
        "eval/sums/t0.6_truncated": 0.25,
    }
    assert sampler.calls == [(0.0, 1, EVALUATION_SEED), (0.6, 1, EVALUATION_SEED)]


def test_one_problem_has_no_error() -> None:
    task = EvalTask(
        EvalTaskConfig(path="x", temperatures=(1.0,)), [prompt_of([1], 3)], lambda *_: 1.0, SamplingConfig(group_size=1)
    )
    sampler: Any = Sampler()
    assert evaluate_tasks(sampler, [task], str)["eval/eval/t1_se"] == 0.0


def test_names_of_temperatures() -> None:
    assert [temperature_name(t) for t in (0, 0.0, 1, 1.0, 0.6)] == ["greedy", "greedy", "t1", "t1", "t0.6"]
