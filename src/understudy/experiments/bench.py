"""The ledger world as experiments use it: problem sets, and each method as one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from understudy.experiments.lab import Lab, Run
from understudy.experiments.worlds import LedgerWorld, ledger_world

# Problem sets of pipeline p are drawn from these seeds + p: no two sets share one.
TRAIN_SEED, TEST_SEED, VALIDATION_SEED = 1000, 2000, 3000
PER_STEP = 64
"""Solutions an optimizer step learns from."""
MAX_TOKENS = 60
"""A solution has 55."""

Problems = Literal["test", "validation"]
T1 = "eval/ledger/t1"
GREEDY = "eval/ledger/greedy"


@dataclass(frozen=True)
class LedgerBench:
    """One pipeline's ledger world. Runs start at its start model unless ``student`` names another; all methods learn
    from ``PER_STEP`` solutions a step, at a constant rate after 5 steps of warm-up."""

    lab: Lab
    world: LedgerWorld

    @classmethod
    def of(cls, lab: Lab, **variant: Any) -> LedgerBench:
        """The pipeline's world, or a variant of it (``ledger_world``)."""
        return cls(lab, ledger_world(lab.cache, lab.pipeline, lab.scale.ledger, **variant))

    @cached_property
    def test(self) -> Path:
        """Held-out problems that results are reported on."""
        return self._problems(self.lab.scale.num_test, TEST_SEED)

    @cached_property
    def validation(self) -> Path:
        """Other held-out problems, for learning rates."""
        return self._problems(self.lab.scale.num_validation, VALIDATION_SEED)

    def prompts(self, n: int) -> Path:
        """``n`` training problems. Sets of different sizes share operations, not start values."""
        return self._problems(n, TRAIN_SEED)

    def _problems(self, n: int, seed: int) -> Path:
        return self.lab.file(self.world.tables.prompt_rows(n, seed + self.lab.pipeline))

    def task(self, problems: Path, temperatures: tuple[float, ...] = (1.0,), samples: int = 1) -> dict[str, Any]:
        """An [[evaluation.tasks]] table; metrics are ``T1`` and ``GREEDY``."""
        return {
            "name": "ledger",
            "path": problems,
            "grader": "ledger",
            "temperatures": temperatures,
            "samples": samples,
        }

    def evaluate(
        self, model: Path, problems: Problems = "test", temperatures: tuple[float, ...] = (0.0, 1.0), samples: int = 1
    ) -> Run:
        """``model`` on the test or the validation problems."""
        path = self.test if problems == "test" else self.validation
        return self.lab.evaluate(model, self.task(path, temperatures, samples), max_completion_tokens=MAX_TOKENS)

    def habits(self, run: Run, temperature: float = 1.0) -> dict[str, float | None]:
        """Recovery and facts in what an evaluation wrote (``Habits``); None: a share of nothing."""
        written = [
            (outcome.prompt_text, completion)
            for outcome in run.outcomes
            if outcome.temperature == temperature
            for completion in outcome.completions
        ]
        habits = self.world.tables.recovery_and_facts(written)
        return {
            "recovery": habits.recovery if habits.num_recoverable else None,
            "facts": habits.facts if habits.num_facts else None,
        }

    def distill(self, rate: float, steps: int, settings: Mapping[str, Any] = {}, **options: Any) -> Run:
        """On-policy distillation from the world's teacher: one solution of each fresh problem, full reverse KL unless
        ``settings`` (dotted keys) say otherwise. ``options``: of ``on_policy``."""
        teacher = {"teacher.model": self.world.teacher, "teacher.dtype": "float32"}
        return self.on_policy("distill", rate, steps, teacher | dict(settings), **options)

    def rl(self, rate: float, steps: int, settings: Mapping[str, Any] = {}, **options: Any) -> Run:
        """Outcome-reward RL: 8 problems x 8, reward 1 for a right final value, centred and scaled by group."""
        outcome = {
            "reward.grader": "ledger",
            "objective.normalize_rewards": True,
            "sampling.group_size": 8,
            "sampling.groups_per_batch": PER_STEP // 8,
        }
        return self.on_policy("rl", rate, steps, outcome | dict(settings), **options)

    def on_policy(
        self,
        method: Literal["distill", "rl"],
        rate: float,
        steps: int,
        settings: Mapping[str, Any],
        *,
        student: Path | None = None,
        prompts: Path | None = None,
        every: int = 0,
        teacher: Any = None,
    ) -> Run:
        """``every``: evaluate on the test problems at temperature 1 before training, and every so many steps; 0: never.
        ``prompts``: absent, as many fresh problems as the run uses. ``teacher``: a ``BroughtTeacher``."""
        sampling = {"group_size": 1, "groups_per_batch": PER_STEP, "max_completion_tokens": MAX_TOKENS}
        sampling |= {k.removeprefix("sampling."): v for k, v in settings.items() if k.startswith("sampling.")}
        tree = self._tree(rate, steps, student, every) | {"sampling": sampling, "objective": {"estimator": "auto"}}
        tree["prompts"] = {"path": prompts or self.prompts(steps * sampling["groups_per_batch"])}
        return self.lab.run(method, tree, settings, teacher=teacher)

    def sft(
        self,
        rate: float,
        steps: int,
        samples: Path,
        settings: Mapping[str, Any] = {},
        *,
        student: Path | None = None,
        every: int = 0,
    ) -> Run:
        """Fine-tuning on ``samples``, ``PER_STEP`` a step; options as of ``on_policy``."""
        tree = self._tree(rate, steps, student, every)
        tree |= {"prompts": {"path": samples}, "supervised": {"batch_size": PER_STEP}}
        return self.lab.run("sft", tree, settings)

    def samples(self, n: int, *, writer: Path | None = None, per_problem: int = 1) -> Run:
        """``writer``'s solutions (absent: the teacher's) at temperature 1 of ``prompts(n)``."""
        tree = {
            "seed": self.lab.pipeline,
            "num_threads": 1,
            "student": {"model": self.world.start},
            "teacher": {"model": writer or self.world.teacher, "dtype": "float32"},
            "prompts": {"path": self.prompts(n)},
            "sampling": {"group_size": per_problem, "max_completion_tokens": MAX_TOKENS},
        }
        return self.lab.run("generate", tree)

    def _tree(self, rate: float, steps: int, student: Path | None, every: int) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "seed": self.lab.pipeline,
            "num_threads": 1,
            "student": {"model": student or self.world.start, "dtype": "float32", "compute_dtype": "float32"},
            "sampling": {"max_completion_tokens": MAX_TOKENS},
            "optim": {"learning_rate": rate, "num_steps": steps, "warmup_steps": 5, "betas": [0.9, 0.98]},
            "checkpoints": {"every": steps, "keep": 1},
            "rollouts": {"per_step": 0},
        }
        if every:
            tree["evaluation"] = {"every": every, "tasks": [self.task(self.test)]}
        return tree
