"""Two evaluations on the same problems: is the difference more than chance?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.errors import ConfigError
from understudy.evaluation import Outcome, read_outcomes, temperature_name
from understudy.statistics import mean_and_error, sign_flip_p_value, t_interval

# The permutation test draws its random signs from this, so that a comparison can be repeated.
COMPARISON_SEED = 0
_Problems = Mapping[int, Outcome]


@dataclass(frozen=True)
class TaskComparison:
    """B against A on one task at one temperature. ``difference``: mean over problems of B's mean reward minus A's, with
    its standard error and 95% interval. A problem is won where B's mean is higher."""

    task: str
    decoding: str
    num_problems: int
    mean_a: float
    mean_b: float
    difference: float
    difference_se: float
    difference_low: float
    difference_high: float
    p_value: float
    won: int
    lost: int
    tied: int


@dataclass(frozen=True)
class Comparison:
    """The folders compared, and every task at every temperature."""

    a: str
    b: str
    tasks: tuple[TaskComparison, ...]

    def to_json(self) -> dict[str, Any]:
        """What `understudy compare --output` writes."""
        return {"schema_version": 1, **asdict(self)}

    def to_text(self) -> str:
        """For people."""
        return "\n".join(_paragraph(self.a, self.b, task) for task in self.tasks)


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Pair the outcomes that `understudy eval` stored in two folders, problem by problem.

    Raises ConfigError where a folder holds none, where the two differ in tasks, temperatures, graders or problems, or
    where there is a single problem.
    """
    grouped_a, grouped_b = (_grouped(read_outcomes(Path(folder))) for folder in (a, b))
    if grouped_a.keys() != grouped_b.keys():
        only_a, only_b = grouped_a.keys() - grouped_b.keys(), grouped_b.keys() - grouped_a.keys()
        raise _unlike("tasks and temperatures", f"only in {a}: {_names(only_a)}; only in {b}: {_names(only_b)}")
    return Comparison(str(a), str(b), tuple(_compared(grouped_a[key], grouped_b[key]) for key in grouped_a))


def _grouped(outcomes: list[Outcome]) -> dict[tuple[str, float], dict[int, Outcome]]:
    """(task, temperature) -> problems by index."""
    groups: dict[tuple[str, float], dict[int, Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.task, outcome.temperature), {})[outcome.prompt_index] = outcome
    return groups


def _names(keys: set[tuple[str, float]]) -> str:
    return ", ".join(f"{task} {temperature_name(temperature)}" for task, temperature in sorted(keys)) or "none"


def _unlike(what: str, got: str) -> ConfigError:
    return ConfigError(
        f"compare: {what}",
        got=got,
        expected="the same in both",
        remedy="evaluate both students with one file, and change only --student.model and --output_dir",
    )


def _compared(a: _Problems, b: _Problems) -> TaskComparison:
    first = next(iter(a.values()))
    _check_same_problems(first.name, a, b)
    pairs = [(a[index].mean_reward, b[index].mean_reward) for index in a]
    differences = [mean_b - mean_a for mean_a, mean_b in pairs]
    # 1 - 2/3 and 1/3 are the same success.
    differences = [0.0 if math.isclose(*pair, abs_tol=1e-12) else d for pair, d in zip(pairs, differences, strict=True)]
    difference, error = mean_and_error(differences)
    low, high = t_interval(differences)
    won, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return TaskComparison(
        task=first.task,
        decoding=temperature_name(first.temperature),
        num_problems=len(pairs),
        mean_a=mean_and_error([mean_a for mean_a, _ in pairs])[0],
        mean_b=mean_and_error([mean_b for _, mean_b in pairs])[0],
        difference=difference,
        difference_se=error,
        difference_low=low,
        difference_high=high,
        p_value=sign_flip_p_value(differences, seed=COMPARISON_SEED),
        won=won,
        lost=lost,
        tied=len(pairs) - won - lost,
    )


def _check_same_problems(name: str, a: _Problems, b: _Problems) -> None:
    """Pairs must be pairs: the same rows with the same texts and answers, graded by the same rule."""
    if a.keys() != b.keys():
        raise _unlike(f"{name}, problems", f"{len(a)} and {len(b)}, of which {len(a.keys() & b.keys())} in both")
    for index, one in a.items():
        other = b[index]
        for what in ("grader", "prompt_text", "answer"):
            if getattr(one, what) != getattr(other, what):
                got = f"{_short(getattr(one, what))} and {_short(getattr(other, what))}"
                raise _unlike(f"{name}, {what} of problem {index}", got)
    if len(a) < 2:
        raise ConfigError(
            f"compare: {name}",
            got="one problem",
            expected="at least two, which show how much the difference varies",
            remedy="evaluate on more problems",
        )


def _short(value: str | None) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _paragraph(a: str, b: str, task: TaskComparison) -> str:
    width = max(len(a), len(b), len("difference"))
    p_value = f"p = {task.p_value:.4f}" if task.p_value >= 1e-4 else "p < 0.0001"
    interval = f"95% interval {task.difference_low:+.4f} to {task.difference_high:+.4f}"
    return (
        f"{task.task} {task.decoding}: {task.num_problems} problems\n"
        f"  {a:<{width}}   {task.mean_a:.4f}\n"
        f"  {b:<{width}}   {task.mean_b:.4f}\n"
        f"  {'difference':<{width}}  {task.difference:+.4f} ± {task.difference_se:.4f}, {interval}, {p_value}\n"
        f"  {'problems':<{width}}   {task.won} won, {task.lost} lost, {task.tied} tied"
    )
