"""Accuracy on held-out problems, with standard errors, and what became of each problem.

A grader's details are averaged over the completions whose grade gives them. A detail that comes with another one of its
name and ``_count`` is a share of things counted, not of completions: {"instruction": followed, "instruction_count":
asked} is reported as the sum of the first over the sum of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter

from understudy.backends.protocols import Sampler
from understudy.checkpoints import write_jsonl
from understudy.config import EvalTaskConfig, SamplingConfig
from understudy.errors import ConfigError, RunError
from understudy.json_text import parsed
from understudy.rewards import grades_of
from understudy.rollouts import sample_rollouts
from understudy.statistics import mean_and_error, pass_at_k
from understudy.tasks import Grader
from understudy.types import FinishReason, Prompt, Rollout

# Every evaluation of a run draws the same random numbers, so that two checkpoints differ by their weights alone.
EVALUATION_SEED = 20251027
SCHEMA_VERSION = 1
_FOLDER = "evaluation"


@dataclass(frozen=True)
class EvalTask:
    """Problems ready to be sampled and graded."""

    config: EvalTaskConfig
    prompts: Sequence[Prompt]
    grader: Grader
    sampling: SamplingConfig


@dataclass(frozen=True)
class Outcome:
    """What became of one problem at one temperature. Lists have an entry per completion."""

    task: str
    grader: str
    temperature: float
    prompt_index: int
    prompt_text: str
    answer: str | None
    completions: list[str]
    finish_reasons: list[FinishReason]
    rewards: list[float]
    has_answer: list[bool]
    details: list[dict[str, float]]

    @property
    def name(self) -> str:
        """The metric that this problem is part of."""
        return f"eval/{self.task}/{temperature_name(self.temperature)}"

    @property
    def mean_reward(self) -> float:
        """Over the problem's completions."""
        return sum(self.rewards) / len(self.rewards)

    @property
    def num_passed(self) -> int:
        """Completions with all that a grader of shares could give: a reward of at least 1."""
        return sum(reward >= 1 for reward in self.rewards)


def temperature_name(temperature: float) -> str:
    """0 -> "greedy", 1 -> "t1", 0.6 -> "t0.6"."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


def evaluate_tasks(
    sampler: Sampler, tasks: Sequence[EvalTask], decode: Callable[[Sequence[int]], str]
) -> dict[str, float]:
    """The metrics of ``outcome_metrics`` for all tasks."""
    return outcome_metrics([outcome for task in tasks for outcome in task_outcomes(sampler, task, decode)])


def task_outcomes(sampler: Sampler, task: EvalTask, decode: Callable[[Sequence[int]], str]) -> list[Outcome]:
    """What becomes of every problem, temperature by temperature."""
    outcomes: list[Outcome] = []
    for temperature in task.config.temperatures:
        samples = task.config.samples if temperature > 0 else 1
        sampling = task.sampling.model_copy(update={"temperature": temperature, "group_size": samples})
        groups = sample_rollouts(sampler, task.prompts, sampling, seed=EVALUATION_SEED)
        outcomes += [_outcome(task, temperature, group, decode) for group in groups]
    return outcomes


def _outcome(
    task: EvalTask, temperature: float, group: Sequence[Rollout], decode: Callable[[Sequence[int]], str]
) -> Outcome:
    grades = grades_of(group, task.grader, decode)
    prompt = group[0].prompt
    return Outcome(
        task=task.config.name,
        grader=task.config.grader,
        temperature=temperature,
        prompt_index=prompt.index,
        prompt_text=prompt.text,
        answer=prompt.answer,
        completions=[decode(rollout.completion_ids) for rollout in group],
        finish_reasons=[rollout.finish_reason for rollout in group],
        rewards=[grade.reward for grade in grades],
        has_answer=[grade.has_answer for grade in grades],
        details=[{name: float(value) for name, value in grade.details.items()} for grade in grades],
    )


def outcome_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """eval/<task>/<greedy|t1>: mean reward; ``_se``: its standard error, clustered by problem; ``_truncated``: share
    cut at the cap; ``_no_answer``: share in which the grader found none; ``_pass@k`` where there are several samples;
    ``_<detail>`` for what the grader gives besides.

    Raises RunError for a detail that is called like one of the others.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.name, []).append(outcome)
    metrics: dict[str, float] = {}
    for name, group in groups.items():
        numbers = _numbers(group)
        means = _detail_means([detail for outcome in group for detail in outcome.details])
        details = {f"_{detail}": mean for detail, mean in means.items()}
        if taken := numbers.keys() & details.keys():
            raise RunError(
                f"the grader {group[0].grader} gives details whose names an evaluation has taken, "
                f"{', '.join(name.removeprefix('_') for name in sorted(taken))}; rename them"
            )
        metrics |= {f"{name}{suffix}": value for suffix, value in (numbers | details).items()}
    return metrics


