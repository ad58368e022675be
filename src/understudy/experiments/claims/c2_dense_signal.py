"""C2: the dense signal. A model that RL has made better teaches its own start by distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.experiments.bench import T1, LedgerBench
from understudy.experiments.claim import (
    Finding,
    Record,
    Search,
    searched,
)
from understudy.experiments.lab import Lab, Run

# Share of the teacher's accuracy that counts as having its skill.
LEVEL = 0.95
ON_POLICY: Mapping[str, Mapping[str, Any]] = {
    "distill": {"objective.estimator": "full"},
    "distill-sampled": {"objective.estimator": "sampled"},
    "teacher-free": {"objective.estimator": "sampled", "objective.control": "fixed_negative"},
    "shuffled-teacher": {"objective.estimator": "sampled", "objective.control": "shuffled_teacher"},
}


@dataclass(frozen=True)
class Settings:
    """Optimizer steps, and how often accuracy is looked at."""

    rl_steps: int = 160
    steps: int = 40
    every: int = 5


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems after all of the arm's steps."""
    bench = LedgerBench.of(lab)
    if arm == "rl":
        return searched(lambda rate: _score(bench, bench.rl(rate, settings.rl_steps)))
    # The search of the other arms needs a teacher before RL's own rate is known: its middle rate makes one.
    teacher = bench.rl(3e-4, settings.rl_steps).student
    return searched(lambda rate: _score(bench, _arm(bench, settings, arm, rate, teacher, every=0)))


def _score(bench: LedgerBench, run: Run) -> float:
    return bench.evaluate(run.student, "validation", (1.0,)).metrics[T1]


def _arm(bench: LedgerBench, settings: Settings, arm: str, rate: float, teacher: Path, every: int) -> Run:
    if arm == "sft":
        samples = bench.samples(settings.steps * 64, writer=teacher).samples
        return bench.sft(rate, settings.steps, samples, every=every)
    return bench.distill(rate, settings.steps, {**ON_POLICY[arm], "teacher.model": teacher}, every=every)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """RL from the start; its result as the teacher of the same start."""
    bench = LedgerBench.of(lab)
    rl = bench.rl(rates["rl"], settings.rl_steps, every=settings.every)
    teacher = bench.evaluate(rl.student, "test", (1.0,)).metrics[T1]
    arms = {"rl": rl} | {
        arm: _arm(bench, settings, arm, rates[arm], rl.student, settings.every) for arm in (*ON_POLICY, "sft")
    }
    return {
        "teacher": teacher,
        "start": rl.curve(T1)[0][1],
        "arms": {name: {"accuracy": run.curve(T1), "flops": run.curve("cost/flops")} for name, run in arms.items()},
    }


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c2_dense_signal/README.md."""
    raise NotImplementedError
