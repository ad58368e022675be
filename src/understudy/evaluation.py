"""Accuracy on held-out problems, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.backends.protocols import Sampler
from understudy.config import EvalTaskConfig, SamplingConfig
from understudy.rewards import grade_rollouts
from understudy.rollouts import sample_rollouts
from understudy.tasks import Grader
from understudy.types import Prompt

# Every evaluation of a run draws the same random numbers, so that two checkpoints differ by their weights alone.
EVALUATION_SEED = 20251027


@dataclass(frozen=True)
class EvalTask:
    """Problems ready to be sampled and graded."""

    config: EvalTaskConfig
    prompts: Sequence[Prompt]
    grader: Grader
    sampling: SamplingConfig


def temperature_name(temperature: float) -> str:
    """0 -> "greedy", 1 -> "t1", 0.6 -> "t0.6"."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


def evaluate_tasks(
    sampler: Sampler, tasks: Sequence[EvalTask], decode: Callable[[Sequence[int]], str]
) -> dict[str, float]:
    """eval/<task>/<greedy|t1>: mean reward of one completion per problem; ``_se``: its standard error over problems;
    ``_truncated``: share cut at the cap."""
    metrics: dict[str, float] = {}
    for task in tasks:
        for temperature in task.config.temperatures:
            sampling = task.sampling.model_copy(update={"temperature": temperature})
            groups = sample_rollouts(sampler, task.prompts, sampling, seed=EVALUATION_SEED)
            rollouts = [group[0] for group in groups]
            rewards = grade_rollouts(rollouts, task.grader, decode)
            mean = sum(rewards) / len(rewards)
            variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
            name = f"eval/{task.config.name}/{temperature_name(temperature)}"
            metrics[name] = mean
            metrics[f"{name}_se"] = math.sqrt(variance / len(rewards))
            metrics[f"{name}_truncated"] = sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)
    return metrics