def _numbers(group: Sequence[Outcome]) -> dict[str, float]:
    """What is reported of every task at a temperature, by suffix."""
    mean, error = mean_and_error([outcome.mean_reward for outcome in group])
    reasons = [reason for outcome in group for reason in outcome.finish_reasons]
    answers = [has_answer for outcome in group for has_answer in outcome.has_answer]
    numbers = {
        "": mean,
        "_se": error,
        "_truncated": reasons.count("length") / len(reasons),
        "_no_answer": answers.count(False) / len(answers),
    }
    samples = len(group[0].rewards)
    for k in (2**power for power in range(samples.bit_length()) if samples > 1):
        numbers[f"_pass@{k}"] = sum(pass_at_k(samples, outcome.num_passed, k) for outcome in group) / len(group)
    return numbers


def _detail_means(details: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, over the completions that have it; sum(foo) / sum(foo_count) where a count comes with it."""
    names = dict.fromkeys(name for detail in details for name in detail)
    means = {}
    for name in names:
        count = f"{name}_count"
        if name.endswith("_count") and name.removesuffix("_count") in names:
            continue
        given = [d for d in details if name in d and (count in d or count not in names)]
        total = sum(d.get(count, 1.0) for d in given)
        if total:  # else there was nothing to count
            means[name] = sum(d[name] for d in given) / total
    return means


def write_outcomes(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """evaluation/<task>.jsonl in a run's folder, one row per problem and temperature: docs/evaluation.md."""
    (folder / _FOLDER).mkdir(exist_ok=True)
    tasks: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        tasks.setdefault(outcome.task, []).append({"schema_version": SCHEMA_VERSION, **asdict(outcome)})
    for task, rows in tasks.items():
        write_jsonl(folder / _FOLDER / f"{quote(task, safe=' ')}.jsonl", rows)  # a name may hold a slash


def read_outcomes(folder: Path) -> list[Outcome]:
    """All outcomes of a run's folder. Raises ConfigError where there are none, or not in this version's form."""
    paths = sorted((folder / _FOLDER).glob("*.jsonl"))
    if not paths:
        raise ConfigError(
            f"run {folder}",
            got=f"a folder without {_FOLDER}/*.jsonl" if folder.is_dir() else "no such folder",
            expected="the output_dir of `understudy eval`",
            remedy="understudy eval run.toml --student.model <checkpoint> --output_dir <folder>",
        )
    return [_read(path, line) for path in paths for line in path.read_bytes().split(b"\n") if line]


_OUTCOME = TypeAdapter(Outcome)


def _read(path: Path, line: bytes) -> Outcome:
    try:
        row = parsed(line)
        if row["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {row['schema_version']}")
        if not row["rewards"]:
            raise ValueError("no rewards")
        return _OUTCOME.validate_python({field.name: row[field.name] for field in fields(Outcome)})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"outcomes {path}",
            got=f"{type(error).__name__}: {error}",
            expected=f"rows of schema version {SCHEMA_VERSION}, as `understudy eval` writes them",
            remedy="evaluate again with this version",
        ) from None
